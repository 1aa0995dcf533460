"""How many tokens an on-policy batch puts through the policy: what arms of equal cost are cut by.

Counted is every position of a forward pass, prompts included and padding left out: the texts as
they are written, the two measuring passes (policy and base), and the updates.  A prompt that its
texts share counts once, as it is computed once.  Backward passes are not counted, and neither are
evaluations.
"""

from __future__ import annotations

import math

from fedalign.models.base import ResidentModel
from fedalign.training.batch import Prompt, row_tokens
from fedalign.training.encode import Ids
from fedalign.training.policy import Episodes
from fedalign.training.prefix import worth_sharing


def forward_tokens(
    resident: ResidentModel, episodes: Episodes, questions: int, updates: int
) -> int:
    """Return the tokens of one batch: written, measured and trained on.

    Args:
        resident: says whether prompts are shared (models that recompute activations do not).
        episodes: the batch.
        questions: prompts a minibatch.
        updates: optimiser steps taken; a whole pass over the batch takes one a minibatch.
    """
    texts: dict[Ids, list[Ids]] = {}
    for prompt, response in zip(episodes.prompts, episodes.responses, strict=True):
        texts.setdefault(prompt, []).append(response)
    prompts = [Prompt(p, tuple(r)) for p, r in texts.items()]
    if not resident.checkpointing and worth_sharing(prompts):
        scored = sum(len(p.tokens) + sum(map(len, p.completions)) for p in prompts)
    else:
        scored = row_tokens(prompts)
    generated = sum(map(len, texts)) + sum(len(r) - 1 for r in episodes.responses)
    minibatches = math.ceil(len(texts) / questions)
    return generated + 2 * scored + round(scored * updates / minibatches)
