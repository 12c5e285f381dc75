"""strobe as an attention implementation of Hugging Face transformers.

from strobe.integrations import transformers as strobe_transformers
strobe_transformers.register()
AutoModelForCausalLM.from_pretrained(name, attn_implementation="strobe")
"""

from __future__ import annotations

from typing import Any, cast

import torch

from strobe.attention.api import attention
from strobe.attention.problem import UNLIMITED
from strobe.errors import MissingExtraError, ProblemError
from strobe.integrations.sdpa import additive, as_autocast, of_one_width

NAME = "strobe"


def register(name: str = NAME) -> None:
    """Make `attn_implementation=name` work, masks included. Raises MissingExtraError without transformers."""
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    except ImportError as error:
        raise MissingExtraError.of("transformers", "integrations") from error
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, sdpa_mask)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention call: `[batch, heads, len, head_dim]` in, `[batch, len, heads, head_dim]` out.

    Without a mask, attention is causal where the module says so (`is_causal`), aligned top-left: a cache of
    a fixed size has room behind the prompt. A mask (bool, True: may attend, or additive) already holds the
    causal and the window part. `sliding_window` (keys a query sees, itself included), `softcap` and `s_aux`
    (sinks) come as keywords.
    """
    if dropout:
        raise ProblemError(f"dropout is {dropout}; supported: 0.0", hint="call model.eval()")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    q_len, kv_len, bias = query.shape[2], key.shape[2], None
    window = (UNLIMITED, UNLIMITED)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask is not None:
        bias = additive(attention_mask[..., :kv_len], query.dtype)
    elif causal and q_len > 1:
        if q_len > kv_len:
            raise ProblemError(f"{q_len} causal queries of {kv_len} keys; supported: a key for every query")
        key, value = key[:, :, :q_len], value[:, :, :q_len]
        left = kwargs.get("sliding_window")
        window = (UNLIMITED if left is None else left - 1, 0)
    query, key, value, width = of_one_width(as_autocast(query), as_autocast(key), as_autocast(value))
    out = attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        window=window,
        scale=scaling,
        softcap=kwargs.get("softcap") or 0.0,
        sinks=kwargs.get("s_aux"),
        bias=bias,
    )
    return cast(torch.Tensor, out)[..., :width], None
