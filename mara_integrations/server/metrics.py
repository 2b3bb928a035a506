"""Counts and durations of what the server did, for `GET /metrics`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mara_integrations.engine.workers import EngineStatus

# Seconds, from a short reply of a small model to a long one of a large model.
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16_384, 65_536)


class Metrics:
    """The metrics of one application; each has a registry of its own.

    Args:
        num_admitted: Returns the number of sequences that were admitted and are not answered yet.
        status: Returns what the engine is doing.
    """

    def __init__(self, num_admitted: Callable[[], int], status: Callable[[], EngineStatus]) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "mara_requests", "Requests by endpoint and HTTP status.", ["endpoint", "status"], registry=registry
        )
        self._tokens = Counter("mara_tokens", "Tokens read and written.", ["kind"], registry=registry)
        for kind in ("prompt", "completion"):
            self._tokens.labels(kind)
        self._seconds = Histogram(
            "mara_request_seconds", "Seconds to answer.", ["endpoint"], registry=registry, buckets=_SECONDS
        )
        self._first_token = Histogram(
            "mara_time_to_first_token_seconds", "Seconds to the first token.", registry=registry, buckets=_SECONDS
        )
        self._reply_tokens = Histogram("mara_reply_tokens", "Tokens of a reply.", registry=registry, buckets=_TOKENS)
        gauges: dict[str, tuple[str, Callable[[], int]]] = {
            "admitted": ("Sequences that were let in and are not answered yet.", num_admitted),
            "running": ("Sequences that the engine is decoding.", lambda: status().num_live),
            "waiting": ("Sequences that wait in the engine's queue.", lambda: status().num_waiting),
        }
        for name, (text, count) in gauges.items():
            Gauge(f"mara_sequences_{name}", text, registry=registry).set_function(count)

    def count_request(self, endpoint: str, status: int, seconds: float) -> None:
        """Count a request that was answered."""
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def count_first_token(self, seconds: float) -> None:
        """Count a reply that began this long after its request arrived."""
        self._first_token.observe(seconds)

    def count_tokens(self, kind: Literal["prompt", "completion"], number: int) -> None:
        """Count tokens as they are read or written, whether or not their reply is ever finished."""
        self._tokens.labels(kind).inc(number)

    def count_reply(self, completion_tokens: int) -> None:
        """Count a finished reply."""
        self._reply_tokens.observe(completion_tokens)

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self._registry)
