"""What is made and launched for one GPU stays there, whichever is the current device."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

import strobe
from strobe.attention.cases import Case
from strobe.engine.config import EngineConfig
from strobe.engine.engine import Engine
from strobe.engine.request import Request
from strobe.engine.sampling_params import SamplingParams
from strobe.integrations.flash_attn import flash_attn_with_kvcache
from strobe.linear.projection import Projection
from strobe.models.shapes import named, random_model
from strobe.ops import cache, rope

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
TURNS = [(current, index) for current in (0, 1, 0) for index in (1, 0, 1)]


@pytest.mark.parametrize(
    ("memory", "rows"),
    [
        ("dense", ((70, 130),) * 2),
        ("dense", ((1, 700),) * 2),
        ("packed", ((70, 130), (33, 40))),
        ("paged", ((1, 5000), (1, 40))),
        ("paged", ((100, 500), (30, 31))),
    ],
)
def test_attention_runs_where_its_tensors_are(memory: str, rows: tuple[tuple[int, int], ...]) -> None:
    case = Case("two gpus", rows, 4, 2, 128, layout=memory, causal=True)
    drawn = []
    for index in range(2):
        torch.manual_seed(7)
        drawn.append(case.inputs(torch.bfloat16, f"cuda:{index}"))
    expected = strobe.attention(drawn[0].q, drawn[0].k, drawn[0].v, **drawn[0].options)
    for current, index in TURNS:
        inputs = drawn[index]
        with torch.cuda.device(current):
            for _ in range(2):
                out = strobe.attention(inputs.q, inputs.k, inputs.v, **inputs.options)
                assert out.get_device() == index
                assert torch.equal(out.to("cuda:0"), expected)
            assert torch.cuda.current_device() == current


def test_a_cache_is_written_where_it_is() -> None:
    torch.manual_seed(1)
    qkv = torch.randn(5, 4 + 2 * 2, 64, device="cuda:0").bfloat16()
    positions = torch.randint(1000, (5,), device="cuda:0")
    turn = rope.angles(positions, rope.signed([1e4 ** (-i / 32) for i in range(32)], "cuda:0"), qkv.dtype)
    slots = torch.randperm(32, device="cuda:0")[:5]
    told = []
    for current, index in TURNS:
        with torch.cuda.device(current):
            there = [x.to(f"cuda:{index}") for x in (qkv, *turn, slots)]
            k, v = torch.zeros(2, 2, 16, 2, 64, dtype=qkv.dtype, device=f"cuda:{index}")
            q = cache.append_rotated(there[0][:, :6], there[0][:, 6:], (there[1], there[2]), k, v, there[3])
            assert q.get_device() == index
            told.append([x.cpu() for x in (q, k, v)])
    for each in told[1:]:
        for ours, first in zip(each, told[0], strict=True):
            assert torch.equal(ours, first)


def test_flash_attn_s_cache_on_both() -> None:
    torch.manual_seed(2)
    given = [torch.randn(2, n, 4, 64).bfloat16() for n in (1, 300, 300, 1, 1)]
    told = []
    for current, index in TURNS:
        with torch.cuda.device(current):
            q, k, v, new_k, new_v = (x.to(f"cuda:{index}") for x in given)
            lengths = torch.tensor([100, 7], dtype=torch.int32, device=f"cuda:{index}")
            out = flash_attn_with_kvcache(q, k, v, new_k, new_v, cache_seqlens=lengths, causal=True)
            told.append((out.cpu(), k.cpu()))
    for out, k in told[1:]:
        assert torch.equal(out, told[0][0])
        assert torch.equal(k, told[0][1])


@pytest.mark.parametrize(("tokens", "kernel"), [(3, "cuda_skinny"), (40, "cuda_wgmma"), (3, "auto")])
def test_products_on_both(tokens: int, kernel: str) -> None:
    torch.manual_seed(3)
    weight, norm = torch.randn(512, 1024).bfloat16() / 32, torch.rand(1024).bfloat16()
    x = torch.randn(tokens, 1024).bfloat16()
    products = [
        Projection(weight.to(f"cuda:{i}"), norm=norm.to(f"cuda:{i}"), norm_eps=1e-5) for i in range(2)
    ]
    told = []
    for current, index in TURNS:
        with torch.cuda.device(current):
            told.append(products[index](x.to(f"cuda:{index}"), kernel=kernel).cpu())
    assert all(torch.equal(each, told[0]) for each in told[1:])


def test_engines_on_both_write_the_same() -> None:
    """Step by step in turn, with graphs, greedy and drawn, chunks of prompts beside decoding rows."""
    config = replace(named("llama3.2-1b"), layers=2, max_position=4096)
    engines = []
    for index in range(2):
        model = random_model(config, device=f"cuda:{index}", dtype=torch.bfloat16)
        settings = EngineConfig(kv_cache_pages=600, max_num_seqs=8, max_num_batched_tokens=256)
        engines.append(Engine(model, None, settings))
    rng = random.Random(5)
    prompts = [tuple(rng.randrange(config.vocab_size) for _ in range(n)) for n in (3, 40, 300, 17)]
    asked = []
    for engine in engines:
        requests = [
            Request(str(i), prompt, SamplingParams(temperature=i % 2, seed=i, max_tokens=30, ignore_eos=True))
            for i, prompt in enumerate(prompts)
        ]
        for request in requests:
            engine.add(request)
        asked.append(requests)
    while any(engine.has_work for engine in engines):
        for engine in engines:
            if engine.has_work:
                engine.step()
        assert torch.cuda.current_device() == 0
    told = [[request.output().outputs[0].token_ids for request in requests] for requests in asked]
    assert told[0] == told[1]
    assert all(len(tokens) == 30 for tokens in told[0])
