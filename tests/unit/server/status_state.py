"""A coordinator's state folder made by hand: runs in every condition, certificates, process ids."""

from __future__ import annotations

import datetime
import json
import os
import zlib
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedalign.config import Config, to_flat
from fedalign.ledger import ClientRow, Ledger, ReplyRow, ScoreRow, WeightRow
from fedalign.runfolder import LEDGER, REPORT

NOW = 1_800_000_000.0
GROUPS = ("coast", "hills", "isles", "valley")
FIRST = {"coast": 0.62, "hills": 0.58, "isles": 0.41, "valley": 0.55}


def site_of(group: str) -> str:
    """The site of a group; one with odd letters has a number for a name."""
    name = group if group.isalpha() else f"odd-{zlib.crc32(group.encode())}"
    return f"{name}-lab"


def score_of(group: str, round_: int) -> float:
    """What the fixture's ledger says: rises with rounds, isles from furthest below."""
    return round(FIRST.get(group, 0.5) + 0.02 * round_, 4)


def make_run(
    folder: Path,
    *,
    groups: tuple[str, ...] = GROUPS,
    done: int = 3,
    rounds: int = 8,
    status: str = "running",
    void: bool = False,
    resumed: bool = False,
    withheld: str = "",
    absent: str = "",
    started: float = NOW - 3600,
    config: dict[str, object] | None = None,
) -> Path:
    """Write a run's ledger: ``done`` committed rounds; ``void`` adds attempt 1 of the next one."""
    flat = {**to_flat(Config()), "run.rounds": rounds, **(config or {})}
    with Ledger(folder / LEDGER) as ledger:
        ledger.put_run(config=flat, metric="js_divergence", status=status, started=started)
        ledger.put_clients(
            [ClientRow(site_of(g), g, "survey", 40, 10, 10, 200) for g in groups]
        )  # fmt: skip
        ledger.write("base", 0, 1, scores=[
            ScoreRow("base", site_of(g), g, split, "js_divergence", 10, score_of(g, 0), 0.98, 0.3)
            for g in groups for split in ("validation", "test")
        ])  # fmt: skip
        ledger.commit("base", 0, 1)
        for t in range(1, done + 1):
            gone = absent if t == done else ""
            here = [g for g in groups if g != gone]
            ledger.write(
                "train", t, 1,
                weights=[
                    WeightRow(
                        g,
                        None if g == gone else 1 / len(here),
                        None if g == withheld else score_of(g, t),
                        None if g in (gone, withheld) else score_of(g, t),
                        present=g != gone,
                    )
                    for g in groups
                ],
                replies=[
                    ReplyRow(site_of(g), g, "n1", weight=1 / len(here), examples=40)
                    if g != gone
                    else ReplyRow(site_of(g), g, "n1", "rejected", "no-reply")
                    for g in groups
                ],
            )  # fmt: skip
            if gone:
                ledger.event(
                    "reply-rejected", "no-reply", phase="train", round=t, attempt=1,
                    client=site_of(gone),
                )  # fmt: skip
            ledger.commit("train", t, 1)
        if void:
            # Written, never committed: a score of 0.999 that nobody may see.
            ledger.write(
                "train", done + 1, 1,
                weights=[WeightRow(g, 0.999, 0.999, 0.999) for g in groups],
                replies=[
                    ReplyRow(site_of(g), g, "n1", "rejected", "bad-shape") for g in groups[:3]
                ],
            )  # fmt: skip
            for g in groups[:3]:
                ledger.event(
                    "reply-rejected", "bad-shape", phase="train", round=done + 1, attempt=1,
                    client=site_of(g),
                )  # fmt: skip
            ledger.event("round-void", "1 of 4 clients usable, 2 needed", phase="train",
                         round=done + 1, attempt=1)  # fmt: skip
        if resumed:
            ledger.event("resumed", f"after train {done}")
        if status.startswith("failed"):
            ledger.event("run-failed", status.removeprefix("failed: "))
        if status == "completed":
            for phase in ("final", "personal"):
                ledger.write(phase, done, 1)
                ledger.commit(phase, done, 1)
    if status == "completed":
        (folder / REPORT).write_text("<!doctype html><p>the report</p>", encoding="utf-8")
    for name in os.listdir(folder):
        os.utime(folder / name, (NOW - 60, NOW - 60))
    os.utime(folder, (NOW - 60, NOW - 60))
    return folder


def make_certificate(path: Path, days: float) -> None:
    """Write a self-signed certificate that ends ``days`` after NOW."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    end = datetime.datetime.fromtimestamp(NOW + 86400 * days, datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(end - datetime.timedelta(days=3000))
        .not_valid_after(end)
        .sign(key, hashes.SHA256())
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM))


def put_pids(state: Path, **pids: int) -> None:
    """Write pids.json."""
    (state / "pids.json").write_text(json.dumps(pids), encoding="utf-8")
