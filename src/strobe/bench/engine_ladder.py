"""One Llama through one engine in several configurations: what each kernel is worth in tokens a second.

Each configuration keeps what the one before brought and replaces one thing.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from strobe.bench.engine import TIE, latency_figures
from strobe.bench.engine_peers import Generation
from strobe.bench.results import Row
from strobe.bench.verify import logits
from strobe.engine import Engine, EngineConfig, Request, SamplingParams
from strobe.engine.memory import GIB, free_memory
from strobe.errors import DeviceError, KernelRefusedError, StrobeError
from strobe.models import shapes
from strobe.models.network import Model

PAGE_SIZE = 16


@dataclass(frozen=True)
class Configuration:
    """The kernels of one engine, by name."""

    name: str
    attention_kernel: str
    linear_kernel: str


REFERENCE = Configuration("reference", "torch_naive", "torch_linear")
"""PyTorch's own calls, which every configuration's tokens are compared with."""

ON_GPU = (
    Configuration("naive_matmul", "torch_naive", "cuda_matmul_naive"),
    Configuration("cuda_softmax", "torch_cuda_softmax", "cuda_matmul_naive"),
    Configuration("fused_attention", "auto", "cuda_matmul_naive"),
    # a GEMV is for few tokens; a prompt's many go through cuBLAS
    Configuration("gemv", "auto", "cuda_gemv,torch_linear"),
)
ON_CPU = (
    Configuration("naive_attention", "torch_naive", "torch_linear"),
    Configuration("online_softmax", "torch_online", "torch_linear"),
    Configuration("fused_attention", "auto", "torch_linear"),
    # oneDNN is for three tokens and more
    Configuration("onednn", "auto", "torch_onednn,torch_linear"),
)


def random_model(shape: str, device: str, dtype: torch.dtype) -> Model:
    """A published shape with random weights, for `measure`.

    Raises:
        UnknownNameError: no such shape.
        DeviceError: its weights do not fit the device's free memory.
    """
    config = shapes.named(shape)
    needed, free = shapes.weight_bytes(config, dtype), free_memory(torch.device(device))
    if needed > free:
        raise DeviceError(
            f"{shape} takes {needed / GIB:.1f} GiB in {str(dtype).removeprefix('torch.')}; "
            f"{free / GIB:.1f} GiB are free on {device}",
            hint=f"shapes: {', '.join(shapes.SHAPES)}",
        )
    return shapes.random_model(config, device=device, dtype=dtype)


def measure(
    model: Model,
    name: str,
    configurations: Sequence[Configuration],
    *,
    prompt: int = 128,
    output: int = 128,
    runs: int = 3,
) -> Iterator[Row]:
    """A row a configuration: one request of random token ids, greedy, alone in the engine.

    A row's `first_difference` is the index of the first output token that is not the reference's, None
    where all are; `checked` says that the reference's own logits tie there. A configuration whose
    kernels refuse has a row with `refused`, their reasons, and no figures.

    Raises:
        SettingsError: the model's context does not hold the prompt and the output.
        StrobeError: no prompt, or an output of less than two tokens.
    """
    if prompt < 1 or output < 2:
        raise StrobeError(f"prompt {prompt}, output {output}; supported: 1 and up, 2 and up")
    rng = random.Random(0)  # noqa: S311 - tokens of a benchmark
    tokens = [rng.randrange(model.config.vocab_size) for _ in range(prompt)]
    case = {
        "model": name,
        "batch": 1,
        "prompt": prompt,
        "output": output,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    expected = _generate(_engine(model, REFERENCE, prompt + output), tokens, output).token_ids
    for configuration in configurations:
        row: Row = {
            "case": case,
            "provider": f"strobe:{configuration.name}",
            "attention_kernel": configuration.attention_kernel,
            "linear_kernel": configuration.linear_kernel,
        }
        engine = _engine(model, configuration, prompt + output)
        try:
            given = _generate(engine, tokens, output).token_ids
        except KernelRefusedError as error:
            yield row | {"checked": None, "refused": str(error)}
            continue
        at = next((i for i, (a, b) in enumerate(zip(given, expected, strict=True)) if a != b), None)
        right = at is None or _ties(model, [*tokens, *expected[:at]], given[at], expected[at])
        row |= {"checked": right, "first_difference": at}
        if right:
            row |= latency_figures(model, [_generate(engine, tokens, output) for _ in range(runs)])
        yield row


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


def _generate(engine: Engine, prompt: Sequence[int], output: int) -> Generation:
    params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
    tokens: list[int] = []
    at: list[float] = []
    start = time.perf_counter()
    engine.add(Request("0", tuple(prompt), params, stream=True))
    while engine.has_work:
        for chunk in engine.step():
            tokens += chunk.token_ids
            at.append(time.perf_counter() - start)
    return Generation(tuple(tokens), tuple(at))


def _ties(model: Model, prefix: Sequence[int], given: int, expected: int) -> bool:
    """True where the reference's logits after `prefix` are too close for the dtype to tell them apart."""
    kernels = {"attention_kernel": REFERENCE.attention_kernel, "linear_kernel": REFERENCE.linear_kernel}
    scores = logits(model, list(prefix), **kernels)[-1]
    share = max(TIE, 4 * torch.finfo(model.dtype).eps)
    return bool((scores[expected] - scores[given]).abs() <= share * scores.abs().max())
