"""One Llama through one engine in several configurations: what each kernel is worth in tokens a second.

Each configuration keeps what the one before brought and replaces one thing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from strobe.bench.answers import first_wrong
from strobe.bench.engine import latency_figures
from strobe.bench.engine_cases import Batch
from strobe.bench.engine_peers import Strobe, Transformers
from strobe.bench.results import Row
from strobe.bench.subject import Subject
from strobe.engine import Engine, EngineConfig
from strobe.errors import KernelRefusedError
from strobe.models.network import Model

PAGE_SIZE = 16


@dataclass(frozen=True)
class Configuration:
    """The kernels of one engine, by name."""

    name: str
    attention_kernel: str
    linear_kernel: str


ON_GPU = (
    Configuration("naive_matmul", "torch_naive", "cuda_matmul_naive"),
    Configuration("cuda_softmax", "torch_cuda_softmax", "cuda_matmul_naive"),
    Configuration("fused_attention", "auto", "cuda_matmul_naive"),
    # a GEMV is for few tokens; a prompt's many go through cuBLAS
    Configuration("gemv", "auto", "cuda_gemv,torch_linear"),
    # products that load ahead, with norm, activation, residual, rope and append within their launches
    Configuration("fastest", "auto", "auto"),
)
ON_CPU = (
    Configuration("naive_attention", "torch_naive", "torch_linear"),
    Configuration("online_softmax", "torch_online", "torch_linear"),
    Configuration("fused_attention", "torch_sdpa", "torch_linear"),
    # oneDNN is for three tokens and more
    Configuration("onednn", "torch_sdpa", "torch_onednn,torch_linear"),
    # with numba: a step's attention and products compiled
    Configuration("fastest", "auto", "auto"),
)


def measure(
    model: Model,
    name: str,
    configurations: Sequence[Configuration],
    *,
    folder: Path | None = None,
    prompt: int = 128,
    output: int = 128,
    runs: int = 3,
) -> Iterator[Row]:
    """A row a configuration: one request of random token ids, greedy, alone in the engine.

    `folder` is the model's; None where its weights are random. `checked` says that PyTorch's own calls
    would have written the same tokens, or others only in a tie; else `first_wrong` is the first output
    token that they would not have, and there are no figures. A configuration whose kernels refuse has a
    row with `refused`, their reasons.

    Raises:
        SettingsError: the model's context does not hold the prompt and the output.
        StrobeError: no prompt, or an output of less than two tokens.
    """
    case = Batch(1, prompt, output)
    tokens = case.jobs(model.config.vocab_size, 1)[0].prompts[0]
    for configuration in configurations:
        subject = Subject(name, _engine(model, configuration, prompt + output), folder)
        engine = Strobe(subject)
        row: Row = {
            "case": subject.case(**case.sizes()),
            "provider": f"strobe:{configuration.name}",
            "attention_kernel": configuration.attention_kernel,
            "linear_kernel": configuration.linear_kernel,
        }
        try:
            given = engine.one(tokens, output).token_ids
        except KernelRefusedError as error:
            yield row | {"checked": None, "refused": str(error)}
            continue
        wrong = first_wrong(model, tokens, given)
        if wrong is not None:
            yield row | {"checked": False, "first_wrong": wrong}
            continue
        done = [engine.one(tokens, output) for _ in range(runs)]
        yield row | {"checked": True} | latency_figures(model, done, prompt)


def transformers_row(
    model: Model,
    name: str,
    *,
    folder: Path | None = None,
    prompt: int = 128,
    output: int = 128,
    runs: int = 3,
) -> Row:
    """transformers on the same network, with the same prompt; as a row of `measure`.

    Raises:
        CheckpointError, MissingExtraError: as `Transformers`.
    """
    case = Batch(1, prompt, output)
    tokens = case.jobs(model.config.vocab_size, 1)[0].prompts[0]
    subject = Subject(name, _engine(model, Configuration("", "auto", "auto"), prompt + output), folder)
    peer = Transformers(subject)
    row: Row = {"case": subject.case(**case.sizes()), "provider": peer.name}
    wrong = first_wrong(model, tokens, peer.one(tokens, output).token_ids)
    if wrong is not None:
        return row | {"checked": False, "first_wrong": wrong}
    done = [peer.one(tokens, output) for _ in range(runs)]
    return row | {"checked": True} | latency_figures(model, done, prompt)


def _engine(model: Model, configuration: Configuration, context: int) -> Engine:
    """An engine with room for one request of `context` tokens."""
    config = EngineConfig(
        page_size=PAGE_SIZE,
        kv_cache_pages=-(-context // PAGE_SIZE),
        max_num_seqs=1,
        max_model_len=context,
        prefix_cache=False,
        attention_kernel=configuration.attention_kernel,
        linear_kernel=configuration.linear_kernel,
    )
    return Engine(model, None, config)
