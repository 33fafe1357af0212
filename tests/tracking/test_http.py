"""The health and the metrics that a run serves, and clients that misbehave."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from partialfc.tracking import http
from partialfc.tracking.http import Endpoint
from partialfc.tracking.prometheus import RunBegin
from tests.harness.running import command, free_port, lines, started, steps_done, wait_until
from tests.harness.tasks import write_task


@pytest.fixture
def now() -> dict[str, Any]:
    return {
        "state": "running",
        "step": 7,
        "total_steps": 10,
        "updated": 1795576655.0,
        "seconds_since_progress": 1.0,
        "restarts": 0,
    }


@pytest.fixture
def endpoint(now: dict[str, Any]) -> Iterator[Endpoint]:
    endpoint = Endpoint(0, "face", RunBegin(), lambda: now, stalled_after=60)
    yield endpoint
    endpoint.close()


def get(endpoint: Endpoint, path: str) -> tuple[int, bytes]:
    with urllib.request.urlopen(f"http://127.0.0.1:{endpoint.port}{path}", timeout=10) as answer:
        return answer.status, answer.read()


def test_health_and_metrics_are_served_on_loopback(endpoint: Endpoint, now: dict[str, Any]) -> None:
    endpoint.record({"kind": "train", "step": 7, "loss": 1.5, "seconds": {"data": 0.25}, "time": 1.0})
    status, body = get(endpoint, "/healthz")
    assert (status, json.loads(body)["step"]) == (200, 7)
    for path in ("/metrics", "/metrics?name[]=x"):
        status, body = get(endpoint, path)
        families = {family.name: family for family in text_string_to_metric_families(body.decode())}
        assert families["partialfc_loss"].samples[0].value == 1.5
        assert families["partialfc_up"].samples[0].value == 1
    now["seconds_since_progress"] = 61.0
    with pytest.raises(urllib.error.HTTPError, match="503"):
        get(endpoint, "/healthz")
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(endpoint, "/elsewhere")


def connect(endpoint: Endpoint, sent: bytes = b"") -> socket.socket:
    client = socket.create_connection(("127.0.0.1", endpoint.port), timeout=10)
    client.sendall(sent)
    return client


def server_sockets() -> int:
    """Descriptors of this process that are sockets."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            found += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
        except OSError:
            continue
    return found


def test_idle_connections_are_bounded_and_keep_nobody_out(endpoint: Endpoint) -> None:
    before, most = server_sockets(), 0
    clients = []
    for _ in range(100):
        clients.append(connect(endpoint, b"GET /metrics HTTP/1.1\r\n"))
        most = max(most, server_sockets() - before - len(clients))
    assert get(endpoint, "/healthz")[0] == 200
    assert most <= http._MOST_CONNECTIONS + 1
    handlers = [thread for thread in threading.enumerate() if "process_request" in thread.name]
    assert len(handlers) <= http._MOST_CONNECTIONS
    assert clients[0].recv(1) == b"", "the oldest has made room"
    for client in clients:
        client.close()


@pytest.mark.parametrize("drips", [False, True])
def test_a_connection_ends_after_some_seconds_even_if_it_sends_a_byte_now_and_then(
    monkeypatch: pytest.MonkeyPatch, endpoint: Endpoint, drips: bool
) -> None:
    monkeypatch.setattr(http, "_SECONDS", 0.3)
    client = connect(endpoint, b"GET /")
    client.settimeout(0.1)
    for _ in range(100):
        try:
            if drips:
                client.sendall(b"x")
            if client.recv(1) == b"":
                return
        except TimeoutError:
            continue
        except OSError:  # reset
            return
    pytest.fail("the connection is still open")


GARBAGE = (b"\x16\x03\x01\x02\x00\x01\x00", b"\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9\xb2.1\r\n\r\n", b"x" * 70_000)


def test_garbage_and_clients_that_go_away_leave_nothing_in_the_log(
    endpoint: Endpoint, capfd: pytest.CaptureFixture[str]
) -> None:
    for number in range(100):
        client = connect(endpoint)
        # Closed at once, with a reset: the answer cannot be written.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        with contextlib.suppress(OSError):
            client.sendall([*GARBAGE, b"GET /metrics HTTP/1.1\r\n\r\n"][number % 6])
        client.close()
    assert get(endpoint, "/healthz")[0] == 200
    wait_until(lambda: not endpoint._server._deadlines, seconds=10)
    assert capfd.readouterr() == ("", "")


def test_a_run_serves_its_health_while_it_trains_and_trains_without_if_the_port_is_taken(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(write_task(tmp_path)))
    port = free_port()
    long = ["optim.epochs=1000", "evaluation.every=0", f"tracking.metrics_port={port}"]
    with started(command(config, 0, f"run.dir={tmp_path}/first", *long), tmp_path / "first.out") as first:
        wait_until(lambda: steps_done(tmp_path / "first") >= 3, of=first)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        values = dict(re.findall(r'^partialfc_(\w+)\{run="first"\} (\S+)$', text, re.MULTILINE))
        assert float(values["step"]) >= 3
        assert float(values["samples_total"]) >= 60
        with started(command(config, 0, f"run.dir={tmp_path}/second", *long), tmp_path / "second.out") as second:
            wait_until(lambda: steps_done(tmp_path / "second") >= 1, of=second)
    assert f"tracking.metrics_port={port} cannot be served" in (tmp_path / "second.out").read_text()
    train = lines(tmp_path / "second", "train")[0]
    named = {name.removesuffix("_total") for name in values}
    # By its name in the line or, where that has no unit, with one.
    unserved = {field for field in train if not any(name.startswith(field) for name in named)}
    assert unserved == {"kind", "time", "seconds"}, "each number of a train line is a metric"
