"""``fedalign-client check``: are the data usable, what would leave, is the policy enforced?

Reads the site's own files; sends nothing.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from clients.policy_toml import load_policy
from clients.separation import account, cannot_run, problems
from clients.site import Home, SiteSettings, load_settings, local_flat, own_client
from clients.site_policy import Policy
from fedalign.config import Config, from_flat, to_flat
from fedalign.data.records import SPLITS, ClientData, Dataset, SurveyItem
from fedalign.errors import ConfigError

MOST_TOPICS = 12
"""Topics that are listed; the rest is counted."""


@dataclass
class Findings:
    """What ``check`` prints, and whether the site can serve."""

    lines: list[str] = field(default_factory=list)
    healthy: bool = True
    """The site's data and settings can be used."""
    enforced: bool = True
    """Bundle code is kept away from the data."""


def check(
    home: Home,
    data: str = "",
    source: str = "",
    node_user: str = "",
    trainer_user: str = "",
    seed: int = 0,
) -> Findings:
    """Check a site.

    Args:
        home: the site's folder.
        data: another file or folder to check in place of that of ``trainer.toml``.
        source: its kind; empty takes that of ``trainer.toml``.
        node_user: who the node runs as; empty takes the owner of ``node/``.
        trainer_user: who the trainer runs as; empty takes the owner of ``trainer/``.
        seed: seed of the split that is counted; a run brings its own.

    Raises ``ConfigError`` and ``DataError`` (with file and line) for what cannot be used.
    """
    found = Findings()
    other = {"path": str(Path(data).expanduser().resolve())} if data else {}
    settings = load_settings(home.settings, other | ({"source": source} if source else {}))
    policy = load_policy(home.policy)
    run = replace(Config(), run=replace(Config().run, seed=seed))
    config = from_flat(local_flat(to_flat(run), settings, home.store))
    client, dataset = own_client(settings, config)
    found.lines += _data(settings, client, dataset, config)
    if len(client.train) < policy.training.min_examples:
        found.healthy = False
        found.lines.append(
            f"FAIL  {len(client.train)} training examples; training.min-examples = "
            f"{policy.training.min_examples} in the policy: every run would be refused"
        )
    else:
        found.lines.append(f"ok    at least {policy.training.min_examples} training examples")
    found.lines += ["", "What leaves this site under the policy, and nothing else:"]
    found.lines += [f"  {what:<22} {how}" for what, how in leaving(policy)]
    found.lines += ["", *_separation(found, home, settings, trainer_user, node_user)]
    return found


def leaving(policy: Policy) -> list[tuple[str, str]]:
    """Return everything that a site may send: what, and in which form."""
    p = policy
    scores = {
        "exact": "exact",
        "rounded": f"rounded to multiples of {p.scores.rounding:g}",
        "withheld": "withheld",
    }[p.scores.release]
    questions = "not sent"
    if p.scores.question_scores and p.scores.release != "withheld":
        questions = f"on test, where the run asks: a hash of each question's text; score {scores}"
    update = "exact LoRA factors, float32"
    if p.update.clip:
        update = f"LoRA factors B, update clipped to norm {p.update.clip:g}"
        update += f", noise {p.update.noise:g} times that" if p.update.noise else ", no noise"
        update += "; only under frozen A"
    trains = any(o != "exchange" for o in p.training.objectives)
    rows = [
        ("to hello", "site, group; number of train, validation, test rows; size; versions; model"),
        ("mean scores", f"{scores} (with number of questions, option mass, uniform score)"),
        ("question scores", questions),
        ("update of a round", update if trains else "not sent: no training objective is allowed"),
        ("losses", scores if trains else "not sent"),
        ("counts of a round", "pairs, steps, tokens, seconds: exact"),
        ("personal adapter", "never; its test scores as above"),
    ]
    if "exchange" in p.training.objectives:
        rewards = "exact" if not p.exchange.rounding else f"multiples of {p.exchange.rounding:g}"
        budget = p.exchange.query_budget
        limit = f"{budget} different texts a question" if budget else "any number of texts"
        source = {"shares": "true answers", "predictor": "the predictor"}.get(
            p.exchange.answers, "true answers or the predictor"
        )
        rows.append(("rewards of texts", f"from {source}; {rewards}; {limit}"))
        predictor = "not sent"
        if p.exchange.answers != "shares":
            predictor = f"parameters exact (refused under clipping); error and losses {scores}"
        rows.append(("preference predictor", predictor))
    rows.append(("anything refused", "a status code"))
    return rows


def _data(
    settings: SiteSettings, client: ClientData, dataset: Dataset, config: Config
) -> list[str]:
    lines = [
        f"site {settings.name}, group {settings.group}: {len(dataset.items)} rows of "
        f"{dataset.form} data, {len(dataset.bad_rows)} left out",
    ]
    lines += [f"  left out  {row.source}: {row.reason}" for row in dataset.bad_rows[:5]]
    if len(dataset.bad_rows) > 5:
        lines.append(f"  ... and {len(dataset.bad_rows) - 5} more")
    shares = f"validation {config.data.validation:g}, test {config.data.test:g}"
    lines.append(f"with seed {config.run.seed}, {shares} (a run brings its own):")
    for split in SPLITS:
        items = client.split(split)
        lines.append(f"  {split:<11} {len(items):>6} rows, {len({i.key for i in items}):>6} texts")
    topics = Counter(
        (i.topic if isinstance(i, SurveyItem) else i.columns.get("topic", "")) or "(none)"
        for i in dataset.items
    )
    shown = ", ".join(f"{name} {n}" for name, n in topics.most_common(MOST_TOPICS))
    more = f", and {len(topics) - MOST_TOPICS} more" if len(topics) > MOST_TOPICS else ""
    lines.append(f"topics: {shown}{more}")
    return lines


def _separation(
    found: Findings, home: Home, settings: SiteSettings, trainer_user: str, node_user: str
) -> list[str]:
    if not node_user and not home.node.is_dir():
        raise ConfigError(f"{home.node}: no such folder. Join first, or give --node-user.")
    node = account(node_user or str(home.node.stat().st_uid))
    trainer = account(trainer_user or str(home.trainer.stat().st_uid))
    lines = [f"trainer runs as {trainer.name} ({trainer.uid}), node as {node.name} ({node.uid})"]
    for path in (home.path, home.node, home.trainer, home.settings, home.policy, home.run):
        lines.append(f"  {_mode(path)}  {path}")
    if home.socket.exists():
        lines.append(f"  {_mode(home.socket)}  {home.socket}")
    open_points = problems(home, settings, trainer.uid, node.uid)
    found.enforced = not open_points
    if os.geteuid() == 0 and (trainer_user or node_user):
        reasons = [r for r in map(cannot_run, (trainer, node)) if r]
        found.healthy = found.healthy and not reasons
        lines += [f"FAIL  {reason}" for reason in reasons]
    if not open_points:
        return [*lines, "ok    code from the coordinator is kept away from the data"]
    lines.append("THE POLICY IS ADVISORY: it binds an honest coordinator only, because")
    return lines + [f"  - {point}" for point in open_points]


def _mode(path: Path) -> str:
    if not path.exists():
        return "absent              "
    state = path.stat()
    return f"{stat.filemode(state.st_mode)} {state.st_uid:>9}"
