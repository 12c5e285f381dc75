from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Cli


@pytest.fixture
def generate(cli: Cli, model_folder: Path) -> Cli:
    def call(*args: str, stdin: str = "") -> object:
        flags = ("--model", str(model_folder), "--device", "cpu", "--max-tokens", "12", "--seed", "5")
        return cli("generate", *args, *flags, stdin=stdin)

    return call


def test_text_to_stdout_and_timings_to_stderr(generate: Cli) -> None:
    outcome = generate("hello")
    record = json.loads(generate("hello", "--json").out)
    assert outcome.code == 0
    assert outcome.out == record["text"] + "\n"
    assert "5 prompt tokens" in outcome.err
    assert "first token" in outcome.err
    assert len(outcome.err.splitlines()) == 1


@pytest.mark.parametrize(("to_compile", "at_a_terminal"), [(True, True), (True, False), (False, True)])
def test_a_first_start_says_why_it_takes_longer(
    generate: Cli, monkeypatch: pytest.MonkeyPatch, to_compile: bool, at_a_terminal: bool
) -> None:
    monkeypatch.setattr("strobe.cpu.jit.to_compile", lambda: to_compile)
    monkeypatch.setattr("sys.stderr.isatty", lambda: at_a_terminal)
    told = "compiling kernels for this CPU" in generate("O").err
    assert told == (to_compile and at_a_terminal)


def test_echo_writes_the_prompt_first(generate: Cli) -> None:
    assert generate("hello", "--echo").out == "hello" + generate("hello").out


def test_echo_is_refused_where_it_would_say_nothing(generate: Cli) -> None:
    assert "--echo with --json" in generate("hello", "--echo", "--json").error


def test_a_kernel_that_refuses_leaves_stdout_empty(generate: Cli) -> None:
    assert "kernel 'cuda_paged' refuses" in generate("hello", "--kernel", "cuda_paged").error


@pytest.mark.parametrize("flag", ["--overlap", "--graphs", "--eager", "--deterministic"])
def test_how_steps_are_run_does_not_show_in_the_text(generate: Cli, flag: str) -> None:
    assert generate("hello", flag).out == generate("hello").out


def test_memory_that_is_not_there_is_one_line(generate: Cli) -> None:
    assert "on no GPU" in generate("hello", "--gpu-memory-fraction", "0.5").error
    both = generate("hello", "--gpu-memory-fraction", "0.5", "--kv-cache-gib", "1")
    assert "give one of them" in both.error
    assert "kv_cache_gib=" in generate("hello", "--kv-cache-gib", "1e6").error
    named = generate("hello", "--deterministic", "--linear", "torch_linear")
    assert "deterministic and a kernel by name" in named.error


def test_json_holds_the_whole_answer(generate: Cli) -> None:
    outcome = generate("hello", "--json")
    record = json.loads(outcome.out)
    assert outcome.err == ""
    assert record["prompt"] == "hello"
    assert record["finish_reason"] == "length"
    assert len(record["token_ids"]) == 12
    assert record["metrics"]["output_tokens"] == len(record["token_ids"])
    assert record["metrics"]["ttft_s"] > 0


def test_prompt_from_stdin_is_the_same_prompt(generate: Cli) -> None:
    assert generate(stdin="hello\n").out == generate("hello").out


def test_same_seed_same_text(generate: Cli, cli: Cli, model_folder: Path) -> None:
    assert generate("hello").out == generate("hello").out
    flags = ("--model", str(model_folder), "--device", "cpu", "--max-tokens", "12")
    assert len({cli("generate", "hello", *flags, "--seed", str(seed)).out for seed in range(6)}) > 1


def test_prompts_of_a_file_in_their_order(generate: Cli, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\nand two\n  three\n")
    outcome = generate("--prompts", str(file), "--json", "--temperature", "0")
    records = [json.loads(line) for line in outcome.out.splitlines()]
    assert [record["prompt"] for record in records] == ["one", "and two", "  three"]
    for record in records:
        alone = json.loads(generate(record["prompt"], "--json", "--temperature", "0").out)
        assert record["token_ids"] == alone["token_ids"]
    assert outcome.err == ""
    assert generate("--prompts", "-", "--json", "--temperature", "0", stdin=file.read_text()).out
    text = generate("--prompts", str(file), "--temperature", "0").out
    assert text == "".join(f"{record['prompt']}{record['text']}\n\n" for record in records)


def test_stop_string_ends_the_text(generate: Cli) -> None:
    whole = json.loads(generate("hello", "--json", "--temperature", "0").out)["text"]
    part = whole[3:5]
    cut = json.loads(generate("hello", "--json", "--temperature", "0", "--stop", part).out)
    assert cut["text"] == whole[: whole.index(part)]
    assert cut["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("args", "stdin", "told"),
    [
        (["x" * 3000], "", "this model's context is 2048"),
        (["--max-tokens", "5000", "hello"], "", "max_tokens is 5000"),
        (["--prompts", "-"], "\n \n", "holds no prompt"),
        (["hello", "--kernel", "nonsense"], "", "unknown kernel 'nonsense'"),
        (["hello", "--kernel", "textboook"], "", "did you mean 'textbook'"),
        (["hello", "--linear", "nonsense"], "", "nonsense"),
        (["hello", "--kv-cache-gib", "1e9"], "", "KV cache"),
        (["hello", "--dtype", "float61"], "", "dtype 'float61'"),
        (["hello", "--device", "cuda:77"], "", "cuda:77"),
    ],
)
def test_mistake_is_one_line(cli: Cli, model_folder: Path, args: list[str], stdin: str, told: str) -> None:
    flags = ["--model", str(model_folder)] + ([] if "--device" in args else ["--device", "cpu"])
    assert told in cli("generate", *args, *flags, stdin=stdin).error


def test_prompts_that_are_no_text(cli: Cli, model_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"good\n\xff\xfe bad\n")
    told = cli("generate", "--prompts", str(file), "--model", str(model_folder)).error
    assert "prompts.txt is not UTF-8 text: byte 5" in told


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="this system has no /dev/zero")
def test_input_without_an_end_is_refused(
    cli: Cli, process: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    assert "/dev/zero holds more than" in cli("generate", "--prompts", "/dev/zero").error
    with Path("/dev/zero").open() as endless:
        done = process("generate", stdin=endless)
    assert done.returncode == 2
    assert done.stderr.startswith("error: stdin holds more than")


def test_empty_prompt_without_a_bos_token(cli: Cli, model_folder: Path, tmp_path: Path) -> None:
    assert "the prompt is empty" in cli("generate", "", "--model", str(model_folder)).error
    assert "the prompt is empty" in cli("generate", "--model", str(model_folder), stdin="").error


def test_a_prompt_ends_with_its_line_alone(generate: Cli, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("one\u2028still one\x0cand still\r\ntwo\n".encode())
    outcome = generate("--prompts", str(file), "--json")
    prompts = [json.loads(line)["prompt"] for line in outcome.out.split("\n") if line]
    assert prompts == ["one\u2028still one\x0cand still", "two"]


def test_bad_defaults_of_a_model_name_their_file(cli: Cli, model_folder: Path, tmp_path: Path) -> None:
    for path in model_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "generation_config.json").write_text('{"do_sample": true, "temperature": NaN}')
    told = cli("generate", "hello", "--model", str(tmp_path)).error
    assert "generation_config.json: temperature is nan" in told


@pytest.mark.parametrize("broken", ["config.json", "model.safetensors", "tokenizer.json"])
def test_truncated_file_is_named(cli: Cli, model_folder: Path, tmp_path: Path, broken: str) -> None:
    for path in model_folder.iterdir():
        data = path.read_bytes()
        (tmp_path / path.name).write_bytes(data[: len(data) // 2] if path.name == broken else data)
    assert broken in cli("generate", "hello", "--model", str(tmp_path)).error


def test_empty_folder_is_named(cli: Cli, tmp_path: Path) -> None:
    assert f"{tmp_path} is empty" in cli("generate", "hello", "--model", str(tmp_path)).error


def test_as_a_process(
    process: Callable[..., subprocess.CompletedProcess[str]], model_folder: Path, generate: Cli
) -> None:
    flags = ["--model", str(model_folder), "--device", "cpu", "--max-tokens", "12", "--seed", "5"]
    done = process("generate", *flags, input="hello")
    assert done.returncode == 0, done.stderr
    as_read = io.TextIOWrapper(io.BytesIO(generate("hello").out.encode())).read()  # "\r" becomes "\n"
    assert done.stdout == as_read
    done = process("generate", "hello", "--model", "/no/such/folder")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
