"""The engine's benchmark checks answers first, and times what it says it times."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch

from strobe.bench import engine, engine_peers
from strobe.bench.engine import agree, latency, throughput
from strobe.bench.engine_cases import Load
from strobe.bench.engine_peers import Generation
from strobe.bench.subject import subject
from strobe.engine import EngineConfig
from strobe.errors import CheckpointError, StrobeError, UnknownNameError

VOCAB = 60


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("bench")
    torch.manual_seed(torch.seed() % 2**31)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=96, initializer_range=0.4, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return subject(
        folder, None, device="cpu", config=EngineConfig(kv_cache_pages=64, attention_kernel="torch_naive")
    )


@pytest.fixture(scope="module")
def peer(ours):
    return engine_peers.named("transformers", ours)


def test_latency_rows_of_both_engines(ours, peer):
    first, second = latency(ours, peer, prompt=20, output=9, runs=2)
    assert [first["provider"], second["provider"]] == ["strobe", "transformers"]
    assert first["case"] == second["case"]
    assert first["checked"] is second["checked"] is True
    for row in (first, second):
        assert 0 < row["ttft_ms_min"] <= row["ttft_ms"] <= row["ttft_ms_max"]
        assert 0 < row["tpot_ms_min"] <= row["tpot_ms"] <= row["tpot_ms_max"]
        assert row["tpot_ms_p50"] <= row["tpot_ms_p99"]
        assert row["tok_s"] == pytest.approx(1e3 / row["tpot_ms"])


def test_throughput_rows_count_wanted_tokens_alone(ours, peer):
    load = Load(5, (3, 20), (2, 9), seed=3)
    first, second = throughput(ours, peer, load, runs=2, batches=(2, 4))
    _, outputs = load.draw(VOCAB)
    assert first["checked"] is second["checked"] is True
    assert first["output_tokens"] == second["output_tokens"] == sum(outputs)
    assert second["best_batch"] in (2, 4)
    for row in (first, second):
        assert row["tok_s"] == pytest.approx(sum(outputs) / row["s"])


def test_without_a_peer_torchs_own_calls_are_the_judge(ours, monkeypatch):
    assert [row["checked"] for row in latency(ours, prompt=4, output=3, runs=1)] == [True]
    assert [row["checked"] for row in throughput(ours, load=Load(2, (3, 4), (2, 3)), runs=1)] == [True]
    honest = engine_peers.Strobe.many

    def lying(self, prompts, outputs):
        return [tuple((token + 1) % VOCAB for token in answer) for answer in honest(self, prompts, outputs)]

    monkeypatch.setattr(engine_peers.Strobe, "many", lying)
    assert [row["checked"] for row in throughput(ours, load=Load(2, (3, 4), (2, 3)), runs=1)] == [False]


def test_no_run_is_served_from_the_last_ones_pages(ours):
    strobe = engine_peers.Strobe(ours)
    prompt = [3] * 40
    hits = ours.engine.stats().prefix_hits
    for _ in range(2):
        strobe.one(prompt, 2)
        strobe.many([prompt], [2])
    assert ours.engine.stats().prefix_hits == hits


def test_a_padded_batch_answers_as_each_prompt_alone(peer):
    prompts, outputs = Load(4, (3, 30), (2, 8), seed=9).draw(VOCAB)
    together = peer.many(prompts, outputs, 4)
    assert [len(tokens) for tokens in together] == outputs
    assert together == [peer.one(p, n).token_ids for p, n in zip(prompts, outputs, strict=True)]


def test_an_engine_that_answers_otherwise_fails_the_check(ours, peer, monkeypatch):
    honest = engine_peers.Strobe.one

    def lying(self, prompt: Sequence[int], output: int) -> Generation:
        answer = honest(self, prompt, output)
        wrong = tuple((token + 1) % VOCAB for token in answer.token_ids)
        return Generation(wrong, answer.at_s)

    monkeypatch.setattr(engine_peers.Strobe, "one", lying)
    assert [row["checked"] for row in latency(ours, peer, prompt=5, output=4, runs=1)] == [False, False]


def test_tokens_may_differ_only_where_logits_tie():
    tied = torch.zeros(VOCAB)
    tied[[4, 5, 6]] = torch.tensor([10.0, 10.0 - 1e-4, 9.0])
    fake = SimpleNamespace(logits=lambda tokens: tied)
    same, tie, other = (Generation((7, token), ()) for token in (4, 5, 6))
    assert agree(fake, [1], same, same)
    assert agree(fake, [1], tie, same)
    assert not agree(fake, [1], other, same)


def test_percentiles_are_nearest_rank():
    values = [float(n) for n in range(1, 201)]
    assert engine._percentile(values, 50) == 100
    assert engine._percentile(values, 99) == 198
    assert engine._percentile([5.0], 99) == 5


@pytest.mark.parametrize(
    "load", [{"requests": 0}, {"requests": 10**9}, {"prompt": (0, 5)}, {"output": (9, 5)}], ids=str
)
def test_a_load_that_cannot_be_is_refused(load):
    with pytest.raises(StrobeError, match=next(iter(load))):
        Load(**load)


def test_peers_that_cannot_be_are_refused(ours, tmp_path):
    with pytest.raises(UnknownNameError, match="did you mean 'transformers'"):
        engine_peers.named("transfomers", ours)
    with pytest.raises(CheckpointError, match="no Hugging Face folder"):
        engine_peers.Transformers(SimpleNamespace(folder=tmp_path, model=None))
