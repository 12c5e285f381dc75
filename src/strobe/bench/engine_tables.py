"""The engine's rows as tables: every case down, each engine with its speed and its share of the floor."""

from __future__ import annotations

from collections.abc import Sequence

from strobe.bench import tables
from strobe.bench.results import Row

HEAD = [
    "model",
    "case",
    "engine",
    "first token, ms",
    "ms a token",
    "tok/s",
    "GB/s",
    "of the floor",
    "times vLLM",
]

FIGURES = ("ttft_ms", "tpot_ms", "tok_s", "gbps")


def table(rows: Sequence[Row]) -> str:
    """A line a row; beside strobe's, its tok/s over that of the faster of vLLM's two modes."""
    best: dict[str, float] = {}
    for row in rows:
        if row["provider"].startswith("vllm") and "tok_s" in row:
            best[_key(row)] = max(best.get(_key(row), 0.0), row["tok_s"])
    lines, shown = [], None
    for row in rows:
        model, case = model_name(row), case_name(row)
        figures = ["–" if name not in row else tables.number(row[name]) for name in FIGURES]
        if row["checked"] is False:
            figures = ["WRONG", "", "", ""]
        elif "failed" in row:
            figures = ["failed", "", "", ""]
        share = f"{row['floor_percent']:.0f} %" if "floor_percent" in row else "–"
        over = ""
        if row["provider"] == "strobe" and "tok_s" in row and _key(row) in best:
            over = f"{row['tok_s'] / best[_key(row)]:.2f}"
        lines.append([model if model != shown else "", case, row["provider"], *figures, share, over])
        shown = model
    return tables.markdown(HEAD, lines)


def line(row: Row) -> str:
    """One row for a terminal, as it comes."""
    told = f"{model_name(row)}, {case_name(row)}, {row['provider']}: "
    if "tok_s" not in row:
        return told + (f"failed: {row['failed']}" if "failed" in row else "WRONG")
    told += f"{tables.number(row['tok_s'])} tok/s"
    if "tpot_ms" in row:
        told += f", {row['tpot_ms']:.4g} ms a token, first after {row['ttft_ms']:.4g} ms"
    return told + (f", {row['floor_percent']:.0f} % of the floor" if "floor_percent" in row else "")


def case_name(row: Row) -> str:
    """ "batch 8, prompt 128, output 256", or "512 requests, prompts 100 to 1024, outputs 100 to 1024"."""
    case = row["case"]
    if "requests" in case:
        (p_low, p_high), (o_low, o_high) = case["prompt"], case["output"]
        return f"{case['requests']} requests, prompts {p_low} to {p_high}, outputs {o_low} to {o_high}"
    return f"batch {case['batch']}, prompt {case['prompt']}, output {case['output']}"


def model_name(row: Row) -> str:
    """ "llama3-8b (random weights)"."""
    case = row["case"]
    return case["model"] + (f" ({case['weights']} weights)" if "weights" in case else "")


def _key(row: Row) -> str:
    return f"{row['case']['model']}: {case_name(row)}"
