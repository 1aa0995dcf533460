"""Facts of state folders in every condition, and what the terminal shows of them."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

from fedalign.audit import AuditLog
from fedalign.errors import ConfigError, FedalignError
from server import status as module
from server.registry import Registry
from server.status import facts, print_status
from server.status_records import Status
from server.status_terminal import sparkline
from server.superlink_admin import NodeEntry


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


fixture = _load("status_state")
NOW: float = fixture.NOW
MARKUP = '<b>&"[red]'


@pytest.fixture
def state(tmp_path: Path) -> Path:
    (tmp_path / "runs").mkdir()
    return tmp_path


def shown(status: Status, width: int = 80) -> str:
    """What a terminal without colours of this width shows."""
    console = Console(width=width, force_terminal=True, color_system=None)
    with console.capture() as capture:
        print_status(status, console)
    return capture.get()


def texts(status: Status) -> str:
    return "\n".join(f"{a.level}: {a.text}" for a in status.attention)


def test_empty_folder_says_what_to_do(state: Path) -> None:
    made = facts(state, now=NOW)
    assert made.run is None
    assert made.attention == ()
    text = shown(made)
    assert "Nothing needs attention." in text
    assert "No site has joined yet." in text
    assert "fedalign-server invite --site NAME --group GROUP" in text
    assert "No run yet." in text


def test_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fedalign-server init"):
        facts(tmp_path / "nowhere")


def test_reading_writes_nothing(state: Path) -> None:
    fixture.make_run(state / "runs" / "a", status="completed")
    enrol(state, coast="coast")

    def files() -> dict[str, bytes]:
        # SQLite's side files are a reader's own: an empty log and its index.
        found = [p for p in state.rglob("*") if p.is_file() and p.name[-4:] not in ("-wal", "-shm")]
        return {p.name: p.read_bytes() for p in found}

    before, first = files(), facts(state, now=NOW)
    assert files() == before
    assert facts(state, now=NOW).runs == first.runs  # a second look finds the same times of change


def test_failed_run_comes_first_with_its_reason(state: Path) -> None:
    fixture.make_run(state / "runs" / "bad", status="failed: quorum missed twice", void=True)
    fixture.put_pids(state, supervisor=os.getpid())
    fixture.make_certificate(state / "tls" / "server.crt", days=12)
    made = facts(state, now=NOW)
    assert [a.level for a in made.attention] == ["failed", "warning"]
    assert "Run bad failed in round 4 of 8: quorum missed twice" in made.attention[0].text
    assert made.attention[0].todo.endswith("fedalign-server resume bad")
    text = shown(made)
    assert text.index("quorum missed twice") < text.index("server certificate ends in 12 days")
    assert text.index("server certificate ends in 12 days") < text.index("Groups")


def test_a_later_run_takes_the_place_of_a_failed_one(state: Path) -> None:
    fixture.make_run(state / "runs" / "bad", status="failed: quorum", started=NOW - 9000)
    fixture.make_run(state / "runs" / "good", started=NOW - 100)
    made = facts(state, now=NOW)
    assert [b.name for b in made.runs] == ["good", "bad"]
    assert made.run is not None
    assert made.run.brief.name == "good"
    assert "bad" not in texts(made)


def enrol(state: Path, **groups: str) -> dict[str, int]:
    """Enrol sites; return their node ids."""
    ids = {}
    with Registry(state / "registry.sqlite") as registry:
        for i, (name, group) in enumerate(groups.items()):
            site = f"{name}-lab"
            key = f"key of {site}".encode()
            token = registry.invite(site, group, 3600.0, NOW - 7200)
            claimed = registry.claim(token, key, NOW - 7100)
            registry.registered(claimed.fingerprint, 100 + i, NOW - 7000)
            ids[site] = 100 + i
    return ids


def test_sites_online_offline_and_last_reply(state: Path) -> None:
    ids = enrol(state, coast="coast", isles="isles", hills="hills")
    fixture.make_run(state / "runs" / "a", done=3, absent="isles")
    unknown = facts(state, now=NOW)
    assert not unknown.nodes_known
    assert {s.status for s in unknown.sites} == {"active"}
    assert "not known" in shown(unknown)
    nodes = [
        NodeEntry(ids["coast-lab"], "", "online", b""),
        NodeEntry(ids["isles-lab"], "", "offline", b"", NOW - 300),
        NodeEntry(ids["hills-lab"], "", "registered", b""),
    ]
    made = facts(state, now=NOW, nodes=lambda: nodes)
    sites = {s.site: s for s in made.sites}
    assert [sites[f"{g}-lab"].status for g in ("coast", "isles", "hills")] == [
        "online", "offline", "offline",
    ]  # fmt: skip
    assert sites["coast-lab"].last_code == "ok"
    assert (sites["isles-lab"].last_code, sites["isles-lab"].last_where) == ("no-reply", "train 3")
    assert "Site isles-lab (isles) is offline, last seen 5 min ago." in texts(made)
    assert "Site hills-lab (hills) is offline." in texts(made)


def test_superlink_that_does_not_answer_is_a_problem(state: Path) -> None:
    enrol(state, coast="coast")

    def nodes() -> list[NodeEntry]:
        raise FedalignError("the SuperLink does not answer")

    made = facts(state, now=NOW, nodes=nodes)
    assert not made.nodes_known
    assert "failed: the SuperLink does not answer" in texts(made)
    assert [s.site for s in made.sites] == ["coast-lab"]


def test_invites_show_no_token_and_end(state: Path) -> None:
    with Registry(state / "registry.sqlite") as registry:
        token = registry.invite("north-lab", "north", 3600.0, NOW)
        registry.invite("south-lab", "south", 60.0, NOW - 120)
        registry.claim(
            registry.invite("pending-lab", "north", 90000.0, NOW - 90000), b"k", NOW - 80000
        )
    made = facts(state, now=NOW)
    assert [(i.site, i.group, i.expires) for i in made.invites] == [
        ("north-lab", "north", NOW + 3600)
    ]
    assert token not in json.dumps(asdict(made))
    assert token not in shown(made)
    assert "Site pending-lab (north) began to join 22 h ago" in texts(made)


def test_revoked_site_is_shown_and_needs_no_attention(state: Path) -> None:
    enrol(state, coast="coast")
    with Registry(state / "registry.sqlite") as registry:
        registry.revoke("coast-lab", NOW)
    made = facts(state, now=NOW, nodes=list)
    assert [s.status for s in made.sites] == ["revoked"]
    assert made.attention == ()


def test_audit_chain(state: Path) -> None:
    log = AuditLog(state / "audit.jsonl")
    for i in range(3):
        log.append("site.enrolled", site=f"s{i}")
    made = facts(state, now=NOW)
    assert (made.audit.state, made.audit.lines) == ("verified", 3)
    assert "chain verified up to line 3" in shown(made)
    path = state / "audit.jsonl"
    path.write_text(path.read_text().replace("s1", "s9"))
    broken = facts(state, now=NOW)
    assert broken.audit.state == "broken"
    assert broken.attention[0].level == "failed"
    assert re.search(r"line 2|:2", broken.attention[0].text)


def test_processes_alive_or_not(state: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    fixture.put_pids(state, superlink=os.getpid(), gateway=gone.pid)
    made = facts(state, now=NOW)
    assert {p.name: p.alive for p in made.processes} == {"superlink": True, "gateway": False}
    assert "gateway is not running" in texts(made)
    assert made.attention[0].todo.endswith("fedalign-server start")
    assert "gateway NOT running" in shown(made)
    (state / "pids.json").write_text("[1, 2]")
    assert "pids.json" in texts(facts(state, now=NOW))


def test_certificates_that_end(state: Path) -> None:
    fixture.make_certificate(state / "ca" / "ca.crt", days=400)
    assert "The coordinator is not running" in texts(facts(state, now=NOW))
    fixture.put_pids(state, supervisor=os.getpid())
    fixture.make_certificate(state / "tls" / "server.crt", days=31)
    assert texts(facts(state, now=NOW)) == ""
    fixture.make_certificate(state / "tls" / "server.crt", days=-1)
    made = facts(state, now=NOW)
    assert made.attention[0].level == "failed"
    assert "ended 24 h ago: no site can connect" in made.attention[0].text
    (state / "tls" / "server.crt").write_text("no certificate")
    assert "not a certificate" in texts(facts(state, now=NOW))


def test_a_later_process_with_the_same_id_is_another(state: Path) -> None:
    fixture.put_pids(state, superlink=os.getpid())
    long_ago = time.time() - 10 * 365 * 86400
    os.utime(state / "pids.json", (long_ago, long_ago))
    assert [p.alive for p in facts(state, now=NOW).processes] == [False]


def test_disk_low(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "disk_free", lambda _: 2**30 - 1)
    assert "warning: Only 1024 MiB are free" in texts(facts(state, now=NOW))
    monkeypatch.setattr(module, "disk_free", lambda _: 2**30)
    assert facts(state, now=NOW).attention == ()


def test_terminal_fits_80_columns_and_shows_markup_as_it_is(state: Path) -> None:
    long = "North " * 10 + "end"
    groups = (MARKUP, "bell\x07\x1b[31mred", long, "isles")
    fixture.make_run(state / "runs" / "a", groups=groups, void=True)
    fixture.make_run(state / "runs" / "b", status="failed: " + "why " * 40, started=NOW - 9999)
    text = shown(facts(state, now=NOW))
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    assert "\x07" not in text
    assert "\x1b[31m" not in text
    wide = shown(facts(state, now=NOW), width=200)
    assert MARKUP in wide


def test_sparkline_is_blank_where_a_round_has_no_value() -> None:
    assert sparkline({1: 0.0, 2: 0.5, 4: 1.0}, 0.0, 1.0) == "▁▅ █"
    assert sparkline({}, 0.0, 1.0) == ""
    assert sparkline({3: 0.4}, 0.4, 0.4) == "▁"
