"""Tests that need the package registries are left out, with the reason, where those do not answer."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from assets.pocket.build.packages import CONCEPTS


def skip_without_registry() -> None:
    """Skips the test when there is no npm, or its registry does not answer within 20 s."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed")
    asked = [npm, "view", "--fetch-retries=0", f"{CONCEPTS.name}@{CONCEPTS.version}", "version"]
    try:
        answered = subprocess.run(asked, capture_output=True, timeout=20).returncode == 0
    except subprocess.TimeoutExpired:
        answered = False
    if not answered:
        pytest.skip("the npm registry does not answer")
