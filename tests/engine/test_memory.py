"""How many pages a device's memory gives, and what is said where it gives none."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from strobe.engine.config import EngineConfig
from strobe.engine.memory import GIB, Memory, MemoryPlan, plan_memory
from strobe.errors import SettingsError
from strobe.models.network import allocate, tensors
from strobe.models.shapes import named

SHAPE = named("llama3-8b")
PAGE_BYTES = 2 * 32 * 16 * 8 * 128 * 2


@dataclass
class Placed:
    """A model's sizes on some device, without its weights."""

    device: torch.device
    config = SHAPE
    dtype = torch.bfloat16
    weights = allocate(SHAPE, device="meta", dtype=torch.bfloat16)


GPU, CPU = Placed(torch.device("cuda", 0)), Placed(torch.device("cpu"))
WEIGHTS = sum(tensor.nbytes for tensor in tensors(GPU.weights))


def plan(memory: Memory, model=GPU, **options) -> MemoryPlan:
    return plan_memory(model, EngineConfig(**options), memory)


H200 = Memory(free=139 * GIB - WEIGHTS, total=140 * GIB)


@given(
    total=st.integers(20, 200),
    others=st.integers(0, 60),
    fraction=st.none() | st.floats(0.05, 1.0),
    seqs=st.integers(1, 600),
    graphs=st.booleans(),
)
def test_what_is_planned_fits(total, others, fraction, seqs, graphs):
    memory = Memory(max(0, (total - others) * GIB - WEIGHTS), total * GIB)
    options = {"max_num_seqs": seqs, "max_num_batched_tokens": 2048, "gpu_memory_fraction": fraction}
    options["graphs"] = graphs
    try:
        found = plan(memory, **options)
    except SettingsError:
        assert memory.free < 8 * GIB or fraction is not None
        return
    taken = found.pages * found.page_bytes + found.workspace + found.graphs
    assert taken <= memory.free
    if fraction is not None:
        assert memory.total - memory.free + taken <= fraction * memory.total
    assert found.page_bytes == PAGE_BYTES
    assert found.max_model_len == min(SHAPE.max_position, found.pages * 16)
    assert found.pages <= seqs * (SHAPE.max_position // 16)


def test_the_plan_is_told_in_one_line():
    found = plan(H200)
    text = str(found)
    assert "\n" not in text
    assert f"weights {WEIGHTS / GIB:.3g} GiB" in text
    assert f"for {found.pages * 16:,} tokens" in text
    assert "of 140 GiB" in text
    assert "CUDA graphs" not in text
    recorded = plan(H200, graphs=True)
    assert f"{recorded.graphs / GIB:.3g} GiB for CUDA graphs" in str(recorded)
    left = H200.free - recorded.pages * PAGE_BYTES - recorded.workspace - recorded.graphs
    assert f"{left / GIB:.3g} GiB left free" in str(recorded)


def test_a_fraction_takes_that_much_and_no_more():
    half, most = plan(H200, gpu_memory_fraction=0.5), plan(H200, gpu_memory_fraction=0.95)
    assert half.pages < most.pages
    used = H200.total - H200.free + half.workspace + half.pages * half.page_bytes
    assert 0.49 < used / H200.total <= 0.5


@pytest.mark.parametrize(
    ("memory", "options", "message"),
    [
        (H200, {"kv_cache_gib": 500.0}, "would take 500.00 GiB"),
        (H200, {"kv_cache_gib": 1e-6}, "a page of this model takes"),
        (H200, {"gpu_memory_fraction": 0.05}, "gpu_memory_fraction is 0.05; .* take 0.1[0-9] of 140 GiB"),
        (H200, {"max_model_len": 8192, "kv_cache_gib": 0.5}, "hold 4096 tokens"),
        (Memory(0, 16 * GIB), {}, "GiB are free"),
    ],
    ids=str,
)
def test_too_little_is_one_error_that_says_what_would_fit(memory, options, message):
    with pytest.raises(SettingsError, match=message):
        plan(memory, **options)


def test_the_hints_hold():
    """What an error proposes is then accepted, and gives the context that it promises."""
    with pytest.raises(SettingsError) as raised:
        plan(H200, kv_cache_gib=500.0)
    gib, context = re.fullmatch(
        r"kv_cache_gib=(\S+) would fit, for a context of (\d+) tokens", raised.value.hint
    ).groups()
    found = plan(H200, kv_cache_gib=float(gib))
    assert found.pages * 16 == pytest.approx(int(context), rel=0.01)
    with pytest.raises(SettingsError) as raised:
        plan(H200, gpu_memory_fraction=0.05)
    context, least = re.fullmatch(r"a context of (\d+) tokens fits from (\S+) on", raised.value.hint).groups()
    assert plan(H200, gpu_memory_fraction=float(least)).max_model_len == int(context)
    with pytest.raises(SettingsError) as raised:
        plan(H200, max_model_len=8192, kv_cache_gib=0.5)
    fits = int(re.search(r"lower max_model_len to (\d+)", raised.value.hint)[1])
    assert plan(H200, max_model_len=fits, kv_cache_gib=0.5).max_model_len == fits


def test_a_fraction_is_for_a_gpu():
    with pytest.raises(SettingsError, match="on no GPU"):
        plan(H200, CPU, gpu_memory_fraction=0.5)


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, float("nan"), "half", True])
def test_a_fraction_is_one(fraction):
    with pytest.raises(SettingsError, match="gpu_memory_fraction is"):
        EngineConfig(gpu_memory_fraction=fraction)


@pytest.mark.parametrize("size", [{"kv_cache_gib": 1.0}, {"kv_cache_pages": 8}], ids=str)
def test_one_size_is_enough(size):
    with pytest.raises(SettingsError, match="beside a size of the KV cache"):
        EngineConfig(gpu_memory_fraction=0.5, **size)


def test_a_step_that_needs_more_leaves_less_for_the_cache():
    small, large = (
        plan(replace(H200, free=20 * GIB), max_num_batched_tokens=n, gpu_memory_fraction=1.0)
        for n in (512, 1 << 16)
    )
    assert small.workspace < large.workspace
    assert small.pages > large.pages
