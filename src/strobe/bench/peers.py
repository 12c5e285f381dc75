"""Other people's attention, called as they mean it to be called, for timing beside strobe's.

A peer is measured where it can be imported; else it says why not.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F

from strobe.attention.cases import Inputs
from strobe.attention.problem import UNLIMITED, AttentionProblem, Dense, Paged
from strobe.errors import UnknownNameError

Call = Callable[[], torch.Tensor]
_BACKENDS = {"sdpa-flash": "fa2", "sdpa-cudnn": "cudnn"}
"""Peers by the backend of scaled_dot_product_attention that they are."""
_PLANNED, _SCHEDULED = "bench: flashinfer's plan", "bench: fa3's schedules"


@dataclass(frozen=True)
class Peer:
    """`load()` gives the library (or raises ImportError or OSError); `make` binds one call's inputs."""

    name: str
    load: Callable[[], Any]
    refusals: Callable[[AttentionProblem], list[str]]
    make: Callable[[Any, Inputs], Call]

    def missing(self) -> str | None:
        """Why this peer cannot run here, or None."""
        try:
            self.load()
        except (ImportError, OSError, RuntimeError) as error:
            return " ".join(str(error).split())
        return None


def named(names: list[str]) -> list[Peer]:
    """The peers of these names. Raises UnknownNameError."""
    names = [_BACKENDS.get(name, name) for name in names]
    for name in names:
        if name not in PEERS:
            raise UnknownNameError.among("peer", name, PEERS)
    return [PEERS[name] for name in names]


def _dense_16_bit(problem: AttentionProblem) -> list[str]:
    reasons = [] if isinstance(problem.layout, Dense) else ["dense layouts only"]
    if problem.device != "cuda":
        reasons.append("needs a GPU")
    if problem.dtype not in ("float16", "bfloat16") or problem.kv_dtype != problem.dtype:
        reasons.append("float16 and bfloat16 only")
    plain_mask = problem.window in ((UNLIMITED, UNLIMITED), (UNLIMITED, 0))
    if not plain_mask or problem.softcap or problem.sinks is not None:
        reasons.append("no window, softcap or sinks in this harness")
    return reasons


def _sdpa(backend: str) -> Peer:
    def load() -> Any:
        if not torch.cuda.is_available():
            raise ImportError("needs a GPU")
        from torch.nn.attention import SDPBackend, sdpa_kernel

        return lambda: sdpa_kernel(getattr(SDPBackend, backend))

    def refusals(problem: AttentionProblem) -> list[str]:
        square = problem.window == (UNLIMITED, UNLIMITED) or problem.q_len == problem.kv_len
        return [*_dense_16_bit(problem), *([] if square else ["its causal is aligned top-left"])]

    def make(library: Any, inputs: Inputs) -> Call:
        q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
        problem = inputs.problem
        causal, gqa = problem.masked, problem.group > 1

        def call() -> torch.Tensor:
            with library():
                out = F.scaled_dot_product_attention(
                    q, k, v, is_causal=causal, scale=problem.scale, enable_gqa=gqa
                )
            return out.transpose(1, 2)

        return call

    name = {"FLASH_ATTENTION": "fa2", "CUDNN_ATTENTION": "cudnn"}[backend]
    return Peer(name, load, refusals, make)


def _load_fa3() -> Any:
    """Its operators: from the flash_attn_3 package, or from the file that FLASH_ATTN_3_LIBRARY names.

    A libcudart.so.12 beside that file is loaded first.
    """
    if not hasattr(torch.ops.flash_attn_3, "fwd"):
        if library := os.environ.get("FLASH_ATTN_3_LIBRARY"):
            runtime = Path(library).with_name("libcudart.so.12")
            if runtime.is_file():  # which it is linked with, and torch may bring another
                ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
            torch.ops.load_library(library)
        else:
            importlib.import_module("flash_attn_3._C")
    return torch.ops.flash_attn_3


def _fa3_refusals(problem: AttentionProblem) -> list[str]:
    dense = AttentionProblem(**{**problem.__dict__, "layout": Dense()}) if problem.paged else problem
    return [*_dense_16_bit(dense), *([] if problem.arch == 90 else ["Hopper only"])]


def _make_fa3(library: Any, inputs: Inputs) -> Call:
    problem, layout = inputs.problem, inputs.problem.layout
    options: dict[str, Any] = {
        "softmax_scale": problem.scale,
        "is_causal": problem.masked,
        "window_size_left": -1,
        "window_size_right": -1,
        "num_splits": 0 if problem.phase == "decode" else 1,  # 0: as it likes
    }
    if isinstance(layout, Paged):
        pages = layout.page_table.clamp_max(inputs.k.shape[0] - 1)
        schedule = _fa3_schedule(library, inputs, pages.shape[1] * problem.page_size, problem.page_size)
        options |= {"seqused_k": layout.seq_lens, "page_table": pages, "num_splits": 0}
        options["scheduler_metadata"] = schedule
    return lambda: library.fwd(inputs.q, inputs.k, inputs.v, **options)[0]


def _fa3_schedule(library: Any, inputs: Inputs, longest: int, page_size: int | None) -> torch.Tensor:
    """Once for all calls over a layout, as vLLM makes it for all layers: else each call is two launches."""
    problem, layout = inputs.problem, cast(Paged, inputs.problem.layout)
    kept = layout.scratch.setdefault(_SCHEDULED, {})
    if page_size not in kept:
        heads = problem.q_heads, problem.kv_heads, problem.head_dim, problem.head_dim
        kept[page_size] = library.get_scheduler_metadata(
            *(problem.batch, problem.q_len, longest, *heads, inputs.q.dtype, layout.seq_lens),
            page_size=page_size,
            is_causal=problem.masked,
        )
    return kept[page_size]


def _contiguous_refusals(problem: AttentionProblem) -> list[str]:
    return _fa3_refusals(problem) + (
        [] if problem.paged else ["for a paged cache, copied to a contiguous one"]
    )


def _make_fa3_contiguous(library: Any, inputs: Inputs) -> Call:
    """The same keys and values `[batch, longest, kv_heads, head_dim]`, with no page table to follow."""
    problem, layout = inputs.problem, cast(Paged, inputs.problem.layout)
    table = layout.page_table[:, : -(-problem.kv_len // problem.page_size)].clamp_max(inputs.k.shape[0] - 1)
    k, v = (cache[table].flatten(1, 2).nan_to_num(0.0) for cache in (inputs.k, inputs.v))
    options = {
        "softmax_scale": problem.scale,
        "is_causal": problem.masked,
        "window_size_left": -1,
        "window_size_right": -1,
        "num_splits": 0,
        "seqused_k": layout.seq_lens,
        "scheduler_metadata": _fa3_schedule(library, inputs, k.shape[1], None),
    }
    return lambda: library.fwd(inputs.q, k, v, **options)[0]


def _make_fa4(forward: Any, inputs: Inputs) -> Call:
    problem = inputs.problem
    scale, causal = problem.scale, problem.masked
    return lambda: forward(inputs.q, inputs.k, inputs.v, softmax_scale=scale, causal=causal)[0]


def _flashinfer_refusals(problem: AttentionProblem) -> list[str]:
    reasons = [] if problem.paged and problem.q_len == 1 else ["paged decode only"]
    if problem.kv_dtype != problem.dtype:
        reasons.append("a cache in q's dtype only, in this harness")
    return reasons + ([] if problem.device == "cuda" else ["needs a GPU"])


def _make_flashinfer(library: Any, inputs: Inputs) -> Call:
    layout = cast(Paged, inputs.problem.layout)
    if _PLANNED not in layout.scratch:
        layout.scratch[_PLANNED] = _plan_flashinfer(library, inputs)
    wrapper = layout.scratch[_PLANNED]
    q, cache = inputs.q.squeeze(1), (inputs.k, inputs.v)
    return lambda: wrapper.run(q, cache).unsqueeze(1)


def _plan_flashinfer(library: Any, inputs: Inputs) -> Any:
    """Once for all calls over a layout, as for all layers of a model: they share its workspace."""
    problem, layout = inputs.problem, cast(Paged, inputs.problem.layout)
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    wrapper = library.BatchDecodeWithPagedKVCacheWrapper(
        workspace, "NHD", use_tensor_cores=problem.group >= 4
    )
    counts = [-(-n // problem.page_size) for n in layout.host_lens]
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    pages = torch.cat([layout.page_table[row, :n] for row, n in enumerate(counts)])
    last = torch.tensor([(n - 1) % problem.page_size + 1 for n in layout.host_lens]).int()
    wrapper.plan(
        starts.cuda(), pages, last.cuda(), problem.q_heads, problem.kv_heads, problem.head_dim,
        problem.page_size, q_data_type=inputs.q.dtype, kv_data_type=inputs.k.dtype, sm_scale=problem.scale,
    )  # fmt: skip
    return wrapper


PEERS = {
    peer.name: peer
    for peer in (
        _sdpa("FLASH_ATTENTION"),
        _sdpa("CUDNN_ATTENTION"),
        Peer("fa3", _load_fa3, _fa3_refusals, _make_fa3),
        Peer("fa3_contiguous", _load_fa3, _contiguous_refusals, _make_fa3_contiguous),
        Peer(
            "fa4",
            lambda: importlib.import_module("flash_attn.cute").flash_attn_func,
            lambda problem: (
                _dense_16_bit(problem) + ([] if problem.arch >= 90 else ["Hopper and later only"])
            ),
            _make_fa4,
        ),
        Peer(
            "flashinfer",
            lambda: importlib.import_module("flashinfer"),
            _flashinfer_refusals,
            _make_flashinfer,
        ),
    )
}
