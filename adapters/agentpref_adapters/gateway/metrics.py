"""What a gateway counts, for Prometheus. No label holds what people wrote, or an id."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The counters of one gateway."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter(
            "agentpref_requests",
            "Requests, by route and status.",
            ["route", "status"],
            registry=registry,
        )
        self.seconds = Histogram(
            "agentpref_request_seconds",
            "Seconds to the first byte.",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.open = Gauge(
            "agentpref_open_calls", "Calls that are being answered.", registry=registry
        )
        self.runs = Counter(
            "agentpref_runs", "Answers given to the log.", ["namespace", "end"], registry=registry
        )
        self.judgements = Counter(
            "agentpref_judgements", "Judgements taken in.", ["kind"], registry=registry
        )
        self.dropped = Gauge(
            "agentpref_dropped_runs",
            "Runs that the log could not keep.",
            ["namespace"],
            registry=registry,
        )

    def text(self) -> bytes:
        """All of it in Prometheus's text format."""
        return generate_latest(self._registry)
