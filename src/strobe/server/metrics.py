"""What /metrics shows, in names that vLLM's dashboards know with another prefix."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from strobe.engine.engine import EngineStats
    from strobe.engine.request import Metrics as RequestMetrics

_Family = TypeVar("_Family", GaugeMetricFamily, CounterMetricFamily)

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKENS = tuple(1 << power for power in range(18))
_LAG_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)

LAG_PERIOD_S = 0.02
_RECENT = 0.1
"""Weight of the newest request in `recent_queue_s`."""


class Metrics:
    """Counters and histograms of one server; gauges of the engine are read when asked for.

    What vLLM has too carries its label `model_name`. No label takes its values from clients.
    """

    def __init__(self, model_name: str) -> None:
        self.model_name = model_name
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.ttft = self._seconds("time_to_first_token_seconds", "From arrival to the first token.")
        self.inter_token = self._seconds("inter_token_latency_seconds", "Between a stream's tokens.")
        self.tpot = self._seconds(
            "request_time_per_output_token_seconds", "A request's mean time a token after the first."
        )
        self.e2e = self._seconds("e2e_request_latency_seconds", "From arrival to the last token.")
        self.queue = self._seconds("request_queue_time_seconds", "From arrival to the first step.")
        self.prefill = self._seconds(
            "request_prefill_time_seconds", "From the first step to the first token."
        )
        self.decode = self._seconds("request_decode_time_seconds", "From the first token to the last.")
        self.prompt_tokens = self._histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self.output_tokens = self._histogram("request_generation_tokens", "Tokens written.", _TOKENS)
        self.finished = Counter(
            "strobe:request_success",
            "Requests by how they ended.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self.rejected = Counter(
            "strobe:request_rejected", "Requests turned away by a full queue.", registry=self.registry
        )
        self.http = Counter(
            "strobe:http_requests",
            "Answers by route and status.",
            ["route", "status"],
            registry=self.registry,
        )
        self.lag = Histogram(
            "strobe:event_loop_lag_seconds",
            "How late the event loop woke up.",
            registry=self.registry,
            buckets=_LAG_S,
        )
        self.last_lag = Gauge(
            "strobe:event_loop_lag_max_seconds",
            "Worst lag of the event loop in the last 10 s.",
            registry=self.registry,
        )
        self.recent_queue_s = 1.0

    def _seconds(self, name: str, what: str) -> Histogram:
        return self._histogram(name, what, _SECONDS)

    def _histogram(self, name: str, what: str, buckets: Sequence[float]) -> Histogram:
        labels = ["model_name"]
        every = Histogram(f"strobe:{name}", what, labels, registry=self.registry, buckets=buckets)
        return every.labels(self.model_name)

    def watch(self, stats: Callable[[], EngineStats], max_model_len: int) -> None:
        """Show the engine's own numbers, read at each scrape."""
        self.registry.register(_EngineCollector(stats, max_model_len, self.model_name))

    def ended(self, reason: str) -> None:
        """Count a request by how it ended."""
        self.finished.labels(self.model_name, reason).inc()

    def observe(self, metrics: RequestMetrics, reason: str) -> None:
        """A request that ended by itself."""
        self.ttft.observe(metrics.ttft_s)
        self.e2e.observe(metrics.e2e_s)
        self.queue.observe(metrics.queue_s)
        self.prefill.observe(metrics.ttft_s - metrics.queue_s)
        self.decode.observe(metrics.e2e_s - metrics.ttft_s)
        if metrics.tpot_s:
            self.tpot.observe(metrics.tpot_s)
        self.prompt_tokens.observe(metrics.prompt_tokens)
        self.output_tokens.observe(metrics.output_tokens)
        self.ended(reason)
        self.recent_queue_s += _RECENT * (metrics.queue_s - self.recent_queue_s)

    async def watch_loop(self) -> None:
        """Measure the event loop's lag until cancelled."""
        loop = asyncio.get_running_loop()
        worst, since = 0.0, time.monotonic()
        while True:
            due = loop.time() + LAG_PERIOD_S
            await asyncio.sleep(LAG_PERIOD_S)
            lag = max(0.0, loop.time() - due)
            self.lag.observe(lag)
            worst = max(worst, lag)
            if time.monotonic() - since > 10:
                worst, since = lag, time.monotonic()
            self.last_lag.set(worst)


class _EngineCollector:
    def __init__(self, stats: Callable[[], EngineStats], max_model_len: int, model_name: str) -> None:
        self._stats = stats
        self._max_model_len = max_model_len
        self._model_name = model_name

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        for name, what, value in (
            ("num_requests_running", "Sequences in the running batch.", stats.running),
            ("num_requests_waiting", "Sequences that wait.", stats.waiting),
            (
                "kv_cache_usage_perc",
                "Share of KV-cache pages in use; 1 is all.",
                stats.used_pages / stats.pages,
            ),
            ("kv_cache_pages", "Pages of the KV cache.", stats.pages),
            ("kv_cache_pages_used", "Pages that sequences hold.", stats.used_pages),
            ("max_model_len", "Longest prompt and output together, in tokens.", self._max_model_len),
        ):
            yield self._told(GaugeMetricFamily, name, what, value)
        for name, what, value in (
            ("engine_steps", "Forward passes.", stats.steps),
            ("prompt_tokens", "Prompt tokens served.", stats.prompt_tokens),
            ("generation_tokens", "Tokens written.", stats.output_tokens),
            ("num_preemptions", "Sequences that gave their pages back to wait.", stats.preemptions),
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_queries),
            ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.prefix_hits),
        ):
            yield self._told(CounterMetricFamily, name, what, value)

    def _told(self, kind: type[_Family], name: str, what: str, value: float) -> _Family:
        family = kind(f"strobe:{name}", what, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family
