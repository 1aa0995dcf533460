"""What the tests of a deployment compare and wait for; ``conftest.py`` gives it as ``deployed``."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from clients.budget import Budget
from clients.site import Home
from fedalign.errors import FedalignError
from fedalign.ledger import EventRow, Ledger
from fedalign.runfolder import ADAPTER, LEDGER

SETTINGS = ("run.rounds=2", "run.quorum=1.0", "local.steps=4", "personal.steps=0")


def products(folder: Path) -> dict[str, np.ndarray]:
    """Return B A of every module of a run's final adapter."""
    factors = load_file(folder / ADAPTER / "adapter_model.safetensors")
    return {
        name: factors[name.replace("lora_A", "lora_B")].astype(np.float64) @ a.astype(np.float64)
        for name, a in factors.items()
        if "lora_A" in name
    }


def same(one: Path, other: Path, tolerance: float = 1e-4) -> None:
    """Assert that two adapters agree within a share of the largest entry of the product."""
    a, b = products(one), products(other)
    assert a.keys() == b.keys()
    for name in a:
        assert np.abs(a[name] - b[name]).max() <= tolerance * np.abs(a[name]).max(), name


def differ(one: Path, other: Path) -> None:
    """Assert that two adapters do not agree, so that :func:`same` says something."""
    a, b = products(one), products(other)
    assert any(np.abs(a[n] - b[n]).max() > 1e-2 * np.abs(a[n]).max() for n in a)


def scores(folder: Path) -> dict[tuple[str, str, str], float]:
    """Return base and final scores by stage, split and client."""
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        return {
            (stage, split, row.client): row.score
            for stage in ("base", "shared")
            for split in ("validation", "test")
            for row in ledger.scores(stage, split)
            if row.score is not None
        }


def rows(folder: Path) -> list[EventRow]:
    """Return the events of a run; none while its ledger is being made."""
    try:
        with Ledger(folder / LEDGER, readonly=True) as ledger:
            return ledger.events()
    except FedalignError:
        return []


def events(folder: Path) -> list[str]:
    """Return the kinds of a run's events."""
    return [e.kind for e in rows(folder)]


def lost(folder: Path, client: str) -> set[tuple[str, int, str]]:
    """Return (phase, round, reason) of everything a client was asked and did not answer."""
    return {
        (e.phase, e.round, e.detail)
        for e in rows(folder)
        if e.kind == "reply-rejected" and e.client == client
    }


def commits(folder: Path) -> set[tuple[str, int, int]]:
    """Return (phase, round, attempt) of what is committed; none while the ledger is being made."""
    try:
        with Ledger(folder / LEDGER, readonly=True) as ledger:
            return set(ledger.commits())
    except FedalignError:
        return set()


def repeated(folder: Path, phase: str, round_: int) -> bool:
    """Say whether a round was committed at a later attempt than its first."""
    return any((p, r) == (phase, round_) and a > 1 for p, r, a in commits(folder))


def trained(folder: Path, round_: int) -> set[str]:
    """Return whose update is in a round."""
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        return {
            r.client
            for r in ledger.replies()
            if (r.phase, r.round, r.status) == ("train", round_, "ok")
        }


def jobs(site: Path) -> int:
    """Return how many rounds of training a site has begun; it writes that before it works."""
    return Budget(Home(site).budget, readonly=True).spent(time.time()).rounds


def begin_round(
    federation: Any, loopback: Any, name: str, site: str, *settings: str
) -> tuple[Any, Path]:
    """Start a run and return when ``site`` has begun to train in round 1 and not answered."""
    folder: Path = federation.result(name)
    home = federation.home(site)
    process = federation.begin(name, *SETTINGS, *settings)
    before = 0

    def begun() -> bool:
        # A site that hung may still be at work for an earlier run until it answers for the base.
        nonlocal before
        now, base = jobs(home), ("base", 0, 1) in commits(folder)
        before = before if base else now
        return (base and now > before) or process.poll() is not None

    loopback.wait(begun, f"round 1 at {site}")
    assert process.poll() is None, (federation.folder / f"{name}.txt").read_text()
    assert not any(phase == "train" for phase, _, _ in commits(folder))
    return process, folder


def parts(site: Path) -> dict[str, int]:
    """Return the process ids of a site: ``supervisor``, ``trainer``, ``supernode``."""
    return dict(json.loads((site / "logs" / "start.json").read_text()))


def last_job(site: Path) -> float:
    """Return when a site did its last job by its own clock, in seconds since 1970."""
    last = json.loads((site / "trainer" / "audit.jsonl").read_text().splitlines()[-1])
    return datetime.fromisoformat(last["time"]).timestamp()


class Stopped:
    """Hangs a process with SIGSTOP; it goes on when the block is left, whatever happens in it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def __enter__(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def __exit__(self, *_: object) -> None:
        os.kill(self.pid, signal.SIGCONT)


def until(
    loopback: Any, process: Any, good: Callable[[], object], what: str, seconds: float = 300.0
) -> None:
    """Wait for ``good()`` while a run goes on; a run that ends before is a failure."""
    loopback.wait(lambda: good() or process.poll() is not None, what, seconds)
    assert good(), f"the run ended with {process.poll()} before {what}"
