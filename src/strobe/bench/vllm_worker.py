"""vLLM in a process of its own: jobs from one JSON file, a line of JSON for each to another.

    python -m strobe.bench.vllm_worker JOBS RESULTS

Uses nothing of strobe, so that what is measured is vLLM alone. A job that fails is a line that says why,
and the next one runs.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main(jobs: Path, results: Path) -> None:
    """JOBS holds `folder` (a config.json), `options` (of vllm.LLM) and `jobs`: prompts, outputs, runs."""
    spec = json.loads(jobs.read_text(encoding="utf-8"))
    with results.open("a", encoding="utf-8") as out:

        def tell(line: dict[str, Any]) -> None:
            out.write(json.dumps(line) + "\n")
            out.flush()

        start = time.perf_counter()
        import vllm  # type: ignore[import-not-found, unused-ignore]

        llm = vllm.LLM(model=spec["folder"], **spec["options"])
        tell({"start_s": time.perf_counter() - start, "version": vllm.__version__})
        for job in spec["jobs"]:
            tell(result(vllm, llm, job))


def result(vllm: Any, llm: Any, job: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"s": timed(vllm, llm, job)}
    except Exception as error:  # whatever vLLM raises is this job's result
        return {"failed": f"{type(error).__name__}: {error}"}


def timed(vllm: Any, llm: Any, job: dict[str, Any]) -> list[float]:
    """Seconds of each run, after a shorter one that nobody times."""
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]

    def params(most: int) -> list[Any]:
        return [
            vllm.SamplingParams(
                temperature=0, ignore_eos=True, max_tokens=min(output, most), detokenize=False
            )
            for output in job["outputs"]
        ]

    llm.generate(prompts, params(16), use_tqdm=False)
    found, wanted = [], params(1 << 30)
    for _ in range(job["runs"]):
        start = time.perf_counter()
        answers = llm.generate(prompts, wanted, use_tqdm=False)
        found.append(time.perf_counter() - start)
        written = [len(answer.outputs[0].token_ids) for answer in answers]
        if written != job["outputs"]:
            raise RuntimeError(f"wrote {sum(written)} tokens of {sum(job['outputs'])}")
    return found


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
