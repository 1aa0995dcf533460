"""Freed memory stays in the process where the C library allows it."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from fedalign.models.memory import keep_freed_memory

PROGRAM = """
import resource, torch
from fedalign.models.memory import keep_freed_memory
{first}
torch.set_num_threads(1)
def step():  # as activations: many are held, then all are let go
    held = [torch.ones(n) for n in range(100_000, 2_000_000, 100_000)]
    del held
step()
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(first: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(first=first)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_blocks_are_reused_without_page_faults() -> None:
    assert faults("assert keep_freed_memory()") < 0.1 * faults("")


def test_elsewhere_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_freed_memory() is False
