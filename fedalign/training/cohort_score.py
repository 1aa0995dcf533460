"""Log-probabilities of many adapters, each on its own prompts, as one batch.

In the personal phase every client's own adapters are scored on its own test questions.  As in
training (``cohort.py``), rows of all clients go through the frozen base together and each adapter
acts on its own rows (``cohort_forward.py``); here without gradients.  Passes hold prompts of
similar length (``cohort_batch.py``).

*Equal to one after another* (``score.py``) up to rounding: log-probabilities agree to 1e-5 nats in
float32, and long texts to a part in a million (tests/unit/training/test_cohort_score.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch

from fedalign.config import LocalConfig
from fedalign.data.records import Pair
from fedalign.errors import WireError
from fedalign.models.base import ResidentModel
from fedalign.models.layout import Array
from fedalign.training import cohort_llama
from fedalign.training.batch import Prompt
from fedalign.training.cohort_batch import Question, collate, in_passes
from fedalign.training.cohort_forward import CohortForward, pass_tokens, token_logps
from fedalign.training.cohort_plan import forward_of, in_cohorts
from fedalign.training.dpo import differences
from fedalign.training.examples import survey_prompt
from fedalign.training.rows import NO_PAIRS, lay_out
from fedalign.training.score import Floats, SurveyAnswer, pair_prompts, score_survey
from fedalign.training.stack import AdapterStack


def logps_of_each(
    resident: ResidentModel,
    adapters: Sequence[Array],
    prompts: Sequence[Sequence[Prompt]],
    settings: LocalConfig,
) -> list[Floats]:
    """Return for each adapter (P,) the log-probability of every completion of its own prompts.

    The k-th result is (completions of ``prompts[k]``,) float64, nats, in order, as
    ``score.logps_of`` gives it with the k-th adapter loaded.  The adapter that is loaded does not
    change and plays no part.  Cohorts: ``cohort_plan.py``.

    Raises ``WireError`` (reason ``score_not_finite``) when a log-probability is NaN or infinite,
    and ``ConfigError`` for an architecture that cannot be cut by client.
    """
    if len(adapters) != len(prompts):
        raise ValueError(f"{len(adapters)} adapters for {len(prompts)} lists of prompts.")
    # Lists of similar length together: a cohort computes as many rows for each.
    order = sorted(range(len(adapters)), key=lambda k: -len(prompts[k]))
    found: dict[int, Floats] = {k: np.empty(0) for k in order if not prompts[k]}
    order = [k for k in order if prompts[k]]

    def work(chosen: list[int]) -> list[Floats]:
        stack = AdapterStack(
            [adapters[k] for k in chosen],
            [0.0] * len(chosen),
            resident.layout,
            resident.device,
            resident.frozen_a,
        )
        return _cohort(resident, forward_of(resident), stack, [prompts[k] for k in chosen])

    found |= in_cohorts(resident, settings, order, work)
    return [found[k] for k in range(len(adapters))]


def score_survey_each(
    resident: ResidentModel,
    adapters: Sequence[Array],
    items: Sequence[Sequence[tuple[str, Sequence[str]]]],
    settings: LocalConfig,
) -> list[list[SurveyAnswer]]:
    """Return each adapter's answers to its own (question, options), as ``score.score_survey`` does.

    Raises as :func:`logps_of_each` does, and ``DataError`` for a question the model cannot take.
    """
    prompts = [[survey_prompt(resident, *item) for item in own] for own in items]
    distinct = [list(dict.fromkeys(own)) for own in prompts]
    answers: list[list[SurveyAnswer]] = []
    for own, known, logps in zip(
        prompts, distinct, logps_of_each(resident, adapters, distinct, settings), strict=True
    ):
        cuts = np.cumsum([len(p.completions) for p in known])[:-1]
        found = dict(zip(known, map(_answer, np.split(logps, cuts)), strict=True)) if known else {}
        answers.append([found[p] for p in own])
    return answers


def score_survey_loaded(
    resident: ResidentModel, items: Sequence[tuple[str, Sequence[str]]], settings: LocalConfig
) -> list[SurveyAnswer]:
    """Return the answers of the adapter that is loaded, as ``score.score_survey`` does.

    Where the model has merged weights (``cohort_llama.py``), through them: less than half the time,
    and equal up to rounding.  Margins of pairs are not computed so: their *sign* counts, and those
    of the base against itself must be exactly 0.
    """
    if not cohort_llama.supported(resident):
        return score_survey(resident, items)
    (answers,) = score_survey_each(resident, [resident.read()], [items], settings)
    return answers


def score_pairs_each(
    resident: ResidentModel,
    adapters: Sequence[Array],
    pairs: Sequence[Sequence[Pair]],
    settings: LocalConfig,
    references: Sequence[Array | None],
) -> list[Floats]:
    """Return each adapter's margins on its own pairs, as ``score.score_pairs`` does.

    ``references`` holds each list's (2n,) log-probabilities of chosen and rejected, or None.
    Raises as :func:`logps_of_each` does.
    """
    prompts = [pair_prompts(resident, own) for own in pairs]
    margins: list[Floats] = []
    for own, reference, found in zip(
        prompts, references, logps_of_each(resident, adapters, prompts, settings), strict=True
    ):
        lengths = torch.tensor([len(c) for p in own for c in p.completions], dtype=torch.int64)
        chosen = torch.arange(0, 2 * len(own), 2)
        given = None if reference is None else torch.from_numpy(reference.astype(np.float64))
        logps = torch.from_numpy(found)
        delta = differences(logps, given, lengths, chosen, chosen + 1, settings)
        margins.append(settings.beta * delta.numpy())
    return margins


def _answer(logps: Floats) -> SurveyAnswer:
    mass = float(np.exp(logps).sum())
    shifted = np.exp(logps - logps.max())
    return SurveyAnswer(shifted / shifted.sum(), min(mass, 1.0))


def _cohort(
    resident: ResidentModel,
    forward: CohortForward,
    stack: AdapterStack,
    prompts: Sequence[Sequence[Prompt]],
) -> list[Floats]:
    asked: list[list[Question]] = []
    places: list[list[slice]] = []  # of the questions as asked: where their results stand
    out: list[Floats] = []
    for owner, own in enumerate(prompts):
        rows = lay_out(own)
        starts = np.cumsum([0, *(len(r.lengths) for r in rows)]).tolist()
        spans = [slice(*ends) for ends in itertools.pairwise(starts)]
        # As ``in_passes`` orders them: a pass then holds the next few of every list.
        order = sorted(range(len(own)), key=lambda k: -rows[k].longest)
        asked.append([Question(owner, rows[k], NO_PAIRS, None) for k in order])
        places.append([spans[k] for k in order])
        out.append(np.empty(starts[-1]))
    dense = max(len(x.rows.row) / x.rows.tokens for own in asked for x in own)
    with torch.no_grad():
        forward.begin(stack)
        done = [0] * len(asked)
        for part in in_passes(asked, pass_tokens(resident, dense)):
            batch = collate(part, resident.device)
            logps = token_logps(forward.logits(batch), batch.slot, batch.token)
            if not batch.single:
                logps = torch.segment_reduce(logps, "sum", lengths=batch.lengths)
            values, at = logps.double().cpu().numpy(), 0
            for owner, questions in enumerate(part):
                for x in questions:
                    count = len(x.rows.lengths)
                    out[owner][places[owner][done[owner]]] = values[at : at + count]
                    at += count
                    done[owner] += 1
    wrong = sum(int((~np.isfinite(own)).sum()) for own in out)
    if wrong:
        raise WireError(
            "score_not_finite",
            f"{wrong} of {sum(map(len, out))} log-probabilities are not finite",
        )
    return out
