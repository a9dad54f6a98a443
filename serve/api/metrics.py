"""Counts for /metrics, in the form of Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """What the server has done."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "qmax_requests", "Answers by path and status", ("path", "status"), registry=self.registry
        )
        self.prompt_tokens = Counter("qmax_prompt_tokens", "Tokens of prompts", registry=self.registry)
        self.cached_tokens = Counter(
            "qmax_cached_tokens", "Tokens of prompts that had been read", registry=self.registry
        )
        self.generated_tokens = Counter("qmax_generated_tokens", "Tokens of replies", registry=self.registry)
        self.first_token = Histogram(
            "qmax_first_token_seconds", "Until the first token", buckets=SECONDS, registry=self.registry
        )
        self.between_tokens = Histogram(
            "qmax_between_tokens_seconds", "From token to token of a reply", buckets=BETWEEN, registry=self.registry
        )
        self.finished = Counter("qmax_finished", "Replies by how they ended", ("reason",), registry=self.registry)

    def watch(self, name: str, words: str, value: Callable[[], float]) -> None:
        """A gauge that is read when it is asked for."""
        Gauge(name, words, registry=self.registry).set_function(value)

    def render(self) -> bytes:
        """All of it as text."""
        return generate_latest(self.registry)
