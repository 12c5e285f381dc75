"""The production decode kernels in the emulator: variants on ragged little caches, against the oracle."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cuda_emulator import emulated_gpu, missing
from decode_cases import STRIDES, in_float8, random_dense, strided

from strobe.attention import ladder
from strobe.attention.api import attention, empty_lse
from strobe.attention.cases import Case, Inputs
from strobe.attention.check import verdict
from strobe.attention.decode import cuda_cluster, cuda_paged
from strobe.attention.inputs import describe
from strobe.attention.problem import UNLIMITED, Options, Paged
from strobe.integrations.flash_attn import flash_attn_with_kvcache
from strobe.integrations.sdpa import scaled_dot_product_attention

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

SETTLED = {"settled": True}
VARIANTS = [
    (cuda_paged, {"heads": 2}),
    (cuda_paged, SETTLED),
    (cuda_cluster, {"cluster": 4}),
    (cuda_cluster, {"cluster": 16, **SETTLED}),
]


def run(rung: Any, changes: dict[str, Any], inputs: Inputs, sms: int = 5) -> torch.Tensor:
    out = torch.full_like(inputs.q, float("nan"), memory_format=torch.contiguous_format)
    with emulated_gpu(sm_count=sms, last_block_first=random.random() < 0.5):
        problem = inputs.problem
        lse = empty_lse(problem, inputs.q).fill_(float("nan"))
        shape = replace(rung.choose_shape(problem), **changes)
        for _ in range(2):  # the second finds what the first left behind
            rung.run(problem, inputs.q, inputs.k, inputs.v, out, lse, shape)
        judged = verdict(problem, inputs.q, inputs.k, inputs.v, out, lse)
    assert judged.right, str(judged)
    return out


@pytest.mark.parametrize(("rung", "changes"), VARIANTS)
def test_packed_rows_with_fewer_queries_than_others(rung: Any, changes: dict[str, Any]) -> None:
    rows = ((1, 130), (0, 40), (3, random.randint(3, 99)), (2, 0), (0, 64))
    case = Case("ragged", rows, 32, 2, 64, "paged_packed", causal=True, sinks=True)
    run(rung, changes, case.inputs(torch.bfloat16, seed=random.randrange(2**31)))


@pytest.mark.parametrize(("rung", "changes"), [(cuda_paged, {}), VARIANTS[3]])
def test_window_softcap_and_odd_pages(rung: Any, changes: dict[str, Any]) -> None:
    rows = tuple((2, n) for n in (0, 1, 10, random.randint(11, 250)))
    window = (random.randint(0, 60), UNLIMITED)
    case = Case("odd", rows, 6, 2, 80, "paged", 10, causal=True, window=window, softcap=15.0)
    run(rung, changes, case.inputs(torch.float16, seed=random.randrange(2**31)))


@pytest.mark.parametrize("how", STRIDES)
@pytest.mark.parametrize(("rung", "changes"), [(cuda_paged, {}), (cuda_cluster, {})])
def test_dense_keys_in_any_strides(rung: Any, changes: dict[str, Any], how: str) -> None:
    inputs = random_dense(random.randrange(2**31)).inputs(random.choice([torch.bfloat16, torch.float16]))
    run(rung, changes, strided(inputs, how))


@pytest.mark.parametrize(("rung", "changes"), [(cuda_paged, {"heads": 2}), VARIANTS[2]])
def test_dense_rows_that_blocks_share(rung: Any, changes: dict[str, Any]) -> None:
    case = Case("dense", ((3, random.randint(900, 1200)),) * 2, 8, 2, 64, causal=True)
    inputs = strided(case.inputs(torch.bfloat16, seed=random.randrange(2**31)), "heads")
    assert torch.equal(run(rung, changes, inputs, 11), run(rung, changes, inputs, 11))


def test_a_cache_that_grows_by_torchs_signature() -> None:
    """As transformers calls it: heads outermost, other tensors and one key more each time."""
    q, stored = torch.randn(2, 8, 1, 64).bfloat16(), torch.randn(2, 2, 2, 40, 64).bfloat16()
    for length in (33, 34, 35):
        k, v = stored[:, :, :, :length].clone()
        with emulated_gpu(sm_count=3):
            ours = scaled_dot_product_attention(q, k, v, enable_gqa=True)
            chosen = ladder.choose(describe(*(x.transpose(1, 2) for x in (q, k, v)), Options())).name
        assert chosen == "cuda_paged"
        torch.testing.assert_close(
            ours, F.scaled_dot_product_attention(q, k, v, enable_gqa=True), atol=2e-2, rtol=2e-2
        )


@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "lengths", "sms"),
    [(8, 1, (4800,), 36), (1, 1, (2500, 700), 20), (8, 2, (2500, 10), 18), (4, 4, (900, 0, 130), 11)],
)
def test_segments_that_many_blocks_share(
    q_heads: int, kv_heads: int, lengths: tuple[int, ...], sms: int
) -> None:
    """More than FAN blocks a segment, so that groups of them add up first; and a few."""
    case = Case("shared", tuple((1, n) for n in lengths), q_heads, kv_heads, 64, "paged", causal=True)
    inputs = case.inputs(torch.bfloat16, seed=random.randrange(2**31))
    first = run(cuda_paged, {}, inputs, sms)
    assert torch.equal(run(cuda_paged, SETTLED, inputs, sms), first)


@pytest.mark.parametrize("rung", [cuda_paged, cuda_cluster], ids=lambda rung: rung.__name__)
def test_float8_cache(rung: Any) -> None:
    inputs = Case("float8", ((1, 300), (1, 17)), 8, 2, 128, "paged", causal=True).inputs(torch.bfloat16)
    run(rung, {}, in_float8(inputs))


@pytest.mark.parametrize(("rung", "changes"), [(cuda_paged, {}), *VARIANTS[1:3]])
def test_float8_rows_that_are_not_swizzled(rung: Any, changes: dict[str, Any]) -> None:
    page_size, q_len, group = random.choice([1, 7, 16, 64]), random.randint(1, 16), random.choice([1, 4, 8])
    lengths = (0, 1, page_size - 1, page_size, page_size + 1, random.randint(1, 200))
    case = Case(
        "rows of 80 bytes",
        tuple((q_len, n) for n in random.sample(lengths, 4)),
        *(2 * group, 2, 80, "paged", page_size),
        causal=random.random() < 0.7,
        window=(random.choice([UNLIMITED, 13]), UNLIMITED),
        softcap=random.choice([0.0, 15.0]),
        sinks=random.random() < 0.5,
    )
    dtype = random.choice([torch.bfloat16, torch.float16])
    run(rung, changes, in_float8(case.inputs(dtype, seed=random.randrange(2**31))))


@pytest.mark.parametrize("head_dim", [80, 128])
def test_flash_attn_appends_to_a_float8_cache(head_dim: int) -> None:
    """What is read is what was stored, rounded to float8."""
    cache = torch.randn(2, 9, 16, 2, head_dim).to(torch.float8_e4m3fn)
    q, k, v = torch.randn(3, 2, 3, 4, head_dim).bfloat16()
    k, v = k[:, :, :2], v[:, :, :2]
    table, lens = torch.randperm(9).int()[:8].view(2, 4), torch.randint(0, 61, (2,)).int()
    where = {"cache_seqlens": lens, "block_table": table, "causal": True, "return_softmax_lse": True}
    with emulated_gpu(sm_count=3):
        out, lse = flash_attn_with_kvcache(q, *cache, k, v, **where)
    for row, n in enumerate(lens.tolist()):
        held = cache[:, table[row].long()].flatten(1, 2)[:, n : n + 3]
        assert torch.equal(held.float(), torch.stack((k[row], v[row])).to(held.dtype).float())
    layout = Paged(table, lens + 3)
    judged = verdict(describe(q, *cache, Options(causal=True, layout=layout)), q, *cache, out, lse)
    assert judged.right, str(judged)


def test_rows_that_fill_a_clusters_rings_several_times() -> None:
    """Where the kernel behind may start before the last tiles are asked for, nothing else changes."""
    lengths = ((1, random.randint(600, 900)), (1, 257), (1, 256))
    inputs = Case("long", lengths, 8, 2, 64, "paged", causal=True).inputs(torch.bfloat16)
    small = {"cluster": 2, "stages": 2}
    assert torch.equal(
        run(cuda_cluster, {**small, **SETTLED}, inputs),
        run(cuda_cluster, {**small, "stages": 3}, inputs),
    )


def test_a_rows_bits_do_not_depend_on_its_batch() -> None:
    inputs = Case("", tuple((1, n) for n in (90, 3, 200)), 4, 2, 64, "paged").inputs(torch.bfloat16)
    together, layout = run(cuda_cluster, {}, inputs), inputs.options["layout"]
    for row in range(3):
        alone = Paged(layout.page_table[row : row + 1], layout.seq_lens[row : row + 1])
        part = Inputs(inputs.q[row : row + 1], inputs.k, inputs.v, {**inputs.options, "layout": alone})
        assert torch.equal(run(cuda_cluster, {}, part)[0], together[row])


@pytest.mark.parametrize("kernel", ["cuda_paged", "cuda_cluster"])
def test_layers_share_a_prepared_launch(kernel: str) -> None:
    """Other queries, other layers of one cache, one layout: only the first call prepares."""
    inputs = Case("", ((1, 90), (1, 200)), 4, 2, 64, "paged", causal=True).inputs(torch.bfloat16)
    stored = torch.randn(3, 2, *inputs.k.shape).bfloat16()
    for layer in stored.unbind():
        q = torch.randn(2, 1, 6, 64).bfloat16()[:, :, 1:5]
        with emulated_gpu(sm_count=5):
            options = inputs.options
            out, lse = attention(q, *layer.unbind(), return_lse=True, kernel=kernel, **options)
            problem = describe(q, *layer.unbind(), Options(**options))
            judged = verdict(problem, q, *layer.unbind(), out, lse)
        assert judged.right, str(judged)


@pytest.mark.parametrize("kernel", ["torch_naive", "torch_sdpa", "cuda_paged", "auto"])
@pytest.mark.parametrize(
    "given", [{}, {"max_q_len": 1, "max_kv_len": 48}], ids=["lengths read", "lengths given"]
)
def test_a_layout_that_was_written_to_is_followed(kernel: str, given: dict[str, int]) -> None:
    """As where one decodes: lengths count on and pages are added, in place, in the same layout."""
    dtype = torch.bfloat16 if kernel == "cuda_paged" else random.choice([torch.bfloat16, torch.float32])
    q, k, v = torch.randn(2, 1, 4, 64).to(dtype), *torch.randn(2, 8, 16, 2, 64).to(dtype)
    table = torch.randperm(8).int()[:6].view(2, 3)
    lens = torch.tensor([48, random.randint(0, 40)], dtype=torch.int32)
    layout = Paged(table, lens, **given)
    for _ in range(3):
        with emulated_gpu(3):
            out = attention(q, k, v, layout=layout, kernel=kernel)
            problem = describe(q, k, v, Options(layout=Paged(table.clone(), lens.clone())))
            judged = verdict(problem, q, k, v, out)
        assert judged.right, str(judged)
        lens[1] += random.randint(1, 3)
        table[0] = table[0].flip(0)
