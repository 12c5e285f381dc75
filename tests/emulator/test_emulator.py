"""The emulator itself: it finds what is wrong with a kernel, and rounds as a GPU does."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
import torch
from cuda_emulator import EmulationError, build, emulated_gpu, kernel

from strobe.cuda import nvrtc

HEAD = 'extern "C" __global__ void attempt(const float* in, float* out, int n)'


def attempt(folder: Path, body: str, n: int = 64, shared_bytes: int = 256) -> torch.Tensor:
    """out [n] of a block of 64 threads that runs `body` on in [n]."""
    source = folder / "attempt.cu"
    headers = "".join(f'#include "{name}.cuh"\n' for name in ("async_copy", "bulk_copy", "mma"))
    source.write_text(f"{headers}{HEAD} {{\n#line 1\n{body}\n}}\n")
    x, out = torch.arange(n, dtype=torch.float32), torch.full((n,), float("nan"))
    with emulated_gpu():
        kernel.kernel(source, "attempt")(1, 64, [x, out, ctypes.c_int(n)], shared_bytes=shared_bytes)
    return out


I = "const int i = threadIdx.x;\n"  # noqa: E741
SHARED = I + "extern __shared__ float4 room[];\nfloat* x = reinterpret_cast<float*>(room);\n"
MISTAKES = {
    "read past the end": (I + "out[i] = in[i + 1];", r"thread \(63, 0, 0\) at attempt.cu:2: reads 4 bytes"),
    "write before the start": (
        I + "out[i - 1] = 0;",
        r"thread \(0, 0, 0\).* writes 4 bytes .*4 bytes before",
    ),
    "misaligned": (I + "if (i == 3) *reinterpret_cast<float4*>(out + i) = {};", "not aligned"),
    "shared memory's end": (SHARED + "x[i + 1] = 1;", "offset 256 of 256 bytes of dynamic shared memory"),
    "no barrier": (SHARED + "x[i] = in[i];\nout[i] = x[63 - i];", "a race: nothing orders it"),
    "overwritten too early": (
        SHARED + "x[i] = in[i];\n__syncthreads();\nout[i] = x[63 - i];\nx[i] = 9;",
        "a race: nothing orders it",
    ),
    "shuffles order nothing": (
        SHARED + "x[i] = in[i];\n__shfl_sync(~0u, i, 0);\nout[i] = x[i ^ 1];",
        "a race: nothing orders it",
    ),
    "divergent barrier": (
        I + "if (i < 32) __syncthreads();\nelse\n__syncthreads();",
        "divergent barrier: thread 0 waits at attempt.cu:2",
    ),
    "divergent warp": (
        I + "if (i % 2) out[i] = __shfl_sync(~0u, i, 0);\nelse\nout[i] = __shfl_sync(~0u, i, 1);",
        "divergent warp: lane",
    ),
    "deadlock": (
        "__shared__ Barrier full;\nif (!threadIdx.x) full.init(2);\n__syncthreads();\n"
        "if (!threadIdx.x) full.arrive();\nfull.wait(0);",
        r"deadlock: every thread waits\n  block \(0, 0, 0\), warp 0: lanes ffffffff looking \(attempt.cu:5\)",
    ),
    "one arrival too many": (
        "__shared__ Barrier full;\nif (!threadIdx.x) full.init(1);\n"
        "__syncthreads();\nfull.arrive_expecting(8);",
        "more arrivals than the barrier's 1",
    ),
    "no fence before the copy engine": (
        SHARED + "__shared__ Barrier full;\nif (!i) full.init(1);\nx[i] = in[i];\n__syncthreads();\n"
        "if (!i) full.arrive_expecting(256), bulk_copy(x, in, 256, full);\nfull.wait(0);",
        "no fence.proxy.async follows a store by thread",
    ),
    "a copy that nobody waits for": (
        SHARED + "__shared__ Barrier full;\nif (!i) full.init(1), bulk_copy(x, in, 256, full);",
        "copies into its shared memory that nobody waited for",
    ),
    "past a register array's end": (
        I + "float x[4] = {};\nfor (int j = 0; j <= n / 16; ++j) x[j] = in[j];\nout[i] = x[i % 4];",
        "attempt.cu:3: an index past the end of an array",
    ),
    "division by zero": (I + "out[i] = 64 / (n - 64);", "attempt.cu:2: an integer divided by zero"),
    "a product without all lanes": (
        I + "if (i % 32 == 7) return;\nfloat c[4] = {};\nconst u32 a[4] = {};\n"
        "mma_16x8x16<bf16>(c, a, 0, 0);",
        "without lane 7, which has ended",
    ),
    "an arrival before init": ("__shared__ Barrier full;\nfull.arrive();", "not initialised"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(mistake: str, tmp_path: Path) -> None:
    body, message = MISTAKES[mistake]
    with pytest.raises(EmulationError, match=message):
        attempt(tmp_path, body)


def test_the_same_with_barriers_is_right(tmp_path: Path) -> None:
    out = attempt(
        tmp_path, SHARED + "x[i] = in[i];\n__syncthreads();\nout[i] = x[63 - i];\n__syncthreads();\nx[i] = 9;"
    )
    assert torch.equal(out, torch.arange(64.0).flip(0))


WAIT, BEHIND = "grid_dependency_wait();\n", "grid_launch_dependents();\n"
TOO_EARLY = {
    "read": (I + "out[i] = in[i];\n" + WAIT, r"reads 4 bytes .*which a kernel ahead writes"),
    "write again": (I + "middle[i] = 1;\n" + WAIT, r"writes 4 bytes .*which a kernel ahead writes"),
    "write what it reads": (I + "first[i] = 1;\n" + WAIT, r"writes 4 bytes .*which a kernel ahead reads"),
    "one thread's wait": (I + f"if (i == 5) {WAIT}out[i] = in[i];", r"thread \(0, 0, 0\).*reads"),
    "an asynchronous copy": (
        SHARED + "if (i < 16) copy_async_16(shared_address(x + 4 * i), in + 4 * i, true);\n"
        "commit_copies();\n" + WAIT + "wait_copies<0>();\n__syncthreads();\nout[i] = x[i];",
        r"attempt.cu:4: reads 16 bytes .*which a kernel ahead writes",
    ),
    "no wait": ("", "none of its threads waits"),
}


def chain(folder: Path, *bodies: str) -> torch.Tensor:
    """out [64] of kernels one behind the other, all but the first launched programmatically. The first copies
    `first`, 0 .. 63, to `middle`; the others run these bodies, with `middle` as `in`."""
    source, made = folder / "chain.cu", ""
    parameters = "float* first, const float* in, float* middle, float* out"
    for i, body in enumerate(["middle[threadIdx.x] = first[threadIdx.x];", *bodies]):
        made += f'extern "C" __global__ void run{i}({parameters}) {{\n#line 1 "attempt.cu"\n{body}\n}}\n'
    headers = "".join(f'#include "{name}.cuh"\n' for name in ("async_copy", "grid_dependency", "types"))
    source.write_text(headers + made)
    first, middle, out = torch.arange(64.0), torch.zeros(64), torch.full((64,), float("nan"))
    with emulated_gpu():
        for i in range(len(bodies) + 1):
            args = [first, middle, middle, out]
            kernel.kernel(source, f"run{i}")(1, 64, args, shared_bytes=256, programmatic=i > 0)
    return out


@pytest.mark.parametrize("mistake", TOO_EARLY)
def test_what_is_too_early_behind_another_kernel(mistake: str, tmp_path: Path) -> None:
    body, message = TOO_EARLY[mistake]
    with pytest.raises(EmulationError, match=message):
        chain(tmp_path, body)


def test_what_no_kernel_ahead_changes_may_be_read_early(tmp_path: Path) -> None:
    early = I + "const float x = first[i];\n" + WAIT + BEHIND + "out[i] = in[i] == x ? x : -1;"
    assert torch.equal(chain(tmp_path, early), torch.arange(64.0))


@pytest.mark.parametrize("waits_first", [True, False])
def test_a_kernel_that_opens_before_it_waits_leaves_two_ahead(waits_first: bool, tmp_path: Path) -> None:
    between = WAIT + BEHIND if waits_first else BEHIND + WAIT
    bodies = between, I + "out[i] = in[i];\n" + WAIT
    if waits_first:
        assert torch.equal(chain(tmp_path, *bodies), torch.arange(64.0))
        return
    with pytest.raises(EmulationError, match=r"attempt.cu:2: reads 4 bytes .*which a kernel ahead writes"):
        chain(tmp_path, *bodies)


@pytest.mark.parametrize("waits", [True, False])
def test_asynchronous_copies_arrive_when_waited_for(waits: bool, tmp_path: Path) -> None:
    body = (
        SHARED + "if (i < 16) copy_async_16(shared_address(x + 4 * i), in + 4 * i, true);\ncommit_copies();\n"
    )
    body += "wait_copies<0>();\n__syncthreads();\n" if waits else "__syncthreads();\n"
    out = attempt(tmp_path, body + "out[i] = x[i];\nwait_copies<0>();") if waits else None
    if waits:
        assert torch.equal(out, torch.arange(64.0))
        return
    with pytest.raises(EmulationError, match="a race: nothing orders it"):
        attempt(tmp_path, body + "out[i] = x[i];\n__syncthreads();\nwait_copies<0>();\nx[i] = 0;")


@pytest.mark.parametrize("last_block_first", [False, True])
def test_blocks_may_wait_for_one_another(last_block_first: bool, tmp_path: Path) -> None:
    source = tmp_path / "meet.cu"
    source.write_text(
        '#include "memory.cuh"\nextern "C" __global__ void meet(float2* box) {\n'
        "float2* mine = box + blockIdx.x;\nfloat2* other = box + 1 - blockIdx.x;\n"
        "mine->x = 1;\nwhile (load_relaxed(other).x != 1);\nmine->y = 2;\n}\n"
    )
    box = torch.zeros(2, 2)
    with emulated_gpu(last_block_first=last_block_first):
        kernel.kernel(source, "meet")(2, 1, [box])
    assert box.tolist() == [[1.0, 2.0], [1.0, 2.0]]


PUSH = (
    "__shared__ Barrier full;\n__shared__ float2 box;\nconst u32 other = 1 - cluster_rank();\n"
    "{init}{meet}push(&box, make_float2(cluster_rank(), 7), full, other);\n{wait}"
    "out[blockIdx.x] = box;\n"
)
PUSHES = {
    "right": (
        "full.init(1), full.arrive_expecting(8);\n",
        "cluster_arrive(), cluster_wait();\n",
        "full.wait(0);\n",
        "",
    ),
    "no meeting": ("full.init(1), full.arrive_expecting(8);\n", "", "full.wait(0);\n", "not initialised"),
    "no barrier": ("", "cluster_arrive(), cluster_wait();\n", "full.wait(0);\n", "not initialised"),
    "no wait": (
        "full.init(1), full.arrive_expecting(8);\n",
        "cluster_arrive(), cluster_wait();\n",
        "",
        "which has ended",
    ),
}


@pytest.mark.parametrize("case", PUSHES)
def test_pushes_to_another_block_of_the_cluster(case: str, tmp_path: Path) -> None:
    init, meet, wait, message = PUSHES[case]
    source, out = tmp_path / "push.cu", torch.zeros(2, 2)
    body = PUSH.format(init=init, meet=meet, wait=wait)
    headers = "".join(f'#include "{name}.cuh"\n' for name in ("cluster", "cluster_push"))
    source.write_text(f'{headers}extern "C" __global__ void swap(float2* out) {{\n{body}}}\n')
    with emulated_gpu():
        launch = kernel.kernel(source, "swap").prepare(2, 1, [out], cluster=2)
    if message:
        with pytest.raises(EmulationError, match=message):
            launch()
        return
    launch()
    assert out.tolist() == [[1.0, 7.0], [0.0, 7.0]]


def test_unwritten_shared_memory_is_not_a_number(tmp_path: Path) -> None:
    assert attempt(tmp_path, SHARED + "out[i] = x[i];").isnan().all()


def test_launches_that_a_gpu_refuses(tmp_path: Path) -> None:
    with pytest.raises(EmulationError, match="an SM has 232448"):
        attempt(tmp_path, "", shared_bytes=228 * 1024)
    x = torch.zeros(1)
    with emulated_gpu():
        launch = kernel.kernel(tmp_path / "attempt.cu", "attempt").prepare(1, 32, [x, x, ctypes.c_int64(1)])
    with pytest.raises(EmulationError, match="argument 2 of attempt is 4 bytes there, 8 here"):
        launch()


def test_conversions_round_as_a_gpu_does(tmp_path: Path) -> None:
    body = (
        I
        + """
for (; i < n; i += 64) {
  out[4 * i] = __uint_as_float(f16_bits(in[i]));
  out[4 * i + 1] = __uint_as_float(bf16_bits(in[i]));
  out[4 * i + 2] = __uint_as_float(e4m3_pair(in[i], -in[i]));
  out[4 * i + 3] = f16_value(f16_bits(in[i]));
}""".replace("for (;", "for (int j = i;").replace("i < n; i +=", "j < n; j +=")
    )
    body = re.sub(r"\[(4 \* )?i\b", lambda found: found[0][:-1] + "j", body)
    source = tmp_path / "convert.cu"
    source.write_text(f'#include "types.cuh"\n{HEAD} {{\n{body}\n}}\n')
    every_f16 = torch.arange(2**16).to(torch.int16).view(torch.float16).float()
    between = (every_f16[1:] + every_f16[:-1]) / 2  # ties
    x = torch.cat(
        [
            every_f16,
            between,
            torch.randn(5000) * 300,
            torch.rand(5000) * 1e-6,
            torch.tensor([448.0, 449, 464, 1e9]),
        ]
    )
    x = x[~x.isnan()].contiguous()
    out = torch.empty(x.numel(), 4)
    with emulated_gpu():
        kernel.kernel(source, "attempt")(1, 64, [x, out, ctypes.c_int(x.numel())])
    bits = out.view(torch.int32)
    assert torch.equal(bits[:, 0].to(torch.int16), x.half().view(torch.int16))
    assert torch.equal(bits[:, 1].to(torch.int16), x.bfloat16().view(torch.int16))
    e4m3 = x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(bits[:, 2].to(torch.uint8), e4m3)
    assert torch.equal(bits[:, 2] >> 8 & 0x7F, (e4m3 & 0x7F).int())
    assert torch.equal(out[:, 3], x.half().float())


def test_ptx_stands_in_headers_that_the_emulator_replaces() -> None:
    package = nvrtc.INCLUDE.parents[1]
    with_ptx = {path for path in package.rglob("*.cu*") if re.search(r"\basm\b", path.read_text())}
    assert {path.parent for path in with_ptx} == {nvrtc.INCLUDE}
    assert {path.name for path in with_ptx} == {path.name for path in build.TWINS.iterdir()}
