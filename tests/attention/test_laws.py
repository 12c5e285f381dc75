"""Properties that hold for every problem, drawn by hypothesis, through attention() itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strobe.attention import oracle
from strobe.attention.api import attention
from strobe.attention.cases import Case

LAWFUL = settings(max_examples=40, deadline=None, derandomize=False)


@st.composite
def cases(draw: st.DrawFn, layout: str | None = None) -> Case:
    layout = layout or draw(st.sampled_from(["dense", "packed", "paged", "paged_packed"]))
    lengths = st.tuples(st.integers(0, 40), st.integers(0, 70))
    rows = draw(st.lists(lengths, min_size=1, max_size=4))
    if layout == "dense":
        rows = [rows[0]] * len(rows)
    elif layout == "paged":
        rows = [(rows[0][0], kv) for _, kv in rows]
    kv_heads = draw(st.integers(1, 3))
    limit = st.integers(-1, 50)
    return Case(
        name="drawn",
        rows=tuple(rows),
        q_heads=kv_heads * draw(st.integers(1, 4)),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([1, 3, 16, 33, 64])),
        layout=layout,
        page_size=draw(st.sampled_from([1, 3, 16, 64])),
        causal=draw(st.booleans()),
        window=draw(st.tuples(limit, limit)),
        scale=draw(st.sampled_from([None, 0.01, 0.3])),
        softcap=draw(st.sampled_from([0.0, 5.0])),
        sinks=draw(st.booleans()),
    )


seeds = st.integers(0, 2**31)


@given(cases(), seeds)
@LAWFUL
def test_equals_the_oracle(case: Case, seed: int) -> None:
    inputs = case.inputs(torch.float32, seed=seed)
    expected, expected_lse = oracle.attention(inputs.problem, inputs.q, inputs.k, inputs.v)
    out, lse = attention(inputs.q, inputs.k, inputs.v, **inputs.options, return_lse=True)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_allclose(lse, expected_lse, atol=3e-5)
    fastest = attention(inputs.q, inputs.k, inputs.v, **inputs.options)
    np.testing.assert_allclose(fastest, expected, atol=1e-5)


@given(cases("dense"), seeds)
@LAWFUL
def test_permuting_rows_permutes_outputs(case: Case, seed: int) -> None:
    inputs = case.inputs(torch.float32, seed=seed)
    order = torch.randperm(len(case.rows))
    out = attention(inputs.q, inputs.k, inputs.v, **inputs.options)
    permuted = attention(inputs.q[order], inputs.k[order], inputs.v[order], **inputs.options)
    torch.testing.assert_close(permuted, out[order], atol=2e-6, rtol=0)


@given(cases("dense"), seeds, st.floats(0, 1))
@LAWFUL
def test_splitting_the_keys_and_merging_changes_nothing(case: Case, seed: int, where: float) -> None:
    # docs/math.md, equation 6. Without a mask, since a part of the keys has a diagonal of its own.
    case = replace(case, causal=False, window=(-1, -1), sinks=False)
    inputs = case.inputs(torch.float64, seed=seed)
    cut = int(where * inputs.k.shape[1])
    q, k, v, options = inputs.q, inputs.k, inputs.v, inputs.options
    whole, whole_lse = attention(q, k, v, **options, return_lse=True)
    left, left_lse = attention(q, k[:, :cut], v[:, :cut], **options, return_lse=True)
    right, right_lse = attention(q, k[:, cut:], v[:, cut:], **options, return_lse=True)
    lse = torch.logaddexp(left_lse, right_lse)
    shift = lse.masked_fill(lse == float("-inf"), 0)

    def weight(part: torch.Tensor) -> torch.Tensor:
        return torch.exp(part - shift).transpose(1, 2).unsqueeze(-1)

    torch.testing.assert_close(weight(left_lse) * left + weight(right_lse) * right, whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(lse, whole_lse, atol=1e-5, rtol=0)


@given(cases("dense"), seeds)
@LAWFUL
def test_scale_is_a_factor_of_q(case: Case, seed: int) -> None:
    inputs = case.inputs(torch.float64, seed=seed)
    options = {**inputs.options, "scale": 0.25}
    out = attention(inputs.q, inputs.k, inputs.v, **options)
    scaled = attention(inputs.q * 0.25, inputs.k, inputs.v, **{**options, "scale": 1.0})
    torch.testing.assert_close(out, scaled, atol=1e-10, rtol=0)


@given(cases(), seeds)
@LAWFUL
def test_a_window_as_wide_as_the_context_is_none(case: Case, seed: int) -> None:
    inputs = case.inputs(torch.float32, seed=seed)
    widest = max(q + kv for q, kv in case.rows)
    none = attention(inputs.q, inputs.k, inputs.v, **{**inputs.options, "window": (-1, -1)})
    wide = attention(inputs.q, inputs.k, inputs.v, **{**inputs.options, "window": (widest, widest)})
    torch.testing.assert_close(wide, none, atol=2e-6, rtol=0)


@given(cases("dense"), seeds, st.floats(-100, 100))
@LAWFUL
def test_outputs_are_averages_of_values(case: Case, seed: int, shift: float) -> None:
    # without a sink the weights sum to one: shifting every value shifts every output that sees a key
    case = replace(case, sinks=False)
    inputs = case.inputs(torch.float64, seed=seed)
    out, lse = attention(inputs.q, inputs.k, inputs.v, **inputs.options, return_lse=True)
    shifted = attention(inputs.q, inputs.k, inputs.v + shift, **inputs.options)
    sees = (lse > float("-inf")).transpose(1, 2).unsqueeze(-1)
    torch.testing.assert_close(shifted, torch.where(sees, out + shift, 0.0), atol=1e-9, rtol=0)


@pytest.mark.parametrize("page_size", [1, 16, 100])
def test_layouts_agree(page_size: int) -> None:
    dense = Case("x", ((30, 90),) * 2, causal=True).inputs(torch.float32, seed=5)
    expected = attention(dense.q, dense.k, dense.v, causal=True)
    paged_case = Case("x", ((30, 90),) * 2, causal=True, layout="paged", page_size=page_size)
    paged = paged_case.inputs(torch.float32, seed=6)
    layout = paged.options["layout"]
    for row in range(2):
        for at in range(90):
            page, slot = int(layout.page_table[row, at // page_size]), at % page_size
            paged.k[page, slot], paged.v[page, slot] = dense.k[row, at], dense.v[row, at]
    out = attention(dense.q, paged.k, paged.v, **paged.options)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)
