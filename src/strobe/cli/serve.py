"""`strobe serve`: the model behind OpenAI's HTTP API, and a page to chat with it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from strobe import settings
from strobe.cli import console, options
from strobe.cli.load import tell_compiling, tell_memory
from strobe.errors import MissingExtraError, SettingsError

if TYPE_CHECKING:
    from strobe.server.config import ServerConfig

_MODEL, _DOOR, _LOAD, _SAFETY = "Model", "Address", "Load", "Safety"


def _flag(*names: str, help: str, panel: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


def serve(
    model: options.Model = None,
    served_model_name: Annotated[
        list[str] | None,
        _flag(
            "--served-model-name",
            help="What clients call the model; may be given several times.",
            show_default="the model's own",
            panel=_MODEL,
        ),
    ] = None,
    max_model_len: Annotated[
        int | None,
        _flag(
            "--max-model-len",
            help="Longest prompt and output together, in tokens.",
            show_default="the model's context",
            panel=_MODEL,
        ),
    ] = None,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    kernel: options.Kernel = None,
    linear: options.Linear = None,
    kv_cache_gib: options.KvCacheGib = None,
    gpu_memory_fraction: options.GpuMemoryFraction = None,
    overlap: options.Overlap = None,
    graphs: options.Graphs = None,
    deterministic: options.Deterministic = False,
    host: Annotated[
        str, _flag("--host", help="Address to listen on; 0.0.0.0 for all of this machine's.", panel=_DOOR)
    ] = "127.0.0.1",
    port: Annotated[int, _flag("--port", "-p", help="Port; 0 takes a free one.", panel=_DOOR)] = 8000,
    max_num_seqs: Annotated[
        int, _flag("--max-num-seqs", help="Sequences that run at once; more wait.", panel=_LOAD)
    ] = 512,
    max_num_batched_tokens: Annotated[
        int | None,
        _flag(
            "--max-num-batched-tokens",
            help="Tokens of one step; longer prompts go in chunks.",
            show_default="2048; 8192 on a large GPU",
            panel=_LOAD,
        ),
    ] = None,
    max_queue: Annotated[
        int, _flag("--max-queue", help="Requests that may wait; more get status 429.", panel=_LOAD)
    ] = 256,
    max_queued_tokens: Annotated[
        int, _flag("--max-queued-tokens", help="Prompt tokens that may wait.", panel=_LOAD)
    ] = 1 << 18,
    queue_timeout: Annotated[
        float, _flag("--queue-timeout", help="Seconds a request may wait for its first step.", panel=_LOAD)
    ] = 60.0,
    request_timeout: Annotated[
        float, _flag("--request-timeout", help="Seconds a request may take in all.", panel=_LOAD)
    ] = 600.0,
    drain_timeout: Annotated[
        float, _flag("--drain-timeout", help="Seconds that running requests get after SIGTERM.", panel=_LOAD)
    ] = 30.0,
    no_prefix_cache: Annotated[
        bool, _flag("--no-prefix-cache", help="Share nothing between prompts.", panel=_LOAD)
    ] = False,
    api_key: Annotated[
        list[str] | None,
        _flag(
            "--api-key",
            help="A key that clients must bring; may be given several times.",
            show_default=False,
            panel=_SAFETY,
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        _flag(
            "--api-key-file",
            help="A file of keys, one a line: `ps` shows flags.",
            show_default=False,
            panel=_SAFETY,
        ),
    ] = None,
    allowed_origin: Annotated[
        list[str] | None,
        _flag(
            "--allowed-origin",
            help="A web origin whose pages may call the API (CORS).",
            show_default="none",
            panel=_SAFETY,
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        _flag(
            "--allowed-host",
            help="A host name to answer to on loopback without keys, besides localhost.",
            show_default="none",
            panel=_SAFETY,
        ),
    ] = None,
    max_body_kib: Annotated[int, _flag("--max-body-kib", help="Largest request body.", panel=_SAFETY)] = 2048,
    log_requests: Annotated[
        bool, _flag("--log-requests", help="A line on stderr for every answer.", panel=_SAFETY)
    ] = False,
    log_prompts: Annotated[
        bool, _flag("--log-prompts", help="Write prompts to the log, too.", panel=_SAFETY)
    ] = False,
) -> None:
    """Serve a model over HTTP, as OpenAI's API has it, with a page to chat with it at /.

    One line on stdout says where, once it answers.
    The first SIGTERM or Ctrl-C lets running requests end; a second one stops at once.
    """
    from strobe.server.config import ServerConfig
    from strobe.server.listen import bind, url_of

    for library in ("fastapi", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(library) is None:
            raise MissingExtraError.of(library, "server")
    chosen = settings.load(device=device, kernel=kernel, linear=linear)
    config = ServerConfig(
        host=host,
        port=port,
        api_keys=(*(api_key or ()), *_keys_of(api_key_file)),
        served_names=tuple(served_model_name or ()),
        max_queue=max_queue,
        max_queued_tokens=max_queued_tokens,
        queue_timeout_s=queue_timeout,
        request_timeout_s=request_timeout,
        drain_timeout_s=drain_timeout,
        max_body_bytes=max_body_kib << 10,
        allowed_origins=tuple(allowed_origin or ()),
        allowed_hosts=tuple(allowed_host or ()),
        log_prompts=log_prompts,
    )
    with bind(config) as bound:
        from strobe.engine import LLM, EngineConfig
        from strobe.server.run import serve as serve_llm

        engine_config = EngineConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            kv_cache_gib=kv_cache_gib,
            gpu_memory_fraction=gpu_memory_fraction,
            overlap=overlap,
            graphs=graphs,
            deterministic=deterministic,
            prefix_cache=not no_prefix_cache,
            attention_kernel=chosen.kernel,
            linear_kernel=chosen.linear,
        )
        with console.bytes_progress("weights") as progress:
            llm = LLM(model, device=chosen.device, dtype=dtype, config=engine_config, progress=progress)
        with llm:
            tell_memory(llm)
            tell_compiling(llm)
            _log(requests=log_requests, prompts=log_prompts)
            _warn(config)
            serve_llm(llm, config, bound, lambda: console.write(f"{llm.name} is served on {url_of(bound)}\n"))


def _keys_of(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        keys = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path} is not UTF-8 text: byte {error.start}") from None
    if not keys:
        raise SettingsError(f"{path} holds no key", hint="one key a line")
    return keys


def _log(*, requests: bool, prompts: bool) -> None:
    import logging

    if requests or prompts:
        logging.getLogger("strobe.server").setLevel(logging.INFO)


def _warn(config: ServerConfig) -> None:
    if not config.on_loopback and not config.api_keys:
        console.note(f"anyone who reaches {config.host} may use this server (hint: --api-key)")
