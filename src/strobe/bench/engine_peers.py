"""Engines that are timed in this process, strobe's own and transformers', each as it is meant to be used."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from strobe.bench.foreign import transformers_network
from strobe.bench.subject import Subject
from strobe.engine import Request, SamplingParams
from strobe.errors import CheckpointError, MissingExtraError, UnknownNameError


@dataclass(frozen=True)
class Generation:
    """Greedy tokens of one prompt, and the seconds from its start to each."""

    token_ids: tuple[int, ...]
    at_s: tuple[float, ...]


class Strobe:
    """strobe itself, its prefix cache emptied before each run so that none is served from the last."""

    name = "strobe"

    def __init__(self, subject: Subject) -> None:
        self.engine = subject.engine

    def one(self, prompt: Sequence[int], output: int) -> Generation:
        self._forget()
        tokens: list[int] = []
        at: list[float] = []
        start = time.perf_counter()
        self.engine.add(Request("0", tuple(prompt), _greedy(output), stream=True))
        while self.engine.has_work:
            for chunk in self.engine.step():
                tokens += chunk.token_ids
                at += [time.perf_counter() - start] * len(chunk.token_ids)
        return Generation(tuple(tokens), tuple(at))

    def many(self, prompts: Sequence[Sequence[int]], outputs: Sequence[int]) -> list[tuple[int, ...]]:
        """Every prompt's greedy tokens, all served together."""
        self._forget()
        requests = [
            Request(str(index), tuple(prompt), _greedy(output))
            for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
        ]
        for request in requests:
            self.engine.add(request)
        while self.engine.has_work:
            self.engine.step()
        return [request.output().outputs[0].token_ids for request in requests]

    def _forget(self) -> None:
        self.engine.scheduler.cache.clear()


def _greedy(output: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)


class Transformers:
    """transformers' `generate` in the model's own dtype, on its device; batches are padded on the left.

    Random weights are shared with strobe's network; a checkpoint is read once more.

    Raises:
        CheckpointError: the checkpoint is no Hugging Face folder, the only kind that transformers reads.
        MissingExtraError: transformers is not installed.
    """

    name = "transformers"

    def __init__(self, subject: Subject) -> None:
        path, ours = subject.folder, subject.model
        if path is not None and not (path / "config.json").is_file():
            raise CheckpointError(f"{path} is no Hugging Face folder, the only kind that transformers reads")
        try:
            from transformers import AutoModelForCausalLM, GenerationConfig, logging
        except ImportError:
            raise MissingExtraError.of("transformers", "integrations") from None
        logging.disable_progress_bar()
        if path is None:
            self.model = transformers_network(ours)
        else:
            loader: Any = AutoModelForCausalLM
            model = loader.from_pretrained(
                path, dtype=ours.dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
            )
            self.model = model.to(ours.device).eval()
        self.model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)

    def one(self, prompt: Sequence[int], output: int) -> Generation:
        clock = _Clock()
        (row,) = self._generate([prompt], output, streamer=clock)
        return Generation(tuple(row), tuple(at - clock.start for at in clock.at))

    def many(
        self, prompts: Sequence[Sequence[int]], outputs: Sequence[int], batch: int
    ) -> list[tuple[int, ...]]:
        """Batches of prompts of like length, each run until its longest output is done."""
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        found: list[tuple[int, ...]] = [()] * len(prompts)
        for start in range(0, len(order), batch):
            members = order[start : start + batch]
            rows = self._generate([prompts[i] for i in members], max(outputs[i] for i in members))
            for index, row in zip(members, rows, strict=True):
                found[index] = tuple(row[: outputs[index]])
        return found

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """float32 `[vocab_size]` after these tokens."""
        with torch.inference_mode():
            return self.model(torch.tensor([token_ids], device=self.model.device)).logits[0, -1].float()

    def _generate(self, prompts: Sequence[Sequence[int]], output: int, **options: Any) -> list[list[int]]:
        longest = max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        device = self.model.device
        with torch.inference_mode():
            out = self.model.generate(
                ids.to(device), attention_mask=mask.to(device), max_new_tokens=output, **options
            )
        return out[:, longest:].tolist()


class _Clock:
    """A transformers streamer that keeps the time of each token; the prompt is put first."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.at: list[float] = []
        self._prompt = True

    def put(self, value: Any) -> None:
        if not self._prompt:
            self.at.append(time.perf_counter())
        self._prompt = False

    def end(self) -> None:
        pass


PEERS = {"transformers": Transformers}


def named(name: str, subject: Subject) -> Transformers:
    """The peer of this name, loaded. Raises UnknownNameError."""
    if name not in PEERS:
        raise UnknownNameError.among("peer", name, PEERS)
    return PEERS[name](subject)
