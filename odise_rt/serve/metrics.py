"""What Prometheus can ask of the server. Names start with ``odise_``; times are seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from odise_rt.errors import MissingPackageError
from odise_rt.serve import MISSING_PACKAGES
from odise_rt.serve.problems import STATUS_CLIENT_GONE
from odise_rt.serve.worker import Answer

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_WINDOWS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 64)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self, labels: dict[str, str], gauges: dict[str, tuple[str, Callable[[], float]]]) -> None:
        """Start at zero.

        Args:
            labels: of ``odise_server_info``: version, bundle and the like.
            gauges: name to description and a function that gives the present value.

        Raises:
            MissingPackageError: prometheus_client is not installed.
        """
        try:
            import prometheus_client as prometheus
        except ImportError as exc:
            raise MissingPackageError(MISSING_PACKAGES) from exc
        drop_creation_times: Any = prometheus.disable_created_metrics
        drop_creation_times()  # a second series for each first one, of use to nobody here
        self._prometheus = prometheus
        registry = self._registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=registry)
        prometheus.Info("odise_server", "What is served.", registry=registry).info(labels)
        for name, (description, value) in gauges.items():
            prometheus.Gauge(name, description, registry=registry).set_function(value)
        self._requests: Any = prometheus.Counter(
            "odise_requests", "Requests by route and HTTP status (499: the client left).", ["route", "status"],
            registry=registry,
        )  # fmt: skip
        self._problems: Any = prometheus.Counter(
            "odise_problems", "Refused or failed requests by type of problem.", ["type"], registry=registry
        )
        self._latency: Any = prometheus.Histogram(
            "odise_request_seconds", "From the first byte to the answer.", ["route"], buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self._steps: Any = prometheus.Histogram(
            "odise_step_seconds", "Time of each step of a segmentation.", ["step"], buckets=_SECONDS, registry=registry
        )
        self._batches: Any = prometheus.Histogram(
            "odise_batch_windows", "Windows in one run of a shared stage.", ["stage"], buckets=_WINDOWS,
            registry=registry,
        )  # fmt: skip
        self._callers: Any = prometheus.Counter(
            "odise_batch_callers", "Requests that took part in runs of a shared stage.", ["stage"], registry=registry
        )
        self._windows: Any = prometheus.Counter("odise_windows", "Windows segmented.", registry=registry)
        self._segments: Any = prometheus.Counter("odise_segments", "Segments found.", registry=registry)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count one request, and its time if it was answered.

        Args:
            route: a template, never a path of the client's making.
            status: of the answer, or :data:`odise_rt.serve.problems.STATUS_CLIENT_GONE`.
            seconds: from the first byte on.
        """
        self._requests.labels(route, str(status)).inc()
        if status != STATUS_CLIENT_GONE:
            self._latency.labels(route).observe(seconds)

    def problem(self, kind: str) -> None:
        """Count one problem."""
        self._problems.labels(kind).inc()

    def answer(self, answer: Answer) -> None:
        """Count what a worker did."""
        for step, seconds in answer.seconds.items():
            self._steps.labels(step).observe(seconds)
        for stage, windows, callers in answer.batches:
            self._batches.labels(stage).observe(windows)
            self._callers.labels(stage).inc(callers)
        self._windows.inc(answer.windows)
        self._segments.inc(answer.segments)

    def exposition(self) -> tuple[bytes, str]:
        """All of it in Prometheus' text format, and its media type."""
        return self._prometheus.generate_latest(self._registry), self._prometheus.CONTENT_TYPE_LATEST
