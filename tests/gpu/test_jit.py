"""jit on a GPU: arguments, launches, streams, graphs, tensor maps, errors."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from strobe.cuda import jit
from strobe.errors import DeviceError

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STROBE_CACHE_DIR", str(tmp_path / "cache"))


_AXPY = """
struct Params { const float* x; float* y; float a; int n; };
extern "C" __global__ void axpy(const float* x, float* y, float a, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] += a * x[i];
}
extern "C" __global__ void axpy_struct(const __grid_constant__ Params p) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < p.n) p.y[i] += p.a * p.x[i];
}
"""


class Params(ctypes.Structure):
    _fields_ = [("x", ctypes.c_void_p), ("y", ctypes.c_void_p), ("a", ctypes.c_float), ("n", ctypes.c_int)]


@pytest.fixture
def axpy(tmp_path: Path) -> Path:
    source = tmp_path / "axpy.cu"
    source.write_text(_AXPY)
    return source


def test_launch_with_a_sequence_and_with_a_structure(axpy: Path) -> None:
    n = 1000
    x, y = torch.randn(n, device="cuda"), torch.randn(n, device="cuda")
    want = y + 2.5 * x - 1.25 * x
    jit.kernel(axpy, "axpy")((n + 255) // 256, 256, [x, y, ctypes.c_float(2.5), ctypes.c_int(n)])
    jit.kernel(axpy, "axpy_struct")((n + 255) // 256, 256, Params(x.data_ptr(), y.data_ptr(), -1.25, n))
    torch.testing.assert_close(y, want)


def test_a_prepared_launch_sees_rewritten_arguments(axpy: Path) -> None:
    x, y = torch.ones(64, device="cuda"), torch.zeros(64, device="cuda")
    params = Params(x.data_ptr(), y.data_ptr(), 1.0, 64)
    step = jit.kernel(axpy, "axpy_struct").prepare(1, 64, params)
    step()
    params.a, params.n = 10.0, 32
    step()
    assert y.tolist() == [11.0] * 32 + [1.0] * 32


def test_kernels_are_loaded_once(axpy: Path) -> None:
    first = jit.kernel(axpy, "axpy", {"UNUSED": 1})
    assert jit.kernel(axpy, "axpy", {"UNUSED": 1}) is first
    assert jit.kernel(axpy, "axpy", {"UNUSED": 2}) is not first
    assert first.resources == jit.compile(axpy, {"UNUSED": 1}, jit.arch_of()).resources()["axpy"]


def test_launches_follow_the_current_stream(axpy: Path) -> None:
    x, y = torch.ones(1 << 20, device="cuda"), torch.zeros(1 << 20, device="cuda")
    add = jit.kernel(axpy, "axpy")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        y.fill_(5.0)
        add(4096, 256, [x, y, ctypes.c_float(1.0), ctypes.c_int(x.numel())])
    stream.synchronize()
    assert (y == 6.0).all()


def test_first_use_inside_a_graph_capture(axpy: Path) -> None:
    x, y = torch.ones(64, device="cuda"), torch.zeros(64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        jit.kernel(axpy, "axpy", {"ONLY_CAPTURED": 1})(1, 64, [x, y, ctypes.c_float(3.0), ctypes.c_int(64)])
    assert (y == 0).all()
    graph.replay()
    graph.replay()
    assert (y == 6.0).all()


def test_launch_from_a_new_thread(axpy: Path) -> None:
    x, y = torch.ones(64, device="cuda"), torch.zeros(64, device="cuda")
    params = Params(x.data_ptr(), y.data_ptr(), 1.0, 64)
    step = jit.kernel(axpy, "axpy_struct").prepare(1, 64, params)
    thread = threading.Thread(target=step)
    thread.start()
    thread.join()
    assert (y == 1.0).all()


def test_a_tensor_map_in_a_new_thread() -> None:
    x = torch.ones(256, 64, device="cuda", dtype=torch.bfloat16)
    described = (x.data_ptr(), "bfloat16", (64, 256), (128,), (64, 64))
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(jit.tensor_map, *described).result()
    jit.tensor_map.cache_clear()
    assert bytes(found) == bytes(jit.tensor_map(*described))


def test_a_moved_tensor_map_is_that_of_the_other_tensor() -> None:
    one, other = torch.randn(2, 40, 64, device="cuda")
    maps = [
        jit.tensor_map(x.data_ptr(), "float32", (64, 40), (256,), (16, 8), swizzle=64) for x in (one, other)
    ]
    assert bytes(jit.moved(maps[0], other.data_ptr())) == bytes(maps[1])
    with ThreadPoolExecutor(1) as pool:
        assert bytes(pool.submit(jit.moved, maps[1], one.data_ptr()).result()) == bytes(maps[0])


def test_refused_launches_name_the_kernel_and_the_driver_s_reason(axpy: Path) -> None:
    x = torch.ones(64, device="cuda")
    add = jit.kernel(axpy, "axpy")
    args = [x, x, ctypes.c_float(1.0), ctypes.c_int(64)]
    with pytest.raises(DeviceError, match=r"launching axpy .*block \(2048, 1, 1\).*CUDA_ERROR_INVALID_VALUE"):
        add(1, 2048, args)
    with pytest.raises(DeviceError, match="CUDA_ERROR_INVALID_VALUE"):
        add(1, 64, args, shared_bytes=add.max_shared_bytes + 1)
    add(1, 64, args, shared_bytes=add.max_shared_bytes)
    with pytest.raises(DeviceError, match=r"looking nothing_like_it up in axpy\.cu"):
        jit.kernel(axpy, "nothing_like_it")
    with pytest.raises(TypeError, match="a kernel argument is a int"):
        add(1, 64, [x, x, 1.0, 64][3:])


_CLUSTER = """
extern "C" __global__ void ranks(int* out) {
  unsigned rank, size;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  asm volatile("griddepcontrol.wait;" ::: "memory");
  if (threadIdx.x == 0) out[blockIdx.x] += int(rank * 100 + size);
}
"""


@pytest.mark.parametrize("programmatic", [False, True])
@pytest.mark.parametrize("cluster", [None, 2, (4, 1, 1)])
def test_clusters_and_programmatic_launches(tmp_path: Path, cluster: object, programmatic: bool) -> None:
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("needs thread-block clusters (compute capability 9.0)")
    source = tmp_path / "ranks.cu"
    source.write_text(_CLUSTER)
    size = 1 if cluster is None else cluster if isinstance(cluster, int) else cluster[0]
    out = torch.zeros(8, dtype=torch.int32, device="cuda")
    ranks = jit.kernel(source, "ranks")
    for _ in range(3):
        ranks(8, 32, [out], cluster=cluster, programmatic=programmatic)
    assert out.tolist() == [3 * (i % size * 100 + size) for i in range(8)]


_TMA = """
struct alignas(64) TensorMap { unsigned long long opaque[16]; };
extern "C" __global__ void copy_box(const __grid_constant__ TensorMap map, float* out, int x, int y) {
  __shared__ alignas(128) float tile[8 * 16];
  __shared__ alignas(8) unsigned long long barrier;
  unsigned bar = (unsigned)__cvta_generic_to_shared(&barrier), dst = (unsigned)__cvta_generic_to_shared(tile);
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(bar));
    asm volatile("fence.mbarrier_init.release.cluster;");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 512;" :: "r"(bar) : "memory");
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 " [%0], [%1, {%2, %3}], [%4];" :: "r"(dst), "l"(&map), "r"(x), "r"(y), "r"(bar) : "memory");
  }
  __syncthreads();
  asm volatile("{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;"
               " @!done bra again; }" :: "r"(bar) : "memory");
  out[threadIdx.x] = tile[threadIdx.x];
}
"""


def test_a_tensor_map_describes_a_strided_tensor(tmp_path: Path) -> None:
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("needs the bulk copy engine (compute capability 9.0)")
    source = tmp_path / "tma.cu"
    source.write_text(_TMA)
    whole = torch.randn(50, 64, device="cuda")
    view = whole[:, :40]
    described = jit.tensor_map(view.data_ptr(), "float32", (40, 50), (256,), (16, 8), swizzle=0)
    out = torch.full((8, 16), float("nan"), device="cuda")
    jit.kernel(source, "copy_box")(1, 128, [described, out, ctypes.c_int(28), ctypes.c_int(45)])
    want = torch.zeros(8, 16, device="cuda")
    want[:5, :12] = view[45:50, 28:40]
    assert torch.equal(out, want)


def test_a_tensor_map_that_cannot_be_names_the_shape() -> None:
    x = torch.zeros(64, 64, device="cuda")
    with pytest.raises(DeviceError, match=r"no tensor map of float32 sizes \(64, 64\), strides \(24,\)"):
        jit.tensor_map(x.data_ptr(), "float32", (64, 64), (24,), (16, 8), swizzle=0)


def test_a_new_process_loads_from_the_cache_without_the_compiler(axpy: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from strobe.cuda import jit
jit.kernel(Path({str(axpy)!r}), "axpy")
print("cuda.bindings.nvrtc" in sys.modules)
"""
    compiled = [
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
        for _ in range(2)
    ]
    assert compiled == ["True\n", "False\n"]
