"""The policy on a bandit whose optimum is known in closed form."""

from __future__ import annotations

import numpy as np
import torch

from fedalign.config import ModelConfig, PpoConfig
from fedalign.models.base import ResidentModel
from fedalign.randomness import keyed_seed
from fedalign.training.generate import generate
from fedalign.training.policy import Episodes, improve, measure, start


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """Jensen-Shannon divergence, base 2."""
    m = (p + q) / 2
    return float(0.5 * (p * np.log2(p / m)).sum() + 0.5 * (q * np.log2(q / m)).sum())


def test_on_a_bandit_of_pocket_questions_it_finds_the_optimum() -> None:
    """Fixed rewards of the letters: the optimum is the base times exp(reward / kl)."""
    from fedalign.aggregation.adapters import initial_adapter
    from fedalign.models.layout import pack
    from fedalign.training.examples import survey_prompt
    from fedalign.training.score import logps_of

    torch.set_num_threads(1)
    resident = ResidentModel(ModelConfig(device="cpu"))
    subjects = ("the bridge", "school hours", "the new tax", "the harbour", "bus lanes", "the park")
    options = ("strongly agree", "agree", "disagree", "strongly disagree")
    questions = [survey_prompt(resident, f"What about {s}?", options) for s in subjects]
    rewards = np.random.default_rng(0).random((6, 4))
    kl = 0.1

    def answers() -> list[np.ndarray]:
        """Return letters and the rest: (5,) for each question."""
        p = np.exp(logps_of(resident, questions).reshape(6, 4))
        return [np.append(row, 1.0 - row.sum()) for row in p]

    settings = PpoConfig(kl=kl, questions=6, samples=16, minibatches=1, learning_rate=0.006)
    first = pack(initial_adapter(dict(resident.layout), 0), resident.layout)
    state = start(resident, first, settings, kl)
    resident.load(first)
    base = answers()
    exchanges = 40
    prompts = tuple(q.tokens for q in questions for _ in range(16))
    for t in range(exchanges):
        resident.load(state.adapter)
        made = generate(resident, [q.tokens for q in questions], 16, 1, keyed_seed(0, "bandit", t))
        scores = []
        for k, (text, _) in enumerate(made):
            letters = [c[0] for c in questions[k // 16].completions]
            scores.append(rewards[k // 16][letters.index(text[0])] if text[0] in letters else 0.0)
        episodes = Episodes(prompts, tuple(t for t, _ in made))
        state, metrics = improve(
            resident,
            state,
            episodes,
            measure(resident, state, episodes),
            np.array(scores),
            settings,
            0,
            (t,),
            learning_rate=0.006 * (1 - t / exchanges),
        )
    resident.load(state.adapter)
    before, after = 0.0, 0.0
    for row, p, q in zip(rewards, base, answers(), strict=True):
        best = p * np.exp(np.append(row, 0.0) / kl)
        best /= best.sum()
        before += divergence(p, best)
        after += divergence(q, best)
    assert before / 6 > 0.2  # there is something to learn
    assert (before - after) / before >= 0.9
    assert metrics["explained-variance"] > 0.3
