"""Meta's folders: params.json, consolidated.*.pth, tokenizer.model.

The weights of a large model are split over several files. Projections that make features are split
by rows, those that take features by columns (Shoeybi et al. 2019, arXiv 1909.08053, section 3);
Llama 2 splits the embedding by columns, Llama 3 by rows; norms are repeated in each file.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from strobe.checkpoints import sentencepiece, tiktoken
from strobe.checkpoints.files import check_file, read_json
from strobe.checkpoints.source import Source
from strobe.checkpoints.tokenizer import Tokenizer
from strobe.checkpoints.weights import Places
from strobe.errors import CheckpointError
from strobe.models.config import ModelConfig, Rope

_PARAMS = """
    dim n_layers n_heads n_kv_heads vocab_size multiple_of ffn_dim_multiplier norm_eps rope_theta max_seq_len
    max_batch_size use_scaled_rope rope_scale_factor rope_low_freq_factor rope_high_freq_factor
"""
_ROWS, _COLUMNS, _WHOLE = 0, 1, None
_LAYER = {
    "attention.wq.weight": ("self_attn.q_proj.weight", _ROWS),
    "attention.wk.weight": ("self_attn.k_proj.weight", _ROWS),
    "attention.wv.weight": ("self_attn.v_proj.weight", _ROWS),
    "attention.wo.weight": ("self_attn.o_proj.weight", _COLUMNS),
    "feed_forward.w1.weight": ("mlp.gate_proj.weight", _ROWS),
    "feed_forward.w2.weight": ("mlp.down_proj.weight", _COLUMNS),
    "feed_forward.w3.weight": ("mlp.up_proj.weight", _ROWS),
    "attention_norm.weight": ("input_layernorm.weight", _WHOLE),
    "ffn_norm.weight": ("post_attention_layernorm.weight", _WHOLE),
}
"""Meta's name → Hugging Face's, and the dimension that is split over the files."""
_INDEX_LIMIT = 16 << 20
"""Bytes of the largest pickle of names and shapes read: a thousand times that of Llama 3 405B."""
_SMALLEST_3_1 = 4096
"""`dim` of Llama 3.1 8B; the text models of 3.2 have 2048 and 3072."""
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


def holds(path: Path) -> bool:
    """True for a folder of this format."""
    return (path / "params.json").is_file()


def read(path: Path) -> Source:
    """Describe the folder `path`.

    Raises:
        CheckpointError, TokenizerError: what is missing or broken, by file.
    """
    shards = sorted(path.glob("consolidated.*.pth"))
    if not shards:
        raise CheckpointError(f"{path} holds no consolidated.*.pth")
    for index, shard in enumerate(shards):
        if shard.name != (wanted := f"consolidated.{index:02}.pth"):
            raise CheckpointError(f"{path} lacks {wanted}: {shard.name} is there")
    files = [PickledShard(shard, index, len(shards)) for index, shard in enumerate(shards)]
    params_path = path / "params.json"
    config = _config(params_path, read_json(params_path), files[0])
    tokenizer = _tokenizer(path / "tokenizer.model", config)
    return Source(config=config, files=files, dtype=files[0].dtype, tokenizer=tokenizer, neighbour_pairs=True)


@dataclass(frozen=True, eq=False)
class PickledShard:
    """consolidated.NN.pth, one of `count`: unpickled with weights only, its tensors mapped."""

    path: Path
    index: int
    count: int

    def _load(self) -> dict[str, torch.Tensor]:
        _check_archive(self.path)
        try:
            found = torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError as error:
            wanted = _GLOBAL.search(str(error))
            what = f"it asks for {wanted[1]}" if wanted else _first_line(error)
            raise CheckpointError(
                f"{self.path} holds more than weights, and its code is not run: {what}"
            ) from error
        except (OSError, RuntimeError, ValueError, EOFError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{self.path} is not a whole torch file: {_first_line(error)}") from error
        if not isinstance(found, dict) or not all(
            isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in found.items()
        ):
            raise CheckpointError(f"{self.path} holds something else than tensors by name")
        return {name: tensor for name, tensor in found.items() if name != "rope.freqs"}

    @cached_property
    def _header(self) -> tuple[dict[str, tuple[int, ...]], torch.dtype]:
        found = self._load()
        if not found:
            raise CheckpointError(f"{self.path} holds no weights")
        return {name: tuple(tensor.shape) for name, tensor in found.items()}, next(iter(found.values())).dtype

    @property
    def dtype(self) -> torch.dtype:
        """Of its first tensor."""
        return self._header[1]

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._header[0]

    def views(self, places: Places) -> Places:
        return {name: self._part(places[ours], split) for name, (ours, split) in self._names(places).items()}

    def _names(self, places: Places) -> dict[str, tuple[str, int | None]]:
        embedding = places["model.embed_tokens.weight"]
        by_rows = self.shapes().get("tok_embeddings.weight", (0, 0))[-1] == embedding.shape[1]
        names: dict[str, tuple[str, int | None]] = {
            "tok_embeddings.weight": ("model.embed_tokens.weight", _ROWS if by_rows else _COLUMNS),
            "norm.weight": ("model.norm.weight", _WHOLE),
        }
        if "lm_head.weight" in places:
            names["output.weight"] = ("lm_head.weight", _ROWS)
        layers = sum(name.endswith("input_layernorm.weight") for name in places)
        for layer in range(layers):
            for theirs, (ours, split) in _LAYER.items():
                names[f"layers.{layer}.{theirs}"] = (f"model.layers.{layer}.{ours}", split)
        return names

    def _part(self, place: torch.Tensor, split: int | None) -> torch.Tensor:
        """This file's part of a whole tensor's place."""
        if split is _WHOLE:
            return place
        if place.shape[split] % self.count:
            raise CheckpointError(
                f"{self.path} is one of {self.count} files; {list(place.shape)} does not split so"
            )
        return place.chunk(self.count, dim=split)[self.index]

    def read(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._load().items()


def _check_archive(path: Path) -> None:
    """Raise CheckpointError where reading the file's index would take more memory than any model needs.

    torch.save compresses nothing: what is compressed here is made to unfold.
    """
    check_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} is not a whole torch file: {_first_line(error)}") from error
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(f"{path} is compressed; supported: files as torch.save writes them")
    if any(entry.file_size > _INDEX_LIMIT for entry in entries if entry.filename.endswith(".pkl")):
        raise CheckpointError(f"{path} has an index of over {_INDEX_LIMIT:,} bytes")


def _config(path: Path, params: Mapping[str, Any], first: PickledShard) -> ModelConfig:
    if unknown := sorted(set(params) - set(_PARAMS.split())):
        raise CheckpointError(f"{path}: unknown key {unknown[0]!r}; supported: {', '.join(_PARAMS.split())}")

    def number(key: str, default: float | None = None) -> Any:
        value = params.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < abs(value) < 1e9:
            raise CheckpointError(f"{path}: {key} is {value!r}; supported: a number")
        return value

    dim, heads, layers = number("dim"), number("n_heads"), number("n_layers")
    if not all(isinstance(size, int) and size > 0 for size in (dim, heads, layers)) or dim % heads:
        raise CheckpointError(
            f"{path}: dim {dim!r} is not a multiple of n_heads {heads!r}, or not an integer"
        )
    shapes = first.shapes()
    vocab_size = number("vocab_size", -1)
    if vocab_size == -1:
        head = shapes.get("output.weight")
        if not head:
            raise CheckpointError(
                f"{path} leaves vocab_size open, and {first.path} has no output.weight to tell"
            )
        vocab_size = head[0] * first.count
    scaled = params.get("use_scaled_rope") is True
    llama3 = "rope_theta" in params
    hidden = int(2 * 4 * dim / 3)
    hidden = int(number("ffn_dim_multiplier", 1.0) * hidden)
    multiple = number("multiple_of", 256)
    try:
        return ModelConfig(
            architecture="llama",
            layers=layers,
            hidden=dim,
            intermediate=int(multiple * -(-hidden // multiple)),
            q_heads=heads,
            kv_heads=number("n_kv_heads", heads),
            head_dim=dim // heads,
            vocab_size=vocab_size,
            max_position=131072 if scaled else 8192 if llama3 else 4096,
            norm_eps=number("norm_eps", 1e-5),
            rope=_rope(number, scaled, dim),
            tie_embeddings="output.weight" not in shapes,
        )
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error.message}") from error


def _rope(number: Any, scaled: bool, dim: int) -> Rope:
    """Meta's files leave the factor out: it is 8 for Llama 3.1 and 32 for the small models of 3.2."""
    theta = float(number("rope_theta", 10000.0))
    if not scaled:
        return Rope(theta=theta)
    return Rope(
        theta=theta,
        scaling="llama3",
        factor=float(number("rope_scale_factor", 32 if dim < _SMALLEST_3_1 else 8)),
        low_freq_factor=float(number("rope_low_freq_factor", 1)),
        high_freq_factor=float(number("rope_high_freq_factor", 4)),
        original_max_position=8192,
    )


def _tokenizer(path: Path, config: ModelConfig) -> Tokenizer | None:
    if not path.exists():
        return None
    check_file(path)
    with path.open("rb") as file:
        head = file.read(4096)
    if tiktoken.is_rank_file(head):
        return tiktoken.read(path, config.vocab_size)
    return sentencepiece.read(path, {})


def _first_line(error: Exception) -> str:
    return json.dumps(str(error).split("\n", 1)[0][:200])
