"""The health and the metrics that a run serves."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from partialfc.tracking.http import Endpoint
from tests.harness.running import command, free_port, lines, started, steps_done, wait_until
from tests.harness.tasks import write_task


def test_health_and_metrics_are_served_on_loopback(tmp_path: Path) -> None:
    now: dict[str, Any] = {
        "state": "running",
        "step": 7,
        "total_steps": 10,
        "seconds_since_progress": 1.0,
        "reason": "",
    }
    endpoint = Endpoint(0, lambda: now, stalled_after=60)
    endpoint.record({"kind": "train", "step": 7, "loss": 1.5, "seconds": {"data": 0.25, "head": 0.5}, "time": 1.0})
    endpoint.record({"kind": "event", "event": "skipped_step"})
    endpoint.record({"kind": "event", "event": "skipped_step"})
    base = f"http://127.0.0.1:{endpoint.port}"
    with urllib.request.urlopen(f"{base}/healthz", timeout=10) as answer:
        assert (answer.status, json.load(answer)["step"]) == (200, 7)
    with urllib.request.urlopen(f"{base}/metrics", timeout=10) as answer:
        families = {family.name: family for family in text_string_to_metric_families(answer.read().decode())}
    assert families["partialfc_loss"].samples[0].value == 1.5
    assert families["partialfc_step"].samples[0].value == 7
    assert families["partialfc_up"].samples[0].value == 1
    phases = {sample.labels["phase"]: sample.value for sample in families["partialfc_step_seconds"].samples}
    assert phases == {"data": 0.25, "head": 0.5}
    assert {s.labels["event"]: s.value for s in families["partialfc_events"].samples} == {"skipped_step": 2}
    now["seconds_since_progress"] = 61.0
    with pytest.raises(urllib.error.HTTPError, match="503"):
        urllib.request.urlopen(f"{base}/healthz", timeout=10)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{base}/elsewhere", timeout=10)
    endpoint.close()


def test_a_run_serves_its_health_while_it_trains_and_trains_without_if_the_port_is_taken(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(write_task(tmp_path)))
    port = free_port()
    long = ["optim.epochs=1000", "evaluation.every=0", f"tracking.metrics_port={port}"]
    with started(command(config, 0, f"run.dir={tmp_path}/first", *long), tmp_path / "first.out") as first:
        wait_until(lambda: steps_done(tmp_path / "first") >= 3, of=first)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        step = float(re.findall(r"^partialfc_step (\S+)$", text, re.MULTILINE)[0])
        assert step >= 3
        with started(command(config, 0, f"run.dir={tmp_path}/second", *long), tmp_path / "second.out") as second:
            wait_until(lambda: steps_done(tmp_path / "second") >= 1, of=second)
    assert f"tracking.metrics_port={port} cannot be served" in (tmp_path / "second.out").read_text()
    assert lines(tmp_path / "second", "train")
