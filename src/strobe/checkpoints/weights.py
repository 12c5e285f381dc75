"""Foreign tensors into our weights: checked by name and shape first, then copied piece by piece.

A format describes each of its files as a `WeightFile`. Nothing is allocated before every file's
header has been compared with what the config asks for, so a lying file costs no memory. Then the
files are read one after the other, each mapped into memory only while its own tensors are copied to
their places on the device: the host holds at most one file's pages and one piece at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from strobe.checkpoints.upload import copying
from strobe.errors import CheckpointError, DeviceError
from strobe.linear import Projection
from strobe.models import network
from strobe.models.config import ModelConfig
from strobe.models.gpt2 import GPT2Weights, Norm
from strobe.models.llama import LlamaWeights

STORED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

Places = Mapping[str, torch.Tensor]
"""Where each tensor goes, by its Hugging Face name: views of our weights, shaped like the file's tensors."""


class WeightFile(Protocol):
    """One file of weights."""

    @property
    def path(self) -> Path: ...

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Its tensors by the file's own names, from the header alone, less those that no network needs."""

    def views(self, places: Places) -> Places:
        """Where its tensors go, by the file's own names: exactly those that it must hold."""

    def read(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Its tensors, mapped or read one at a time; may repeat or leave out none of `shapes`."""


Progress = Callable[[int, int], object]
"""Told of the bytes of weights that are in place, and of all there are, as they come."""


def load_weights(
    config: ModelConfig,
    files: Sequence[WeightFile],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    progress: Progress | None = None,
) -> network.Weights:
    """The weights of a network, out of its files.

    Raises:
        CheckpointError: a tensor is missing, not expected, of a wrong shape or dtype.
        DeviceError: the device has no room for them.
    """
    sketch = places(config, network.allocate(config, device="meta", dtype=dtype))
    for file in files:
        _compare(file, file.views(sketch))
    weights = _allocate(config, device, dtype)
    ours = places(config, weights)
    done, total = 0, sum(place.nbytes for place in ours.values())
    with copying(device) as copy:
        for file in files:
            views = file.views(ours)
            for name, tensor in file.read():
                if tensor.dtype not in STORED:
                    supported = ", ".join(map(str, STORED))
                    raise CheckpointError(f"{file.path}: {name} is {tensor.dtype}; supported: {supported}")
                copy(views[name], tensor)
                done += views[name].nbytes
                if progress is not None:
                    progress(done, total)
    return weights


def _allocate(config: ModelConfig, device: torch.device | str, dtype: torch.dtype) -> network.Weights:
    try:
        return network.allocate(config, device=device, dtype=dtype)
    except RuntimeError as error:  # torch's own out-of-memory errors, on a GPU and on a CPU
        sketch = network.tensors(network.allocate(config, device="meta", dtype=dtype))
        size = sum(tensor.numel() * tensor.element_size() for tensor in sketch)
        raise DeviceError(f"{device} has no room for weights of {size / 2**30:.1f} GiB in {dtype}") from error


def _compare(file: WeightFile, views: Places) -> None:
    shapes = file.shapes()
    if missing := [name for name in views if name not in shapes]:
        raise CheckpointError(f"{file.path} lacks {_some(missing)}")
    if unexpected := [name for name in shapes if name not in views]:
        raise CheckpointError(
            f"{file.path} holds tensors that its config has no place for: {_some(unexpected)}"
        )
    for name, view in views.items():
        if tuple(shapes[name]) != tuple(view.shape):
            raise CheckpointError(
                f"{file.path}: {name} is {list(shapes[name])}; its config asks for {list(view.shape)}"
            )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def places(config: ModelConfig, weights: network.Weights) -> dict[str, torch.Tensor]:
    """Where each Hugging Face tensor goes. Merged projections are filled slice by slice."""
    if isinstance(weights, LlamaWeights):
        return _llama_places(config, weights)
    return _gpt2_places(weights)


def _llama_places(config: ModelConfig, weights: LlamaWeights) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor | None] = {
        "model.embed_tokens.weight": weights.embedding,
        "model.norm.weight": weights.head.norm,
        "lm_head.weight": None if config.tie_embeddings else weights.head.weight,
    }
    for index, layer in enumerate(weights.layers):
        block = f"model.layers.{index}."
        attention = block + "self_attn."
        sizes = (config.q_size, config.kv_size, config.kv_size)
        for name, part in zip("qkv", layer.qkv.weight.split(sizes), strict=True):
            found[f"{attention}{name}_proj.weight"] = part
        if layer.qkv.bias is not None:
            for name, part in zip("qkv", layer.qkv.bias.split(sizes), strict=True):
                found[f"{attention}{name}_proj.bias"] = part
        gate, up = layer.gate_up.weight.chunk(2)
        found |= {
            attention + "q_norm.weight": layer.q_norm,
            attention + "k_norm.weight": layer.k_norm,
            attention + "o_proj.weight": layer.output.weight,
            attention + "o_proj.bias": layer.output.bias,
            block + "input_layernorm.weight": layer.qkv.norm,
            block + "post_attention_layernorm.weight": layer.gate_up.norm,
            block + "mlp.gate_proj.weight": gate,
            block + "mlp.up_proj.weight": up,
            block + "mlp.down_proj.weight": layer.down.weight,
        }
    return {name: place for name, place in found.items() if place is not None}


def _gpt2_places(weights: GPT2Weights) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor | None] = {
        "wte.weight": weights.embedding,
        "wpe.weight": weights.positions,
        "lm_head.weight": None if weights.head.weight is weights.embedding else weights.head.weight,
    }

    def norm(name: str, to: Norm) -> None:
        found[name + ".weight"], found[name + ".bias"] = to.weight, to.bias

    def projection(name: str, to: Projection) -> None:
        # Conv1D keeps its weight as [inputs, outputs].
        found[name + ".weight"], found[name + ".bias"] = to.weight.t(), to.bias

    norm("ln_f", weights.norm)
    for index, layer in enumerate(weights.layers):
        block = f"h.{index}."
        norm(block + "ln_1", layer.attention_norm)
        norm(block + "ln_2", layer.mlp_norm)
        projection(block + "attn.c_attn", layer.qkv)
        projection(block + "attn.c_proj", layer.output)
        projection(block + "mlp.c_fc", layer.up)
        projection(block + "mlp.c_proj", layer.down)
    return {name: place for name, place in found.items() if place is not None}


def halve_rotation_pairs(config: ModelConfig, weights: LlamaWeights) -> None:
    """Reorder queries and keys from neighbouring rotation pairs to pairs half a head apart, in place.

    Meta's files and llama2.c's turn features (2i, 2i + 1) together; we turn (i, i + head_dim/2).
    """
    pairs = config.head_dim // 2
    for layer in weights.layers:
        rows = layer.qkv.weight[: config.q_size + config.kv_size]
        rows.copy_(rows.unflatten(0, (-1, pairs, 2)).transpose(1, 2).flatten(0, 2))
