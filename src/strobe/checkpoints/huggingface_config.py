"""config.json and generation_config.json → ModelConfig and GenerationDefaults."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strobe.checkpoints.checkpoint import GenerationDefaults
from strobe.errors import CheckpointError
from strobe.models.config import LARGEST, ModelConfig, Rope


@dataclass(frozen=True)
class _Family:
    """What an architecture's config leaves unsaid, and where it differs from Llama."""

    max_position: int = 2048
    head_dim: int | None = None
    window: str = "none"
    """Which layers `sliding_window` binds: "none", "all", or those from `max_window_layers` ("upper")."""
    qkv_bias: bool = False
    attention_bias: bool = False
    """Whether the key of this name exists: a bias on q, k, v and the output."""
    qk_norm: bool = False


_LLAMA_LIKE = {
    "LlamaForCausalLM": _Family(attention_bias=True),
    "MistralForCausalLM": _Family(max_position=131072, window="all"),
    "Qwen2ForCausalLM": _Family(max_position=32768, window="upper", qkv_bias=True),
    "Qwen3ForCausalLM": _Family(
        max_position=32768, head_dim=128, window="upper", attention_bias=True, qk_norm=True
    ),
}
_ARCHITECTURES = (*_LLAMA_LIKE, "GPT2LMHeadModel")
_BY_MODEL_TYPE = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}

_MUST_BE: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "attn_logit_softcapping": (0,),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (0,),
    "hidden_act": ("silu",),
    "is_encoder_decoder": (False,),
    "logits_scaling": (1,),
    "mlp_bias": (False,),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "num_local_experts": (0,),
    "partial_rotary_factor": (1,),
    "quantization_config": (),
    "residual_multiplier": (1,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "scale_attn_weights": (True,),
}
"""Keys that change the network where they hold anything but these (or null)."""

_UNSAID_WINDOW = 4096
"""The window of a config that has no `sliding_window`; one that says null has none."""

_ROPE_SCALINGS = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}


class _Keys:
    """A config file's keys, each checked for its type where it is read."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self.values = values

    def integer(self, key: str, default: int | None = None) -> int:
        return self._one(key, (int,), "an integer", default)

    def number(self, key: str, default: float | None = None) -> float:
        value = self._one(key, (int, float), "a number", default)
        try:
            return float(value)
        except OverflowError:
            raise CheckpointError(f"{self.path}: {key} has more digits than a number holds") from None

    def flag(self, key: str, default: bool) -> bool:
        return self._one(key, (bool,), "true or false", default)

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def _one(self, key: str, kinds: tuple[type, ...], wanted: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise CheckpointError(f"{self.path} has no {key}")
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise CheckpointError(f"{self.path}: {key} is {value!r}; supported: {wanted}")
        return value


def model_config(path: Path, values: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
    """The network that a config.json describes; `generation`'s end-of-sequence ids win over its own.

    Raises:
        CheckpointError: an architecture, or a key's value, that strobe does not run.
    """
    architecture = _architecture(path, values)
    for key, allowed in _MUST_BE.items():
        value = values.get(key)
        if value is not None and value not in allowed:
            supported = " or ".join(map(repr, allowed)) or "none"
            raise CheckpointError(f"{path}: {key} is {value!r}; supported: {supported}")
    keys = _Keys(path, values)
    eos = generation.get("eos_token_id", values.get("eos_token_id"))
    tokens = {
        "bos_token_id": values.get("bos_token_id"),
        "eos_token_ids": tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
    }
    try:
        if architecture == "GPT2LMHeadModel":
            return _gpt2(keys, tokens)
        return _llama(keys, _LLAMA_LIKE[architecture], tokens)
    except CheckpointError as error:
        if str(path) in error.message:
            raise
        raise CheckpointError(f"{path}: {error.message}") from error


def _architecture(path: Path, values: Mapping[str, Any]) -> str:
    named = values.get("architectures") or _BY_MODEL_TYPE.get(str(values.get("model_type")))
    named = named[0] if isinstance(named, list) and len(named) == 1 else named
    if named is None:
        named = values.get("model_type")
    if named not in _ARCHITECTURES:
        raise CheckpointError(f"{path}: architecture {named!r}; supported: {', '.join(_ARCHITECTURES)}")
    return str(named)


def _llama(keys: _Keys, family: _Family, tokens: Mapping[str, Any]) -> ModelConfig:
    layers, hidden = keys.integer("num_hidden_layers"), keys.integer("hidden_size")
    q_heads = keys.integer("num_attention_heads")
    head_dim = family.head_dim
    if not keys.has("head_dim") and head_dim is None:
        if q_heads < 1 or hidden % q_heads:
            raise CheckpointError(f"hidden_size {hidden} is not a multiple of num_attention_heads {q_heads}")
        head_dim = hidden // q_heads
    window, sliding_layers = _window(keys, family, layers)
    rope = _rope(keys)
    longest = keys.integer("max_position_embeddings", family.max_position)
    if rope.scaling == "yarn":  # which is added by hand to a config that says how long the training was
        longest = max(longest, int(rope.factor * rope.original_max_position))
    attention_bias = family.attention_bias and keys.flag("attention_bias", False)
    return ModelConfig(
        architecture="llama",
        layers=layers,
        hidden=hidden,
        intermediate=keys.integer("intermediate_size"),
        q_heads=q_heads,
        kv_heads=keys.integer("num_key_value_heads", q_heads),
        head_dim=keys.integer("head_dim", head_dim),
        vocab_size=keys.integer("vocab_size"),
        max_position=longest,
        norm_eps=keys.number("rms_norm_eps", 1e-6),
        rope=rope,
        sliding_window=window,
        sliding_layers=sliding_layers,
        qkv_bias=family.qkv_bias or attention_bias,
        output_bias=attention_bias,
        qk_norm=family.qk_norm,
        tie_embeddings=keys.flag("tie_word_embeddings", False),
        **tokens,
    )


def _gpt2(keys: _Keys, tokens: Mapping[str, Any]) -> ModelConfig:
    hidden, heads = keys.integer("n_embd"), keys.integer("n_head")
    if heads < 1 or hidden % heads:
        raise CheckpointError(f"n_embd {hidden} is not a multiple of n_head {heads}")
    return ModelConfig(
        architecture="gpt2",
        layers=keys.integer("n_layer"),
        hidden=hidden,
        intermediate=keys.integer("n_inner", 4 * hidden),
        q_heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        vocab_size=keys.integer("vocab_size"),
        max_position=keys.integer("n_positions", 1024),
        norm_eps=keys.number("layer_norm_epsilon", 1e-5),
        rope=None,
        tie_embeddings=keys.flag("tie_word_embeddings", True),
        **tokens,
    )


def _window(keys: _Keys, family: _Family, layers: int) -> tuple[int | None, frozenset[int] | None]:
    """`sliding_window` and the layers it binds (None: all)."""
    bound = family.window == "all" or (family.window == "upper" and keys.flag("use_sliding_window", False))
    if not bound or keys.values.get("sliding_window", _UNSAID_WINDOW) is None:
        return None, None
    window = keys.integer("sliding_window", _UNSAID_WINDOW)
    kinds = keys.values.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or set(map(str, kinds)) - {"full_attention", "sliding_attention"}:
            raise CheckpointError(
                f"{keys.path}: layer_types is {kinds!r:.200}; "
                "supported: a list of full_attention and sliding_attention"
            )
        if len(kinds) != layers:
            raise CheckpointError(f"{keys.path}: layer_types names {len(kinds)} layers of {layers}")
        return window, frozenset(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    if family.window == "upper":
        first = keys.integer("max_window_layers", 28)
        return window, frozenset(range(max(0, first), min(layers, LARGEST["layers"])))
    return window, None


def _rope(keys: _Keys) -> Rope:
    """`rope_parameters`, or the older `rope_scaling`, which wins; `rope_theta` where they hold none."""
    values: dict[str, Any] = {}
    if keys.has("rope_theta"):
        values["rope_theta"] = keys.values["rope_theta"]
    for name in ("rope_parameters", "rope_scaling"):
        part = keys.values.get(name)
        if part is not None and not isinstance(part, dict):
            raise CheckpointError(f"{keys.path}: {name} is {part!r}; supported: an object")
    values |= keys.values.get("rope_scaling") or keys.values.get("rope_parameters") or {}
    kind = values.get("rope_type", values.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_SCALINGS:
        raise CheckpointError(
            f"{keys.path}: rope scaling {kind!r}; supported: {', '.join(_ROPE_SCALINGS)}",
        )
    if values.get("partial_rotary_factor") not in (None, 1):
        raise CheckpointError(f"{keys.path}: partial_rotary_factor is not 1; supported: whole heads turned")
    rope = _Keys(keys.path, values)
    theta = rope.number("rope_theta", 10000.0)
    if kind == "default":
        return Rope(theta=theta)
    if kind == "linear":
        return Rope(theta=theta, scaling="linear", factor=rope.number("factor"))
    if kind == "yarn":
        return _yarn(theta, rope)
    return Rope(
        theta=theta,
        scaling="llama3",
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position=rope.integer("original_max_position_embeddings"),
    )


def _yarn(theta: float, keys: _Keys) -> Rope:
    for name, allowed in (("mscale", None), ("mscale_all_dim", None), ("truncate", True)):
        if keys.values.get(name) not in (None, allowed):
            raise CheckpointError(
                f"{keys.path}: {name} of yarn is {keys.values[name]!r}; supported: {allowed}"
            )
    factor = keys.number("factor")
    return Rope(
        theta=theta,
        scaling="yarn",
        factor=factor,
        original_max_position=keys.integer("original_max_position_embeddings"),
        beta_fast=keys.number("beta_fast", 32.0),
        beta_slow=keys.number("beta_slow", 1.0),
        attention_factor=keys.number("attention_factor", 1 + 0.1 * math.log(factor) if factor > 1 else 1.0),
    )


def generation_defaults(path: Path, values: Mapping[str, Any]) -> GenerationDefaults:
    """How generation_config.json says to sample; `do_sample` false is greedy, whatever else it says."""
    keys = _Keys(path, values)
    if not keys.flag("do_sample", True):
        return GenerationDefaults(temperature=0.0)

    def optional(key: str) -> float | None:
        return keys.number(key) if keys.has(key) else None

    return GenerationDefaults(
        temperature=optional("temperature"),
        top_k=keys.integer("top_k") if keys.has("top_k") else None,
        top_p=optional("top_p"),
        min_p=optional("min_p"),
        repetition_penalty=optional("repetition_penalty"),
    )
