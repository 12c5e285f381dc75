"""What every CUDA kernel needs of where it is to run, said as a rung's refusals."""

from __future__ import annotations

LEAST = 80
"""Ampere: the first that multiplies bfloat16 and copies to shared memory beside the arithmetic."""


def refusals(device: str, arch: int, least: int = LEAST) -> list[str]:
    """Why a kernel for `least` and up cannot run on this device type and compute capability (times ten)."""
    if device != "cuda":
        return [f"tensors on {device}; needs an NVIDIA GPU"]
    if arch < least:
        return [f"compute capability {arch / 10}; supported: {least / 10} and up"]
    return []
