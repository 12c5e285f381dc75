"""Hugging Face folders: config.json, safetensors in one file or many, tokenizer.json and its companions."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from strobe.checkpoints import sentencepiece
from strobe.checkpoints.files import check_file, inside, read_json
from strobe.checkpoints.huggingface_config import generation_defaults, model_config
from strobe.checkpoints.source import Source
from strobe.checkpoints.tokenizer import Tokenizer
from strobe.checkpoints.weights import Places, places
from strobe.errors import CheckpointError
from strobe.models.config import ModelConfig
from strobe.models.network import allocate

HUB_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "chat_template.jinja",
)
"""What `read` may look for in a repository on the hub."""

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BUFFERS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
"""Ends of tensor names that older checkpoints carry and that are computed, not learned."""
_HEAD, _EMBEDDINGS = "lm_head.weight", ("model.embed_tokens.weight", "wte.weight")


def holds(path: Path) -> bool:
    """True for a folder of this format."""
    return (path / "config.json").is_file()


def read(path: Path) -> Source:
    """Describe the folder `path`.

    Raises:
        CheckpointError, TokenizerError: what is missing or broken, by file.
    """
    config_path, generation_path = path / "config.json", path / "generation_config.json"
    generation = read_json(generation_path) if generation_path.exists() else {}
    config = model_config(config_path, read_json(config_path), generation)
    files = _weight_files(path, config)
    return Source(
        config=config,
        files=files,
        dtype=files[0].dtype,
        tokenizer=_tokenizer(path),
        defaults=generation_defaults(generation_path, generation),
    )


@dataclass(frozen=True, eq=False)
class SafetensorsFile:
    """One .safetensors file.

    `names` are the tensors that an index says it holds; None for all there are. `embedding_is_head`: a tied
    network's one matrix goes by the head's name, as `safetensors.torch.save_model` leaves it.
    """

    path: Path
    config: ModelConfig
    names: frozenset[str] | None = field(default=None, repr=False)
    embedding_is_head: bool = False

    @cached_property
    def _header(self) -> dict[str, tuple[tuple[int, ...], str]]:
        with _open(self.path) as file:
            slices = {name: file.get_slice(name) for name in file.keys() if not self._ignored(name)}  # noqa: SIM118
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}

    @property
    def dtype(self) -> torch.dtype:
        """Of its first tensor.

        Raises:
            CheckpointError: no tensor, or a dtype that is not loaded (quantised weights).
        """
        for name, (_, dtype) in self._header.items():
            if dtype not in _DTYPES:
                raise CheckpointError(f"{self.path}: {name} is {dtype}; supported: {', '.join(_DTYPES)}")
            return _DTYPES[dtype]
        raise CheckpointError(f"{self.path} holds no weights")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, (shape, _) in self._header.items()}

    def views(self, places: Places) -> Places:
        prefixed = self.names if self.names is not None else self._header
        prefix = "transformer." if any(name.startswith("transformer.") for name in prefixed) else ""
        named = {(name if name == _HEAD else prefix + name): to for name, to in places.items()}
        if self.embedding_is_head:
            (embedding,) = (name for name in named if name.endswith(_EMBEDDINGS))
            named[_HEAD] = named.pop(embedding)
        return {name: to for name, to in named.items() if self.names is None or name in self.names}

    def read(self) -> Iterator[tuple[str, torch.Tensor]]:
        with _open(self.path) as file:
            for name in self._header:
                yield name, file.get_tensor(name)

    def _ignored(self, name: str) -> bool:
        """Computed buffers, and the head that is its network's embedding."""
        again = name == _HEAD and self.config.tie_embeddings and not self.embedding_is_head
        return again or name.endswith(_BUFFERS)


def _open(path: Path) -> Any:
    check_file(path)
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error


def _embedding_is_head(config: ModelConfig, names: Collection[str]) -> bool:
    embedded = any(name.endswith(_EMBEDDINGS) for name in names)
    return config.tie_embeddings and _HEAD in names and not embedded


def _weight_files(path: Path, config: ModelConfig) -> list[SafetensorsFile]:
    index_path = path / "model.safetensors.index.json"
    if not index_path.exists():
        single = path / "model.safetensors"
        if not single.exists():
            raise CheckpointError(
                f"{path} holds no model.safetensors",
                hint="pickled weights (.bin) are not read; save the model with safetensors",
            )
        with _open(single) as file:
            return [SafetensorsFile(single, config, None, _embedding_is_head(config, file.keys()))]
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path} has no weight_map")
    held: dict[Path, set[str]] = {}
    for name, file_name in weight_map.items():
        held.setdefault(inside(path, file_name), set()).add(name)
    is_head = _embedding_is_head(config, weight_map)
    files = [SafetensorsFile(file, config, frozenset(names), is_head) for file, names in sorted(held.items())]
    _check_index(index_path, files, config)
    return files


def _check_index(path: Path, files: list[SafetensorsFile], config: ModelConfig) -> None:
    """An index's files must between them hold every tensor, each once."""
    wanted = places(config, allocate(config, device="meta", dtype=torch.float32))
    found = {name.removeprefix("transformer.") for file in files for name in file.names or ()}
    found |= set(_EMBEDDINGS) if files[0].embedding_is_head else set()
    if missing := [name for name in wanted if name not in found]:
        raise CheckpointError(f"{path} names no file for {missing[0]}")


def _tokenizer(path: Path) -> Tokenizer | None:
    settings_path, template_path = path / "tokenizer_config.json", path / "chat_template.jinja"
    settings = read_json(settings_path) if settings_path.exists() else {}
    template = template_path if template_path.exists() else None
    if (path / "tokenizer.json").exists():
        return Tokenizer.from_json(path / "tokenizer.json", settings, template)
    if (path / "tokenizer.model").exists():
        return sentencepiece.read(path / "tokenizer.model", settings, template)
    return None
