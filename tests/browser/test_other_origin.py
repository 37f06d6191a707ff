"""A page of another origin, in a real browser: it cannot start, read or stop anything in the window."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.app_client import make_run
from tests.bad_pictures import make_picture

ATTACK = """async (target) => {
  const read = [];
  const note = (how, text) => text && read.push([how, String(text).slice(0, 200)]);
  const json = {"Content-Type": "application/json"};
  for (const mode of ["cors", "no-cors"]) for (const credentials of ["include", "omit"]) {
    const options = { mode, credentials };
    for (const path of ["/", "/api/projects", "/api/runs", "/api/runs/r/samples/00000001_00.png", "/web/core.js"])
      await fetch(target + path, options).then((r) => r.text()).then((t) => note("GET " + mode + path, t)).catch(() => 0);
    for (const [method, path, body] of [["POST", "/api/projects", '{"name":"evil"}'], ["POST", "/api/sample", ""],
        ["POST", "/api/runs/r/stop", ""], ["POST", "/api/runs/r/resume", ""], ["DELETE", "/api/projects/cats", null],
        ["DELETE", "/api/runs/r", null], ["PATCH", "/api/projects/cats", '{"name":"evil"}']])
      for (const headers of [json, { "Content-Type": "text/plain" }])
        await fetch(target + path, { ...options, method, headers, body }).then((r) => r.text())
          .then((t) => note(method + " " + mode, t)).catch(() => 0);
  }
  const element = (tag, source) => new Promise((done) => {
    const made = document.createElement(tag);
    made.onload = () => done(made); made.onerror = () => done(null);
    made.src = source; document.body.append(made); setTimeout(() => done(null), 1500);
  });
  const image = await element("img", target + "/api/runs/r/samples/00000001_00.png");
  note("img", image && image.naturalWidth);
  note("script", await element("script", target + "/web/core.js") && "loaded");
  const frame = await element("iframe", target + "/");
  try { note("iframe", frame && frame.contentDocument && frame.contentDocument.body.textContent); } catch { /* closed to us */ }
  await new Promise((done) => { const events = new EventSource(target + "/api/runs/r/status");
    events.onmessage = (e) => { note("EventSource", e.data); done(); }; events.onerror = () => { events.close(); done(); }; });
  await new Promise((done) => { const socket = new WebSocket(target.replace("http", "ws") + "/api/x");
    socket.onopen = () => { note("WebSocket", "open"); done(); }; socket.onerror = socket.onclose = done; });
  const form = document.createElement("form");
  Object.assign(form, { method: "post", action: target + "/api/projects", enctype: "text/plain", target: "gone" });
  form.innerHTML = `<input name='{"name":"evil","x":"' value='"}'>`;
  const sink = document.createElement("iframe"); sink.name = "gone"; document.body.append(sink, form); form.submit();
  await new Promise((done) => setTimeout(done, 800));
  try { note("form", sink.contentDocument && sink.contentDocument.body.textContent); } catch { /* closed to us */ }
  return read;
}"""


class _Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>Evil</title><body>Look at this!")

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def elsewhere() -> Iterator[int]:
    """The port of a server of somebody else on this machine."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()


def test_a_page_of_another_origin_starts_reads_and_stops_nothing(own_window: Any, browser: Any, elsewhere: int) -> None:
    run = make_run(own_window.home, "r", ['{"type": "stage", "time": 1.0, "name": "scan"}'])
    run.samples.mkdir()
    make_picture(number=1).save(run.samples / "00000001_00.png")
    context = browser.new_context()
    page = context.new_page()
    page.goto(own_window.url)
    page.evaluate("""() => fetch("/api/projects", { method: "POST", headers: { "Content-Type": "application/json" },
        body: '{"name": "cats"}' }).then((answer) => answer.json())""")
    before = state(page, run.path)
    assert "cats" in before, "our own page may"

    for name in ("127.0.0.1", "localhost"):
        other = context.new_page()
        other.goto(f"http://{name}:{elsewhere}/")
        assert other.evaluate(ATTACK, own_window.url.rstrip("/")) == [], name
        assert other.evaluate(ATTACK, f"http://{name}:{elsewhere}") != [], "of its own server it reads what it likes"
        assert state(page, run.path) == before, name
    context.close()


def state(page: Any, run: Path) -> str:
    """All that the window tells of projects and runs, and the names in the run folder."""
    told = page.evaluate(
        """() => Promise.all(["/api/projects", "/api/runs"].map((path) => fetch(path).then((a) => a.json())))"""
    )
    return json.dumps([told, sorted(path.name for path in run.iterdir())])
