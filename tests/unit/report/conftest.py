"""A plausible ledger without any training: answer distributions, mixed towards what groups say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedalign.config import Config, to_flat
from fedalign.ledger import (
    ClientRow,
    CurveRow,
    DiscardedRow,
    ItemRow,
    Ledger,
    ReferenceRow,
    ReplyRow,
    ScoreRow,
    TimingRow,
    WeightRow,
)
from fedalign.runfolder import LEDGER

NAMES = ("Coast", "Highland", "River & Lakes", "Far North")


def agreement(p: np.ndarray, y: np.ndarray) -> np.ndarray:
    """1 - Jensen-Shannon divergence, base 2: (..., K), (..., K) -> (...)."""
    m = (p + y) / 2
    return 1 - ((p * np.log2(p / m)).sum(-1) + (y * np.log2(y / m)).sum(-1)) / 2


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def make_ledger(
    folder: Path,
    *,
    groups: int = 4,
    clients_per_group: int = 1,
    rounds: int = 8,
    questions: int = 40,
    seed: int = 0,
    option_mass: float = 0.985,
    optimum: bool = True,
    items: bool = True,
    status: str = "completed",
    failed_client: bool = False,
    names: tuple[str, ...] = NAMES,
    config: dict[str, object] | None = None,
) -> Path:
    """Write ``ledger.sqlite`` into ``folder`` and return the folder."""
    rng = np.random.default_rng(seed)
    k = 4
    common = rng.normal(size=(questions, k)) * 1.2
    own = rng.normal(size=(groups, questions, k)) * np.linspace(0.5, 1.6, groups)[:, None, None]
    y = softmax(common + own)  # (G, Q, K)
    base = softmax(0.4 * common + rng.normal(size=(questions, k)) * 1.0)
    mean = y.mean(0)
    power = np.ones(groups) / groups  # weights of the mixture that serves the worst group best
    for _ in range(60):
        served = agreement(np.tensordot(power, y, 1), y).mean(1)
        power = softmax(np.log(power) - 4 * served)
    low = np.tensordot(power, y, 1)
    uniform = np.full((questions, k), 1 / k)
    group_names = [names[i] if i < len(names) else f"Region {i + 1:02d}" for i in range(groups)]
    sizes = [
        int(400 * 0.85**i) + 20 if groups < 20 else int(rng.integers(20, 400))
        for i in range(groups)
    ]
    clients = [
        (f"{group_names[g]}/{c}", g) for g in range(groups) for c in range(clients_per_group)
    ]

    def answers(stage: str, g: int, t: float = 1.0) -> np.ndarray:
        noise = softmax(rng.normal(size=(questions, k)))
        shared = 0.72 * (0.6 * mean + 0.4 * low) + 0.28 * base
        match stage:
            case "base":
                return base
            case "received":
                return (1 - t) * base + t * shared
            case "shared":
                return shared
            case "personal":
                return 0.55 * y[g] + 0.35 * shared + 0.1 * noise
            case "local_only":
                return 0.35 * y[g] + 0.35 * base + 0.3 * noise
            case _:
                return 0.5 * y[g] + 0.25 * base + 0.25 * noise

    def rows(stage: str, split: str, t: float = 1.0) -> tuple[list[ScoreRow], list[ItemRow]]:
        scores, item_rows = [], []
        for index, (client, g) in enumerate(clients):
            mine = [
                q for q in range(questions)
                if q % clients_per_group == index % clients_per_group
            ]  # fmt: skip
            values = agreement(answers(stage, g, t), y[g])
            if split == "validation":
                values = values + rng.normal(size=questions) * 0.004
            even = agreement(uniform, y[g])
            failed = failed_client and stage == "personal" and index == 0
            if failed:
                scores.append(
                    ScoreRow(stage, client, group_names[g], split, "js_divergence", 0,
                             status="failed", reason="non_finite_score")
                )  # fmt: skip
                continue
            scores.append(
                ScoreRow(stage, client, group_names[g], split, "js_divergence", len(mine),
                         float(values[mine].mean()), float(option_mass - 0.004 * (g % 3)),
                         float(even[mine].mean()))
            )  # fmt: skip
            if items and split == "test":
                item_rows += [
                    ItemRow(stage, client, group_names[g], split, f"q{q:03d}", float(values[q]))
                    for q in mine
                ]
        return scores, item_rows

    flat = {**to_flat(Config()), "run.rounds": rounds, "run.name": "default", **(config or {})}
    with Ledger(folder / LEDGER) as ledger:
        ledger.put_run(
            config=flat, metric="js_divergence", form="survey", status=status,
            parameters=412_000, data_name="synthetic (default)",
            manifest=json.dumps({"base_revision": "3f0c" * 16, "layout": [["a", [8, 64]]]}),
            versions={"fedalign": "0.1.0", "torch": "2.13.0"},
            started=1_760_000_000.0, finished=1_760_000_041.5,
        )  # fmt: skip
        if status == "failed":
            ledger.put_run(status="failed: round 5 missed its quorum twice")
        ledger.put_clients([
            ClientRow(c, group_names[g], "survey", 2 * questions, questions // 2,
                      questions // clients_per_group, sizes[g])
            for c, g in clients
        ])  # fmt: skip
        references: list[ReferenceRow] = []
        policies = {"uniform": uniform, "mean_of_groups": mean}
        if optimum:
            policies |= {"optimum_average": mean,
                         "optimum_worst": low}  # fmt: skip
        else:
            for name in ("optimum_average", "optimum_worst"):
                references.append(
                    ReferenceRow(name, "", None, note="the groups share no comparison")
                )
        for name, policy in policies.items():
            per_question = np.stack([agreement(policy, y[g]) for g in range(groups)])
            references += [
                ReferenceRow(name, group_names[g], float(per_question[g].mean()))
                for g in range(groups)
            ]
            cov = per_question.std(0) / per_question.mean(0)
            references.append(
                ReferenceRow(name, "", float((1 / (1 + cov**2)).mean()), quantity="fairness_index")
            )
        ledger.put_references(references)

        test_scores, test_items = rows("base", "test")
        validation_scores, _ = rows("base", "validation")
        ledger.write("base", 0, 1, scores=[*test_scores, *validation_scores], items=test_items)
        ledger.commit("base", 0, 1)
        done = rounds if status == "completed" else rounds // 2
        for t in range(1, done + 1):
            share = 1 - np.exp(-(t - 1) / 2.5)
            scores, _ = rows("received", "validation", share)
            by_group = {
                g: float(np.mean([s.score for s in scores if s.group == g])) for g in group_names
            }
            absent = {group_names[1]} if groups > 2 and t == 3 else set()
            z = np.array([(1 - by_group[g]) / 0.05 for g in group_names])
            z[[g in absent for g in group_names]] = -np.inf
            a = 0.8 * softmax(z) + 0.2 * np.isfinite(z) / np.isfinite(z).sum()
            lost = 0 if t % 4 else 1
            replies = []
            for index, (client, g) in enumerate(clients):
                if group_names[g] in absent:
                    continue
                bad = lost and index == 0
                replies.append(
                    ReplyRow(client, group_names[g], f"node{index % 2}",
                             "failed" if bad else "ok", "non_finite_loss" if bad else "",
                             None if bad else float(a[g] / clients_per_group), sizes[g],
                             None if bad else float(0.3 + 0.1 * rng.random()), "a1b2",
                             None if bad else float(0.64 - 0.06 * share + 0.004 * rng.normal()), 12)
                )  # fmt: skip
            weights = [
                WeightRow(g, None, by_group[g], None, False, 0.0) if g in absent
                else WeightRow(g, float(a[i]), by_group[g], by_group[g])
                for i, g in enumerate(group_names)
            ]  # fmt: skip
            if t == 2:
                ledger.write("train", t, 1, replies=replies[:1])
                ledger.event("attempt_failed", "1 of 4 replies usable; quorum is 0.5",
                             phase="train", round=2, attempt=1)  # fmt: skip
            attempt = 2 if t == 2 else 1
            ledger.write(
                "train", t, attempt, scores=scores, weights=weights, replies=replies,
                curves=[CurveRow(r.client, "margin", 0.1 * t) for r in replies if r.status == "ok"],
                discarded=[
                    DiscardedRow(f"layers.{layer}.q_proj", g, float(rng.random() * 0.03))
                    for layer in range(4) for g in group_names if g not in absent
                ],
                timings=[TimingRow("train", 1.9), TimingRow("aggregate", 0.03)],
            )  # fmt: skip
            ledger.commit("train", t, attempt)
            for g in absent:
                ledger.event("group_absent", g, phase="train", round=t, attempt=attempt)
        if status == "completed":
            scores, item_rows = rows("shared", "test")
            ledger.write("final", rounds, 1, scores=scores, items=item_rows)
            ledger.commit("final", rounds, 1)
            scores, item_rows = [], []
            for stage in ("personal", "local_only", "local_only_total"):
                more, more_items = rows(stage, "test")
                scores += more
                item_rows += more_items
            ledger.write("personal", rounds, 1, scores=scores, items=item_rows)
            ledger.commit("personal", rounds, 1)
        elif status == "failed":
            ledger.event("run_failed", "round 5 missed its quorum twice", phase="train", round=5)
    return folder


@pytest.fixture
def run_folder(tmp_path) -> Callable[..., Path]:
    """Return ``make(**options)``, which writes a ledger and returns its folder."""
    made = iter(range(1000))

    def make(**options) -> Path:
        return make_ledger(tmp_path / f"run{next(made)}", **options)

    return make
