"""What the engine's benchmarks run: a network in an engine, from a checkpoint or with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from strobe.checkpoints.load import DTYPES, load
from strobe.checkpoints.tokenizer import Tokenizer
from strobe.engine import Engine, EngineConfig
from strobe.engine.memory import GIB, free_memory
from strobe.errors import DeviceError, StrobeError, UnknownNameError
from strobe.models import shapes
from strobe.models.network import Model


@dataclass(frozen=True, eq=False)
class Subject:
    """`folder` is the checkpoint; None where the weights are random, of a published shape called `name`."""

    name: str
    engine: Engine
    folder: Path | None = None
    tokenizer: Tokenizer | None = None

    @property
    def model(self) -> Model:
        return self.engine.model

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    def case(self, **sizes: Any) -> dict[str, Any]:
        """How result rows name what was run; random weights are said to be."""
        weights = {} if self.folder is not None else {"weights": "random"}
        return {"model": self.name, **weights, **sizes, "dtype": self.dtype}


def subject(
    model: str | Path | None,
    shape: str | None,
    *,
    device: str,
    dtype: str = "auto",
    config: EngineConfig | None = None,
) -> Subject:
    """An engine on a checkpoint (None: the bundled model), or on random weights of `shape` where given.

    Raises:
        StrobeError: both are given.
        CheckpointError, DeviceError, SettingsError, UnknownNameError: it cannot be had.
    """
    network, tokenizer, name, folder = find_network(model, shape, device=device, dtype=dtype)
    return Subject(name, Engine(network, tokenizer, config or EngineConfig()), folder, tokenizer)


def find_network(
    model: str | Path | None, shape: str | None, *, device: str, dtype: str = "auto"
) -> tuple[Model, Tokenizer | None, str, Path | None]:
    """A network, its tokenizer, its name and its folder; of random weights the first and the third only.

    Raises:
        As `subject`.
    """
    if shape is None:
        found = load(model, device=device, dtype=dtype)
        return found.model, found.tokenizer, found.name, found.path
    if model is not None:
        raise StrobeError("--model and --random are both given", hint="give one of them")
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    if dtype not in DTYPES:
        raise UnknownNameError.among("dtype", dtype, ["auto", *DTYPES])
    return random_model(shape, device, DTYPES[dtype]), None, shape, None


def random_model(shape: str, device: str, dtype: torch.dtype) -> Model:
    """A published shape with random weights.

    Raises:
        UnknownNameError: no such shape.
        DeviceError: its weights do not fit the device's free memory.
    """
    config = shapes.named(shape)
    needed, free = shapes.weight_bytes(config, dtype), free_memory(torch.device(device))
    if needed > free:
        raise DeviceError(
            f"{shape} takes {needed / GIB:.1f} GiB in {str(dtype).removeprefix('torch.')}; "
            f"{free / GIB:.1f} GiB are free on {device}",
            hint=f"shapes: {', '.join(shapes.SHAPES)}",
        )
    return shapes.random_model(config, device=device, dtype=dtype)
