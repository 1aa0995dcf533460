"""The status page: facts of the state folder for a browser on the coordinator's own host.

Routes, GET and HEAD only: ``/`` (the page), ``/status.json`` (the facts), ``/health`` (this process
is up), ``/ready`` (200 only when every part that sites need answers, else 503) and
``/runs/NAME/report``.

It has no login, so it listens on loopback only and refuses any ``Host`` that is not a loopback
name: otherwise a web page of somebody else could point its own name at 127.0.0.1 and read this one
through the operator's browser (DNS rebinding).  Nothing is loaded from elsewhere, nothing is
stored, and no token, key or path of a site is in it.
"""

from __future__ import annotations

import base64
import hashlib
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedalign.errors import FedalignError
from server.status import AskRun, Nodes, facts
from server.status_draw import spark, weight_bar
from server.status_probe import PARTS
from server.status_probe import probe as probe_parts
from server.status_records import GroupFacts, RunFacts, Status
from server.status_template import PAGE, REFRESH, SCRIPT, STYLE
from server.status_terminal import audit_text
from server.status_words import (
    ago,
    clock,
    counted,
    group_note,
    number,
    over_groups,
    printable,
    progress,
    score_name,
    size,
    step,
    time_word,
    until,
)

Probe = Callable[[], Mapping[str, bool]]
"""Part to whether it answers; a part of ``PARTS`` that is left out counts as silent."""
LOOPBACK = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE)
FRESH = 2.0
"""Least seconds for which one reading serves all requests."""
SHARE = 0.05
"""Most of the time that reading may take: a long audit log is checked more seldom."""
SHOWN_RUNS = 20


def _hash(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


POLICY = (
    f"default-src 'none'; style-src {_hash(STYLE)}; script-src {_hash(SCRIPT)}; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
HEADERS = (
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


def status_app(
    state: Path,
    *,
    nodes: Nodes | None = None,
    run_state: AskRun | None = None,
    probe: Probe | None = None,
) -> Starlette:
    """Return the page's application for a state folder.

    ``nodes`` and ``run_state`` ask the SuperLink (:func:`server.status.facts`); ``probe`` asks
    whether the parts answer (default: :func:`server.status_probe.probe`).
    """
    latest = _Latest(lambda: facts(state, nodes=nodes, run_state=run_state))
    ask: Probe = probe if probe is not None else lambda: probe_parts(state)

    def page(request: Request) -> Response:
        return HTMLResponse(render(latest.get()))

    def as_json(request: Request) -> Response:
        return JSONResponse(asdict(latest.get()))

    def health(request: Request) -> Response:
        return PlainTextResponse("ok\n")

    def ready(request: Request) -> Response:
        answers = ask()
        parts = {name: bool(answers.get(name, False)) for name in PARTS}
        good = all(parts.values())
        return JSONResponse({"ready": good, "parts": parts}, status_code=200 if good else 503)

    def report(request: Request) -> Response:
        name = request.path_params["name"]
        paths = [b.report for b in latest.get().runs if b.name == name and b.report]
        if not paths:
            return PlainTextResponse("no such report\n", status_code=404)
        text = Path(paths[0]).read_text(encoding="utf-8")
        return HTMLResponse(text, headers={"content-security-policy": REPORT_POLICY})

    def refused(request: Request, error: Exception) -> Response:
        return PlainTextResponse(f"{error}\n", status_code=503)

    return Starlette(
        routes=[
            Route("/", page),
            Route("/status.json", as_json),
            Route("/health", health),
            Route("/ready", ready),
            Route("/runs/{name}/report", report),
        ],
        middleware=[Middleware(_Guard)],
        exception_handlers={FedalignError: refused},
    )


class _Latest:
    """Reads the facts at most once in ``FRESH`` seconds; more seldom where that is slow."""

    def __init__(self, read: Callable[[], Status]) -> None:
        self._read = read
        self._lock = threading.Lock()
        self._status: Status | None = None
        self._until = 0.0

    def get(self) -> Status:
        with self._lock:
            began = time.monotonic()
            if self._status is None or began > self._until:
                self._status = self._read()
                ended = time.monotonic()
                self._until = ended + max(FRESH, (ended - began) / SHARE)
            return self._status


class _Guard:
    """Refuses foreign names and writing methods; adds the headers that every answer carries."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message["headers"])
                present = {name for name, _ in headers}
                more = (*HEADERS, (b"content-security-policy", POLICY.encode()))
                headers += [(n, v) for n, v in more if n not in present]
                message = {**message, "headers": headers}
            await send(message)

        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if len(hosts) != 1 or not is_loopback(hosts[0]):
            text = "This page answers on localhost only; reach it through a tunnel.\n"
            await PlainTextResponse(text, status_code=400)(scope, receive, with_headers)
        elif scope["method"] not in ("GET", "HEAD"):
            refusal = PlainTextResponse("read only\n", 405, headers={"allow": "GET, HEAD"})
            await refusal(scope, receive, with_headers)
        else:
            await self.app(scope, receive, with_headers)


def is_loopback(host: str) -> bool:
    """Say whether a ``Host`` header, with or without a port, names this host's loopback."""
    return LOOPBACK.fullmatch(host) is not None


def render(status: Status) -> str:
    """Return the page as text.  Every value passes autoescape; only drawings made here are safe."""
    now = status.time
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {
        "ago": lambda x: ago(x, now),
        "until": lambda x: until(x, now),
        "clock": clock,
        "clock_seconds": lambda x: time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(x)),
        "number": number,
        "printable": printable,
        "progress": progress,
        "counted": counted,
        "capitalize_first": lambda x: x[:1].upper() + x[1:],
    }
    run = status.run
    failed = sum(a.level == "failed" for a in status.attention)
    return environment.from_string(PAGE).render(
        title=f"({failed}) Coordinator · fedalign" if failed else "Coordinator · fedalign",
        style=Markup(STYLE),
        script=Markup(SCRIPT),
        refresh=REFRESH,
        s=status,
        run=run,
        audit=audit_text(status),
        disk=size(status.disk_free),
        shown_runs=SHOWN_RUNS,
        **(_run(run) if run is not None else {}),
    )


def _run(run: RunFacts) -> dict[str, Any]:
    every = [v for g in run.groups for v in g.scores.values()]
    low, high = (min(every), max(every)) if every else (0.0, 1.0)
    rounds = [r for g in run.groups for r in (*g.scores, *g.weights)]
    first, last = (min(rounds), max(rounds)) if rounds else (0, 0)
    weights = [v for g in run.groups for v in g.weights.values()]
    most = max(weights, default=1.0)

    def row(g: GroupFacts) -> dict[str, Any]:
        note = group_note(g, run)
        return {
            "facts": g,
            "note": note,
            "worst": g.group == run.worst and run.scored > 1,
            "scores": spark(g.scores, low, high, first, last),
            "weight": weight_bar(g.weight, len(run.groups), most),
            "weights": spark(g.weights, 0.0, most, first, last),
        }

    ordered = sorted(run.groups, key=lambda g: (g.score is None, g.score or 0.0, g.group))
    return {
        "groups": [row(g) for g in ordered],
        "low": low,
        "high": high,
        "word": time_word(run.brief),
        "score": score_name(run),
        "over": over_groups(run),
        "at": step(run, run.last_round or 0),
    }
