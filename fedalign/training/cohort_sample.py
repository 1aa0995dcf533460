"""Texts sampled from the adapters of a cohort, each client's own prompts under its own adapter.

Random numbers are those of ``generate.py``: they are keyed by a client's seed and a prompt's place,
so a text is what the client would sample alone, but for rounding of the logits (a draw that falls
on the border between two tokens may then take the other one).

Answers of one token, such as letters, take one forward pass over the prompts; longer ones are
written with a cache by the model's own layers, rows of equal number for every client.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedalign.models.base import ResidentModel
from fedalign.randomness import keyed_seed
from fedalign.training.batch import HEAD_VALUES, Prompt, output_head
from fedalign.training.cohort_batch import Question, collate
from fedalign.training.cohort_forward import CohortForward, StackedLayers, pass_tokens
from fedalign.training.cohort_texts import cut
from fedalign.training.encode import Ids
from fedalign.training.generate import (
    CACHE_TOKENS,
    Uniforms,
    check_request,
    draw,
    end_tokens,
    uniform_table,
    write,
)
from fedalign.training.rows import NO_PAIRS, lay_out

Text = tuple[Ids, bool]
"""Tokens, and whether the last one is an end token."""


@dataclass(frozen=True)
class Request:
    """What one client is asked."""

    prompts: Sequence[Ids]
    limits: Sequence[int]
    """New tokens of an answer, at most, for each prompt."""
    seed: int
    """Of the client's draws, as ``generate.generate`` takes it."""


def sample_each(
    resident: ResidentModel,
    forward: CohortForward,
    stacked: StackedLayers,
    requests: Sequence[Request],
    samples: int,
) -> list[list[Text] | None]:
    """Return ``samples`` texts for each prompt of each client, prompt by prompt.

    The k-th request goes to the k-th client of the stack that ``forward`` and ``stacked`` have
    begun.  None for a client whose logits were not finite.  Raises ``DataError`` as
    ``generate.generate`` does.
    """
    for r in requests:
        check_request(resident, r.prompts, samples, r.limits, [0] * len(r.prompts))
    ends = end_tokens(resident)
    ones = all(limit == 1 for r in requests for limit in r.limits)
    order = [_longest_first(r) for r in requests]
    vocabulary = output_head(resident.network).weight.shape[0]
    least = -(-CACHE_TOKENS * vocabulary // HEAD_VALUES)  # of a row, so that logits fit as well
    sizes = [
        [
            len(r.prompts[k]) if ones else samples * max(least, len(r.prompts[k]) + r.limits[k])
            for k in own
        ]
        for r, own in zip(requests, order, strict=True)
    ]
    found: list[dict[int, list[Text]]] = [{} for _ in requests]
    broken: set[int] = set()
    with torch.no_grad():
        most = pass_tokens(resident, 1 / min(map(min, sizes))) if ones else CACHE_TOKENS
        for part in cut(sizes, most):
            places = [own[part] for own in order]
            if ones:
                made, wrong = _first_tokens(resident, forward, requests, places, samples, ends)
            else:
                made, wrong = _written(resident, stacked, requests, places, samples, ends)
            broken |= wrong
            for own, texts in zip(found, made, strict=True):
                own |= texts
    return [
        None if c in broken else [text for k in range(len(r.prompts)) for text in found[c][k]]
        for c, r in enumerate(requests)
    ]


def _first_tokens(
    resident: ResidentModel,
    forward: CohortForward,
    requests: Sequence[Request],
    places: Sequence[Sequence[int]],
    samples: int,
    ends: frozenset[int],
) -> tuple[list[dict[int, list[Text]]], set[int]]:
    """Return texts of one token: by client, by place among its prompts; and broken clients."""
    part = [
        [
            Question(c, rows, NO_PAIRS, None)
            for rows in lay_out([Prompt(r.prompts[k], ((0,),)) for k in own])
        ]
        for c, (r, own) in enumerate(zip(requests, places, strict=True))
    ]
    batch = collate(part, resident.device)
    logits = forward.logits(batch).index_select(0, batch.slot)  # (prompts, vocabulary)
    asked = [(c, k) for c, own in enumerate(places) for k in own]
    finite = torch.isfinite(logits).all(dim=-1)
    logits = torch.where(finite.unsqueeze(1), logits, 0.0)
    uniforms = _uniforms([(requests[c], k) for c, k in asked], samples)
    draws = torch.from_numpy(uniforms[:, 0]).to(resident.device)
    tokens = draw(logits.repeat_interleave(samples, dim=0), draws).view(-1, samples).tolist()
    made: list[dict[int, list[Text]]] = [{} for _ in requests]
    for (c, k), row in zip(asked, tokens, strict=True):
        made[c][k] = [((t,), t in ends) for t in row]
    broken = {asked[n][0] for n in torch.nonzero(~finite).squeeze(1).tolist()}
    return made, broken


def _written(
    resident: ResidentModel,
    stacked: StackedLayers,
    requests: Sequence[Request],
    places: Sequence[Sequence[int]],
    samples: int,
    ends: frozenset[int],
) -> tuple[list[dict[int, list[Text]]], set[int]]:
    """Return texts of several tokens, as :func:`_first_tokens` does."""
    most = max(map(len, places))
    asked: list[tuple[int, int] | None] = []
    for c, own in enumerate(places):
        asked += [*((c, k) for k in own), *[None] * (most - len(own))]
    keys = [
        ((0,), 1)
        if place is None
        else (requests[place[0]].prompts[place[1]], _limit(requests, place))
        for place in asked
    ]
    longest = max(limit for _, limit in keys)
    uniforms = np.zeros((len(asked), samples, longest))
    real = [n for n, place in enumerate(asked) if place is not None]
    table = _uniforms([(requests[p[0]], p[1]) for p in asked if p is not None], samples)
    uniforms[real, :, : table.shape[1]] = table.reshape(len(real), samples, -1)
    with stacked.layers():
        texts, wrong = write(
            resident, keys, [samples] * len(keys), ends, uniforms.reshape(-1, longest)
        )
    made: list[dict[int, list[Text]]] = [{} for _ in requests]
    for n, place in enumerate(asked):
        if place is not None:
            made[place[0]][place[1]] = texts[n * samples : (n + 1) * samples]
    hit = [asked[n // samples] for n in wrong]
    return made, {place[0] for place in hit if place is not None}


def _longest_first(r: Request) -> list[int]:
    return sorted(range(len(r.prompts)), key=lambda k: -(len(r.prompts[k]) + r.limits[k]))


def _limit(requests: Sequence[Request], place: tuple[int, int]) -> int:
    return requests[place[0]].limits[place[1]]


def _uniforms(asked: Sequence[tuple[Request, int]], samples: int) -> Uniforms:
    """Return the numbers of each (request, place): (prompts * samples, tokens)."""
    return uniform_table(
        [(keyed_seed(r.seed, "prompt", k), r.limits[k]) for r, k in asked], samples
    )
