"""What tests of the families share."""

from __future__ import annotations

import pytest


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files that carry no configuration pass for ones of real size, until they are loaded."""
    monkeypatch.setattr("trainers.families.check_tensors", lambda base: None)
