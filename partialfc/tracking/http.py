"""Health of a run over HTTP on loopback: ``/healthz`` for supervisors, ``/metrics`` for Prometheus."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from partialfc.tracking.prometheus import RunBegin, RunCollector

_MOST_CONNECTIONS = 16  # each takes a thread and a file descriptor, which checkpoints need
_SECONDS = 5.0  # of a connection, from its first byte to its last


class Endpoint:
    """HTTP server for the state of a run and its metrics. All its threads are daemons; no run waits for them.

    ``/healthz`` answers 200 with the state, or 503 if the run is not running or ``stalled_after`` seconds have passed
    without progress.

    Args:
        port: port on 127.0.0.1; 0 takes a free one.
        run: name of the run, a label of its metrics.
        begin: position of the run at which this attempt begins.
        state: returns the content of state.json, and ``seconds_since_progress``.
        stalled_after: seconds.

    Raises:
        OSError: the port is taken.
    """

    def __init__(
        self, port: int, run: str, begin: RunBegin, state: Callable[[], dict[str, Any]], stalled_after: float
    ) -> None:
        self._state, self._stalled_after = state, stalled_after
        collector = RunCollector(run, state, begin)
        self.record = collector.record
        self.registry = CollectorRegistry()
        self.registry.register(collector)
        handler = type("Handler", (_Handler,), {"endpoint": self})
        self._server = _Server(("127.0.0.1", port), handler)
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, name="endpoint", daemon=True).start()

    def health(self) -> tuple[int, dict[str, Any]]:
        """Return the HTTP status and the body of ``/healthz``."""
        state = self._state()
        healthy = state["state"] == "running" and state["seconds_since_progress"] <= self._stalled_after
        return (200 if healthy else 503), state

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    """Server with a bounded number of connections, each of a bounded time.

    A client beyond the bound takes the place of the one that came first: connections that idle never keep one out.
    """

    daemon_threads = True
    request_queue_size = 128  # clients that the kernel keeps waiting cost the process nothing

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self._deadlines: dict[Any, float] = {}  # of the open connections, the oldest first
        self._changed = threading.Condition()
        super().__init__(address, handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError:  # the process is out of file descriptors: the client waits, and nothing spins
            time.sleep(0.1)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._changed:
            while len(self._deadlines) >= _MOST_CONNECTIONS:
                _hang_up(next(iter(self._deadlines)))
                self._changed.wait(1)
            self._deadlines[request] = time.monotonic() + _SECONDS
        super().process_request(request, client_address)

    def service_actions(self) -> None:  # called at least twice a second
        with self._changed:
            for request, deadline in self._deadlines.items():
                if time.monotonic() > deadline:
                    _hang_up(request)

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        with self._changed:
            self._deadlines.pop(request, None)
            self._changed.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log nothing: a client that goes away, or talks no HTTP, is no matter of the run."""


def _hang_up(request: socket.socket) -> None:
    with suppress(OSError):  # it is gone already
        request.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    endpoint: Endpoint

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/healthz":
            status, state = self.endpoint.health()
            self._answer(status, "application/json", json.dumps(state).encode() + b"\n")
        elif path == "/metrics":
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
