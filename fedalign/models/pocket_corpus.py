"""The text that the pocket model is trained on, made from survey questions and their shares.

Each question is asked in the three formats of :mod:`fedalign.models.formats`.  In *letter* a
respondent is drawn from the shares.  In *shares* the completion is the shares in tenths, after a
light noise (Dirichlet with mean shares and a fixed concentration).  In *order* the options are
drawn without replacement in proportion to their shares (Plackett-Luce).  So sampling the trained
model at temperature 1 gives the corpus's own spread in every format, not one fixed string.

No torch here: the settings below are read by code that must stay light.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from fedalign.models.formats import (
    ALPHABET,
    TENTHS,
    letter_completion,
    letter_prompt,
    order_completion,
    order_prompt,
    shares_completion,
    shares_prompt,
    to_tenths,
)

FORMATS = ("letter", "shares", "order")
PROMPTS = {"letter": letter_prompt, "shares": shares_prompt, "order": order_prompt}


@dataclass(frozen=True)
class PocketSettings:
    """Everything but the corpus and the seed that decides a pocket's weights."""

    hidden: int = 64
    layers: int = 2
    heads: int = 4
    mlp: int = 192
    vocabulary: int = 1024
    """At most this many tokens; 256 of them are bytes, 3 are special."""
    context: int = 1024
    """Longest sequence, in tokens, that the model is declared for."""
    longest: int = 192
    """Questions with more tokens than this are left out of training."""
    initializer_range: float = 0.1
    """Llama's default of 0.02 leaves a model this small at one constant answer."""
    steps: int = 800
    batch: int = 16
    """Questions a step."""
    answers: int = 14
    """Answers drawn to each question of a step."""
    warmup: int = 30
    learning_rate: float = 6e-3
    weight_decay: float = 0.01
    text_every: int = 4
    """Every this many steps the loss also covers the prompt, at weight ``text_weight``."""
    text_weight: float = 0.2
    share_noise: float = 200.0
    """Concentration of the Dirichlet noise on shares; larger is less noise."""
    mix: tuple[float, float, float] = (0.2, 0.55, 0.25)
    """Part of the answers in each of FORMATS."""

    def digest(self) -> str:
        """Return 12 hex digits that identify the settings."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


DEFAULT_SETTINGS = PocketSettings()
DEFAULT_SEED = 0


@dataclass(frozen=True)
class CorpusQuestion:
    """A question and the shares (K,) with which the corpus answers it."""

    question: str
    options: tuple[str, ...]
    shares: tuple[float, ...]


def completion(kind: str, shares: Sequence[float], noise: float, rng: np.random.Generator) -> str:
    """Draw the completion of one row; ``kind`` is one of FORMATS, ``shares`` (K,) sum to 1."""
    p = np.asarray(shares, dtype=np.float64)
    p = p / p.sum()
    if kind == "letter":
        return letter_completion(int(rng.choice(len(p), p=p)))
    # A share of zero has no place in a Dirichlet or a Plackett-Luce order: give it a thousandth.
    p = np.maximum(p, 1e-3)
    p = p / p.sum()
    if kind == "shares":
        noisy = rng.dirichlet(noise * p)
        return shares_completion(to_tenths([float(x) for x in noisy / noisy.sum()]))
    if kind == "order":
        # Adding Gumbel noise to log p and sorting is a Plackett-Luce draw.
        return order_completion(
            [int(i) for i in np.argsort(-(np.log(p) + rng.gumbel(size=len(p))))]
        )
    raise ValueError(f"unknown format '{kind}'; choose one of {', '.join(FORMATS)}")


def tokenizer_text(questions: Sequence[CorpusQuestion]) -> list[str]:
    """Return the text the tokenizer is trained on.

    Every letter and every number of tenths is repeated often enough, with its leading space, to be
    merged into one token whatever the questions are.
    """
    prompts = [PROMPTS[kind](q.question, q.options) for q in questions for kind in FORMATS]
    answers = "".join(f" {c}" for c in ALPHABET) + "".join(f" {n}" for n in range(TENTHS + 1))
    return prompts + [answers] * (10 + len(prompts))
