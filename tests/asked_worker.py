"""Asks the render worker inside of the test's own process, request after request."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

from trainers.warm import Warm
from trainers.worker import serve


def run(*requests: dict[str, Any], warm: Warm | None = None) -> list[dict[str, Any]]:
    """The events that requests cause which are sent one after the other, each when the one before has ended."""
    told: list[dict[str, Any]] = []

    def lines() -> Iterator[bytes]:
        for request in requests:
            yield json.dumps(request).encode()
            wait_for(told, request["id"], "done", "failed")

    serve(lines(), told.append, warm or Warm())
    return told


def wait_for(told: list[dict[str, Any]], number: int, *wanted: str) -> None:
    """Returns when one of these events was told of a request."""
    while not any(event["id"] == number and event["event"] in wanted for event in list(told)):
        time.sleep(0.002)


def kinds(events: list[dict[str, Any]], number: int = 1) -> list[str]:
    """What was told of a request, in order."""
    return [event["event"] for event in events if event["id"] == number]
