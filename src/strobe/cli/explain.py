"""`strobe explain`: what each attention kernel says to a shape."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import typer

from strobe import device as devices
from strobe import settings
from strobe.attention import AttentionProblem, Dense, Paged, ladder
from strobe.attention.problem import LARGEST
from strobe.cli import console
from strobe.cli.options import Device, Json
from strobe.errors import KernelRefusedError, ProblemError

_MOST_PAGED_ROWS = 1 << 20
"""Each has a length of its own in the layout, which is kept in memory."""


def explain(
    batch: Annotated[int, typer.Option(help="Rows.")] = 1,
    q_len: Annotated[int, typer.Option(help="Queries of each row.")] = 1024,
    kv_len: Annotated[int | None, typer.Option(help="Keys of each row.", show_default="--q-len")] = None,
    q_heads: Annotated[int, typer.Option(help="Query heads.")] = 32,
    kv_heads: Annotated[
        int | None, typer.Option(help="Key and value heads.", show_default="--q-heads")
    ] = None,
    head_dim: Annotated[int, typer.Option(help="Size of a head.")] = 128,
    dtype: Annotated[str, typer.Option(help="float16, bfloat16, float32 or float64.")] = "bfloat16",
    kv_dtype: Annotated[str | None, typer.Option(help="The cache's dtype.", show_default="--dtype")] = None,
    causal: Annotated[bool, typer.Option("--causal", help="Each query sees the keys up to its own.")] = False,
    window: Annotated[tuple[int, int], typer.Option(help="Keys seen to the left and right; -1 for all.")] = (
        -1,
        -1,
    ),
    softcap: Annotated[float, typer.Option(help="Bound on scores; 0 for none.")] = 0.0,
    page_size: Annotated[int, typer.Option(help="Tokens of a page; 0 for a dense cache.")] = 0,
    device: Device = None,
    arch: Annotated[
        int | None, typer.Option(help="Ask for a GPU of this compute capability times ten (90 for Hopper).")
    ] = None,
    json: Json = False,
) -> None:
    """Show every attention kernel's verdict on a shape, and the one that `auto` takes."""
    kv_len = q_len if kv_len is None else kv_len
    where, arch = _target(device, arch)
    problem = AttentionProblem(
        batch=batch,
        q_len=q_len,
        kv_len=kv_len,
        q_heads=q_heads,
        kv_heads=q_heads if kv_heads is None else kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        kv_dtype=kv_dtype,
        causal=causal,
        window=window,
        softcap=softcap,
        layout=_paged(batch, kv_len, page_size) if page_size else Dense(),
        page_size=page_size,
        device=where,
        arch=arch,
    )
    try:
        chosen = str(ladder.choose(problem))
    except KernelRefusedError:
        chosen = None
    verdicts = ladder.explain(problem)
    if json:
        console.write_json(
            {
                "problem": str(problem),
                "phase": problem.phase,
                "flops": problem.flops(),
                "bytes": problem.bytes(),
                "chosen": chosen,
                "refusals": verdicts,
            }
        )
        return
    console.write(f"{problem}\n")
    intensity = problem.flops() / problem.bytes() if problem.bytes() else 0.0
    console.write(
        f"{problem.phase}: {problem.flops():.3g} FLOP, at least {console.bytes_text(problem.bytes())} "
        f"of memory traffic, {intensity:.1f} FLOP a byte\n\n"
    )
    rows = [
        ["*" if name == chosen else "", name, "; ".join(reasons) or "runs", ladder.RUNGS[name].idea]
        for name, reasons in verdicts.items()
    ]
    console.write_table(["auto", "kernel", "verdict", "idea"], rows)


def _target(device: str | None, arch: int | None) -> tuple[str, int]:
    """The device type and compute capability that the problem is put to."""
    if arch is not None:
        if arch < 0:
            raise ProblemError(f"arch is {arch}; supported: compute capability times ten, as 90; 0 for a CPU")
        return ("cuda", arch) if arch else ("cpu", 0)
    where = devices.resolve(settings.load(device=device).device)
    kind, _, index = where.partition(":")
    return kind, devices.gpu(int(index or 0)).arch if kind == "cuda" else 0


def _paged(batch: int, kv_len: int, page_size: int) -> Paged:
    if page_size < 0:
        raise ProblemError(f"page_size is {page_size}; supported: 1 and up, 0 for a dense cache")
    if not 0 <= batch <= _MOST_PAGED_ROWS or not 0 <= kv_len <= LARGEST:
        given, supported = f"batch {batch}, kv_len {kv_len}", f"up to {_MOST_PAGED_ROWS} and {LARGEST}"
        raise ProblemError(f"{given} with pages; supported: {supported}")
    # one page number stands for all: nothing reads them
    table = np.broadcast_to(np.int32(0), (batch, -(-kv_len // page_size)))
    return Paged(table, np.full(batch, kv_len, np.int32))
