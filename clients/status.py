"""``fedalign-client status``: what runs, what was asked lately, what is left of today."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from pathlib import Path

from clients.budget import Budget
from clients.policy_toml import load_policy
from clients.site import Home, load_settings
from clients.site_policy import Policy, Spent
from clients.start import STATE
from fedalign.errors import DataError


def status(home: Home, jobs: int = 10) -> list[str]:
    """Return the lines of ``status``; raises ``ConfigError`` where the site cannot be read."""
    settings, policy = load_settings(home.settings), load_policy(home.policy)
    lines = [f"site {settings.name}, group {settings.group}", *_running(home), ""]
    lines += ["policy", *(f"  {line}" for line in summary(policy)), "", "today (UTC)"]
    spent = Spent()
    if home.budget.exists():
        spent = Budget(home.budget, readonly=True).spent(time.time())
    for name, used, most in (
        ("jobs", spent.jobs, policy.budget.max_jobs_per_day),
        ("rounds", spent.rounds, policy.budget.max_rounds_per_day),
        ("seconds", round(spent.seconds, 1), policy.budget.max_seconds_per_day),
    ):
        left = f"{max(0, most - used):g} of {most:g} left" if most else "no limit"
        lines.append(f"  {name:<8} {used:>10g}  {left}")
    lines += ["", f"last {jobs} entries of {home.audit.name}"]
    return lines + [f"  {line}" for line in _last(home.audit, jobs)]


def summary(policy: Policy) -> list[str]:
    """Return the policy in a few lines."""
    models = ", ".join(m.name + (f" at {m.revision}" if m.revision else "") for m in policy.models)
    scores = policy.scores
    release = scores.release
    if release == "rounded":
        release += f" to {scores.rounding:g}"
    update = policy.update
    protection = f"clipped to {update.clip:g}, noise {update.noise:g}" if update.clip else "exact"
    return [
        f"models      {models}",
        f"objectives  {', '.join(policy.training.objectives)}",
        f"scores      {release}; question scores {'yes' if scores.question_scores else 'no'}",
        f"updates     {protection}",
    ]


def _running(home: Home) -> list[str]:
    try:
        state = json.loads((home.logs / STATE).read_text())
    except FileNotFoundError:
        return ["not running (or each part on its own, without `start`)"]
    except (OSError, ValueError) as error:
        return [f"what runs cannot be read: {type(error).__name__}"]
    return [f"  {name:<11} {_condition(home, name, found)}" for name, found in state.items()]


def _condition(home: Home, name: str, found: object) -> str:
    if isinstance(found, int):
        return f"{'runs' if _alive(found) else 'gone'}, process {found}"
    code = found.get("code") if isinstance(found, dict) else None
    return f"DOWN, ended with code {code}, is started again; why: {home.logs / name}.log"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _last(path: Path, most: int) -> list[str]:
    try:
        with path.open(encoding="utf-8") as f:
            tail = deque(f, maxlen=most)
    except FileNotFoundError:
        return ["nothing yet"]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from None
    lines = []
    for text in tail:
        try:
            entry = json.loads(text)
            facts = " ".join(f"{k}={v}" for k, v in entry["facts"].items())
            lines.append(f"{entry['time']} {entry['event']:<14} {facts}")
        except (ValueError, KeyError, TypeError, AttributeError):
            lines.append("(a line that cannot be read)")
    return lines
