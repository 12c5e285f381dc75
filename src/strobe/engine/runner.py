"""A schedule to a Batch, a Batch to logits. Owns the tensors of the KV cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from strobe.attention.problem import Paged
from strobe.engine.config import EngineConfig
from strobe.engine.kv_cache import PageCopy
from strobe.engine.scheduler import Chunk, Schedule
from strobe.models.batch import Batch, KvTensors
from strobe.models.network import Model, tensors

_ONE_THREAD_FLOPS = 60e6
"""A step on a CPU of less work than this is run by one thread. With strobe-tiny, whose token takes 10
million, the products gained 6 % from a second one on a machine of two cores. Where others use the cores
too, each of a step's hundred small products waits for both threads: 51 ms a token against 3.1."""


class Runner:
    """Runs one model over one KV cache of `pages` pages."""

    def __init__(self, model: Model, config: EngineConfig, pages: int) -> None:
        self.model = model
        self.config = config
        self.kv_cache = KvTensors.allocate(
            model.config, pages, config.page_size, dtype=model.dtype, device=model.device
        )
        self._token_flops = 2 * sum(tensor.numel() for tensor in tensors(model.weights))

    def run(self, schedule: Schedule) -> torch.Tensor:
        """One forward pass; float32 logits `[rows, vocab_size]`: a row for each of `schedule.sampled`,
        then one for each token of the chunks `schedule.scored`."""
        if schedule.copies:
            self._copy_pages(schedule.copies)
        with torch.inference_mode(), self._threads(schedule.tokens):
            return self.model(self.batch(schedule))

    def batch(self, schedule: Schedule) -> Batch:
        """The schedule's tokens, rows in the order of its chunks."""
        chunks, page_size = schedule.chunks, self.config.page_size
        starts = np.array([chunk.start for chunk in chunks], dtype=np.int64)
        ends = np.array([chunk.end for chunk in chunks], dtype=np.int64)
        counts = ends - starts
        table = _page_table(chunks)
        row_ends = np.cumsum(counts)
        uniform = bool((counts == counts[0]).all())
        if uniform and counts[0] == 1:
            token_ids = np.array([chunk.sequence.tokens[chunk.start] for chunk in chunks], dtype=np.int64)
            positions, rows = starts, np.arange(len(chunks))
        else:
            token_ids = np.concatenate(
                [np.array(c.sequence.tokens[c.start : c.end], dtype=np.int64) for c in chunks]
            )
            rows = np.repeat(np.arange(len(chunks)), counts)
            positions = np.arange(len(token_ids)) + (ends - row_ends)[rows]
        logits_at = row_ends[list(schedule.sampled_chunks)] - 1
        if schedule.scored:
            scored = [np.arange(row_ends[i] - counts[i], row_ends[i]) for i in schedule.scored]
            logits_at = np.concatenate([logits_at, *scored])
        slots = table[rows, positions // page_size].astype(np.int64) * page_size + positions % page_size
        layout = Paged(
            page_table=self._tensor(table),
            seq_lens=self._tensor(ends.astype(np.int32)),
            cu_seqlens_q=None if uniform else self._tensor(np.concatenate(([0], row_ends)).astype(np.int32)),
            max_q_len=int(counts.max()),
            max_kv_len=int(ends.max()),
        )
        return Batch(
            token_ids=self._tensor(token_ids),
            positions=self._tensor(positions),
            slots=self._tensor(slots),
            layout=layout,
            logits_at=self._tensor(logits_at),
            kv_cache=self.kv_cache,
            attention_kernel=self.config.attention_kernel,
            linear_kernel=self.config.linear_kernel,
        )

    @contextmanager
    def _threads(self, tokens: int) -> Iterator[None]:
        """As many of torch's threads as a step of so many tokens deserves."""
        all_threads = torch.get_num_threads()
        if self.model.device.type != "cpu" or self._token_flops * tokens >= _ONE_THREAD_FLOPS:
            yield
            return
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(all_threads)

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.model.device, non_blocking=True)

    def _copy_pages(self, copies: Sequence[PageCopy]) -> None:
        sources, targets = (
            torch.tensor(pages, device=self.model.device) for pages in zip(*copies, strict=True)
        )
        for tensor in (self.kv_cache.k, self.kv_cache.v):
            tensor[:, targets] = tensor[:, sources]


def _page_table(chunks: Sequence[Chunk]) -> np.ndarray:
    """int32 `[rows, longest]`; past a row's pages it holds 0, which nothing reads."""
    lists = [chunk.sequence.pages.pages for chunk in chunks]
    table = np.zeros((len(lists), max(map(len, lists))), dtype=np.int32)
    for row, pages in zip(table, lists, strict=True):
        row[: len(pages)] = pages
    return table
