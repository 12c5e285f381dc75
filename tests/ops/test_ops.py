"""Norms, activations, rotation and cache writes against the formula in float64, and their laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from strobe.errors import KernelRefusedError, UnknownNameError
from strobe.models.config import Rope
from strobe.ops import activation, cache, norm, rope

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 130))
SEEDS = st.integers(0, 2**31)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float32, spread: float = 3.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread).to(dtype)


def assert_rounds_to(given: torch.Tensor, reference: torch.Tensor, steps: int = 4) -> None:
    """Within a few roundings of the reference's largest value."""
    assert given.dtype == reference.dtype
    limit = steps * torch.finfo(given.dtype).eps * reference.double().abs().max().clamp(min=1e-3)
    assert (given.double() - reference.double()).abs().max() <= limit


@given(SHAPES, SEEDS, DTYPES)
def test_rms_norm(shape, seed, dtype):
    x, weight = randn(seed, *shape, dtype=dtype), randn(seed + 1, shape[1], dtype=dtype)
    assert_rounds_to(norm.rms_norm(x, weight, 1e-5), norm.rms_norm_reference(x, weight, 1e-5))


@pytest.mark.parametrize("rows", [1, 2])
def test_rms_norm_of_nothing_is_as_undefined_for_one_row_as_for_more(rows):
    assert norm.rms_norm(torch.zeros(rows, 8), torch.ones(8), 0.0).isnan().all()


@given(SHAPES, SEEDS)
def test_rms_norm_ignores_scale(shape, seed):
    x, weight = randn(seed, *shape).double(), randn(seed + 1, shape[1]).double()
    torch.testing.assert_close(norm.rms_norm(x * 32, weight, 0.0), norm.rms_norm(x, weight, 0.0))


@given(SHAPES, SEEDS, DTYPES)
def test_layer_norm(shape, seed, dtype):
    x = randn(seed, *shape, dtype=dtype)
    weight, bias = randn(seed + 1, shape[1], dtype=dtype), randn(seed + 2, shape[1], dtype=dtype)
    expected = norm.layer_norm_reference(x, weight, bias, 1e-5)
    assert_rounds_to(norm.layer_norm(x, weight, bias, 1e-5), expected, steps=16)


@given(SHAPES, SEEDS, DTYPES)
def test_swiglu(shape, seed, dtype):
    x = randn(seed, shape[0], 2 * shape[1], dtype=dtype)
    before = x.clone()
    assert_rounds_to(activation.swiglu(x), activation.swiglu_reference(x))
    assert torch.equal(x, before)


@given(SHAPES, SEEDS, DTYPES)
def test_gelu_tanh(shape, seed, dtype):
    x = randn(seed, *shape, dtype=dtype)
    # 1 + tanh cancels in the left tail: errors are of the size of x, not of the result
    expected = activation.gelu_tanh_reference(x)
    limit = 4 * torch.finfo(dtype).eps * x.double().abs().max()
    assert (activation.gelu_tanh(x).double() - expected.double()).abs().max() <= limit


@pytest.mark.parametrize("call", [lambda x, **k: norm.rms_norm(x, x[0], 1e-5, **k), activation.swiglu])
def test_a_kernel_asked_for_by_name_does_not_fall_back(call):
    x = torch.ones(2, 64)
    assert torch.equal(call(x, kernel="torch"), call(x))
    with pytest.raises(KernelRefusedError, match="tensors on cpu; needs an NVIDIA GPU"):
        call(x, kernel="cuda")
    with pytest.raises(UnknownNameError, match="known: auto, torch, cuda"):
        call(x, kernel="cudo")


def test_references_agree_with_torch():
    """The references are ours; torch's own functions in float64 are another hand's."""
    x, weight, bias = (randn(seed, 5, 34).double() for seed in (1, 2, 3))
    weight, bias = weight[0], bias[0]
    close = torch.testing.assert_close
    close(norm.rms_norm_reference(x, weight, 1e-5), F.rms_norm(x, (34,), weight, 1e-5))
    close(norm.layer_norm_reference(x, weight, bias, 1e-5), F.layer_norm(x, (34,), weight, bias, 1e-5))
    close(activation.swiglu_reference(x), F.silu(x[:, :17]) * x[:, 17:])
    close(activation.gelu_tanh_reference(x), F.gelu(x, approximate="tanh"))


@given(st.integers(1, 7), st.integers(1, 5), st.sampled_from([2, 6, 64, 128]), SEEDS, DTYPES)
def test_rotation(tokens, heads, head_dim, seed, dtype):
    x = randn(seed, tokens, heads, head_dim, dtype=dtype)
    positions = torch.randint(0, 500, (tokens,), generator=torch.Generator().manual_seed(seed))
    frequencies = Rope().frequencies(head_dim)
    cos, sin = rope.angles(positions, rope.signed(frequencies, "cpu"), dtype)
    expected = rope.rotate_reference(x, positions, frequencies)
    # a float32 angle near 500 is off by up to 2^-15 radians
    limit = (4 * torch.finfo(dtype).eps + 2**-14) * x.double().abs().max()
    assert (rope.rotate(x, cos, sin).double() - expected.double()).abs().max() <= limit


@given(st.integers(0, 100), st.integers(0, 100), st.integers(0, 400), SEEDS)
def test_rotated_products_depend_on_distance_alone(i, j, shift, seed):
    q, k = randn(seed, 1, 1, 32).double(), randn(seed + 1, 1, 1, 32).double()
    frequencies = Rope(scaling="llama3", factor=8.0, original_max_position=64).frequencies(32)

    def product(at_q: int, at_k: int) -> float:
        turned = [
            rope.rotate_reference(x, torch.tensor([at]), frequencies) for x, at in ((q, at_q), (k, at_k))
        ]
        return float((turned[0] * turned[1]).sum())

    assert product(i, j) == pytest.approx(product(i + shift, j + shift), abs=1e-9)


@given(st.floats(1e3, 1e7), st.floats(1.0, 64.0), st.integers(16, 1 << 17))
def test_llama3_scaling_keeps_fast_turns_and_stretches_slow_ones(theta, factor, original):
    plain = Rope(theta=theta).frequencies(128)
    scaled = Rope(theta=theta, scaling="llama3", factor=factor, original_max_position=original).frequencies(
        128
    )
    for before, after in zip(plain, scaled, strict=True):
        wavelength = 2 * np.pi / before
        if wavelength < original / 4:
            assert after == before
        elif wavelength > original:
            assert after == pytest.approx(before / factor)
        else:
            assert before / factor * (1 - 1e-12) <= after <= before * (1 + 1e-12)


@given(st.integers(0, 9), st.integers(1, 6), st.integers(1, 5), st.integers(1, 3), SEEDS)
def test_append_writes_its_slots_and_nothing_else(tokens, pages, page_size, heads, seed):
    random = np.random.default_rng(seed)
    tokens = min(tokens, pages * page_size)
    slots = random.permutation(pages * page_size)[:tokens]
    k, v = (randn(seed + n, tokens, heads, 8) for n in (1, 2))
    k_pages, v_pages = (randn(seed + n, pages, page_size, heads, 8) for n in (3, 4))
    expected = [pages_before.clone().numpy() for pages_before in (k_pages, v_pages)]
    for token, slot in enumerate(slots):
        for values, new in zip(expected, (k, v), strict=True):
            values[slot // page_size, slot % page_size] = new[token].numpy()
    cache.append(k, v, k_pages, v_pages, torch.from_numpy(slots))
    assert np.array_equal(k_pages.numpy(), expected[0])
    assert np.array_equal(v_pages.numpy(), expected[1])


def test_append_rounds_to_the_cache_dtype():
    k, pages = randn(5, 3, 2, 8), torch.zeros(2, 4, 2, 8, dtype=torch.bfloat16)
    cache.append(k, k, pages, pages.clone(), torch.tensor([1, 6, 3]))
    assert torch.equal(pages.flatten(0, 1)[[1, 6, 3]], k.bfloat16())
