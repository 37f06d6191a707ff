"""Memory goes back to the system while a base is laid out, and stays for the next step afterwards."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from tests.command_line import ROOT, environment

_HELD = """
import psutil, torch
from trainers.allocator import give_back_at_once, keep_for_the_next_step

def left(number, size):
    held = psutil.Process().memory_info().rss
    tensors = [torch.ones(size, dtype=torch.uint8) for _ in range(number)]
    keep = torch.ones(1000)  # what lies behind them does not hold them
    del tensors
    return psutil.Process().memory_info().rss - held

torch.ones(10)
give_back_at_once()
print(left(64, 2 << 20))
keep_for_the_next_step()
print(left(64, 2 << 20))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_freed_tensors_go_back_while_loading_and_stay_while_training() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _HELD], env=environment(), cwd=ROOT, capture_output=True, encoding="utf-8", check=True
    )
    loading, training = map(int, done.stdout.split())
    assert loading < 16 << 20 < 64 << 20 < training


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainers import allocator

    allocator._glibc.cache_clear()
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    allocator.give_back_at_once()
    assert allocator._glibc() is None
    allocator._glibc.cache_clear()
