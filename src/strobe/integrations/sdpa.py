"""torch's scaled_dot_product_attention over strobe, and a context that sends torch's own calls here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from strobe.attention.api import attention
from strobe.attention.problem import UNLIMITED
from strobe.errors import KernelRefusedError, ProblemError

_TORCHS = F.scaled_dot_product_attention


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """torch's signature and semantics: `[..., heads, len, head_dim]`, causal aligned top-left.

    attn_mask is bool (True: may attend) or is added to the scores, broadcastable to
    `[..., q_heads, q_len, kv_len]`. Values may be narrower or wider than keys: the narrower are copied and
    padded. torch.autocast is followed. A query that sees no key gives 0. Raises ProblemError for dropout,
    for is_causal with a mask, for leading dimensions that differ (torch broadcasts them), and for fewer key
    than query heads without `enable_gqa`.
    """
    if dropout_p:
        raise ProblemError(f"dropout_p is {dropout_p}; supported: 0.0", hint="strobe runs inference")
    if is_causal and attn_mask is not None:
        raise ProblemError("is_causal with attn_mask; supported: one of the two")
    if not query.shape[:-3] == key.shape[:-3] == value.shape[:-3] or min(query.dim(), key.dim()) < 2:
        given = ", ".join(str(list(x.shape)) for x in (query, key, value))
        raise ProblemError(f"query, key and value are {given}; supported: equal leading dimensions")
    scale = query.shape[-1] ** -0.5 if scale is None and query.shape[-1] else scale
    query, key, value = as_autocast(query), as_autocast(key), as_autocast(value)
    query, key, value, width = of_one_width(query, key, value)
    q, k, v = (_four(x if x.stride(-1) == 1 else x.contiguous()) for x in (query, key, value))
    q_heads, kv_heads = q.shape[1], k.shape[1]
    if q_heads != kv_heads and not enable_gqa:
        raise ProblemError(f"{q_heads} query heads, {kv_heads} key heads", hint="pass enable_gqa=True")
    q_len, kv_len = q.shape[2], k.shape[2]
    window, bias = (UNLIMITED, UNLIMITED), None
    if is_causal and q_len > kv_len:
        # a bottom-right window cannot say "up to i" where i passes the last key
        attn_mask = torch.ones(q_len, kv_len, dtype=torch.bool, device=q.device).tril()
    elif is_causal:
        k, v = k[:, :, :q_len], v[:, :, :q_len]  # no query sees past the q_len-th key
        window = (UNLIMITED, 0)
    if attn_mask is not None:
        if attn_mask.dim() > 3 and query.dim() > 4:  # only then has it leading dimensions of its own
            attn_mask = attn_mask.expand(*query.shape[:-3], *attn_mask.shape[-3:])
        bias = _four(additive(attn_mask, q.dtype))
    out = attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), window=window, scale=scale, bias=bias
    )
    return cast(torch.Tensor, out).transpose(1, 2).reshape(query.shape)[..., :width]


def as_autocast(x: torch.Tensor) -> torch.Tensor:
    """x in the dtype that torch.autocast asks of products, where it is on: of all but float64."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(device))


def of_one_width(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """q, k and v with zeros behind the narrower, which change no score, and the width of the values."""
    width, widest = v.shape[-1], max(v.shape[-1], k.shape[-1])
    if q.shape[-1] == k.shape[-1] != width:
        q, k, v = (F.pad(x, (0, widest - x.shape[-1])) for x in (q, k, v))
    return q, k, v, width


def _four(x: torch.Tensor) -> torch.Tensor:
    """`[..., heads, len, dim]` with all leading dimensions as one batch."""
    while x.dim() < 4:
        x = x.unsqueeze(0)
    return x.flatten(0, -4)


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A bool mask (True: may attend) as numbers to add; others as they are."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))


class redirect(TorchFunctionMode):
    """`with redirect():` torch's own scaled_dot_product_attention calls run on strobe where it fits.

    Those of torch.nn.MultiheadAttention and what stands on it are among them. A call that strobe refuses
    (dropout, a dtype it lacks), that needs gradients, or whose tensors are no plain ones (nested, a subclass,
    under torch.func) goes to torch, and is counted in `.passed_on`; the others in `.taken`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.taken = self.passed_on = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is _TORCHS:
            return self._attend(*args, **kwargs)
        if func is not F.multi_head_attention_forward:
            return func(*args, **kwargs)

        def attend(*args: Any, **kwargs: Any) -> torch.Tensor:
            F.scaled_dot_product_attention = _TORCHS  # which strobe may call in its turn
            return self._attend(*args, **kwargs)

        # a mode does not see what a function calls in its turn; this one calls once, by the module's name
        F.scaled_dot_product_attention = attend
        try:
            return func(*args, **kwargs)
        finally:
            F.scaled_dot_product_attention = _TORCHS

    def _attend(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        needs_gradients = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        if not needs_gradients and all(map(_is_plain, tensors)):
            try:
                out = scaled_dot_product_attention(*args, **kwargs)
            except (ProblemError, KernelRefusedError):
                pass
            else:
                self.taken += 1
                return out
        self.passed_on += 1
        return _TORCHS(*args, **kwargs)


def _is_plain(x: torch.Tensor) -> bool:
    """Whether x holds its own numbers, in memory of its shape and strides."""
    if torch.compiler.is_compiling():
        return True
    own = torch.Tensor, torch.nn.Parameter, FakeTensor
    return type(x) in own and not x.is_nested and not torch._C._functorch.is_functorch_wrapped_tensor(x)
