"""Which of a Triton kernel's configurations is taken: timed once, and kept in a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from strobe.attention import triton_tuned
from strobe.attention.prefill import triton_fused
from strobe.attention.triton_launch import Kernel
from strobe.attention.triton_tuned import Config
from strobe.cuda import cache

pytest.importorskip("triton")
KERNEL = Kernel("strobe.attention.prefill.triton_fused_kernel", "attend")
SLOW, FAST = Config(64, 64, 4, 3), Config(128, 32, 8, 2)


@pytest.fixture
def timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[Config]]:
    """What was timed: FAST is always faster. GPU 0 and 1 are of one name, 2 is another."""
    monkeypatch.setenv("STROBE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton_tuned, "gpu", lambda index: SimpleNamespace(name=f"GPU {index // 2}"))
    monkeypatch.setattr(triton_tuned, "_chosen", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    seen: list[list[Config]] = []

    def measure(calls: list[Callable[[], Config]]) -> list[float]:
        seen.append([call() for call in calls])
        return [1.0 if config == FAST else 2.0 for config in seen[-1]]

    monkeypatch.setattr(triton_tuned, "measure", measure)
    return seen


def choose(kind: str = "head_dim 64", configs: tuple[Config, ...] = (SLOW, FAST), device: int = 0) -> Config:
    return triton_tuned.choose(KERNEL, kind, configs, lambda config: lambda: config, device)


def test_each_kind_is_timed_once_and_the_next_process_finds_it(timed: list[list[Config]]) -> None:
    for _ in range(2):
        for kind in ("head_dim 64", "head_dim 128", "head_dim 64"):
            assert choose(kind) == FAST
        triton_tuned._chosen.clear()  # as in a new process
    assert timed == [[SLOW, FAST]] * 2


def test_a_gpu_of_the_same_name_has_the_same_choice_and_another_its_own(timed: list[list[Config]]) -> None:
    for device in (0, 1, 2):
        assert choose(device=device) == FAST
    assert len(timed) == 2


def test_a_choice_that_is_no_configuration_any_more_is_made_anew(timed: list[list[Config]]) -> None:
    assert choose() == FAST
    triton_tuned._chosen.clear()
    assert choose(configs=(SLOW,)) == SLOW
    assert timed == [[SLOW, FAST], [SLOW]]


@pytest.mark.parametrize("content", ["", "{", "7", "[1]", '{"head_dim 64": 7}', '{"head_dim 64": [1]}', "\0"])
def test_a_file_that_cannot_be_read_is_made_anew(content: str, timed: list[list[Config]]) -> None:
    path = triton_tuned.path_of(KERNEL, "GPU 0")
    path.parent.mkdir()
    path.write_text(content)
    assert choose() == FAST
    assert triton_tuned.recall(path) == {"head_dim 64": FAST}
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_folder_that_cannot_be_made_is_no_error(timed: list[list[Config]]) -> None:
    cache.folder().write_text("")
    assert choose() == FAST


def test_nothing_is_timed_nor_kept_while_a_graph_is_captured(
    timed: list[list[Config]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as capturing:
        capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert choose() == SLOW
        assert timed == []
    assert choose() == FAST


def test_clearing_the_cache_takes_choices_along(timed: list[list[Config]]) -> None:
    choose()
    assert cache.clear() == 1
    assert not list(cache.folder().iterdir())


@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
@pytest.mark.parametrize(("arch", "shared"), [(80, 166_912), (86, 101_376), (90, 232_448), (120, 101_376)])
def test_some_configuration_fits_every_gpu(head_dim: int, arch: int, shared: int) -> None:
    device = SimpleNamespace(arch=arch, shared_memory_per_block=shared)
    fitting = triton_fused.fitting(head_dim, device)
    assert 1 <= len(fitting) <= 2
    for config in fitting:
        assert 2 * head_dim * (config.q_tile + 2 * config.stages * config.k_tile) <= shared
