"""Health of a run over HTTP on loopback: ``/healthz`` for supervisors, ``/metrics`` for Prometheus."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


class Endpoint(Collector):
    """HTTP server for the state of a run and its newest train line. All its threads are daemons; no run waits for them.

    ``/healthz`` answers 200 with the state, or 503 if the run is not running or ``stalled_after`` seconds have passed
    without progress.

    Args:
        port: port on 127.0.0.1; 0 takes a free one.
        state: returns the content of state.json, and ``seconds_since_progress``.
        stalled_after: seconds.

    Raises:
        OSError: the port is taken.
    """

    def __init__(self, port: int, state: Callable[[], dict[str, Any]], stalled_after: float) -> None:
        self._state, self._stalled_after = state, stalled_after
        self._newest: dict[str, Any] = {}
        self._events: dict[str, int] = {}
        self.registry = CollectorRegistry()
        self.registry.register(self)
        handler = type("Handler", (_Handler,), {"endpoint": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, name="endpoint", daemon=True).start()

    def record(self, line: dict[str, Any]) -> None:
        """Record a line of metrics.jsonl (a listener of :class:`~partialfc.tracking.metrics.MetricsFile`)."""
        if line["kind"] == "train":
            self._newest = line
        elif line["kind"] == "event":
            self._events = {**self._events, line["event"]: self._events.get(line["event"], 0) + 1}

    def health(self) -> tuple[int, dict[str, Any]]:
        """Return the HTTP status and the body of ``/healthz``."""
        state = self._state()
        healthy = state["state"] == "running" and state["seconds_since_progress"] <= self._stalled_after
        return (200 if healthy else 503), state

    def collect(self) -> Iterator[Metric]:
        """Yield Prometheus metrics: numbers of the state and of the newest train line, and counts of events by name."""
        state, newest = self._state(), self._newest
        numbers = {"up": int(state["state"] == "running"), **newest, **state}
        for name, value in numbers.items():
            if isinstance(value, int | float) and name not in ("time", "pid"):
                yield GaugeMetricFamily(f"partialfc_{name}", f"{name.replace('_', ' ')}, as in the run folder", value)
        seconds = GaugeMetricFamily("partialfc_step_seconds", "seconds of a step by phase", labels=["phase"])
        for phase, value in newest.get("seconds", {}).items():
            seconds.add_metric([phase], value)
        yield seconds
        events = CounterMetricFamily("partialfc_events", "events of this attempt", labels=["event"])
        for event, count in self._events.items():
            events.add_metric([event], count)
        yield events

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    endpoint: Endpoint

    def do_GET(self) -> None:
        if self.path == "/healthz":
            status, state = self.endpoint.health()
            self._answer(status, "application/json", json.dumps(state).encode() + b"\n")
        elif self.path == "/metrics":
            self._answer(200, CONTENT_TYPE_LATEST, generate_latest(self.endpoint.registry))
        else:
            self._answer(404, "text/plain; charset=utf-8", b"there are /healthz and /metrics\n")

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: the console belongs to the run."""
