"""What the machine has. Nothing here fails on a machine without a GPU, or without torch.

Peak rates are not listed: `strobe bench` measures them.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from strobe.errors import DeviceError
from strobe.settings import DEVICE_NAME, DEVICE_NAMES

_LIBRARIES = (
    "torch",
    "triton",
    "cuda-bindings",
    "nvidia-cuda-nvrtc",
    "numpy",
    "transformers",
    "tokenizers",
    "safetensors",
)


@dataclass(frozen=True)
class Cpu:
    """The host. `memory` in bytes, 0 where the system does not tell."""

    name: str
    cores: int
    memory: int


@dataclass(frozen=True)
class Gpu:
    """One CUDA device. `arch` is ten times the compute capability; memory, L2 and shared memory in bytes."""

    index: int
    name: str
    arch: int
    sm_count: int
    memory: int
    l2_cache: int
    shared_memory_per_block: int

    @property
    def target(self) -> str:
        """The exact architecture that kernels are compiled for: "sm_90a" on Hopper, "sm_80" on Ampere."""
        return f"sm_{self.arch}{'a' if self.arch >= 90 else ''}"

    @property
    def slug(self) -> str:
        """The name that its results are filed under: "h200", "geforce-rtx-4090"."""
        return "-".join(re.findall(r"[a-z0-9]+", self.name.lower().removeprefix("nvidia")))


@dataclass(frozen=True)
class Machine:
    """The host, its GPUs and the libraries in use; a version is None where the library is absent."""

    system: str
    python: str
    cpu: Cpu
    gpus: tuple[Gpu, ...]
    driver: str | None
    versions: dict[str, str | None]


def has_gpu() -> bool:
    """True where torch can run CUDA kernels."""
    torch = _torch()
    return torch is not None and torch.cuda.is_available()


def resolve(device: str) -> str:
    """The torch device that "auto", "cpu", "cuda" or "cuda:N" stands for.

    Raises:
        DeviceError: another name, or a GPU that this machine does not have.
    """
    if not DEVICE_NAME.fullmatch(device):
        raise DeviceError(f"device {device!r:.60}; supported: {DEVICE_NAMES}")
    if device == "auto":
        return "cuda" if has_gpu() else "cpu"
    if device.startswith("cuda"):
        if not has_gpu():
            raise DeviceError(f"device {device!r}: torch sees no NVIDIA GPU", hint="use 'cpu' or 'auto'")
        index, count = int(device.partition(":")[2] or 0), _torch().cuda.device_count()
        if index >= count:
            raise DeviceError(
                f"device {device!r}: this machine has {count} GPU{'s' * (count > 1)}, from cuda:0"
            )
    return device


@cache
def gpu(index: int = 0) -> Gpu:
    """One GPU's figures, read from torch once.

    Raises:
        DeviceError: there is no such GPU.
    """
    resolve(f"cuda:{index}")
    seen = _torch().cuda.get_device_properties(index)
    return Gpu(
        index=index,
        name=seen.name,
        arch=10 * seen.major + seen.minor,
        sm_count=seen.multi_processor_count,
        memory=seen.total_memory,
        l2_cache=seen.L2_cache_size,
        shared_memory_per_block=seen.shared_memory_per_block_optin,
    )


def machine() -> Machine:
    """This machine, as `strobe env` prints it and benchmark results record it."""
    count = _torch().cuda.device_count() if has_gpu() else 0
    return Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        cpu=Cpu(_cpu_name(), _cores(), _memory()),
        gpus=tuple(gpu(index) for index in range(count)),
        driver=_driver() if count else None,
        versions={name: _version(name) for name in _LIBRARIES},
    )


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        return None
    return torch


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0


def _driver() -> str | None:
    """The NVIDIA kernel driver's version, from /proc (Linux)."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text().splitlines()[0].split()
    except (OSError, IndexError):
        return None
    return next((word for word in words if word[:1].isdigit()), None)
