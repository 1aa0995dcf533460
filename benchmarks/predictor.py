"""The preference predictor on the default synthetic world: variants, and baselines.

    python benchmarks/predictor.py [--seeds 3] [--part variants,groups] [--out predictor.json]

Every number is the mean Jensen-Shannon distance (natural logarithm, lower is better) between
predicted and true shares on a client's *validation* questions, one client a group, the pocket as
base.  Test questions are not read.

``variants``: federated training with one thing changed at a time.

``groups``: groups that took part, and each group left out of training in turn ("unseen").  Beside
the predictor:

=================  ============================================================================
uniform            every option alike
own nearest        the group's own answer to the training question whose embedding is nearest,
                   with as many options; among all its training questions, or the context alone
mean of others     the mean of the other groups' true answers to the very question asked
nearest group      the true answers of the group that is nearest on the context's questions
=================  ============================================================================

The last two are told other groups' answers to the held-out question, which nobody in a federation
has: they bound what copying could do.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from fedalign.compat import become_flower_process
from fedalign.config import Config, PredictorConfig, from_flat
from fedalign.data.load import load_dataset
from fedalign.data.partition import build_clients
from fedalign.data.records import SurveyItem
from fedalign.metrics.alignment import jsd
from fedalign.models.base import ResidentModel
from fedalign.models.layout import Array, pack, unpack
from fedalign.rewards.embedding import Embedder
from fedalign.rewards.predictor_parameters import MATCH, initial_predictor, layout
from fedalign.training.predictor_fit import (
    Answered,
    fit,
    fixed_context,
    js_error,
    predicted_shares,
)

Groups = Mapping[str, Mapping[str, Sequence[Answered]]]
"""Group to split to answered questions."""
Embed = Callable[[str, tuple[str, ...]], Array]


@cache
def resident() -> ResidentModel:
    """Return the pocket."""
    return ResidentModel(Config().model)


@cache
def embedder() -> Embedder:
    """Return its embeddings."""
    return Embedder(resident())


def usual(question: str, options: tuple[str, ...]) -> Array:
    """The embedding that the predictor uses."""
    return embedder().embed([(question, options)])[0]


@cache
def published(question: str, options: tuple[str, ...]) -> Array:
    """One mean over "question option" (arXiv 2310.11523)."""
    return np.stack([_mean(f"{question} {option}") for option in options])


@cache
def one_mean(question: str, options: tuple[str, ...]) -> Array:
    """One mean over the prompt with all options, and the answer."""
    from fedalign.models.formats import letter_prompt, letters

    prompt = letter_prompt(question, options)
    names = letters(len(options))
    return np.stack([_mean(f"{prompt} {n}. {o}") for n, o in zip(names, options, strict=True)])


def _mean(text: str) -> Array:
    ids = resident().tokenizer(text)["input_ids"]
    with resident().reference("base"):
        states = resident().network.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    found: Array = states.mean(0).float().numpy()
    return found


def world(seed: int, embed: Embed = usual) -> Groups:
    """Return the train and validation questions of every group, embedded."""
    config = from_flat({"run.seed": seed, "data.partition": "group"})
    found = {}
    for client in build_clients(load_dataset(config.data, seed), config):
        found[client.group] = {
            split: [
                Answered(
                    i.key,
                    embed(i.question, i.options),
                    np.asarray(i.shares[client.group], dtype=np.float32),
                )
                for i in client.split(split)
                if isinstance(i, SurveyItem)
            ]
            for split in ("train", "validation")
        }
    return found


def plain_start(settings: PredictorConfig, dim: int, seed: int) -> Array:
    """Start with keys drawn on their own and no factor on queries and keys."""
    shapes = layout(settings, dim)
    tensors, others = (unpack(initial_predictor(settings, dim, s), shapes) for s in (seed, 10**6))
    for name in tensors:
        if ".key." in name:
            tensors[name] = others[name]
        if name.endswith(("key.weight", "query.weight")):
            tensors[name] = tensors[name] / np.float32(MATCH)
    return pack(tensors, shapes)


def federated(
    groups: Groups,
    members: Sequence[str],
    settings: PredictorConfig,
    seed: int,
    start: Callable[[PredictorConfig, int, int], Array] = initial_predictor,
) -> Array:
    """Return the parameters after all rounds over the groups named."""
    dim = groups[members[0]]["train"][0].options.shape[1]
    shapes, flat = layout(settings, dim), start(settings, dim, seed)
    for round_ in range(1, settings.rounds + 1):
        found = [
            fit(flat, shapes, groups[g]["train"], settings, seed, g, round_).flat for g in members
        ]
        if any(f is None for f in found):
            raise RuntimeError(f"round {round_}: a group's training was not finite")
        flat = np.mean(found, axis=0, dtype=np.float64).astype(np.float32)
    return flat


def error(flat: Array, groups: Groups, group: str, settings: PredictorConfig, seed: int) -> float:
    """Return the error on a group's validation questions, from its own context."""
    own, asked = groups[group]["train"], groups[group]["validation"]
    shapes = layout(settings, own[0].options.shape[1])
    context = fixed_context(own, settings, seed, group)
    found = predicted_shares(flat, shapes, settings, context, [q.options for q in asked])
    return js_error(found, [q.shares for q in asked])


def baselines(groups: Groups, group: str, settings: PredictorConfig, seed: int) -> dict[str, float]:
    """Return the error of each baseline on a group's validation questions."""
    own, asked = groups[group]["train"], groups[group]["validation"]
    truth = [q.shares for q in asked]
    others = [g for g in sorted(groups) if g != group]
    answers = {
        g: {q.key: q.shares.astype(np.float64) for s in groups[g].values() for q in s}
        for g in groups
    }
    context = fixed_context(own, settings, seed, group)

    def apart(other: str) -> float:
        return float(
            np.mean([np.sqrt(jsd(answers[group][q.key], answers[other][q.key])) for q in context])
        )

    nearest = min(others, key=apart)

    def alike(q: Answered, known: Sequence[Answered]) -> np.ndarray:
        same = [k for k in known if len(k.shares) == len(q.shares)]
        nearest = min(same, key=lambda k: float(np.linalg.norm(k.options - q.options)))
        return nearest.shares.astype(np.float64)

    return {
        "uniform": js_error([np.full(len(t), 1 / len(t)) for t in truth], truth),
        "own nearest": js_error([alike(q, own) for q in asked], truth),
        "own nearest in context": js_error([alike(q, context) for q in asked], truth),
        "mean of others": js_error(
            [np.mean([answers[g][q.key] for g in others], axis=0) for q in asked], truth
        ),
        "nearest group": js_error([answers[nearest][q.key] for q in asked], truth),
    }


def variants(seeds: int, settings: PredictorConfig) -> dict[str, dict[str, list[float]]]:
    """Return, for each variant, the errors of each group over seeds."""
    ours = replace(settings, loss="cross-entropy")
    settings = replace(settings, loss="gaussian")
    one_step = replace(settings, rounds=settings.rounds * settings.steps, steps=1)
    arms: dict[str, tuple[Embed, PredictorConfig, Callable[..., Array]]] = {
        "Gaussian loss (published)": (usual, settings, initial_predictor),
        "cross-entropy loss (ours)": (usual, ours, initial_predictor),
        "keys start on their own": (usual, settings, plain_start),
        "one mean, options not listed (published)": (published, settings, initial_predictor),
        "one mean, options listed": (one_mean, settings, initial_predictor),
        "averaged after every step": (usual, one_step, initial_predictor),
    }
    found: dict[str, dict[str, list[float]]] = {}
    for name, (embed, arm, start) in arms.items():
        began = time.process_time()
        for seed in range(seeds):
            groups = world(seed, embed)
            flat = federated(groups, sorted(groups), arm, seed, start)
            for g in sorted(groups):
                value = error(flat, groups, g, arm, seed)
                found.setdefault(name, {}).setdefault(g, []).append(value)
        show(name, found[name], (time.process_time() - began) / seeds)
    return found


def unseen(seeds: int, settings: PredictorConfig) -> dict[str, dict[str, list[float]]]:
    """Return predictor and baselines for groups that took part, and for each left out."""
    found: dict[str, dict[str, list[float]]] = {}

    def note(name: str, group: str, value: float) -> None:
        found.setdefault(name, {}).setdefault(group, []).append(value)

    for seed in range(seeds):
        groups = world(seed)
        names = sorted(groups)
        everyone = federated(groups, names, settings, seed)
        for g in names:
            note("predictor", g, error(everyone, groups, g, settings, seed))
            rest = federated(groups, [n for n in names if n != g], settings, seed)
            note("predictor, group unseen", g, error(rest, groups, g, settings, seed))
            for name, value in baselines(groups, g, settings, seed).items():
                note(name, g, value)
    for name, row in found.items():
        show(name, row)
    return found


def show(name: str, row: Mapping[str, Sequence[float]], seconds: float | None = None) -> None:
    """Print one line: mean over seeds for each group, and the range of the mean over groups."""
    cells = "  ".join(f"{g} {np.mean(v):.3f}" for g, v in row.items())
    means = np.mean([list(v) for v in row.values()], axis=0)
    took = "" if seconds is None else f"  {seconds:.0f} s"
    print(
        f"{name:42s} {cells}  mean {means.mean():.3f} "
        f"({means.min():.3f} to {means.max():.3f}){took}",
        flush=True,
    )


def main() -> None:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--part", default="variants,groups")
    parser.add_argument("--set", action="append", default=[], help="predictor.key=value")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    become_flower_process()
    torch.set_num_threads(1)
    changes = dict(text.split("=") for text in given.set)
    settings = from_flat(
        {k: float(v) if "." in v else int(v) for k, v in changes.items()}
    ).predictor
    parts = {"variants": variants, "groups": unseen}
    found = {name: parts[name](given.seeds, settings) for name in given.part.split(",")}
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
