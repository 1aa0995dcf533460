"""The report of a run in mode ``rewards``, from a ledger made by hand."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fedalign.config import REWARD_RULES, Config, from_flat, to_flat
from fedalign.ledger import (
    ClientRow,
    CurveRow,
    ItemRow,
    Ledger,
    ReferenceRow,
    ReplyRow,
    ScoreRow,
    TimingRow,
    WeightRow,
)
from fedalign.report.card import model_card
from fedalign.report.facts import gather
from fedalign.report.html import build_report
from fedalign.report.policy import CLOSED_FORM, RULES, TASKS, gather_policy, training_rows
from fedalign.report.summary import summarise
from fedalign.report.verdict import judge
from fedalign.runfolder import LEDGER

GROUPS = {"coast": (0.83, 0.86), "hills": (0.72, 0.80), "isles": (0.55, 0.74)}
EXCHANGES = 10


def make_rewards_ledger(
    folder: Path,
    *,
    task: str = "letter",
    rule: str = "literal",
    config: dict[str, object] | None = None,
    final: bool = True,
    closed: bool = True,
    mass: float = 0.97,
    cut: tuple[int, ...] = (),
    refused: float = 0.0,
    error: float | None = None,
) -> Path:
    """Write the ledger of a run of ten exchanges, three groups, one client a group."""
    settings = {
        "run.mode": "rewards",
        "personal.steps": 0,
        "run.rounds": EXCHANGES,
        "run.name": "by hand",
        "rewards.task": task,
        "rewards.rule": rule,
        "weights.temperature": 0.1,
        "weights.decay": 0.8,
        **(config or {}),
    }
    metric = "borda" if task == "order" else "js_divergence"
    flat = to_flat(from_flat(settings))
    names = sorted(GROUPS)

    def scores(stage: str, which: int, m: float) -> list[ScoreRow]:
        return [ScoreRow(stage, g, g, "test", metric, 12, GROUPS[g][which], m, 0.7) for g in names]

    def items(stage: str, which: int) -> list[ItemRow]:
        return [
            ItemRow(stage, g, g, "test", f"q{i:02d}", GROUPS[g][which] + 0.01 * (i - 5.5) / 12)
            for g in names
            for i in range(12)
        ]

    folder.mkdir(parents=True, exist_ok=True)
    with Ledger(folder / LEDGER) as ledger:
        ledger.put_run(
            config=flat, metric=metric, form="survey", status="completed" if final else "running",
            parameters=172_352, data_name="synthetic (default)", started=1_760_000_000.0,
        )  # fmt: skip
        ledger.put_clients([ClientRow(g, g, "survey", 60, 12, 12, 60) for g in names])
        rows = [ReferenceRow("uniform", g, 0.7) for g in names]
        rows += [ReferenceRow("optimum_average", g, 0.9) for g in names]
        rows += [ReferenceRow("optimum_worst", g, 0.85) for g in names]
        if closed:
            quantities = dict(zip(CLOSED_FORM, (0.2, 0.018, 0.91, 0.31, 0.402, 0.988), strict=True))
            rows += [ReferenceRow("closed_form", "", v, quantity=q) for q, v in quantities.items()]
        else:
            rows.append(ReferenceRow("closed_form", "", None, note="shares have too many answers"))
        ledger.put_references(rows)
        ledger.write("base", 0, 1, scores=scores("base", 0, 0.99), items=items("base", 0))
        for t in range(1, EXCHANGES + 1):
            curves = {
                "kl": 0.03 * t,
                "sampled-kl": 0.03 * (t - 1),
                "kl-coefficient": 0.2,
                "reward-mean": 0.5 + 0.01 * t,
                "fairness-index": 0.97 + 0.003 * t,
                "adaptive-branch": float(0.97 + 0.003 * t < 0.99),
                "reward-scale": 1 / 3 if 0.97 + 0.003 * t < 0.99 else 1.0,
                "format-rate": 1 - 0.002 * t,
                "clip-fraction": 0.02 * (1 + t % 2),
                "clip-fraction-max": 0.9 if t in cut else 0.01 * t,
                "updates": 3.0 if t in cut else 8.0,
                "rollouts": 256.0,
                "generated-tokens": 256.0,
                "updated-tokens": 2048.0,
                "value-loss": 0.1 / t,
                "unanswered": 7.0,
                "refused": refused,
                "predicted": 0.0,
                "malformed": 3.0,
            }
            weights = {"coast": 0.2, "hills": 0.3, "isles": 0.5}
            absent = "hills" if t == 4 else ""
            ledger.write(
                "train", t, 1,
                curves=[
                    *(CurveRow(client="", name=n, value=v) for n, v in curves.items()),
                    *(CurveRow(client=f"group:{g}", name="weight", value=w)
                      for g, w in weights.items()),
                ],
                weights=[
                    WeightRow(g, None, None, None, False, 0.0) if g == absent
                    else WeightRow(g, weights[g], 0.6, GROUPS[g][0] + 0.005 * t)
                    for g in names
                ],
                replies=[ReplyRow(g, g, examples=250) for g in names if g != absent],
                timings=[TimingRow("generate", 0.5), TimingRow("update", 1.0)],
            )  # fmt: skip
        if error is not None:
            ledger.write(
                "predictor", 1, 1, replies=[ReplyRow(g, g, examples=9999) for g in names],
                curves=[CurveRow(g, "predictor-error", error) for g in names],
            )  # fmt: skip
        if final:
            ledger.write("final", EXCHANGES, 1, scores=scores("shared", 1, mass),
                         items=items("shared", 1))  # fmt: skip
        for triple in ledger.attempts():
            ledger.commit(*triple)
    return folder


class Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "br", "hr", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text.append(data)


def words(folder: Path) -> str:
    reader = Text()
    reader.feed(build_report(folder).read_text(encoding="utf-8"))
    reader.close()
    assert reader.open == []
    return " ".join(" ".join(reader.text).split())


def rows(folder: Path) -> dict[str, str]:
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        config = ledger.run()["config"]
        policy = gather_policy(ledger, config)
    assert policy is not None
    return dict(training_rows(policy, config))


def test_every_rule_and_task_has_words() -> None:
    assert set(RULES) == set(REWARD_RULES)
    assert set(TASKS) == {"letter", "shares", "order"}


def test_page_of_a_rewards_run(tmp_path: Path) -> None:
    said = words(make_rewards_ledger(tmp_path))
    for heading in (
        "How the policy was trained",
        "Distance to the closed-form optimum",
        "Influence over exchanges",
        "Mean reward of sampled texts over exchanges",
        "KL from the base over exchanges",
        "Well-formed texts over exchanges",
        "Fairness index of the rewards over exchanges",
    ):
        assert heading in said
    for gone in ("Validation score over rounds", "adapter a group received", "over rounds"):
        assert gone not in said
    assert "10 of 10 exchanges" in said
    assert "share of that distance closed 0.910" in said
    assert "mean reward of sampled texts (log, 0 to 1)" in said
    assert "threshold" in said
    assert not re.search(r"\bnan\b|\binf\b|None|Undefined", said)


def test_training_table_by_hand(tmp_path: Path) -> None:
    found = rows(make_rewards_ledger(tmp_path))
    assert found["Task"].startswith("letter: ")
    assert found["Reward of a text"] == "log; 0 if malformed"
    assert found["KL coefficient"] == "0.2"
    assert found["KL from the base, nats a text"] == (
        "0.000 in the first exchange, 0.270 in the last"
    )
    # The index is below .99 up to exchange 6: .97 + .003 * 6 = .988.
    assert found["Adaptive branch taken"] == "in 60% of the exchanges"
    # Mean scale (6 / 3 + 4) / 10 = .6; the KL term weighs 1 / .6 = 1.67 times as much.
    assert found["Scale of the combined reward"].startswith("0.60 of the rewards'")
    assert "1.7 times its coefficient" in found["Scale of the combined reward"]
    assert found["Clipped"] == "3.0% of the ratios on average, 10.0% at most"
    assert found["Optimiser updates"] == "80"
    assert found["Texts sampled"] == "2,560"
    assert found["Tokens in updates"] == "20,480"
    # Three clients, 250 of 256 texts, one absent once: 29 replies.
    counts = "7,250, over all clients (30 malformed (0%), 70 unanswered (1%))"
    assert found["Rewards received"] == counts


def test_table_follows_rule_and_settings(tmp_path: Path) -> None:
    mean = rows(make_rewards_ledger(tmp_path / "a", rule="mean"))
    assert "Adaptive branch taken" not in mean
    assert mean["Rule"] == "mean: mean of the groups' rewards"
    held = {"ppo.kl-target": 0.3, "ppo.kl": 0.1}
    soft = rows(make_rewards_ledger(tmp_path / "b", rule="soft-min", config=held))
    assert "k = -10" in soft["Rule"]
    assert soft["KL coefficient"] == "0.1; 0.2 in the last exchange, moved to hold 0.3 nats a text"


def test_series_are_influence_and_mean_reward(tmp_path: Path) -> None:
    with Ledger(make_rewards_ledger(tmp_path) / LEDGER, readonly=True) as ledger:
        facts = gather(ledger)
        summary = summarise(ledger)
    assert facts.weights["isles"] == dict.fromkeys(range(1, 11), 0.5)
    assert 4 not in facts.weights["hills"]
    assert 4 not in facts.validation["hills"]
    assert facts.validation["coast"][2] == pytest.approx(0.84)
    assert facts.policy is not None
    assert facts.policy.group_weights["isles"][3] == 0.5
    assert summary["policy/kl/last"] == pytest.approx(0.3)
    assert summary["policy/reward-scale/mean"] == pytest.approx(0.6)
    assert summary["closed_form/closed"] == 0.91


def test_orders_have_a_format_rate_and_their_metric(tmp_path: Path) -> None:
    folder = make_rewards_ledger(tmp_path, task="order")
    said = words(folder)
    assert "Format rate" in said
    assert "option mass" not in said.replace("Option mass, or format rate", "")
    assert "agreement of Borda points" in said
    assert "Of sampled texts; one that is no answer scores 0." in said
    low = make_rewards_ledger(tmp_path / "low", task="order", mass=0.4)
    with Ledger(low / LEDGER, readonly=True) as ledger:
        verdict = judge(gather(ledger), summarise(ledger))
    assert verdict.title == (
        "Failed: format rate 0.400 is below 0.9; too many of its texts are no answer, so its "
        "scores mean little."
    )
    assert not any("went from" in s for s in verdict.sentences)


def test_undefined_optimum_gives_its_reason_and_a_running_run_a_page(tmp_path: Path) -> None:
    said = words(make_rewards_ledger(tmp_path / "a", task="shares", closed=False))
    assert "Not defined here: shares have too many answers." in said
    running = words(make_rewards_ledger(tmp_path / "b", final=False))
    assert "Not finished: 10 of 10" in running


def test_a_run_without_an_exchange_has_a_page(tmp_path: Path) -> None:
    with Ledger(tmp_path / LEDGER) as ledger:
        ledger.put_run(config=to_flat(from_flat({"run.mode": "rewards"})), metric="js_divergence")
    said = words(tmp_path)
    assert "How the policy was trained" in said
    assert "Rewards received 0, over all clients" in said


def test_titles_tell_runs_of_one_scenario_apart(tmp_path: Path) -> None:
    assert "Run by hand: rule literal, task letter" in words(make_rewards_ledger(tmp_path / "a"))
    other = words(make_rewards_ledger(tmp_path / "b", rule="mean", task="order"))
    assert "Run by hand: rule mean, task order" in other


def test_the_optimum_has_a_line_in_the_kl_plot(tmp_path: Path) -> None:
    with_optimum = words(make_rewards_ledger(tmp_path / "a"))
    assert "The line “optimum” is the closed form" in with_optimum
    assert " optimum " in with_optimum[with_optimum.index("KL from the base over exchanges") :]
    assert "The line “optimum”" not in words(
        make_rewards_ledger(tmp_path / "b", task="shares", closed=False)
    )


def test_the_format_axis_is_the_whole_range(tmp_path: Path) -> None:
    said = words(make_rewards_ledger(tmp_path))
    plot = said[said.index("Well-formed texts over exchanges") :]
    plot = plot[: plot.index("Fairness index of the rewards")]
    assert {"0.00", "0.25", "1.00"} <= set(plot.split())


def test_exchanges_that_were_cut_short_are_named(tmp_path: Path) -> None:
    folder = make_rewards_ledger(tmp_path / "a", cut=(4, 7))
    text = (
        "2 of 10 exchanges (4, 7) were cut short after 3.0 of 8 updates on average: more than 80% "
        "of an update's ratios were clipped"
    )
    assert rows(folder)["Optimiser updates"].startswith(f"70. {text}")
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        verdict = judge(gather(ledger), summarise(ledger))
    assert any(s.startswith(text) for s in verdict.sentences)
    assert "cut short" not in words(make_rewards_ledger(tmp_path / "b"))


def test_few_rewards_and_a_poor_predictor_are_in_the_verdict(tmp_path: Path) -> None:
    folder = make_rewards_ledger(tmp_path / "a", refused=2000.0, error=0.3)
    said = words(folder)
    # 7 250 came of 7 250 + 20 000 + 100.
    assert "Only 27% of the rewards asked for came (30 malformed (0%)" in said
    assert "20,000 refused (73%)" in said
    assert "The preference predictor is poor for 3 of 3 clients" in said
    assert rows(folder)["Rewards received"].startswith("7,250, ")
    good = words(make_rewards_ledger(tmp_path / "b", error=0.1))
    assert "Only" not in good
    assert "predictor is poor" not in good


def test_card_names_rule_and_task(tmp_path: Path) -> None:
    with Ledger(make_rewards_ledger(tmp_path) / LEDGER, readonly=True) as ledger:
        card = model_card(ledger)
    assert "| `rewards.rule` | literal |" in card
    assert "PPO on the server, 10 exchanges" in card
    assert "local.loss" not in card


def test_adapter_mode_has_nothing_of_it(run_folder) -> None:
    folder = run_folder()
    said = words(folder)
    for absent in ("exchange", "policy was trained", "closed-form", "Influence", "sampled texts"):
        assert absent not in said
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        assert gather(ledger).policy is None
        assert not [k for k in summarise(ledger) if k.startswith(("policy/", "closed_form/"))]
    assert Config().run.mode == "adapters"
