"""What Triton's tuner chose, kept in a file."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from strobe.attention import triton_tuned
from strobe.cuda import cache

triton = pytest.importorskip("triton")


def tuner(*tiles: int) -> Any:
    def kernel() -> None: ...

    fn = SimpleNamespace(cache_key="a hash of its source", __name__=kernel.__name__)
    configs = [triton.Config({"TILE": tile}, num_warps=4, num_stages=2) for tile in tiles]
    return SimpleNamespace(fn=fn, configs=configs, cache={})


KEYS = [(64, True, "torch.bfloat16"), (128, False, "torch.float16")]


def test_another_process_gets_the_same_choices(tmp_path: Path) -> None:
    first, second = tuner(32, 64), tuner(32, 64)
    first.cache = dict(zip(KEYS, reversed(first.configs), strict=True))
    triton_tuned.keep(first, tmp_path / "new" / "choices.json")
    triton_tuned.recall(second, tmp_path / "new" / "choices.json")
    assert second.cache == {KEYS[0]: second.configs[1], KEYS[1]: second.configs[0]}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["choices.json"]


@pytest.mark.parametrize("content", ["", "{", "7", "[1]", '[[["a"], {"TILE": 7}]]', '[[[["a"]], {}]]', None])
def test_what_cannot_be_read_is_measured_again(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "choices.json"
    if content is not None:
        path.write_text(content)
    again = tuner(32, 64)
    triton_tuned.recall(again, path)
    assert again.cache == {}


def test_choices_among_other_configurations_are_not_taken(tmp_path: Path) -> None:
    first, other = tuner(32, 64), tuner(16, 128)
    first.cache = {KEYS[0]: first.configs[0]}
    triton_tuned.keep(first, tmp_path / "choices.json")
    triton_tuned.recall(other, tmp_path / "choices.json")
    assert other.cache == {}
    assert triton_tuned.path_of(first, "a GPU") != triton_tuned.path_of(other, "a GPU")
    assert triton_tuned.path_of(first, "a GPU") != triton_tuned.path_of(first, "another GPU")


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    triton_tuned.keep(tuner(32, 64), tmp_path / "file" / "choices.json")


def test_clearing_the_cache_takes_choices_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STROBE_CACHE_DIR", str(tmp_path))
    mine = tuner(32, 64)
    triton_tuned.keep(mine, triton_tuned.path_of(mine, "a GPU"))
    assert cache.clear() == 1
    assert not list(cache.folder().iterdir())


def test_the_kernel_has_what_a_choice_is_kept_by() -> None:
    from strobe.attention.prefill.triton_fused_kernel import attend

    if len(attend.configs) == 1:
        pytest.skip("TRITON_INTERPRET=1: nothing is tuned")
    assert triton_tuned.path_of(attend, "a GPU").name.startswith("triton-attend-")


def test_a_launch_keeps_what_was_tuned_and_the_next_process_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from strobe.attention.prefill import triton_fused_kernel as module

    class Tuner(SimpleNamespace):
        def __getitem__(self, grid: object) -> Any:
            def run(*arguments: int, **constants: int) -> None:
                key = (constants["HEAD_DIM"], "torch.float16")
                if key not in self.cache:
                    measured.append(key)
                    self.cache[key] = self.configs[0]

            return run

    monkeypatch.setenv("STROBE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(module.device, "gpu", lambda index: SimpleNamespace(name=f"GPU {index}"))
    measured: list[object] = []
    for head_dim in (64, 64, 128, 64):
        monkeypatch.setattr(module, "attend", Tuner(**vars(tuner(32, 64))))  # as in a new process
        module._choices.cache_clear()
        for _ in range(2):
            module.launch(lambda tiles: (1, 1), 0, HEAD_DIM=head_dim)
    module._choices.cache_clear()
    assert measured == [(64, "torch.float16"), (128, "torch.float16")]
