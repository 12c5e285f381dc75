"""Each table that the documents show: its result file, and how it is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from strobe.attention import ladder
from strobe.attention.cases import DECODE_BENCH, LADDER_SHAPES
from strobe.attention.problem import AttentionProblem, Dense, Paged
from strobe.bench import engine_tables, tables
from strobe.bench.attention import described
from strobe.bench.decode import EXTRA
from strobe.bench.results import Result, Row


def _prefill(result: Result) -> str:
    return (
        "TFLOP/s, forward, "
        + _dtype(result)
        + ":\n\n"
        + tables.by_provider(_peered(result.rows), tables.speed("tflops"), best="tflops")
    )


def _us(row: Row) -> str:
    return tables.number(row["ms"] * 1e3) if row["checked"] else "WRONG"


def _small(result: Result) -> str:
    fastest = [{**row, "speed": 1 / row["ms"]} if "ms" in row else row for row in _peered(result.rows)]
    table = tables.by_provider(fastest, _us, best="speed")
    return f"Microseconds a call by CUDA-graph replay, {_dtype(result)}:\n\n{table}"


def _host(result: Result) -> str:
    fastest = [{**row, "speed": 1 / row["host_us"]} for row in result.rows]
    table = tables.by_provider(fastest, lambda row: tables.number(row["host_us"]), best="speed")
    return f"Microseconds until a call returns, {_dtype(result)}:\n\n{table}"


def _decode(result: Result) -> str:
    """What `auto` takes beside the peers."""
    rows = _standard_decode(result)
    table = _beside_peers(result, rows)
    if not any(row["provider"].endswith(" settled") for row in rows):
        return table
    return f"`settled`: as the engine runs it, a launch starts beside the end of the one ahead.\n\n{table}"


def _decode_dense(result: Result) -> str:
    return _beside_peers(result, list(result.rows))


def _beside_peers(result: Result, rows: list[Row]) -> str:
    ours = {
        (tables.case_name(row["case"]), row["provider"]): {**row, "provider": provider}
        for settled, provider in ((True, "strobe, settled"), (False, "strobe"))
        for row in rows
        if row["provider"] == f"strobe:{_taken(rows, row['case'], settled)}" + " settled" * settled
    }
    return _microseconds(
        result, [*ours.values(), *(row for row in rows if not row["provider"].startswith("strobe:"))]
    )


def _taken(rows: list[Row], case: dict[str, Any], settled: bool) -> str:
    """Of the rungs that have a row for this case, the one that `auto` takes."""
    named = ("batch", "q_len", "kv_len", "q_heads", "kv_heads", "head_dim", "dtype", "page_size")
    sizes = {name: case[name] for name in named if name in case}
    layout = Paged(None, None, settled=settled) if "page_size" in case else Dense()
    problem = AttentionProblem(layout=layout, device="cuda", **sizes)
    measured = {row["provider"] for row in rows if row["case"] == case}
    rungs = (ladder.RUNGS[name] for name in ladder.FASTEST_FIRST["decode"])
    return next(r.name for r in rungs if f"strobe:{r.name}" in measured and r.suits(problem))


def _decode_ladder(result: Result) -> str:
    order = [f"strobe:{rung.name}" for rung in ladder.DECODE]
    ours = [row for row in _standard_decode(result) if row["provider"] in order]
    return _microseconds(result, sorted(ours, key=lambda row: order.index(row["provider"])))


def _standard_decode(result: Result) -> list[Row]:
    """Attention's rows of the standard shapes; the others are in the figure."""
    names = {
        tables.case_name(described(case, dtype))
        for case in (*DECODE_BENCH, *EXTRA)
        for dtype in {row["case"]["dtype"] for row in result.rows}
    }
    return [row for row in result.rows if tables.case_name(row["case"]) in names]


def _microseconds(result: Result, rows: list[Row]) -> str:
    roof = result.machine["ceilings"]["read_gbps"]

    def cell(row: Row) -> str:
        return f"{row['ms'] * 1e3:.4g} ({row['gbps'] / roof:.0%})" if row["checked"] else "WRONG"

    fastest = [{**row, "speed": 1 / row["ms"]} if "ms" in row else row for row in rows]
    table = tables.by_provider(fastest, cell, best="speed")
    about = f"Microseconds a call, and the share of the read ceiling ({roof:.4g} GB/s)"
    return f"{about}, {_dtype(result)}:\n\n{table}"


def _append(result: Result) -> str:
    return _microseconds(result, list(result.rows))


def _ladder(result: Result) -> str:
    roof = result.machine["ceilings"]["matmul_tflops"]
    parts = []
    for shape in LADDER_SHAPES:
        case = tables.case_name(described(shape, _dtype(result)))
        rows = {row["provider"]: row for row in result.rows if tables.case_name(row["case"]) == case}
        if not rows:
            continue
        lines, before = [], None
        for rung in ladder.PREFILL:
            row = rows.get(f"strobe:{rung.name}")
            if row is None or "ms" not in row:
                continue
            over = "" if before is None else f"{before / row['ms']:.2f}"
            share = f"{row['tflops'] / roof:.1%}"
            cells = [f"{row['ms']:.4g}", f"{row['tflops']:.4g}", share, tables.memory(row), over]
            lines.append([f"`{rung.name}`", rung.idea, *cells])
            before = row["ms"]
        head = ["rung", "idea", "ms", "TFLOP/s", "of the matmul ceiling", "extra MiB", "times the one before"]
        parts.append(f"{case[0].upper()}{case[1:]}, {_dtype(result)}:\n\n{tables.markdown(head, lines)}")
    return "\n".join(parts)


def _standard(result: Result) -> str:
    time = tables.by_provider(result.rows, tables.speed("ms"))
    memory = tables.by_provider(result.rows, tables.memory)
    return f"Milliseconds, {_dtype(result)}:\n\n{time}\nExtra memory, MiB:\n\n{memory}"


def _memory(result: Result) -> str:
    return "MiB beyond inputs and output:\n\n" + tables.by_provider(result.rows, tables.memory)


def _linear(result: Result) -> str:
    ceilings = result.machine["ceilings"]
    lines = []
    for row in (row for row in result.rows if "tokens" in row["case"]):
        case, name = row["case"], f"`{row['provider'].removeprefix('strobe:')}`"
        shape = f"{case['tokens']} x {case['inputs']} → {case['outputs']}"
        if "ms" not in row:
            lines.append([shape, name, "WRONG", "", "", ""])
            continue
        roof = min(ceilings["matmul_tflops"], ceilings["read_gbps"] * row["intensity"] * 1e-3)
        figures = (tables.number(row[field]) for field in ("ms", "tflops", "gbps"))
        lines.append([shape, name, *figures, f"{row['tflops'] / roof:.1%}"])
    head = ["tokens x inputs → outputs", "rung", "ms", "TFLOP/s", "GB/s", "of the roof"]
    return f"{ceilings['dtype']}:\n\n{tables.markdown(head, lines)}"


def _latency(result: Result) -> str:
    def line(row: Row) -> list[str]:
        names = ("ttft_ms", "tpot_ms", "tpot_ms_p50", "tpot_ms_p99", "tok_s", "gbps")
        return [row["case"]["model"], row["provider"], *(tables.number(row[name]) for name in names)]

    case = result.rows[0]["case"]
    head = ["model", "", "first token, ms", "between tokens, ms", "p50", "p99", "tok/s", "GB/s"]
    about = f"One request, prompt {case['prompt']}, output {case['output']}, {_dtype(result)}"
    return f"{about}:\n\n{tables.markdown(head, [line(row) for row in result.rows])}"


def _throughput(result: Result) -> str:
    case = result.rows[0]["case"]
    (p_low, p_high), (o_low, o_high) = case["prompt"], case["output"]
    about = f"{case['requests']} requests, prompts {p_low} to {p_high}, outputs {o_low} to {o_high}"
    lines = []
    for row in result.rows:
        figures = [tables.number(row[name]) for name in ("tok_s", "gbps")]
        lines.append([row["case"]["model"], row["provider"], *figures, str(row.get("best_batch", "–"))])
    head = ["model", "", "output tok/s", "GB/s", "best batch size"]
    return f"{about}, {_dtype(result)}:\n\n{tables.markdown(head, lines)}"


def _engine_ladder(result: Result) -> str:
    lines, before = [], None
    for row in result.rows:
        name = row["provider"].removeprefix("strobe:")
        peer = "linear_kernel" not in row
        kernels = ["–", "–"] if peer else [f"`{row[f'{kind}_kernel']}`" for kind in ("attention", "linear")]
        if "tok_s" not in row:
            why = next((why for why in ("refused", "failed") if why in row), "WRONG")
            lines.append([name, *kernels, "–", "–", why, "", ""])
            continue
        over = "" if before is None or peer else f"{row['tok_s'] / before:.2f}"
        figures = [tables.number(row[field]) for field in ("ttft_ms", "tok_s", "gbps")]
        figures.append(f"{row['floor_percent']:.0f} %" if "floor_percent" in row else "–")
        lines.append([name, *kernels, *figures, over])
        before = row["tok_s"]
    case = result.rows[0]["case"]
    named = engine_tables.model_name(result.rows[0])
    about = f"{named}, one request, prompt {case['prompt']}, output {case['output']}, {case['dtype']}"
    head = [
        "engine",
        "attention",
        "matmul",
        "first token, ms",
        "tok/s",
        "GB/s",
        "of the floor",
        "times the one before",
    ]
    return f"{about}:\n\n{tables.markdown(head, lines)}"


def _engine(result: Result) -> str:
    about = "Random weights of published shapes, greedy, every engine given the same token ids"
    return f"{about}, {_dtype(result)}:\n\n{engine_tables.table(result.rows)}"


def _verify(result: Result) -> str:
    lines = []
    for row in result.rows:
        apart = [abs(each["transformers_logprob"] - each["strobe_logprob"]) for each in row["differences"]]
        lines.append(
            [
                row["model"],
                f"{row['logit_difference']:.2g} of {row['largest_logit']:.3g}",
                f"{row['same_choice']} of {row['positions']}",
                f"{row['greedy_equal']} of {row['greedy_tokens']}",
                f"{max(apart):.2g}" if apart else "–",
                "yes" if row["checked"] else "NO",
            ]
        )
    head = [
        "shape",
        "largest logit difference",
        "same likeliest token",
        "greedy tokens equal",
        "log-probabilities apart where they part",
        "agrees",
    ]
    about = "Random weights, strobe beside transformers on the same memory"
    return f"{about}, {_dtype(result)}:\n\n{tables.markdown(head, lines)}"


def _kernels(result: Result) -> str:
    lines = [
        [
            f"`{row['case']['source']}`",
            str(row["case"]["variants"]),
            *(f"{row[field]:.3g}" for field in ("compile_s", "load_ms", "load_ms_median")),
        ]
        for row in result.rows
    ]
    where = "onto the GPU" if all(row["on_gpu"] for row in result.rows) else "into memory"
    head = [
        "source",
        "variants",
        "compile, s, the longest",
        f"load {where}, ms, the longest",
        "the middle one",
    ]
    return f"For {result.rows[0]['case']['arch']}:\n\n{tables.markdown(head, lines)}"


def _first_use(result: Result) -> str:
    lines = [
        [f"`{row['case']['rung']}`", f"{row['first_s']:.3g}", f"{row['later_ms']:.3g}"]
        for row in result.rows
        if row["checked"]
    ]
    head = ["rung", "first call, s", "in a new process, ms"]
    return f"For {result.rows[0]['case']['arch']}:\n\n{tables.markdown(head, lines)}"


def _startup(result: Result) -> str:
    fields = ("import_s", "network_s", "engine_s", "first_token_s", "total_s")
    lines = [
        [engine_tables.model_name(row), row["case"]["cache"], *(f"{row[field]:.3g}" for field in fields)]
        for row in result.rows
    ]
    head = ["model", "kernel cache", "import, s", "weights", "engine", "first token", "in all"]
    return f"{_dtype(result)}:\n\n{tables.markdown(head, lines)}"


def _dtype(result: Result) -> str:
    return ", ".join(sorted({row["case"]["dtype"] for row in result.rows}))


def _peered(rows: list[Row]) -> list[Row]:
    """Peers, and strobe's kernels that are measured against them: the production rungs."""
    production = ("cuda_hopper", "cuda_async", "triton_fused", "cuda_paged", "cuda_paged settled")
    return [
        row
        for row in rows
        if not row["provider"].startswith("strobe:") or row["provider"].removeprefix("strobe:") in production
    ]


TABLES: dict[str, tuple[str, Callable[[Result], str]]] = {
    "prefill": ("prefill", _prefill),
    "small": ("small", _small),
    "host": ("host", _host),
    "decode": ("decode", _decode),
    "decode_ladder": ("decode", _decode_ladder),
    "decode_dense": ("decode_dense", _decode_dense),
    "append": ("append", _append),
    "ladder": ("ladder", _ladder),
    "standard": ("ladder", _standard),
    "memory": ("memory", _memory),
    "linear": ("roofline", _linear),
    "latency": ("latency", _latency),
    "throughput": ("throughput", _throughput),
    "engine_ladder": ("engine_ladder", _engine_ladder),
    "engine": ("engine", _engine),
    "verify": ("verify", _verify),
    "kernels": ("kernels", _kernels),
    "first_use": ("kernels", _first_use),
    "startup": ("startup", _startup),
}
"""By name: the result file, and what is made of it."""
