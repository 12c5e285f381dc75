"""A GPU that is not there: CPU tensors that say they are on it, and kernels that run in the emulator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode

from cuda_emulator import kernel, tensor_map
from strobe.attention import plan
from strobe.cuda import driver, jit

_indices: dict[int, int] = {}


@contextmanager
def emulated_gpu(sm_count: int = 132, *, last_block_first: bool = False) -> Iterator[None]:
    """Within, tensors are on a GPU of compute capability 9.0, and strobe's CUDA kernels run in the emulator.

    strobe's own host code runs: `attention(q, k, v, kernel="cuda_async")`, `rung.run(...)`,
    `torch.randn(..., device="cuda")`. With few SMs, the blocks of a persistent kernel have more to do each.
    Blocks start in the order of their numbers, or against it: CUDA promises neither.
    CUDA graphs and streams are not emulated; Triton kernels do not run.
    """
    index = _indices.setdefault(sm_count, 64 + len(_indices))  # modules remember figures by a device's index
    properties = SimpleNamespace(
        name="NVIDIA Emulated",
        major=9,
        minor=0,
        multi_processor_count=sm_count,
        total_memory=1 << 34,
        L2_cache_size=50 << 20,
        shared_memory_per_block_optin=227 << 10,
    )
    stream = SimpleNamespace(cuda_stream=0, synchronize=lambda: None)
    bindings = SimpleNamespace(
        CUstreamCaptureMode=SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED=2),
        cuThreadExchangeStreamCaptureMode=lambda mode: (SimpleNamespace(value=0), mode),
    )
    stand_ins = {
        torch.cuda: {
            "is_available": lambda: True,
            "device_count": lambda: index + 1,
            "current_device": lambda: index,
            "get_device_properties": lambda *_: properties,
            "get_device_capability": lambda *_: (9, 0),
            "current_stream": lambda *_: stream,
            "default_stream": lambda *_: stream,
            "is_current_stream_capturing": lambda: False,
            "synchronize": lambda *_: None,
        },
        torch._C: {
            "_cuda_getDevice": lambda: index,
            "_cuda_getCurrentRawStream": lambda _: 0,
            "_cuda_isCurrentStreamCapturing": lambda: False,
        },
        jit: {
            "kernel": kernel.kernel,
            "tensor_map": tensor_map.tensor_map,
            "moved": tensor_map.moved,
            "arch_of": lambda *_: "sm_90a",
        },
        plan: {
            "recent": lambda *_: None
        },  # which compares tensors as they are, not as the mode below has them
        driver: {"bindings": lambda: bindings},
        kernel: {"last_block_first": last_block_first},
    }
    with ExitStack() as stack:
        for module, functions in stand_ins.items():
            for name, stand_in in functions.items():
                stack.enter_context(patch.object(module, name, stand_in, create=module is torch._C))
        stack.callback(kernel.buffers.let_go)
        stack.callback(kernel.traces.forget)
        stack.enter_context(_EverythingOnGpu(torch.device("cuda", index)))
        yield


class _EverythingOnGpu(TorchFunctionMode):
    """Tensors say that they are on `device`, and are made on the CPU where one is asked for on it."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._answers = {
            torch.Tensor.device.__get__: device,  # type: ignore[attr-defined]
            torch.Tensor.is_cuda.__get__: True,  # type: ignore[attr-defined]
            torch.Tensor.get_device: device.index,
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._answers:
            return self._answers[func]
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.data_ptr:
            kernel.buffers.add(args[0])
        args = tuple(_on_cpu(arg) for arg in args)
        kwargs = {name: _on_cpu(arg) for name, arg in (kwargs or {}).items() if name != "pin_memory"}
        return func(*args, **kwargs)


def _on_cpu(argument: Any) -> Any:
    on_gpu = isinstance(argument, (str, torch.device)) and str(argument).startswith("cuda")
    return torch.device("cpu") if on_gpu else argument
