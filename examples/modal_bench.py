"""Run benchmarks/gpu.sh on a GPU rented from Modal, and bring its result files home.

    pip install modal && modal setup
    modal run examples/modal_bench.py --gpu H200
    make results

The files come to benchmarks/results/<gpu>/ (`--out` for another folder). Peers that the image does not
hold can be added to it below; `fa2` and `cudnn` come with torch.
"""

from __future__ import annotations

import subprocess
from pathlib import Path, PurePosixPath

import modal

ROOT = Path(__file__).resolve().parents[1]
REMOTE = PurePosixPath("/strobe")
RESULTS = Path("/tmp/results")  # noqa: S108 - in a container of its own
HOUR = 3600

app = modal.App("strobe-bench")

# the sources go in last: a change to them does not install torch again
image = (
    modal.Image.debian_slim(python_version="3.12")
    .pip_install_from_pyproject(
        str(ROOT / "pyproject.toml"), optional_dependencies=["gpu", "integrations", "plots"]
    )
    .env({"PYTHONPATH": str(REMOTE / "src")})
    .add_local_dir(ROOT / "src", str(REMOTE / "src"), ignore=["**/__pycache__"])
    .add_local_file(ROOT / "benchmarks" / "gpu.sh", str(REMOTE / "benchmarks" / "gpu.sh"))
)


@app.function(image=image, gpu="H200", timeout=HOUR)
def measure(prefill_peers: str, decode_peers: str, commit: str) -> dict[str, bytes]:
    """In the container: every benchmark once. Gives each result file's name and content.

    A step that fails or overruns leaves the others' files, and its name in the log.
    """
    options = {
        "--prefill-peers": prefill_peers,
        "--decode-peers": decode_peers,
        "--out": str(RESULTS),
        "--commit": commit,
    }
    command = ["sh", "benchmarks/gpu.sh", *(word for option in options.items() for word in option)]
    subprocess.run(command, cwd=REMOTE, check=False)
    return {path.name: path.read_bytes() for path in sorted(RESULTS.glob("*.json"))}


@app.local_entrypoint()
def main(gpu: str = "H200", prefill_peers: str = "fa2,cudnn", decode_peers: str = "", out: str = "") -> None:
    """On this machine: rent the GPU, wait, and write the files."""
    folder = Path(out) if out else ROOT / "benchmarks" / "results" / gpu.lower()
    head = ["git", "rev-parse", "--short=12", "HEAD"]
    commit = subprocess.run(head, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    files = measure.with_options(gpu=gpu).remote(prefill_peers, decode_peers, commit)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
        print(folder / name)
