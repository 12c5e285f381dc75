"""`load()`: find a checkpoint, describe it, fill a network with its weights."""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from strobe import device as devices
from strobe.checkpoints import hub, huggingface, llama2c, meta
from strobe.checkpoints.checkpoint import Checkpoint
from strobe.checkpoints.source import Source
from strobe.checkpoints.weights import Progress, halve_rotation_pairs, load_weights
from strobe.errors import CheckpointError
from strobe.models.llama import LlamaWeights
from strobe.models.network import build

_log = logging.getLogger(__name__)

BUNDLED = Path(__file__).parent.parent / "assets" / "strobe-tiny"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    model: str | Path | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    progress: Progress | None = None,
) -> Checkpoint:
    """A checkpoint, its weights on `device` in `dtype`.

    Args:
        model: a Hugging Face folder, a Meta folder, a llama2.c .bin file or a hub name; None for the
            bundled model.
        device: "auto" takes the GPU where there is one.
        dtype: "auto" takes what the weights are stored in on a GPU, float32 on a CPU.
        progress: told of (bytes in place, bytes in all) while the weights are copied.

    Raises:
        CheckpointError, TokenizerError: what is missing, broken or not supported, by file.
        DeviceError: the device is not there, or has no room for the weights.
    """
    target = torch.device(devices.resolve(str(device)))
    path = _locate(model)
    try:
        source = _format(path).read(path)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    chosen = _dtype(dtype, source.dtype if target.type == "cuda" else torch.float32)
    start = time.perf_counter()
    weights = load_weights(source.config, source.files, device=target, dtype=chosen, progress=progress)
    _log.info("loaded %s in %s on %s in %.1f s", path, chosen, target, time.perf_counter() - start)
    if source.neighbour_pairs and isinstance(weights, LlamaWeights):
        halve_rotation_pairs(source.config, weights)
    config, tokenizer = source.config, source.tokenizer
    if tokenizer is not None and not config.eos_token_ids:
        config = replace(config, eos_token_ids=tokenizer.stop_ids)
    if tokenizer is not None and config.bos_token_id is None:
        config = replace(config, bos_token_id=tokenizer.bos_id)
    return Checkpoint(
        name=model if isinstance(model, str) and hub.is_name(model) else path.resolve().name,
        path=path,
        config=config,
        model=build(config, weights),
        tokenizer=tokenizer,
        defaults=source.defaults,
    )


def _locate(model: str | Path | None) -> Path:
    if model is None:
        return BUNDLED
    # no such user, a name too long, a folder that may not be searched, what is no path at all
    with contextlib.suppress(OSError, RuntimeError, ValueError, TypeError):
        path = Path(model).expanduser()
        if str(model) and path.exists():
            return path
    if isinstance(model, str) and hub.is_name(model):
        return hub.fetch(model)
    raise CheckpointError(
        f"{str(model)!r:.200}: no such file or folder, and no hub name",
        hint="a model is a folder, a llama2.c .bin file, or a hub name such as meta-llama/Llama-3.2-1B",
    )


class _Format(Protocol):
    """A module that reads one kind of checkpoint."""

    def holds(self, path: Path) -> bool: ...

    def read(self, path: Path) -> Source: ...


FORMATS: tuple[_Format, ...] = (huggingface, meta, llama2c)


def _format(path: Path) -> _Format:
    for reader in FORMATS:
        if reader.holds(path):
            return reader
    what = "is empty" if path.is_dir() and not any(path.iterdir()) else "holds no model that strobe knows"
    raise CheckpointError(
        f"{path} {what}; supported: a folder with config.json (Hugging Face) or params.json (Meta), "
        "or a .bin file (llama2.c)"
    )


def _dtype(given: str | torch.dtype, own: torch.dtype) -> torch.dtype:
    if given == "auto":
        return own
    chosen = DTYPES.get(given) if isinstance(given, str) else given
    if chosen is None or chosen not in DTYPES.values():
        raise CheckpointError(f"dtype {given!r}; supported: auto, {', '.join(DTYPES)}")
    return chosen
