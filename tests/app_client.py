"""A client that speaks to the window's whole application (guard included) without a port, as the page does."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient

from trainers.run_folder import RunFolder

PORT = 7860


def make_client(home: Path) -> TestClient:
    """The window for `home`, asked from its own page."""
    from app.server import make_app

    return TestClient(make_app(home, PORT), base_url=f"http://127.0.0.1:{PORT}", raise_server_exceptions=False)


def finish(work: Coroutine[Any, Any, Any]) -> Any:
    """Runs a coroutine to its end, in a thread of its own: tests of the browser may have left a loop running in this one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


def ok(answer: Any) -> Any:
    """The JSON of an answer that is no refusal."""
    assert answer.status_code < 300, f"{answer.status_code} {answer.text}"
    return answer.json()


def refused(answer: Any, status: int) -> dict[str, Any]:
    """The JSON of a refusal: always what, where, hint."""
    assert answer.status_code == status, f"{answer.status_code} {answer.text}"
    told: dict[str, Any] = answer.json()
    assert told["what"] and {"where", "hint"} <= told.keys()
    return told


def project_with(client: TestClient, pictures: Path, **changes: Any) -> str:
    """The id of a new project that uses a typed folder."""
    made = ok(client.post("/api/projects", json={"name": "Test project"}))["id"]
    ok(client.put(f"/api/projects/{made}/source", json={"folder": str(pictures)}))
    if changes:
        ok(client.patch(f"/api/projects/{made}", json=changes))
    return str(made)


def make_run(home: Path, name: str, lines: list[str], **process: Any) -> RunFolder:
    """A run folder as a trainer leaves it, with these lines of events; `process` as the window notes it."""
    run = RunFolder(home / "runs" / name)
    run.path.mkdir(parents=True)
    run.config.write_text('[base]\nmodel = "pocket"\n', encoding="utf-8")
    if lines:
        run.events.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    if process:
        note = {"project": "", "pid": 2**22 + 1, "made": 1.0, "before": 0, **process}
        (run.path / "process.json").write_text(json.dumps(note), encoding="utf-8")
    return run


def await_state(client: TestClient, run_id: str, wanted: Any, seconds: float) -> dict[str, Any]:
    """The first status that `wanted` says yes to; fails with the last one and the log when it does not come."""
    end = time.monotonic() + seconds
    while True:
        status: dict[str, Any] = ok(client.get(f"/api/runs/{run_id}/status"))
        if wanted(status):
            return status
        log = ok(client.get(f"/api/runs/{run_id}/log"))["lines"][-20:] if time.monotonic() > end else None
        assert log is None, f"{ {**status, 'events': len(status['events'])} } {log}"
        time.sleep(0.1)
