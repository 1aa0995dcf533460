"""A coordinator that ships its own code to a site: what that code reaches, and what it does not.

The bundle's ``clients/app.py`` is ``hostile_app.py``, and its ServerApp keeps what comes home.  The
site runs as `fedalign-client start` runs it, trainer and node as two OS users, neither of them
root.  Where other users cannot reach this Python (it lies in a closed home), the site sees it in a
mount namespace of its own, in which only the closed folders look different.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from clients.budget import Budget
from fedalign.audit import verify
from fedalign.config import Config, to_flat
from server.bundle import BundleRefused, check_bundle, make_app_folder
from server.coordinator import load
from server.superlink_admin import CONNECTION, connect, flower_environment, flwr, write_connection

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a site two users"),
]
NODE, TRAINER = 61_001, 61_002
"""Two users without an entry in the user database."""
SITE = "coast-a"
JOBS = 20
POLICY = f"[update]\nclip = 1.0\nnoise = 0.1\n[budget]\nmax-jobs-per-day = {JOBS}\n"
SECRET = "the answer nobody else may see"
HONEST = (
    *("run.rounds=1", "run.quorum=1.0", "aggregation.method=frozen-a"),
    *("local.steps=2", "personal.steps=0"),
)

SERVER = '''
"""The coordinator's own half: send the attack, keep what comes home."""
import json, time
from pathlib import Path
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()
KNOWN, LOOT = json.loads({known!r}), Path({loot!r})

@app.main()
def main(grid, context):
    end = time.monotonic() + 60
    while not (nodes := list(grid.get_node_ids())) and time.monotonic() < end:
        time.sleep(0.2)
    record = ConfigRecord({{"json": json.dumps(KNOWN)}})
    (reply,) = grid.send_and_receive(
        [Message(RecordDict({{"known": record}}), nodes[0], "query.hello")], timeout=300
    )
    text = reply.error.reason if reply.has_error() else reply.content["loot"]["json"]
    LOOT.with_suffix(".tmp").write_text(text)
    LOOT.with_suffix(".tmp").rename(LOOT)
'''


@pytest.fixture(scope="module")
def loopback(root: Path) -> ModuleType:
    path = root / "benchmarks" / "loopback.py"
    spec = importlib.util.spec_from_file_location("loopback", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder through which other users can pass, with a name short enough for a socket."""
    made = Path(tempfile.mkdtemp(prefix="fh"))
    made.chmod(0o711)
    (made / "free").mkdir()
    (made / "free").chmod(0o777)
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="module")
def federation(loopback: ModuleType, folder: Path, root: Path) -> Iterator[Any]:
    view = opened(root, folder)

    class Separated(loopback.Federation):  # type: ignore[name-defined, misc]
        """A federation whose site runs as two users."""

        def join(self, site: str) -> None:
            super().join(site)
            data, home = self.folder / f"{site}.jsonl", self.home(site)
            first, _, rest = data.read_text().partition("\n")
            data.write_text(json.dumps(json.loads(first) | {"topic": SECRET}) + "\n" + rest)
            os.chown(data, TRAINER, TRAINER)
            (home / "trainer" / "policy.toml").write_text(POLICY)

        def start_site(self, site: str, *options: str) -> None:
            users = ("--trainer-user", str(TRAINER), "--node-user", str(NODE))
            super().start_site(site, *users, *options)

        def spawn(self, out: Path, module: str, *words: str) -> subprocess.Popen[bytes]:
            if (module, *words[:1]) != ("clients.cli", "start"):
                return super().spawn(out, module, *words)
            with out.open("ab") as f:
                return subprocess.Popen(
                    [*view, sys.executable, "-m", module, *words],
                    env=self._environment(),
                    stdout=f,
                    stderr=subprocess.STDOUT,
                    cwd="/",
                )

    with Separated(folder, {SITE: "coast"}) as made:
        yield made


def opened(root: Path, folder: Path) -> list[str]:
    """Return the words that start a command where other users reach this Python and this code."""
    needed = sorted({Path(sys.prefix), Path(sys.base_prefix), root})
    closed = {
        path: parent
        for path in needed
        for parent in reversed(path.parents)
        if not parent.stat().st_mode & 0o001
    }
    if not closed:
        return []
    lines = ["set -e"]
    for number, path in enumerate(closed):
        aside = folder / "view" / str(number)
        lines += [f"mkdir -p {aside}", f"mount --bind {shlex.quote(str(path))} {aside}"]
    for parent in sorted(set(closed.values())):
        lines.append(f"mount -t tmpfs -o mode=0755 none {shlex.quote(str(parent))}")
    for number, path in enumerate(closed):
        place = shlex.quote(str(path))
        lines += [f"mkdir -p {place}", f"mount --move {folder / 'view' / str(number)} {place}"]
    script = "\n".join([*lines, 'exec "$@"'])
    words = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"]
    as_node = ("setpriv", f"--reuid={NODE}", f"--regid={NODE}", "--clear-groups")
    tried = subprocess.run(
        [*words, *as_node, sys.executable, "-c", "import flwr, fedalign"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if tried.returncode:
        pytest.skip(f"other users cannot run this Python: {tried.stderr[-200:]}")
    return words


def audit(federation: Any) -> list[dict[str, Any]]:
    """Return the events of the site's audit log, whose chain must hold."""
    path = federation.home(SITE) / "trainer" / "audit.jsonl"
    assert verify(path) > 0
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{"event": line["event"], **line["facts"]} for line in lines]


@pytest.fixture(scope="module")
def known(federation: Any, folder: Path, root: Path) -> dict[str, Any]:
    """What the attacker is told: more than a coordinator could know."""
    return {
        "site": SITE,
        "data": str(folder / f"{SITE}.jsonl"),
        "free": str(folder / "free"),
        "code": str(root / "clients" / "daemon.py"),
        "trainer-user": TRAINER,
        "supervisor": federation.running[SITE].pid,
        "jobs": JOBS,
    }


@pytest.fixture(scope="module")
def loot(
    federation: Any, folder: Path, root: Path, known: dict[str, Any], loopback: ModuleType
) -> dict[str, Any]:
    """Submit the hostile bundle as a coordinator can; return what its ServerApp got."""
    coordinator = load(federation.state)
    write_connection(coordinator)
    environment = flower_environment(coordinator)
    app = make_app_folder(coordinator.apps / "hostile", to_flat(Config()))
    shutil.copyfile(Path(__file__).with_name("hostile_app.py"), app / "clients" / "app.py")
    home = folder / "loot.json"
    (app / "server" / "app.py").write_text(SERVER.format(known=json.dumps(known), loot=str(home)))
    built = folder / "built"
    built.mkdir()
    flwr(environment, "build", "--app", str(app), cwd=built)
    with pytest.raises(BundleRefused, match=r"clients/app\.py.*differs"):
        check_bundle(next(built.glob("*.fab")))  # an honest coordinator would stop here
    answer = flwr(environment, "run", str(app), CONNECTION, "--format", "json")
    assert answer.get("success"), answer
    admin, run = connect(coordinator), int(answer["run-id"])

    def over() -> bool:
        state = admin.run_state(run)
        return home.exists() or (state is not None and state.finished)

    loopback.wait(over, "what the attack brings home", 300)
    assert home.exists(), "the hostile ServerApp ended without a reply"
    text = home.read_text()
    assert text.startswith("{"), text
    return dict(json.loads(text))


def test_it_ran_as_the_nodes_user_and_nothing_more(loot: dict[str, Any]) -> None:
    assert set(loot["user"]) == {NODE}


def test_no_private_file_opens_and_nothing_can_be_replaced(
    loot: dict[str, Any], known: dict[str, Any]
) -> None:
    files = loot["files"]
    assert {name: said for name, said in files.items() if said == "done"} == {}
    reads = {name: said for name, said in files.items() if name.startswith(("read", "through"))}
    assert len(reads) >= 2 * 10
    assert set(reads.values()) == {"EACCES"}
    assert files[f"read {known['data']}"] == "EACCES"
    assert SECRET not in json.dumps(loot)


def test_no_other_process_can_be_read_stopped_or_become(loot: dict[str, Any]) -> None:
    found = loot["processes"]
    assert {name: said for name, said in found.items() if said == "done"} == {}
    assert sum(name.startswith("mem ") for name in found) >= 2  # trainer and supervisor
    assert set(found.values()) <= {"EACCES", "EPERM"}


def test_forged_frames_get_codes_only(federation: Any, loot: dict[str, Any]) -> None:
    assert set(loot["frames"].values()) <= {"none", "refused", "bad-request", "done"}
    assert loot["frames"]["the descriptor's other end"] == "done"
    assert loot["frames"]["a descriptor"] == "bad-request"
    reasons = [e["reason"] for e in audit(federation) if e["event"] == "frame-refused"]
    expected = {"bad-frame", "frame-truncated", "frame-too-large", "unknown-kind"}
    assert set(reasons) >= expected
    assert len(reasons) >= 13


def test_the_policy_refuses_by_code_and_writes_it_down(
    federation: Any, folder: Path, loot: dict[str, Any]
) -> None:
    said = loot["policy"]
    assert said.pop("paths") in ("bad-request", "manifest-mismatch")
    assert said == {
        "another model": "refused-base-model",
        "a folder as model": "refused-base-model",
        "another objective": "refused-objective",
        "too many steps": "refused-settings",
        "a reference path": "refused-settings",
        "without clipping": "refused-aggregation",
        "another client": "unknown-client",
        "two clients": "unknown-client,unknown-client",
        "no setting": "bad-request",
        "a setting of another type": "bad-request",
    }
    logged = [e["code"] for e in audit(federation) if "code" in e]
    for code in {*said.values()} - {"unknown-client,unknown-client"}:
        assert code in logged, code
    assert list((folder / "free").iterdir()) == []  # nothing was written where a run pointed


def test_the_budget_of_the_day_holds(federation: Any, loot: dict[str, Any]) -> None:
    said = loot["budget"]
    worked = said.count("answer")
    assert 0 < worked < JOBS
    assert said == ["answer"] * worked + ["budget-exhausted"] * (len(said) - worked)
    events = audit(federation)
    codes = [e["code"] for e in events if e["event"] == "refused"]
    assert codes.count("budget-exhausted") == len(said) - worked
    assert [e["event"] for e in events].count("started") == 1  # nothing made the trainer end
    budget = Budget(federation.home(SITE) / "trainer" / "budget.sqlite", readonly=True)
    assert budget.spent(time.time()).jobs == JOBS


def test_the_trainer_goes_on_and_an_honest_run_gets_its_code(
    federation: Any, loot: dict[str, Any]
) -> None:
    refused = federation.run("refused", *HONEST)
    assert refused.returncode == 5
    assert "budget-exhausted" in refused.stdout + refused.stderr
    assert [e["event"] for e in audit(federation)].count("started") == 1


@pytest.mark.slow
def test_an_honest_run_is_served_once_the_owner_allows_more(
    federation: Any, loot: dict[str, Any]
) -> None:
    site = federation.running.pop(SITE)
    stray = Path(f"/proc/{loot['stray']}")
    assert stray.exists()
    site.send_signal(signal.SIGTERM)
    assert site.wait(40) == 0
    assert not stray.exists()
    policy = federation.home(SITE) / "trainer" / "policy.toml"
    policy.write_text(POLICY.replace(str(JOBS), "1000"))
    federation.start_site(SITE)
    done = federation.run("honest", *HONEST)
    assert done.returncode == 0, done.stdout + done.stderr
    assert verify(federation.state / "audit.jsonl") > 0
    for path in federation.state.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path
