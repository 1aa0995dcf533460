"""The status page in a real browser: a run's numbers, two widths, light and dark, no contact.

Chromium is driven over its debugging pipe, so that console messages, requests and widths are seen
and not guessed.  The state folder holds a run that really happened (in process, two rounds).
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import uvicorn

from fedalign.ledger import Ledger
from fedalign.runfolder import LEDGER
from server.registry import Registry
from server.status_page import status_app

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
WIDTHS = (390, 1440)
ODD = 'Far <b>North</b> & "West"'

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path")


class Browser:
    """One headless Chromium; every wait ends after ``seconds``."""

    def __init__(self, folder: Path, seconds: float = 40.0) -> None:
        to_child, self._write = os.pipe()
        self._read, from_child = os.pipe()
        # The browser wants its pipe at 3 and 4; moved up first, neither end is overwritten.
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 40) for fd in (to_child, from_child)]
        words = (
            f'exec "{CHROMIUM}" --headless --no-sandbox --disable-gpu --no-first-run '
            "--disable-background-networking --disable-component-update --disable-sync "
            f'--remote-debugging-pipe --user-data-dir="{folder}" about:blank '
            f"3<&{high[0]} 4>&{high[1]}"
        )
        self._process = subprocess.Popen(
            ["bash", "-c", words], pass_fds=high, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for fd in (to_child, from_child, *high):
            os.close(fd)
        self._seconds = seconds
        self._buffer = b""
        self._number = 0
        self.events: list[dict[str, Any]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = ""
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **values: Any) -> dict[str, Any]:
        """Send a command and return its result; events that come meanwhile are kept."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": values}
        if getattr(self, "_session", ""):
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def open(self, url: str, width: int, dark: bool = False, script: bool = True) -> None:
        """Load a page at a width and wait until it is loaded."""
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=900, deviceScaleFactor=1, mobile=width < 700,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Emulation.setScriptExecutionDisabled", value=not script)
        self.events.clear()
        self.ask("Page.navigate", url=url)
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(self._next())

    def value(self, expression: str) -> Any:
        """Return what a JavaScript expression gives; a promise is waited for."""
        made = self.ask(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in made, made
        return made["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """Write the whole page as PNG."""
        made = self.ask("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(made["data"]))

    def close(self) -> None:
        """End the browser."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        os.close(self._write)
        os.close(self._read)

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + self._seconds
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            assert ready, "the browser gave no answer in time"
            got = os.read(self._read, 1 << 16)
            assert got, "the browser ended"
            self._buffer += got
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state folder with a finished run of two rounds, one site and one open invite."""
    folder = tmp_path_factory.mktemp("coordinator")
    run = folder / "runs" / "first"
    done = subprocess.run(
        [
            sys.executable, "-m", "simulations.cli", "simulate", "--out", str(run),
            "--set", "run.rounds=2", "--set", "personal.steps=2", "--set", "local.steps=2",
        ],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert (run / LEDGER).is_file(), done.stderr
    with Ledger(run / LEDGER) as ledger:
        ledger.event("resumed", ODD)
    with Registry(folder / "registry.sqlite") as registry:
        registry.claim(
            registry.invite("north-lab", "north", 600.0, time.time()), b"key", time.time()
        )
        registry.invite("late-lab", "valley", 86400.0, time.time())
    return folder


@pytest.fixture(scope="module")
def page(state: Path) -> Iterator[str]:
    """The page's address while a server runs in a thread."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    settings = uvicorn.Config(
        status_app(state), host="127.0.0.1", port=port, log_level="error", access_log=False
    )
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 20
    while not server.started and time.monotonic() < end:
        time.sleep(0.02)
    assert server.started
    yield f"http://127.0.0.1:{port}/"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    made = Browser(tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


def complaints(browser: Browser) -> list[Any]:
    """Console messages, log entries and exceptions since the page was opened."""
    kinds = ("Runtime.consoleAPICalled", "Log.entryAdded", "Runtime.exceptionThrown")
    return [e["params"] for e in browser.events if e.get("method") in kinds]


def contacts(browser: Browser) -> set[str]:
    """Hosts that were asked for anything."""
    urls = [
        e["params"]["request"]["url"]
        for e in browser.events
        if e.get("method") == "Network.requestWillBeSent"
    ]
    return {urlsplit(u).netloc for u in urls if not u.startswith("data:")}


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_page_reads_at_every_width(
    browser: Browser, page: str, state: Path, tmp_path: Path, width: int, dark: bool
) -> None:
    browser.open(page, width, dark)
    text = browser.value("document.body.innerText")
    with Ledger(state / "runs" / "first" / LEDGER, readonly=True) as ledger:
        last = [w for w in ledger.weights() if w.round == 2]
    worst = min(last, key=lambda w: w.score or 0.0)
    for row in last:
        assert row.group in text
        assert f"{row.score:.3f}" in text
    assert "worst served" in text
    assert f"{worst.score:.3f}" in text
    assert "2 of 2 rounds" in text
    assert "north-lab" in text
    assert "late-lab" in text
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.value("document.querySelectorAll('svg.spark polyline').length") > 0
    cut = browser.value(
        "[...document.querySelectorAll('td, th, dd, li')].filter("
        f"e => e.getBoundingClientRect().right > {width} + 1).length"
    )
    assert cut == 0
    assert complaints(browser) == []
    assert contacts(browser) == {urlsplit(page).netloc}
    paper = browser.value("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") is not dark
    shots = Path(os.environ.get("FEDALIGN_SCREENSHOTS", tmp_path))
    browser.screenshot(shots / f"status-{width}-{'dark' if dark else 'light'}.png")


def test_page_looks_again_without_losing_the_place(browser: Browser, page: str) -> None:
    browser.open(page, 390)
    browser.value("document.getElementById('events').open = true; scrollTo(0, 400)")
    browser.value("document.querySelector('main').dataset.old = 'yes'")
    browser.value("look()")
    assert browser.value("document.querySelector('main').dataset.old") is None
    assert browser.value("document.getElementById('events').open") is True
    assert browser.value("Math.round(scrollY)") == 400
    assert ODD in browser.value("document.body.innerText")
    assert browser.value("document.getElementById('stale').textContent") == ""
    assert complaints(browser) == []
    browser.value("window.fetch = () => Promise.reject(new Error('gone')), look()")
    assert "is old" in browser.value("document.getElementById('stale').textContent")


def test_page_refreshes_itself_without_script(browser: Browser, page: str) -> None:
    browser.open(page, 1440, script=False)
    end = time.monotonic() + 20
    loads = 0
    while loads < 2 and time.monotonic() < end:
        browser.ask("Page.getNavigationHistory")
        loads = sum(e.get("method") == "Page.loadEventFired" for e in browser.events)
        time.sleep(0.2)
    assert loads >= 2


def test_foreign_script_and_style_do_not_run(browser: Browser, page: str) -> None:
    browser.open(page, 1440)
    browser.value(
        "(() => { const s = document.createElement('script'); s.textContent = 'window.bad = 1';"
        " document.body.append(s); })()"
    )
    assert browser.value("window.bad") is None


def test_report_of_the_run_opens(browser: Browser, page: str) -> None:
    browser.open(f"{page}runs/first/report", 1440)
    assert "Scores by group" in browser.value("document.body.innerText")
    assert complaints(browser) == []
    assert contacts(browser) == {urlsplit(page).netloc}
