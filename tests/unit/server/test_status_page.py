"""The page's routes, headers, refusals, escaping, readiness and drawings."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import pytest
from starlette.testclient import TestClient

from fedalign.ledger import Ledger
from fedalign.runfolder import LEDGER
from server import status_page
from server.registry import Registry
from server.status_draw import spark, weight_bar
from server.status_page import is_loopback, status_app
from server.status_probe import PARTS


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


fixture = _load("status_state")
NOW: float = fixture.NOW
MARKUP = "<b>&\"'<script>alert(1)</script>"


@pytest.fixture
def client(tmp_path: Path) -> Callable[..., TestClient]:
    def make(probe: Callable[[], Mapping[str, bool]] | None = None) -> TestClient:
        (tmp_path / "runs").mkdir(exist_ok=True)
        return TestClient(status_app(tmp_path, probe=probe), base_url="http://127.0.0.1:9446")

    return make


def test_empty_state_in_words(client: Callable[..., TestClient]) -> None:
    page = client().get("/")
    assert page.status_code == 200
    assert "No site has joined yet. Run:" in page.text
    assert "fedalign-server invite --site NAME --group GROUP" in page.text
    assert "No run yet." in page.text
    assert "Nothing needs attention." in page.text


def test_numbers_are_those_of_the_ledger(client: Callable[..., TestClient], tmp_path: Path) -> None:
    folder = fixture.make_run(tmp_path / "runs" / "spring", done=3, void=True)
    page = client().get("/").text
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        last = [w for w in ledger.weights() if w.round == 3]
    for row in last:
        assert f"<span>{row.score:.3f}</span>" in page
        assert f"<span>{row.history:.3f}</span>" in page
        assert f"<span>{row.weight:.3f} " in page
    assert "0.999" not in page
    worst = re.search(r"<th>(\w+)<span class=\"tag worst\">worst served</span>", page)
    assert worst is not None
    assert worst.group(1) == "isles"
    assert "attempt void" in page


def test_json_has_the_same_facts(client: Callable[..., TestClient], tmp_path: Path) -> None:
    fixture.make_run(tmp_path / "runs" / "spring", done=2)
    made = client().get("/status.json").json()
    assert made["run"]["brief"]["name"] == "spring"
    scores = {g["group"]: g["score"] for g in made["run"]["groups"]}
    assert scores == {g: fixture.score_of(g, 2) for g in fixture.GROUPS}


def test_names_are_escaped(client: Callable[..., TestClient], tmp_path: Path) -> None:
    groups = (MARKUP, "isles")
    fixture.make_run(tmp_path / "runs" / "<i>run", groups=groups, void=True)
    fixture.make_run(
        tmp_path / "runs" / "x", groups=groups, status=f"failed: {MARKUP}", started=NOW * 2
    )
    page = client().get("/").text
    assert "<script>alert" not in page
    assert "<b>&" not in page
    assert "<i>run" not in page
    assert "&lt;b&gt;&amp;&#34;&#39;&lt;script&gt;" in page


def test_no_token_and_no_key(client: Callable[..., TestClient], tmp_path: Path) -> None:
    with Registry(tmp_path / "registry.sqlite") as registry:
        token = registry.invite("north-lab", "north", 3600.0, time.time())
        used = registry.invite("south-lab", "south", 3600.0, time.time())
        site = registry.claim(used, b"PUBLIC-KEY-BYTES", time.time())
    here = client()
    for path in ("/", "/status.json"):
        text = here.get(path).text
        assert "north-lab" in text
        assert "south-lab" in text
        for secret in (token, used, "PUBLIC-KEY-BYTES", site.fingerprint):
            assert secret not in text


@pytest.mark.parametrize("path", ["/", "/status.json", "/health", "/ready", "/nowhere"])
def test_headers_on_every_answer(client: Callable[..., TestClient], path: str) -> None:
    answer = client(lambda: dict.fromkeys(PARTS, True)).get(path)
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy


def test_policy_names_the_style_and_script_that_are_sent(client: Callable[..., TestClient]) -> None:
    answer = client().get("/")
    for tag in ("style", "script"):
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", answer.text, re.S)
        assert len(found) == 1
        digest = base64.b64encode(hashlib.sha256(found[0].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in answer.headers["content-security-policy"]
    assert " style=" not in answer.text
    assert not re.search(r"(src|href)=\"(?!/|data:,)", answer.text)
    assert not re.search(r"\son\w+=", answer.text)


@pytest.mark.parametrize(
    ("host", "good"),
    [
        ("localhost", True),
        ("LOCALHOST:9446", True),
        ("127.0.0.1:9446", True),
        ("[::1]:9446", True),
        ("[::1]", True),
        ("", False),
        ("evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("localhost.evil.example:9446", False),
        ("localhost:9446@evil.example", False),
        ("127.0.0.2", False),
        ("[::1].evil.example", False),
        ("localhost:", False),
        ("localhost\n", False),
    ],
)
def test_only_loopback_names_are_answered(
    client: Callable[..., TestClient], host: str, good: bool
) -> None:
    assert is_loopback(host) is good
    if "\n" not in host:
        for path in ("/", "/status.json", "/health"):
            answer = client().get(path, headers={"host": host})
            assert answer.status_code == (200 if good else 400)
            assert good or "Coordinator" not in answer.text


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_read_only(client: Callable[..., TestClient], method: str) -> None:
    answer = client().request(method, "/")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "GET, HEAD"


def test_head_has_no_body(client: Callable[..., TestClient]) -> None:
    answer = client().head("/")
    assert (answer.status_code, answer.content) == (200, b"")


def test_health_needs_nothing(client: Callable[..., TestClient], tmp_path: Path) -> None:
    here = client()
    (tmp_path / "runs").rmdir()
    tmp_path.rmdir()
    assert here.get("/health").status_code == 200
    gone = here.get("/")
    assert gone.status_code == 503
    assert "fedalign-server init" in gone.text


@pytest.mark.parametrize("silent", ["", *PARTS])
def test_ready_only_when_every_part_answers(client: Callable[..., TestClient], silent: str) -> None:
    answer = client(lambda: {p: p != silent for p in PARTS}).get("/ready")
    assert answer.status_code == (503 if silent else 200)
    assert answer.json() == {"ready": not silent, "parts": {p: p != silent for p in PARTS}}


def test_ready_takes_a_part_that_is_left_out_as_silent(client: Callable[..., TestClient]) -> None:
    answer = client(lambda: {"superlink": True}).get("/ready")
    assert answer.status_code == 503
    assert answer.json()["parts"]["gateway"] is False


def test_ready_without_settings_says_so(client: Callable[..., TestClient]) -> None:
    answer = client().get("/ready")
    assert answer.status_code == 503
    assert "fedalign-server init" in answer.text


def test_report_of_a_run_and_of_none(client: Callable[..., TestClient], tmp_path: Path) -> None:
    fixture.make_run(tmp_path / "runs" / "a", status="completed", done=8)
    (tmp_path / "report.html").write_text("outside")
    here = client()
    answer = here.get("/runs/a/report")
    assert answer.status_code == 200
    assert "the report" in answer.text
    assert "script-src" not in answer.headers["content-security-policy"]
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    for name in ("b", "..", "%2e%2e", "a%2f.."):
        assert here.get(f"/runs/{name}/report").status_code == 404


def test_one_reading_serves_many_requests(
    client: Callable[..., TestClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    count = []
    real = status_page.facts

    def counted(*args, **values):
        count.append(1)
        return real(*args, **values)

    monkeypatch.setattr(status_page, "facts", counted)
    here = client()
    for _ in range(5):
        here.get("/status.json")
    assert len(count) == 1


def test_spark_breaks_where_a_round_has_no_value() -> None:
    drawn = spark({1: 0.2, 2: 0.3, 4: 0.4, 5: 0.5}, 0.2, 0.5, 1, 5)
    assert drawn.count("<polyline") == 2
    assert "0.200 at 1, 0.500 at 5" in drawn
    assert spark({}, 0, 1, 0, 1) == "–"
    assert "nan" not in spark({3: 0.4}, 0.4, 0.4, 3, 3)


def test_weight_bar_marks_the_equal_share() -> None:
    assert weight_bar(None, 4, 0.5) == ""
    drawn = weight_bar(0.5, 4, 0.5)
    assert 'width="72.0"' in drawn
    assert 'x1="36.0"' in drawn
    json.dumps(drawn)
