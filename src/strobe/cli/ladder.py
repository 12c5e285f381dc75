"""`strobe ladder`: each way to compute attention in one table, checked, then timed on this machine."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from strobe.attention import ladder as rungs
from strobe.cli import bench_kernels as shared
from strobe.cli import console
from strobe.cli.options import Device, Json


def ladder(
    seq: Annotated[
        str, typer.Option(help="Queries and keys of each row, as 512 or 4k; keys where it decodes.")
    ] = "1k",
    batch: Annotated[int, typer.Option(help="Rows.")] = 1,
    heads: shared.Heads = 8,
    kv_heads: shared.KvHeads = None,
    head_dim: shared.HeadDim = 64,
    causal: shared.Causal = False,
    decode: Annotated[bool, typer.Option("--decode", help="One query a row against a paged cache.")] = False,
    page_size: Annotated[int, typer.Option(help="Tokens of a page, with --decode.")] = 16,
    dtype: shared.Dtype = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Check and time every kernel that runs here on one shape; say what the others need."""
    from strobe.attention.cases import decode_shape, prefill_shape
    from strobe.bench.attention import measure_all, of_rung, torch_dtype
    from strobe.bench.ceilings import ceilings
    from strobe.bench.results import Result

    where, dtype = shared.target(device, dtype)
    length, kv_heads = shared.length(seq), kv_heads or heads
    if decode:
        case = decode_shape(batch, length, heads, kv_heads, head_dim, page_size)
    else:
        case = prefill_shape(batch, length, heads, kv_heads, head_dim, causal)
    problem = case.inputs(torch_dtype(dtype), where).problem
    ladder_rungs = rungs.DECODE if decode else rungs.PREFILL
    bar, task = console.progress(len(ladder_rungs), "kernels")
    rows: dict[str, dict[str, Any]] = {}
    with bar:
        for rung in ladder_rungs:
            for row in measure_all([case], [of_rung(rung)], dtype, where):
                rows[rung.name] = row
            bar.advance(task)
    roof = ceilings(where, dtype)
    if json:
        refused = {rung.name: reasons for rung in ladder_rungs if (reasons := rung.refusals(problem))}
        result = Result.here("ladder", list(rows.values()), ceilings=roof.as_dict())
        console.write_json({**result.__dict__, "refused": refused})
        return
    console.write(
        f"{problem}\nceiling: {roof.matmul_tflops:.4g} TFLOP/s matmul, {roof.read_gbps:.4g} GB/s read\n\n"
    )
    unit = "GB/s" if decode else "TFLOP/s"
    table, before = [], None
    for rung in ladder_rungs:
        if rung.name not in rows:
            table.append([rung.name, rung.idea, "–", "–", "–", "–", "; ".join(rung.refusals(problem))])
            continue
        row = rows[rung.name]
        if not row["checked"]:
            table.append([rung.name, rung.idea, "–", "–", "–", "–", f"WRONG: error {row['error']:.3g}"])
            continue
        speed = row["gbps"] if decode else row["tflops"]
        share = speed / (roof.read_gbps if decode else roof.matmul_tflops)
        peak = "–" if row["peak_bytes"] is None else console.bytes_text(row["peak_bytes"])
        over = "" if before is None else f"{before / row['ms']:.2f}x"
        table.append([rung.name, rung.idea, f"{row['ms']:.4g}", f"{speed:.4g}", f"{share:.1%}", peak, over])
        before = row["ms"]
    last = "over the one before, or why not"
    console.write_table(["kernel", "idea", "ms", unit, "% of ceiling", "extra memory", last], table)
