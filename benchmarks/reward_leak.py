"""What a hostile server can read from rewards: attacks on one client, question by question.

    python benchmarks/reward_leak.py [--seeds 5] [--questions 40] [--out leak.json]

The texts in an exchange need not be samples of a policy: such a server sends what it likes.  Every
number below comes out of ``clients.exchange.answer``, the function that a site runs.

``letter``, reward ``log``
    One text an option.  r = 1 + ln(max(p, floor)) / L gives p, or that it is at most the floor.
``shares``, reward ``js_divergence``
    The text that gives option k all ten tenths has a divergence that depends on p_k alone and falls
    with it, so each such text gives one share.  Under rounding: all texts there are, and the shares
    that fit their rewards best (least squares), which averages the rounding out.
``order``, reward ``borda``
    The reward is linear in the group's Borda points.  The server keeps every order that fits the
    replies so far and asks the text whose reply tells most of them apart, until none does.

Of what an attack knows only in bounds (low, high for each option), it takes low + t (high - low)
with t such that the shares sum to 1.  It knows nothing else about the group; a server with an old
survey at hand does better.

Figures are means over the groups of the default synthetic world, with the 95 % half-width over
seeds.  *error* is the mean of |p_hat - p| over options; *pairs* is the share of pairs of options
whose order is recovered, a tie counting half: .5 is a guess.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares
from scipy.stats import t as student

from clients.exchange import answer
from clients.policy import rounded
from fedalign import wire
from fedalign.config import Config, from_flat
from fedalign.data.records import ClientData, SurveyItem
from fedalign.data.synthetic import generate
from fedalign.metrics import ranking
from fedalign.metrics.alignment import kernel, score
from fedalign.models.formats import TENTHS, letter_completion, order_completion, shares_completion
from fedalign.randomness import generator

Array = NDArray[np.float64]
Ask = Callable[[list[tuple[int, str]]], list[float | None]]
"""(question, text) pairs to rewards; None where the site refused."""

NOTHING = "nothing asked"
SETTINGS: dict[str, dict[str, str | int | float]] = {
    NOTHING: {},
    "exact": {},
    "rounding .05": {"site.rounding": 0.05},
    "rounding .1": {"site.rounding": 0.1},
    "rounding .25": {"site.rounding": 0.25},
    "budget 1": {"site.query-budget": 1},
    "budget 2": {"site.query-budget": 2},
    "budget 3": {"site.query-budget": 3},
    "budget 2, rounding .1": {"site.query-budget": 2, "site.rounding": 0.1},
    "predictor, noise .2": {"site.answers": "predictor"},
    "predictor, noise .5": {"site.answers": "predictor"},
}
NOISE = {"predictor, noise .2": 0.2, "predictor, noise .5": 0.5}
"""Standard deviation of the log-shares of a stand-in predictor around the true log-shares."""

TASKS = {"letter": "log", "shares": "js_divergence", "order": "borda"}


@dataclass(frozen=True)
class Leak:
    """What one attack on one client found."""

    texts: float
    """Mean texts answered for each question."""
    error: float | None
    """Mean |p_hat - p|; None for orders."""
    pairs: float
    """Share of pairs of options in the right order."""


def attack(task: str, setting: str, items: Sequence[SurveyItem], group: str, seed: int) -> Leak:
    """Run the attack of a task on one group's answers to ``items``."""
    client = ClientData("site", group, "survey", tuple(i.answered_by(group) for i in items), (), ())
    truth = [np.asarray(i.shares[group]) for i in items]
    with tempfile.TemporaryDirectory() as out:
        config = from_flat(
            {"run.mode": "rewards", "personal.steps": 0, "run.out": out, "rewards.task": task}
            | SETTINGS[setting]
        )
        counted: set[tuple[int, str]] = set()

        def ask(pairs: list[tuple[int, str]]) -> list[float | None]:
            if setting == NOTHING:
                return [None] * len(pairs)
            rewards = _ask(config, client, items, pairs, NOISE.get(setting), seed)
            counted.update(p for p, r in zip(pairs, rewards, strict=True) if r is not None)
            return rewards

        sizes = [len(y) for y in truth]
        if task == "order":
            found = list(_orders(ask, sizes, config.site.rounding))
        elif task == "shares" and config.site.rounding and not config.site.query_budget:
            found = list(_fits(ask, sizes))
        else:
            invert = _from_log(config.rewards.floor) if task == "letter" else _from_corner
            found = list(_bounds(ask, sizes, task, invert, config.site.rounding))
    error = None
    if task != "order":
        error = mean(float(np.abs(p - y).mean()) for p, y in zip(found, truth, strict=True))
    right = mean(_pairs(p, y) for p, y in zip(found, truth, strict=True))
    return Leak(len(counted) / len(items), error, right)


def _ask(
    config: Config,
    client: ClientData,
    items: Sequence[SurveyItem],
    pairs: list[tuple[int, str]],
    noise: float | None,
    seed: int,
) -> list[float | None]:
    """Send one exchange, as a hostile server would, and read the reply."""
    rollouts = wire.Rollouts(
        tuple(wire.Question(i.question, i.options) for i in items),
        tuple(number for number, _ in pairs),
        tuple(text for _, text in pairs),
    )
    predictors = None
    if noise is not None:
        own = {(i.question, i.options): i.shares[client.group] for i in items}

        def predict(question: wire.Question) -> list[float]:
            shares = np.asarray(own[(question.question, question.options)])
            draw = generator(seed, "leak-predictor", client.group, *question.options,
                             question.question).standard_normal(len(shares))  # fmt: skip
            p = shares * np.exp(noise * draw)
            return list(p / p.sum())

        predictors = {client.name: predict}
    (reply,) = answer(config, {client.name: client}, [client.name], rollouts, predictors)
    if reply.status != wire.OK:
        raise RuntimeError(f"the client answered {wire.STATUS[reply.status]}")
    answered = (wire.FROM_SHARES, wire.PREDICTED)
    return [
        float(r) if code in answered else None
        for r, code in zip(reply.rewards, reply.codes, strict=True)
    ]


# --- one text, one share ------------------------------------------------------------------------


def _bounds(
    ask: Ask,
    sizes: Sequence[int],
    task: str,
    invert: Callable[[float], tuple[float, float]],
    rounding: float,
) -> Iterator[Array]:
    """Ask one text an option; each reply bounds one share."""
    pairs = [(q, text) for q, k in enumerate(sizes) for text in _single(task, k)]
    replies = iter(ask(pairs))
    for k in sizes:
        low, high = np.zeros(k), np.ones(k)
        for option in range(k):
            reward = next(replies)
            if reward is not None:
                # A float32 on the wire is exact to about 1e-7.
                low[option] = invert(max(0.0, reward - rounding / 2))[0]
                high[option] = invert(min(1.0, reward + rounding / 2))[1]
        room = float((high - low).sum())
        yield low + (high - low) * (min(1.0, max(0.0, (1 - low.sum()) / room)) if room > 0 else 0.0)


def _single(task: str, k: int) -> list[str]:
    if task == "letter":
        return [letter_completion(option) for option in range(k)]
    return [shares_completion([TENTHS * (o == option) for o in range(k)]) for option in range(k)]


def _from_log(floor: float) -> Callable[[float], tuple[float, float]]:
    """Return the bounds on p that a ``log`` reward leaves; 0 says at most the floor."""

    def invert(reward: float) -> tuple[float, float]:
        p = floor ** (1.0 - reward)
        return (0.0 if reward <= 1e-7 else p), p

    return invert


def _from_corner(reward: float) -> tuple[float, float]:
    """Return p_k, twice, from the js_divergence score of giving all ten tenths to option k."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        # Two options stand for k and all the rest: the rest is in no one's favour.
        if score("js_divergence", [1.0, 0.0], [middle, 1 - middle]) < reward:
            low = middle
        else:
            high = middle
    return high, high


# --- all texts, least squares -------------------------------------------------------------------


def _fits(ask: Ask, sizes: Sequence[int]) -> Iterator[Array]:
    """Ask every text in tenths; fit the shares to the rounded rewards."""
    replies = iter(
        ask([(q, shares_completion(text)) for q, k in enumerate(sizes) for text in _tenths(k)])
    )
    for k in sizes:
        texts = np.array(_tenths(k)) / TENTHS
        rewards = np.array([next(replies) for _ in texts], dtype=np.float64)

        def residuals(x: Array, texts: Array = texts, rewards: Array = rewards) -> Array:
            return kernel("js_divergence", texts, _softmax(x)) - rewards

        start = np.log(texts[rewards.argmax()] + 0.02)
        yield _softmax(least_squares(residuals, start).x)


@cache
def _tenths(k: int) -> list[tuple[int, ...]]:
    """Return every way to deal ten tenths to k options: C(9 + k, k - 1) of them."""
    cuts = combinations(range(TENTHS + k - 1), k - 1)
    return [
        tuple(b - a - 1 for a, b in zip((-1, *c), (*c, TENTHS + k - 1), strict=True)) for c in cuts
    ]


def _softmax(x: Array) -> Array:
    p = np.exp(x - x.max())
    return np.asarray(p / p.sum())


# --- orders -------------------------------------------------------------------------------------


def _orders(ask: Ask, sizes: Sequence[int], rounding: float) -> Iterator[Array]:
    """Ask the most telling text again and again; return the mean points of what still fits."""
    left = [tuple(range(math.factorial(k))) for k in sizes]
    open_ = set(range(len(sizes)))
    while open_:
        chosen = {q: _telling(sizes[q], left[q], rounding) for q in sorted(open_)}
        chosen = {q: text for q, text in chosen.items() if text is not None}
        asked = [
            (q, order_completion(_all_orders(sizes[q])[t].tolist())) for q, t in chosen.items()
        ]
        open_ = set()
        for (q, text), reward in zip(chosen.items(), ask(asked) if asked else [], strict=True):
            if reward is not None:
                row = _rewards(sizes[q], rounding)[text]
                left[q] = tuple(o for o in left[q] if abs(row[o] - reward) < 1e-6)
                open_.add(q)
    for k, fitting in zip(sizes, left, strict=True):
        yield ranking.order_points(_all_orders(k)[list(fitting)]).mean(0)


@cache
def _telling(k: int, left: tuple[int, ...], rounding: float) -> int | None:
    """Return the text whose reply has most entropy over the orders left; None where none tells."""
    best, most = None, 0.0
    table = _rewards(k, rounding)[:, list(left)].round(7)
    for text, row in enumerate(table):
        counts = np.unique(row, return_counts=True)[1] / len(left)
        entropy = float(-(counts * np.log(counts)).sum())
        if entropy > most + 1e-9:
            best, most = text, entropy
    return best


@cache
def _rewards(k: int, rounding: float) -> Array:
    """Return what text i is worth to a group of order j: (k!, k!)."""
    orders = _all_orders(k)
    points = ranking.order_points(orders)
    exact = ranking.kernel("borda", orders[:, None], (points / points[0].sum())[None])
    return np.vectorize(rounded)(exact, rounding) if rounding else exact


@cache
def _all_orders(k: int) -> NDArray[np.int64]:
    return ranking.all_orders(k)


# --- the table ----------------------------------------------------------------------------------


def _pairs(found: Array, truth: Array) -> float:
    i, j = np.triu_indices(len(truth), 1)
    guess, real = np.sign((found[i] - found[j]).round(9)), np.sign(truth[i] - truth[j])
    return float(np.where(guess == 0, 0.5, guess == real).mean())


def _with_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean over seeds and its 95 % half-width (t)."""
    n = len(values)
    half = float(student.ppf(0.975, n - 1)) * stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return mean(values), half


def main() -> None:
    """Run every attack under every setting and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows: dict[str, dict[str, dict[str, object]]] = {}
    print("| policy | " + " | ".join(f"{t}: texts | {t}: error | {t}: pairs" for t in TASKS) + " |")
    print("|---|" + "---|" * (3 * len(TASKS)))
    for setting in SETTINGS:
        cells = []
        for task in TASKS:
            seeds = []
            for seed in range(arguments.seeds):
                data = generate("default", seed)
                chosen = generator(seed, "leak-questions").permutation(len(data.items))
                items = [data.items[int(i)] for i in chosen[: arguments.questions]]
                leaks = [attack(task, setting, items, g, seed) for g in data.groups]  # type: ignore[arg-type]
                seeds.append(leaks)
            texts = mean(x.texts for leaks in seeds for x in leaks)
            pairs = _with_interval([mean(x.pairs for x in leaks) for leaks in seeds])
            error = None
            if task != "order":
                error = _with_interval([mean(x.error or 0.0 for x in leaks) for leaks in seeds])
            rows.setdefault(setting, {})[task] = {"texts": texts, "error": error, "pairs": pairs}
            shown = "-" if error is None else f"{error[0]:.4f} ± {error[1]:.4f}"
            cells.append(f"{texts:.1f} | {shown} | {pairs[0]:.3f} ± {pairs[1]:.3f}")
        print(f"| {setting} | " + " | ".join(cells) + " |", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
