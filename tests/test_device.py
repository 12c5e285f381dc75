from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict

import pytest

from strobe import device
from strobe.errors import DeviceError


def test_machine_is_described_everywhere() -> None:
    machine = device.machine()
    assert machine.cpu.cores >= 1
    assert machine.cpu.name
    assert machine.versions["numpy"]
    json.dumps(asdict(machine))


def test_machine_without_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from strobe import device\n"
        "print(device.has_gpu(), device.resolve('auto'), device.machine().gpus)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "cpu", "()"]


@pytest.mark.skipif(device.has_gpu(), reason="this machine has an NVIDIA GPU")
def test_a_gpu_that_is_not_there() -> None:
    assert device.resolve("auto") == "cpu"
    with pytest.raises(DeviceError, match=r"'cuda:1'.*hint: use 'cpu'"):
        device.resolve("cuda:1")
    with pytest.raises(DeviceError):
        device.gpu()


@pytest.mark.parametrize("name", ["gpu", "meta", "mps", "cuda:", "cuda:-1", "cuda:x", "cpu ", ""])
def test_what_is_no_device_is_told_what_is(name: str) -> None:
    with pytest.raises(DeviceError, match=r"supported: auto, cpu, cuda, cuda:N"):
        device.resolve(name)


@pytest.mark.gpu
def test_gpu_is_described() -> None:
    gpu = device.machine().gpus[0]
    assert gpu.arch >= 70
    assert gpu.sm_count > 0
    assert gpu.memory > gpu.l2_cache > gpu.shared_memory_per_block > 0
    assert device.resolve("auto") == "cuda"
    with pytest.raises(DeviceError, match="from cuda:0"):
        device.resolve("cuda:99")


@pytest.mark.parametrize(("arch", "target"), [(80, "sm_80"), (90, "sm_90a"), (100, "sm_100a")])
def test_target_names_the_exact_architecture(arch: int, target: str) -> None:
    assert device.Gpu(0, "", arch, 1, 1, 1, 1).target == target


@pytest.mark.parametrize(
    ("name", "slug"),
    [("NVIDIA H200", "h200"), ("NVIDIA GeForce RTX 4090", "geforce-rtx-4090"), ("../x", "x")],
)
def test_slug_is_a_plain_folder_name(name: str, slug: str) -> None:
    assert device.Gpu(0, name, 90, 1, 1, 1, 1).slug == slug
