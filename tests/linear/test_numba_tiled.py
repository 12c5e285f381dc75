"""The CPU's product in tiles: narrow weights, threads, any company, and a machine without numba."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strobe.cpu import jit
from strobe.errors import KernelRefusedError
from strobe.linear import Projection, empty_weight, ladder, numba_tiled
from strobe.linear import projection as linear_projection
from strobe.linear.problem import LinearProblem


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch):
    """numba is not installed."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "numba" else found(name))
    jit.refusals.cache_clear()
    yield
    jit.refusals.cache_clear()


def test_without_numba_it_refuses_by_name_and_auto_takes_another(absent):
    problem = LinearProblem(1, 8, 8, "float32", input_major=True)
    assert ladder.RUNGS["numba_tiled"].refusals(problem) == ["needs numba: pip install 'strobe[cpu]'"]
    assert ladder.choose(problem)[0].name == "torch_linear"
    projection = Projection(empty_weight(8, 8, device="cpu", dtype=torch.float32).fill_(1.0))
    assert projection(torch.ones(1, 8)).tolist() == [[8.0] * 8]
    with pytest.raises(KernelRefusedError, match="strobe\\[cpu\\]"):
        projection(torch.ones(1, 8), kernel="numba_tiled")


def projection(outputs: int, inputs: int, seed: int, *, narrow: bool) -> Projection:
    """With all that may stand around it; its weight as a bfloat16 checkpoint gives it, or not."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(2 * outputs, inputs, generator=generator)
    weight = empty_weight(*drawn.shape, device="cpu", dtype=torch.float32)
    weight.copy_(drawn.bfloat16() if narrow else drawn)
    norm, bias = (torch.randn(n, generator=generator) for n in (inputs, 2 * outputs))
    return Projection(weight, bias, norm, norm_eps=1e-5, swiglu=True)


class TestWithNumba:
    @pytest.fixture(autouse=True)
    def _numba(self) -> None:
        pytest.importorskip("numba")

    @pytest.mark.parametrize("narrow", [True, False])
    def test_a_narrow_weight_is_kept_narrow_and_gives_the_same_bits(self, monkeypatch, narrow):
        kept, whole = (projection(77, 130, 5, narrow=narrow) for _ in range(2))
        x = torch.randn(6, 130)
        given = kept(x, kernel="numba_tiled")
        (fixed,) = kept.scratch.values()
        assert fixed.tensors[0].dtype == (torch.bfloat16 if narrow else torch.float32)
        monkeypatch.setattr(linear_projection, "_NARROW_BYTES", 0)
        assert torch.equal(whole(x, kernel="numba_tiled"), given)
        (fixed,) = whole.scratch.values()
        assert fixed.tensors[0] is whole.weight

    def test_many_tokens_are_for_narrow_weights(self):
        x = torch.randn(numba_tiled.MOST_TOKENS + 1, 130)
        projection(77, 130, 5, narrow=True)(x, kernel="numba_tiled")
        with pytest.raises(KernelRefusedError, match="bfloat16"):
            projection(77, 130, 5, narrow=False)(x, kernel="numba_tiled")

    @given(st.integers(1, 70), st.integers(1, 300), st.integers(0, 1000), st.booleans())
    @settings(max_examples=40)
    def test_equals_the_formula_and_a_token_has_the_bits_that_it_has_alone(
        self, tokens, inputs, seed, swiglu
    ):
        generator = torch.Generator().manual_seed(seed)
        outputs = 2 * int(torch.randint(1, 150, (), generator=generator))
        weight = empty_weight(outputs, inputs, device="cpu", dtype=torch.float32)
        weight.copy_(torch.randn(outputs, inputs, generator=generator).bfloat16())
        norm, bias = (torch.randn(n, generator=generator) for n in (inputs, outputs))
        x = torch.randn(tokens, inputs, generator=generator)
        tiled = Projection(weight, bias, norm, norm_eps=1e-5, swiglu=swiglu)
        given = tiled(x, kernel="numba_tiled")
        wide = x.double()
        wide = wide / (wide.square().mean(1, keepdim=True) + 1e-5).sqrt() * norm
        expected = wide @ weight.double().t() + bias
        if swiglu:
            gate, up = expected.chunk(2, 1)
            expected = gate / (1 + (-gate).exp()) * up
        torch.testing.assert_close(given.double(), expected, rtol=2e-4, atol=2e-4)
        row = int(torch.randint(tokens, (), generator=generator))
        assert torch.equal(tiled(x[row : row + 1].contiguous(), kernel="numba_tiled")[0], given[row])

    def test_a_weight_that_was_written_to_is_read_again(self):
        written = projection(5, 9, 1, narrow=True)
        x = torch.randn(1, 9)
        written(x, kernel="numba_tiled")
        written.weight.mul_(3.0)
        expected = written(x, kernel="torch_linear")
        torch.testing.assert_close(written(x, kernel="numba_tiled"), expected)
        written.weight[3, 2] = 1.0000001  # no longer narrow
        expected = written(x, kernel="torch_linear")
        torch.testing.assert_close(written(x, kernel="numba_tiled"), expected)

    def test_so_is_one_that_nobody_counts_the_writes_of(self):
        x = torch.randn(1, 9)
        with torch.inference_mode():
            written = projection(5, 9, 1, narrow=True)
            written(x, kernel="numba_tiled")
            written.weight.mul_(3.0)
            expected = written(x, kernel="torch_linear")
            torch.testing.assert_close(written(x, kernel="numba_tiled"), expected)

    @given(st.integers(1, 8), st.integers(1, 70), st.integers(1, 3000), st.integers(1, 5))
    def test_threads_share_the_columns(self, tokens, inputs, outputs, threads):
        was, worth = torch.get_num_threads(), numba_tiled._THREAD_WORK
        x, residual = torch.randn(tokens, inputs), torch.randn(tokens, outputs)
        alone, shared = (projection(outputs, inputs, 3, narrow=False) for _ in range(2))
        expected = alone(x, residual.clone(), "numba_tiled")
        try:
            torch.set_num_threads(threads)
            numba_tiled._THREAD_WORK = 64
            given = shared(x, residual.clone(), "numba_tiled")
        finally:
            torch.set_num_threads(was)
            numba_tiled._THREAD_WORK = worth
        assert torch.equal(given, expected)

    def test_two_hundred_calls_at_once(self):
        """From many threads of the user's, each with a result of its own."""
        from concurrent.futures import ThreadPoolExecutor

        shared = projection(40, 64, 2, narrow=True)
        xs = [torch.randn(3, 64) for _ in range(200)]
        expected = [shared(x, kernel="torch_linear") for x in xs]
        with ThreadPoolExecutor(8) as pool:
            given = list(pool.map(lambda x: shared(x, kernel="numba_tiled"), xs))
        for one, other in zip(given, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
