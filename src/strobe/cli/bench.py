"""`strobe bench`: measurements, each beside a peer where one can be imported."""

from __future__ import annotations

import typer

from strobe.cli import (
    bench_attention,
    bench_decode,
    bench_engine,
    bench_engine_ladder,
    bench_engine_suite,
    bench_profile,
    bench_serve,
    bench_soak,
    bench_startup,
)

app = typer.Typer(help="Measure kernels and the engine, beside their peers.", no_args_is_help=True)
app.command("latency")(bench_engine.latency)
app.command("throughput")(bench_engine.throughput)
app.command("engine")(bench_engine_suite.engine)
app.command("serve")(bench_serve.serve)
app.command("engine-ladder")(bench_engine_ladder.engine_ladder)
app.command("profile")(bench_profile.profile)
app.command("startup")(bench_startup.startup)
app.command("soak")(bench_soak.soak)
app.command("attention")(bench_attention.attention)
app.command("decode")(bench_decode.decode)
app.command("memory")(bench_attention.memory)
app.command("roofline")(bench_attention.roofline)
