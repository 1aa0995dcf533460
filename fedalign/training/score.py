"""Scores of the adapter that is loaded: answer distributions, and preference margins.

Survey: the model's answer distribution is the softmax over the summed log-probabilities of the
options' letters; *option mass* is the sum of their probabilities, which shows when probability has
left the answers altogether (a renormalised distribution hides that).

Pairs: the margin of a pair is beta times the same difference the training loss is made of.  With a
reference that is DPO's implicit reward, beta ((lp_c - ref_c) - (lp_r - ref_r)); without one it is
the plain difference of summed log-probabilities, which favours short completions, as training
without a reference does.  Only ``ipo`` with ``length-normalised`` divides by completion length.
``pair_accuracy`` is the share of pairs with a positive margin.

Each prompt goes through the model once, in passes of prompts of similar length.  To score the base
or a named adapter, call within ``resident.reference(...)``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedalign.config import LocalConfig
from fedalign.data.records import Pair
from fedalign.errors import WireError
from fedalign.models.base import ResidentModel
from fedalign.training.batch import Prompt, collate, completion_logps, in_passes, output_head
from fedalign.training.dpo import differences
from fedalign.training.examples import pair_prompt, survey_prompt

Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class SurveyAnswer:
    """How the model answers one question."""

    probabilities: Floats
    """(K,) over the options, summing to 1."""
    option_mass: float
    """Probability on the options' letters together, in [0, 1]."""


def score_survey(
    resident: ResidentModel, items: Sequence[tuple[str, Sequence[str]]]
) -> list[SurveyAnswer]:
    """Return the answer to each (question, options), in order.

    Raises ``WireError`` (reason ``score_not_finite``) when a log-probability is NaN or infinite,
    and ``DataError`` for a question the model cannot take.
    """
    prompts = [survey_prompt(resident, question, options) for question, options in items]
    distinct = {p: k for k, p in enumerate(dict.fromkeys(prompts))}
    logps = logps_of(resident, tuple(distinct))
    starts = np.cumsum([0, *(len(p.completions) for p in distinct)])
    answers = [_answer(logps[start:stop]) for start, stop in itertools.pairwise(starts)]
    return [answers[distinct[p]] for p in prompts]


def score_pairs(
    resident: ResidentModel,
    pairs: Sequence[Pair],
    settings: LocalConfig,
    reference: np.ndarray[Any, Any] | None,
) -> Floats:
    """Return the margin of each pair: (n,), nats, positive when ``chosen`` is preferred.

    ``reference`` (2n,) holds the reference's log-probabilities of chosen and rejected, pair after
    pair, as ``reference_logps(resident, pair_prompts(...), kind)`` gives them; None without one.
    """
    prompts = pair_prompts(resident, pairs)
    logps = torch.from_numpy(logps_of(resident, prompts))
    lengths = torch.tensor([len(c) for p in prompts for c in p.completions])
    chosen = torch.arange(0, 2 * len(prompts), 2)
    given = None if reference is None else torch.from_numpy(reference.astype(np.float64))
    delta = differences(logps, given, lengths, chosen, chosen + 1, settings)
    return settings.beta * delta.numpy()


def pair_prompts(resident: ResidentModel, pairs: Sequence[Pair]) -> list[Prompt]:
    """Return each pair as a prompt with two completions: chosen, rejected."""
    return [pair_prompt(resident, pair) for pair in pairs]


def logps_of(resident: ResidentModel, prompts: Sequence[Prompt]) -> Floats:
    """Return the log-probability of every completion of every prompt, in order: (C,) float64.

    Raises ``WireError`` when one is not finite.
    """
    starts = np.cumsum([0, *(len(p.completions) for p in prompts)])
    out = np.empty(starts[-1], dtype=np.float64)
    vocabulary = output_head(resident.network).weight.shape[0]
    order = sorted(range(len(prompts)), key=lambda k: len(prompts[k].tokens))
    with torch.inference_mode():
        for indices in in_passes(prompts, vocabulary, order):
            batch = collate([prompts[k] for k in indices], resident.device)
            values = completion_logps(resident.network, batch).double().cpu().numpy()
            at = 0
            for k in indices:
                count = len(prompts[k].completions)
                out[starts[k] : starts[k + 1]] = values[at : at + count]
                at += count
    if not np.isfinite(out).all():
        raise WireError(
            "score_not_finite",
            f"{int((~np.isfinite(out)).sum())} of {len(out)} log-probabilities are not finite",
        )
    return out


def _answer(logps: Floats) -> SurveyAnswer:
    mass = float(np.exp(logps).sum())
    shifted = np.exp(logps - logps.max())
    return SurveyAnswer(shifted / shifted.sum(), min(mass, 1.0))
