"""What `sampling` says, drawn on a GPU: one launch for a batch, no sort, and no host that waits.

How the rows are drawn lies on the device in a `Table`, which is built when the batch's rows change; from
step to step the kernel itself counts positions and penalised tokens on.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import torch

from strobe.cuda import jit
from strobe.device import gpu
from strobe.ops import kernels
from strobe.ops.sampling import streams

_SOURCE = Path(__file__).with_suffix(".cu")
_THREADS = 512
_MOST_BLOCKS = 8
"""Of a cluster: what every GPU that has clusters can place."""
_SLICE = 16384
"""Tokens of a row that a block holds at most, where more blocks would do."""
_PADDING = 16
_STATIC_SHARED = 21 * 1024

ROW = np.dtype(
    [
        ("stream", np.uint64),
        ("counts", np.uint64),
        ("position", np.int32),
        ("min_tokens", np.int32),
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("log_min_p", np.float32),
        ("top_k", np.int32),
        ("repetition", np.float32),
        ("presence", np.float32),
        ("frequency", np.float32),
        ("edits", np.int32),
        ("biases", np.int32),
        ("forbidden", np.int32),
        ("mask", np.int32),
    ],
    align=True,
)
"""`Row` of sampling_cuda.cu; `greedy_row` fills one in. `counts` is the address of int32 `[vocab]`, or 0."""
EDIT = np.dtype([("token", np.int32), ("bias", np.float32)])


def greedy_row(seed: int, vocab: int) -> np.ndarray:
    """A row `[1]` that takes the likeliest token, to be changed field by field."""
    row = np.zeros(1, ROW)
    row["stream"] = streams(np.array([seed], np.uint64))
    row["top_k"], row["top_p"], row["log_min_p"] = vocab, 1, -np.inf
    row["repetition"], row["mask"] = 1, -1
    return row


def refusals(vocab: int, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Why the kernels do not take logits `[rows, vocab]` there; empty where they do."""
    if device.type != "cuda":
        return [f"runs on NVIDIA GPUs; device is {device.type!r}"]
    found = (
        [] if dtype in kernels.SCALAR else [f"takes {', '.join(map(str, kernels.SCALAR))}; dtype is {dtype}"]
    )
    seen = gpu(device.index or 0)
    needed, most = _slice_bytes(vocab, _MOST_BLOCKS) + _STATIC_SHARED, seen.shared_memory_per_block
    if seen.arch >= 90 and needed > most:
        found.append(f"needs {needed} bytes of shared memory for {vocab} tokens; a block has {most}")
    return found


class Table:
    """How each row of a batch is drawn: one buffer on the device, the rows first.

    Its address changes only where it must grow, so that a CUDA graph of as many rows may hold it.
    """

    def __init__(self, device: torch.device) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)
        self._edits_at = 0

    def load(self, rows: np.ndarray, edits: np.ndarray) -> None:
        """Send `rows` of ROW and their `edits` of EDIT: from a row's `edits` on its biases, then its
        forbidden tokens, no token twice in either."""
        packed = np.concatenate((rows.view(np.uint8), edits.view(np.uint8)))
        if len(packed) > self._buffer.shape[0]:
            self._buffer = self._buffer.new_empty(2 * len(packed))
        self._buffer[: len(packed)].copy_(torch.from_numpy(packed), non_blocking=True)
        self._edits_at = rows.nbytes

    @property
    def rows_at(self) -> int:
        return self._buffer.data_ptr()

    @property
    def edits_at(self) -> int:
        return self._buffer.data_ptr() + self._edits_at


class _Sample(ctypes.Structure):
    """`Sample` of sampling_cuda.cu."""

    _fields_ = [
        ("logits", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("rows", "edits", "allowed", "tokens", "copy", "scratch")),
        *((name, ctypes.c_int) for name in ("count", "vocab", "mask_words")),
    ]


class _Score(ctypes.Structure):
    """`Score` of sampling_cuda.cu."""

    _fields_ = [
        ("logits", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("rows", "tokens", "chosen", "values", "ids", "scratch")),
        *((name, ctypes.c_int) for name in ("count", "vocab", "top")),
    ]


def sample(
    logits: torch.Tensor,
    table: Table | None = None,
    allowed: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    copy: torch.Tensor | None = None,
) -> torch.Tensor:
    """Token ids int64 `[rows]` from logits `[rows, vocab]`, in one launch; in the first rows of `out` where
    it is given, and where `copy` is, in the first rows of that too, pinned memory of the host.

    Logits are float32, bfloat16 or float16, each row contiguous.

    Row i is drawn as row i of `table` says, without one greedily. `allowed` int32 `[masks, words]` has a
    bit for each token, the lowest first: what the rows that name a mask may draw.
    """
    rows = logits.shape[0]
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device) if out is None else out[:rows]
    params = _Sample(
        logits=logits.data_ptr(),
        stride=logits.stride(0),
        tokens=tokens.data_ptr(),
        copy=None if copy is None else copy.data_ptr(),
        count=rows,
        vocab=logits.shape[1],
    )
    if table is not None:
        params.rows, params.edits = table.rows_at, table.edits_at
    if allowed is not None:
        params.allowed, params.mask_words = allowed.data_ptr(), allowed.stride(0)
    _launch("sample", logits, params)
    return tokens


def logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, top: int, rows: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `sampling.logprobs`, of the `rows` int32 `[n]` of logits and tokens: all without. `top` is no more
    than the vocabulary; of tokens that are equally likely the lowest ids come first."""
    count = logits.shape[0] if rows is None else rows.shape[0]
    chosen = torch.empty(count, dtype=torch.float32, device=logits.device)
    values = torch.empty((count, top), dtype=torch.float32, device=logits.device)
    ids = torch.empty((count, top), dtype=torch.int64, device=logits.device)
    params = _Score(
        logits=logits.data_ptr(),
        stride=logits.stride(0),
        rows=None if rows is None else rows.data_ptr(),
        tokens=tokens.data_ptr(),
        chosen=chosen.data_ptr(),
        values=values.data_ptr(),
        ids=ids.data_ptr(),
        count=count,
        vocab=logits.shape[1],
        top=top,
    )
    _launch("score", logits, params)
    return chosen, values, ids


def sources(arch: str) -> list[jit.Source]:
    return [jit.Source(_SOURCE, {"scalar_t": scalar}) for scalar in kernels.SCALAR.values()]


def blocks_for(rows: int, vocab: int, sm_count: int, *, holds: bool) -> int:
    """Blocks that share a row: more where the rows alone would leave SMs idle, and where each `holds` its
    slice in shared memory, so many that two of them fit an SM. No answer depends on it."""
    blocks, most = 1, _SLICE if holds else vocab
    while blocks < _MOST_BLOCKS:
        slice_size = -(-vocab // blocks)
        if slice_size <= (2048 if 2 * blocks * rows <= sm_count else most):
            break
        blocks *= 2
    return blocks


def _slice_bytes(vocab: int, blocks: int) -> int:
    """Of the part of a row that one of its blocks holds as float32."""
    return 4 * (-(-vocab // (8 * blocks)) * 8 + _PADDING)


def _launch(entry: str, logits: torch.Tensor, params: _Sample | _Score) -> None:
    if not params.count:
        return
    index, vocab = logits.get_device(), params.vocab
    kernel = jit.kernel(_SOURCE, entry, {"scalar_t": kernels.SCALAR[logits.dtype]}, index)
    seen = gpu(index)
    holds = entry == "score" or bool(params.rows)  # the likeliest of a row is found on the way
    if seen.arch >= 90:
        blocks = blocks_for(params.count, vocab, seen.sm_count, holds=holds)
        shared = _slice_bytes(vocab, blocks) if holds else 0
        grid = params.count * blocks
        kernel(grid, _THREADS, params, shared_bytes=shared, cluster=blocks, programmatic=True)
        return
    grid = min(params.count, 2 * seen.sm_count)
    if holds:
        scratch = torch.empty(grid * _slice_bytes(vocab, 1), dtype=torch.uint8, device=logits.device)
        params.scratch = scratch.data_ptr()
    kernel(grid, _THREADS, params)
