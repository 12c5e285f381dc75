"""The compiler's front: what changes a key, what happens to a broken cache, what an error shows."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from strobe.cuda import cache, jit, nvrtc
from strobe.errors import CompileError

SOURCE = (
    '#include "part.cuh"\nextern "C" __global__ void twice(float* x) { x[threadIdx.x] *= FACTOR * ONE; }\n'
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and a process that has compiled nothing yet."""
    monkeypatch.setenv("STROBE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(jit, "_in_memory", {})
    monkeypatch.setattr(cache, "_warned", False)
    return tmp_path / "cache" / "cubins"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "part.cuh").write_text('#include "types.cuh"\n#define ONE 1.f\n')
    path = tmp_path / "twice.cu"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the programs that reached the compiler."""
    seen: list[str] = []
    build = nvrtc.build

    def counted(program: nvrtc.Program) -> jit.Cubin:
        seen.append(program.name)
        return build(program)

    monkeypatch.setattr(nvrtc, "build", counted)
    return seen


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    monkeypatch.setattr(jit, "_in_memory", {})


def test_a_new_process_finds_what_an_earlier_one_compiled(
    folder: Path, source: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = jit.compile(source, {"FACTOR": 2}, "sm_80")
    forget(monkeypatch)
    again = jit.compile(source, {"FACTOR": 2}, "sm_80")
    assert again == first
    assert again.resources() == first.resources()
    assert list(again.resources()) == ["twice"]
    assert compilations == ["twice.cu"]
    (entry,) = cache.entries()
    assert (entry.name, entry.arch, entry.defines) == ("twice.cu", "sm_80", (("FACTOR", "2"),))
    assert entry.size == entry.path.stat().st_size


def test_everything_that_matters_changes_the_key(
    folder: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(defines: dict[str, jit.Define] | None = None, arch: str = "sm_80") -> str:
        return nvrtc.program(source, {"FACTOR": 2} if defines is None else defines, arch).key

    plain = key()
    assert key() == plain
    assert key(arch="sm_90a") != plain
    assert key({"FACTOR": 3}) != plain
    assert key({"FACTOR": 2.0}) != plain
    assert key({"FACTOR": 2, "X": ""}) != plain
    assert key({"FACTOR": True}) == key({"FACTOR": 1})
    assert key({"B": 1, "A": 2}) == key({"A": 2, "B": 1})
    header = source.with_name("part.cuh")
    header.write_text(header.read_text() + "// a comment\n")
    assert key() != plain
    changed = key()
    source.write_text(SOURCE + "\n")
    assert key() != changed
    monkeypatch.setattr(nvrtc, "version", lambda: "99.9")
    assert key() not in (plain, changed)


def test_a_nested_header_is_found_and_hashed(source: Path) -> None:
    headers = dict(nvrtc.program(source, {"FACTOR": 2}, "sm_80").headers)
    assert set(headers) == {"part.cuh", "types.cuh", "convert.cuh"}
    assert headers["types.cuh"] == (nvrtc.INCLUDE / "types.cuh").read_text()


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "text"])
def test_a_damaged_file_is_compiled_again(
    damage: str, folder: Path, source: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = jit.compile(source, {"FACTOR": 2}, "sm_80")
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(
        {
            "truncate": whole[:middle],
            "flip": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
            "empty": b"",
            "text": b"not a cubin\n",
        }[damage]
    )
    assert cache.entries() == []
    forget(monkeypatch)
    assert jit.compile(source, {"FACTOR": 2}, "sm_80").resources() == first.resources()
    assert compilations == ["twice.cu"] * 2
    assert len(cache.entries()) == 1


def test_an_unwritable_folder_warns_once_and_compiles_on(
    tmp_path: Path, source: Path, compilations: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("STROBE_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="kept in memory only.*hint: set STROBE_CACHE_DIR"):
        first = jit.compile(source, {"FACTOR": 2}, "sm_80")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert jit.compile(source, {"FACTOR": 2}, "sm_80") is first
        jit.compile(source, {"FACTOR": 3}, "sm_80")
    assert compilations == ["twice.cu"] * 2
    assert cache.entries() == []


def test_eight_processes_at_once(folder: Path, source: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from strobe.cuda import jit\n"
        f"cubins = [jit.compile(Path({str(source)!r}), {{'FACTOR': n}}, 'sm_80') for n in (1, 2, 3)]\n"
        "sys.stdout.buffer.write(b''.join(cubin.image for cubin in cubins))"
    )
    environ = {**os.environ, "STROBE_CACHE_DIR": str(folder.parent)}
    racing = [
        subprocess.Popen([sys.executable, "-c", program], env=environ, stdout=subprocess.PIPE)
        for _ in range(8)
    ]
    images = [process.communicate(timeout=120)[0] for process in racing]
    assert [process.returncode for process in racing] == [0] * 8
    assert len(set(images)) == 1
    assert images[0].startswith(b"\x7fELF")
    assert sorted(path.suffix for path in folder.iterdir()) == [".cubin"] * 3
    assert len(cache.entries()) == 3


def test_the_oldest_go_where_all_take_too_much(
    folder: Path, source: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for age, factor in enumerate((5, 4, 3, 2)):  # the last of them is the oldest
        jit.compile(source, {"FACTOR": factor}, "sm_80")
        (path,) = (each.path for each in cache.entries() if ("FACTOR", str(factor)) in each.defines)
        os.utime(path, (1e9 - age, 1e9 - age))
    sizes = [each.size for each in cache.entries()]
    monkeypatch.setattr(cache, "MOST_BYTES", 3 * max(sizes) + 1)
    jit.compile(source, {"FACTOR": 6}, "sm_80")
    forget(monkeypatch)
    del compilations[:]
    for factor in (6, 5, 4):
        jit.compile(source, {"FACTOR": factor}, "sm_80")
    assert not compilations
    jit.compile(source, {"FACTOR": 3}, "sm_80")
    assert compilations == ["twice.cu"]


def test_clear_deletes_the_files(folder: Path, source: Path) -> None:
    jit.compile(source, {"FACTOR": 2}, "sm_80")
    (folder / "left-by-a-crash.tmp").write_bytes(b"half")
    (folder / "somebody-else's.txt").write_text("stays")
    assert cache.clear() == 2
    assert [path.name for path in folder.iterdir()] == ["somebody-else's.txt"]
    assert cache.clear() == 0


def test_warm_compiles_each_source(folder: Path, source: Path, compilations: list[str]) -> None:
    heard: list[str] = []
    jobs = [jit.Source(source, {"FACTOR": n}) for n in range(4)]
    assert (
        jit.warm(jobs, "sm_80", lambda job, cubin: heard.append(f"{job.defines['FACTOR']} {cubin.arch}")) == 4
    )
    assert sorted(heard) == [f"{n} sm_80" for n in range(4)]
    assert len(cache.entries()) == len(compilations) == 4


def test_a_compile_error_shows_the_source_line(folder: Path, source: Path) -> None:
    source.write_text(SOURCE + "__device__ int f() {\n  return missing + 1;\n}\nint g() { return lost; }\n")
    with pytest.raises(CompileError) as caught:
        jit.compile(source, {"FACTOR": 2}, "sm_80")
    message = str(caught.value)
    assert message.startswith("twice.cu for sm_80 with FACTOR=2 does not compile: twice.cu(4): ")
    assert 'identifier "missing" is undefined: `return missing + 1;` (and 1 more)' in message
    assert "\n" not in message
    assert not folder.exists()


def test_an_error_in_a_header_shows_the_header_s_line(folder: Path, source: Path) -> None:
    source.with_name("part.cuh").write_text("#define ONE 1.f\nusing broken = nothing;\n")
    with pytest.raises(CompileError, match=r"part\.cuh\(2\): .*`using broken = nothing;`"):
        jit.compile(source, {"FACTOR": 2}, "sm_80")


def test_a_missing_header_is_named(folder: Path, source: Path) -> None:
    source.write_text('\n#include "nowhere.cuh"\n')
    with pytest.raises(CompileError, match=r"twice\.cu\(2\): no header 'nowhere\.cuh'"):
        jit.compile(source, {}, "sm_80")
    with pytest.raises(CompileError, match=r"absent\.cu: No such file"):
        jit.compile(source.with_name("absent.cu"), {}, "sm_80")


def test_an_unknown_arch_is_refused(folder: Path, source: Path) -> None:
    with pytest.raises(
        CompileError, match=r"sm_1 .*does not compile: .*invalid value for --gpu-architecture"
    ):
        jit.compile(source, {"FACTOR": 2}, "sm_1")
    assert {"sm_80", "sm_90", "sm_120"} <= set(jit.supported_archs())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_define_is_a_finite_number(value: float, source: Path) -> None:
    with pytest.raises(CompileError, match="define FACTOR is"):
        nvrtc.program(source, {"FACTOR": value}, "sm_80")


def test_loading_does_not_wait_for_the_compiler(folder: Path, source: Path) -> None:
    """What a cache hit costs is a file: NVRTC, which takes most of a tenth of a second to load, stays out."""
    jit.compile(source, {"FACTOR": 2}, "sm_80")
    program = (
        "import sys; from pathlib import Path; from strobe.cuda import jit\n"
        f"jit.compile(Path({str(source)!r}), {{'FACTOR': 2}}, 'sm_80')\n"
        "print([name for name in sys.modules if name.startswith(('cuda.bindings', 'torch'))])"
    )
    environ = {**os.environ, "STROBE_CACHE_DIR": str(folder.parent)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
