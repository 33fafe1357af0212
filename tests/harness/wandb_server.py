"""A W&B server on a loopback port: enough of its protocol for the real client to log, resume and sync a run."""

from __future__ import annotations

import base64
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server:
    """``behaviour``: ``well``, ``failing`` (answers 500) or ``silent`` (takes the request and never answers)."""

    def __init__(self, behaviour: str = "well") -> None:
        self.behaviour = behaviour
        self.history: dict[str, list[dict[str, Any]]] = {}  # by run id
        self.summary: dict[str, dict[str, Any]] = {}
        self.config: dict[str, dict[str, Any]] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.exits: list[dict[str, Any]] = []
        self.artifacts: list[dict[str, Any]] = []
        self.uploaded: dict[str, bytes] = {}
        self.keys: set[str] = set()
        self.requests = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                server._answer(self)

            do_GET = do_PUT = do_POST

            def log_message(self, *_: Any) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            def handle_error(self, *_: Any) -> None:  # a client that is killed
                pass

        self._http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        self.requests += 1
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        while self.behaviour == "silent":
            time.sleep(0.2)
        kind, _, token = request.headers.get("Authorization", "").partition(" ")
        if kind == "Basic":
            self.keys.add(base64.b64decode(token).decode().removeprefix("api:"))
        answer: dict[str, Any] = {}
        status = 500
        if self.behaviour == "well":
            status = 200
            if request.path == "/graphql":
                query = json.loads(body)
                answer = {"data": self._graphql(query["query"], query.get("variables") or {})}
            elif request.path.endswith("/file_stream"):
                self._stream(request.path.split("/")[-2], json.loads(body))
            elif request.path.startswith("/upload/"):
                self.uploaded[request.path.removeprefix("/upload/")] = body
        text = json.dumps(answer).encode()
        request.send_response(status)
        request.send_header("Content-Length", str(len(text)))
        request.end_headers()
        request.wfile.write(text)

    def _stream(self, run: str, content: dict[str, Any]) -> None:
        for name, part in content.get("files", {}).items():
            if name == "wandb-history.jsonl":
                rows = self.history.setdefault(run, [])
                rows[part["offset"] :] = [json.loads(line) for line in part["content"]]
            elif name == "wandb-summary.json":
                self.summary[run] = json.loads(part["content"][-1])
        if "exitcode" in content:
            self.exits.append({"run": run, "code": content["exitcode"], "complete": content.get("complete")})

    def _graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        entity = {"id": "e", "name": "somebody"}
        if "upsertBucket" in query:
            name = variables["name"] or variables["id"]
            self.runs.setdefault(name, {}).update({key: value for key, value in variables.items() if value is not None})
            if variables.get("config"):
                self.config[name] = json.loads(variables["config"])
            project = {"id": "p", "name": variables.get("project"), "entity": entity}
            bucket = {"id": name, "name": name, "displayName": name, "config": "{}", "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if "RunResumeStatus" in query:
            return {"model": {"id": "p", "name": "p", "entity": entity, "bucket": self._known(variables["name"])}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}
        if "createArtifact(" in query:
            self.artifacts.append(variables.get("input") or variables)
            number = len(self.artifacts)
            latest = {"id": f"a{number}", "versionIndex": 0}
            artifact = {
                "id": f"a{number}",
                "state": "COMMITTED",
                "artifactSequence": {"id": "s", "latestArtifact": latest},
            }
            return {"createArtifact": {"artifact": artifact}}
        if "ServerFeatures" in query:
            return {"serverInfo": {"features": []}}
        if "ArtifactType" in query:
            return {"project": {"artifact": None}}
        if "viewer" in query:
            return {"viewer": {"id": "u", "entity": "somebody", "flags": "{}", "teams": {"edges": []}}}
        return {}

    def _known(self, run: str) -> dict[str, Any] | None:
        if run not in self.runs:
            return None
        rows = self.history.get(run, [])
        return {
            "id": run,
            "name": run,
            "displayName": run,
            "summaryMetrics": json.dumps(self.summary.get(run, {})),
            "logLineCount": 0,
            "historyLineCount": len(rows),
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]),
            "eventsTail": "[]",
            "config": "{}",
            "tags": [],
            "notes": None,
            "wandbConfig": '{"t": 1}',
        }
