"""`strobe env`: the machine, the libraries, and every setting with its source."""

from __future__ import annotations

from dataclasses import asdict

from strobe import __version__, device, settings
from strobe.cli import console
from strobe.cli.options import Json


def env(json: Json = False) -> None:
    """Show the machine, the versions in use, and each setting with where it came from."""
    machine, rows = device.machine(), settings.load().rows()
    if json:
        console.write_json({"strobe": __version__, **asdict(machine), "settings": rows})
        return
    cpu = f"{machine.cpu.name}, {machine.cpu.cores} cores, {console.bytes_text(machine.cpu.memory)}"
    facts = [["system", machine.system], ["python", machine.python], ["cpu", cpu]]
    facts += [[f"cuda:{gpu.index}", _gpu_text(gpu)] for gpu in machine.gpus]
    facts += [["gpu driver", machine.driver or "none"]]
    console.write_table(["", ""], facts)
    versions = [["strobe", __version__], *([n, v or "not installed"] for n, v in machine.versions.items())]
    console.write("\n")
    console.write_table(["library", "version"], versions)
    console.write("\n")
    columns = ["variable", "value", "source", "doc"]
    console.write_table(columns, [[row[column] for column in columns] for row in rows])


def _gpu_text(gpu: device.Gpu) -> str:
    memory, l2, shared = (
        console.bytes_text(size) for size in (gpu.memory, gpu.l2_cache, gpu.shared_memory_per_block)
    )
    return f"{gpu.name}, {gpu.target}, {gpu.sm_count} SMs, {memory}, L2 {l2}, shared memory {shared} a block"
