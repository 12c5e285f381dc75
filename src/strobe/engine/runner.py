"""A schedule to a Batch, a Batch to logits. Owns the tensors of the KV cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from strobe.attention.problem import DECODE_MAX_Q_LEN, Paged
from strobe.engine.config import EngineConfig
from strobe.engine.deterministic import decode_kernels
from strobe.engine.graphs import PROMPT_SIZES, StepGraphs, decode_sizes, recorder_for
from strobe.engine.inputs import StepInputs, inputs_of, padded, padded_prompt, table_width
from strobe.engine.scheduler import Schedule
from strobe.engine.transfer import Staging, in_place, nbytes
from strobe.models.batch import Batch, KvTensors
from strobe.models.network import Model, tensors

_ONE_THREAD_FLOPS = 60e6
"""A step on a CPU of less work than this is run by one thread. With strobe-tiny, whose token takes 10
million, the products gained 6 % from a second one on a machine of two cores. Where others use the cores
too, each of a step's hundred small products waits for both threads: 51 ms a token against 3.1."""


class Runner:
    """Runs one model over one KV cache of `pages` pages, each sequence of up to `max_model_len` tokens."""

    def __init__(self, model: Model, config: EngineConfig, pages: int, max_model_len: int) -> None:
        self.model = model
        self.config = config
        self._nobody = pages  # the page after the last: sequences that only pad write there
        self.kv_cache = KvTensors.allocate(
            model.config, pages + 1, config.page_size, dtype=model.dtype, device=model.device
        )
        self.staging = Staging(
            model.device, head=config.max_num_seqs, capacity=_capacity(config, max_model_len)
        )
        recorder = recorder_for(model.device) if config.graphs else None
        self.graphs = StepGraphs(decode_sizes(config.max_num_seqs), recorder) if recorder else None
        prompts = tuple(size for size in PROMPT_SIZES if size <= config.step_tokens)
        self.prompt_graphs = StepGraphs(prompts, recorder) if recorder else None
        on_cpu = model.device.type == "cpu" and not config.overlap and self.graphs is None
        self._send = in_place if on_cpu else self.staging.send
        self._kernels = config.attention_kernel, config.linear_kernel
        self._decode_kernels = decode_kernels(model) if config.deterministic else self._kernels
        self._token_flops = 2 * sum(tensor.numel() for tensor in tensors(model.weights))

    @torch.inference_mode()
    def run(self, schedule: Schedule) -> torch.Tensor:
        """One forward pass; logits `[rows, vocab_size]`, like the weights: a row for each of
        `schedule.sampled`, then one for each token of the chunks `schedule.scored`. The next run may
        overwrite them.

        Tokens that the host has not read yet are taken from `drawn`.
        """
        inputs = inputs_of(schedule, self.config.page_size, self.staging.first_word)
        kernels = self._decode_kernels if schedule.decodes else self._kernels
        chosen = self._graphs_for(schedule, inputs)
        if chosen is not None:
            graphs, size, inputs = chosen
            batch, width = self._stage(inputs, kernels), inputs.page_table.shape[1]
            return graphs.run(size, width, lambda: self.model(batch()))[: len(schedule.sampled)]
        batch = self._stage(inputs, kernels)
        with self._threads(schedule.tokens):
            return self.model(batch())

    @property
    def drawn(self) -> torch.Tensor | None:
        """Where a step's tokens go, int64 on the device: rows of the next step go on from them."""
        return self.staging.drawn if self.config.overlap else None

    def _graphs_for(
        self, schedule: Schedule, inputs: StepInputs
    ) -> tuple[StepGraphs, int, StepInputs] | None:
        """The graphs that run such a step, their size, and the inputs padded to it; None: it runs eagerly."""
        page_size, graphs = self.config.page_size, self.graphs if schedule.decodes else self.prompt_graphs
        if graphs is None:
            return None
        if schedule.decodes:
            size = graphs.size_for(len(schedule.sampled))
            if size is None:
                return None
            return graphs, size, padded(inputs, size, page_size, self.staging.first_word, self._nobody)
        # few tokens are the decode kernels' work; deterministic: a prompt's products have sizes of their own
        if schedule.tokens <= DECODE_MAX_Q_LEN or self.config.deterministic:
            return None
        alone = len(schedule.chunks) == len(schedule.sampled) == 1 and not schedule.scored
        size = graphs.size_for(schedule.tokens)
        if not alone or size is None or inputs.picks is not None:
            return None
        return graphs, size, padded_prompt(inputs, size, page_size, self._nobody)

    def _stage(self, inputs: StepInputs, kernels: tuple[str, str]) -> Callable[[], Batch]:
        """Send a step's arrays. What is returned makes the Batch of what lies in their places when called."""
        attention, linear = kernels
        given = {name: array for name in _SENT if (array := getattr(inputs, name)) is not None}
        sent = dict(zip(given, self._send(list(given.values())), strict=True))
        if "copies" in sent:
            sources, targets = sent["copies"]
            for pages in (self.kv_cache.k, self.kv_cache.v):
                pages[:, targets] = pages[:, sources]

        def batch() -> Batch:
            picks = sent.get("picks")
            cu_seqlens, ahead = sent.get("cu_seqlens"), inputs.decoding

            def layout(rows: slice, cu_seqlens: torch.Tensor | None) -> Paged:
                return Paged(
                    page_table=sent["page_table"][rows],
                    seq_lens=sent["seq_lens"][rows],
                    cu_seqlens_q=cu_seqlens,
                    max_q_len=inputs.max_q_len,
                    max_kv_len=inputs.max_kv_len,
                    settled=True,
                )

            return Batch(
                token_ids=sent["token_ids"] if picks is None else self.staging.words,
                positions=sent["positions"],
                slots=sent["slots"],
                layout=layout(slice(ahead), None) if ahead else layout(slice(None), cu_seqlens),
                logits_at=sent.get("logits_at"),
                kv_cache=self.kv_cache,
                attention_kernel=attention,
                linear_kernel=linear,
                picks=picks,
                prompts=layout(slice(ahead, None), cu_seqlens) if ahead else None,
            )

        return batch

    @contextmanager
    def _threads(self, tokens: int) -> Iterator[None]:
        """As many of torch's threads as a step of so many tokens deserves."""
        all_threads = torch.get_num_threads()
        same = self.model.device.type != "cpu" or self.config.deterministic
        if same or self._token_flops * tokens >= _ONE_THREAD_FLOPS:
            yield
            return
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(all_threads)


_SENT = (
    "token_ids",
    "positions",
    "slots",
    "logits_at",
    "picks",
    "seq_lens",
    "cu_seqlens",
    "page_table",
    "copies",
)
"""The order in which arrays are sent: what only some steps have stands behind what a graph reads."""


def _capacity(config: EngineConfig, max_model_len: int) -> int:
    """Bytes of the largest step's arrays."""
    tokens, rows = config.step_tokens, config.max_num_seqs
    pages = table_width(-(-max_model_len // config.page_size))
    words = [tokens] * 4 + [tokens + rows, 2 * rows]  # token_ids, positions, slots, picks; logits_at; copies
    halves = [rows, rows + 1, rows * pages]  # seq_lens, cu_seqlens; page_table
    return nbytes([(count, 8) for count in words] + [(count, 4) for count in halves])
