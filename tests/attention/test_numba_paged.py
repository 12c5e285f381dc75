"""The CPU's paged decode over drawn problems, against the oracle; and that its bits hang on nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("numba")

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strobe import attention
from strobe.attention import oracle
from strobe.attention.cases import Case, Inputs
from strobe.attention.decode import numba_paged
from strobe.attention.problem import Paged
from strobe.errors import ProblemError

ROWS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 200)), min_size=1, max_size=6)


@pytest.fixture(scope="module", autouse=True)
def _three_threads() -> Iterator[None]:
    """Rows and heads cut among three threads, however small."""
    was, worth = torch.get_num_threads(), numba_paged._THREAD_FLOATS
    torch.set_num_threads(3)
    numba_paged._THREAD_FLOATS = 1
    yield
    torch.set_num_threads(was)
    numba_paged._THREAD_FLOATS = worth


def run(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    return attention(inputs.q, inputs.k, inputs.v, kernel="numba_paged", return_lse=True, **inputs.options)


@given(
    rows=ROWS,
    packed=st.booleans(),
    heads=st.sampled_from([(1, 1), (6, 2), (4, 4), (5, 1)]),
    page_size=st.sampled_from([1, 3, 16, 300]),
    window=st.sampled_from([(-1, -1), (0, 0), (7, -1), (100, 3)]),
    options=st.fixed_dictionaries(
        {"causal": st.booleans(), "softcap": st.sampled_from([0.0, 2.5]), "sinks": st.booleans()}
    ),
    values=st.sampled_from(["normal", "large", "equal"]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40)
def test_equals_the_oracle(rows, packed, heads, page_size, window, options, values, seed):
    if not packed:
        rows = [(rows[0][0], kv_len) for _, kv_len in rows]
    case = Case(
        "drawn",
        tuple(rows),
        q_heads=heads[0],
        kv_heads=heads[1],
        head_dim=24,
        window=window,
        layout="paged_packed" if packed else "paged",
        page_size=page_size,
        values=values,
        **options,
    )
    inputs = case.inputs(torch.float32, seed=seed)
    out, lse = run(inputs)
    expected, expected_lse = oracle.attention(inputs.problem, inputs.q, inputs.k, inputs.v)
    np.testing.assert_allclose(out, expected, atol=5e-4 if values == "large" else 3e-6)  # scores of hundreds
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-6, atol=3e-5)


@pytest.mark.parametrize("head_dim", [1, 7, 24, 160])
def test_head_dims(head_dim):
    case = Case("heads", ((1, 1), (1, 0), (1, 133)), q_heads=4, kv_heads=2, head_dim=head_dim, layout="paged")
    inputs = case.inputs(torch.float32)
    out, lse = run(inputs)
    expected, expected_lse = oracle.attention(inputs.problem, inputs.q, inputs.k, inputs.v)
    np.testing.assert_allclose(out, expected, atol=3e-6)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-5)


def test_a_row_has_the_bits_that_it_has_alone():
    case = Case(
        "batch",
        tuple((1, n) for n in (5, 300, 64, 65, 1, 190)),
        q_heads=6,
        kv_heads=2,
        head_dim=24,
        layout="paged",
    )
    inputs = case.inputs(torch.float32)
    layout = inputs.options["layout"]
    together, _ = run(inputs)
    for row in range(6):
        own = Paged(layout.page_table[row : row + 1], layout.seq_lens[row : row + 1])
        alone = attention(inputs.q[row : row + 1], inputs.k, inputs.v, layout=own, kernel="numba_paged")
        assert torch.equal(alone, together[row : row + 1])


@pytest.mark.parametrize("page", [-1, 3, 10**8])
def test_a_page_or_a_length_from_outside_is_an_error_and_nothing_is_read_there(page):
    """Written under inference_mode, where the plan of the first call cannot see it."""
    k, v, q = torch.randn(3, 16, 2, 24), torch.randn(3, 16, 2, 24), torch.randn(2, 1, 4, 24)
    with torch.inference_mode():
        table = torch.tensor([[1, 2], [0, 2]], dtype=torch.int32)
        layout = Paged(page_table=table, seq_lens=torch.tensor([20, 16], dtype=torch.int32))
        expected = attention(q, k, v, layout=layout, kernel="numba_paged")
        table[1, 1] = page  # past its row's length: anything may stand there
        assert torch.equal(attention(q, k, v, layout=layout, kernel="numba_paged"), expected)
        table[0, 1] = page
        with pytest.raises(ProblemError, match="pages"):
            attention(q, k, v, layout=layout, kernel="numba_paged")
        table[0, 1] = 2
        for length in (-1, 33, 10**9):
            layout.seq_lens[0] = length
            with pytest.raises(ProblemError, match="lengths"):
                attention(q, k, v, layout=layout, kernel="numba_paged")


def test_any_strides():
    """q, k and v as slices of something wider."""
    case = Case("plain", ((2, 40), (2, 71)), q_heads=4, kv_heads=2, head_dim=24, causal=True, layout="paged")
    inputs = case.inputs(torch.float32)
    plain, _ = run(inputs)

    def slices(tensor: torch.Tensor) -> torch.Tensor:
        wide = torch.full((*tensor.shape[:-2], tensor.shape[-2] + 3, tensor.shape[-1] + 5), float("nan"))
        wide[..., 1:-2, 2:-3] = tensor
        return wide[..., 1:-2, 2:-3]

    strided = Inputs(slices(inputs.q), slices(inputs.k), slices(inputs.v), inputs.options)
    assert torch.equal(run(strided)[0], plain)
