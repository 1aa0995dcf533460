"""The predictor on the default synthetic world with the pocket's embeddings, as a run trains it."""

from __future__ import annotations

import numpy as np
import pytest

from fedalign.config import Config, from_flat

pytestmark = pytest.mark.slow

MARGIN = 0.16
"""Jensen-Shannon distance on held-out questions; a uniform answer has .30 to .36."""


def settings() -> Config:
    return from_flat(
        {
            "data.partition": "group",
            "predictor.rounds": 60,
            "predictor.steps": 8,
            "predictor.context": 60,
            "predictor.targets": 40,
            "predictor.learning-rate": 0.002,
        }
    )


def test_held_out_questions_are_predicted_better_than_by_baselines() -> None:
    from clients.predictor import PredictorSite
    from fedalign.data.load import load_dataset
    from fedalign.data.partition import build_clients
    from fedalign.models.base import ResidentModel
    from fedalign.rewards.predictor_parameters import initial_predictor
    from fedalign.training.predictor_fit import js_error

    config = settings()
    clients = {c.name: c for c in build_clients(load_dataset(config.data, config.run.seed), config)}
    site = PredictorSite(ResidentModel(config.model), clients, config)
    names = sorted(clients)
    flat = initial_predictor(config.predictor, site._embedder.dim, config.run.seed)
    for round_ in range(1, config.predictor.rounds + 1):
        replies, updates = site.train(names, flat, round_)
        flat = updates.mean(0)
    replies, _ = site.train(names, flat, config.predictor.rounds + 1)
    for reply in replies:
        client = clients[reply.client]
        truth = {g: [] for g in clients}
        for g, other in clients.items():
            by_key = {i.key: i.shares[g] for s in ("train", "validation") for i in other.split(s)}
            truth[g] = [np.asarray(by_key[i.key], np.float32) for i in client.validation]
        own = truth[client.group]
        uniform = js_error([np.full(len(t), 1 / len(t)) for t in own], own)
        others = [truth[g] for g in clients if g != client.group]
        mean = js_error([np.mean(each, axis=0) for each in zip(*others, strict=True)], own)
        copied = min(js_error([t.astype(float) for t in other], own) for other in others)
        assert reply.error < MARGIN
        # The mean and the copy are told other groups' answers to the very questions.
        assert reply.error < 0.6 * min(uniform, mean, copied)
