"""All questions at once, answered by one distribution each: scores, and the best for weights.

Shorter questions are padded with options that nobody chose.  How the best answer for weighted
groups is found, for each score, is in ``best_answer``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedalign.errors import DataError
from fedalign.metrics import alignment
from fedalign.metrics.best_answer import (
    cosine_answer,
    median_answer,
    minimise_distance,
    minimise_jsd,
    weighted_mean,
)
from fedalign.metrics.shared_answer import Array, Ordinals, SharedAnswer, Shares


class ShareProblem:
    """All questions on which the score is defined, padded to one number of options."""

    def __init__(self, metric: str, shares: Shares, ordinals: Ordinals | None) -> None:
        given = ordinals or {}
        self.metric = metric
        self.concave = not metric.startswith("js_distance")
        self.questions = [
            q for q in sorted(shares) if shares[q] and alignment.is_defined(metric, given.get(q))
        ]
        self.skipped = tuple(sorted(set(shares) - set(self.questions)))
        if not self.questions:
            raise DataError(
                f"no question has a score '{metric}' ({len(shares)} questions given); "
                "wasserstein needs ordinals that differ."
            )
        self.groups = sorted({g for q in self.questions for g in shares[q]})
        self.width = [len(next(iter(shares[q].values()))) for q in self.questions]
        size = (len(self.questions), len(self.groups), max(self.width))
        self.options = np.zeros((size[0], size[2]))
        """(questions, options), 1 where the option exists."""
        self.answered = np.zeros(size[:2])
        """(questions, groups), 1 where the group answered."""
        self.y = np.zeros(size)
        """(questions, groups, options); uniform where the group did not answer."""
        self.ordinals: Array | None = (
            np.zeros(self.options.shape) if metric == "wasserstein" else None
        )
        position = {g: j for j, g in enumerate(self.groups)}
        for i, (q, k) in enumerate(zip(self.questions, self.width, strict=True)):
            self.options[i, :k] = 1.0
            self.y[i, :, :k] = 1.0 / k
            for g, y in shares[q].items():
                j = position[g]
                if len(y) != k:
                    raise DataError(f"question '{q}': group '{g}' has {len(y)} shares, not {k}.")
                self.y[i, j, :k] = alignment.distribution(y, f"question '{q}': group '{g}'")
                self.answered[i, j] = 1.0
            o = given.get(q)
            if self.ordinals is not None and o is not None:
                self.ordinals[i] = alignment.pad_ordinals(o, k, size[2])
        self.per_group = self.answered / self.answered.sum(0)  # (questions, groups): 1 / n_g

    def scores(self, p: Array) -> Array:
        """Return (questions, groups) for answers p (questions, options)."""
        o = None if self.ordinals is None else self.ordinals[:, None, :]
        return alignment.kernel(self.metric, p[:, None, :], self.y, o)

    def served(self, p: Array) -> Array:
        """Return AS_g (groups,)."""
        return np.asarray((self.per_group * self.scores(p)).sum(0), dtype=np.float64)

    def best_response(self, weights: Array, thorough: bool) -> tuple[Array, float | None]:
        """Return the answers that maximise sum_g l_g AS_g, and a certified slack or None."""
        w = self.per_group * weights  # (questions, groups)
        idle = w.sum(1) <= 0  # no weight on any group that answered: any answer will do
        w = np.where(idle[:, None], self.answered, w)
        scale = w.sum(1)
        w = w / scale[:, None]
        if self.metric == "cosine":
            return cosine_answer(self.y, w), 0.0
        if self.ordinals is not None:
            return median_answer(self.y, w, self.ordinals), 0.0
        p, gap = minimise_jsd(self.y, w)
        if self.metric == "js_divergence":
            return p, float(np.where(idle, 0.0, scale * gap).sum())
        return minimise_distance(self.y, w, p, thorough), None

    def mix(self, policies: Sequence[Array], mixture: Array) -> Array:
        """Return the mixture of answers; for ``cosine`` of their unit vectors."""
        total = np.zeros_like(self.options)
        for share, p in zip(mixture, policies, strict=True):
            if share > 0:
                unit = np.linalg.norm(p, axis=1, keepdims=True) if self.metric == "cosine" else 1.0
                total += share * p / unit
        return total / total.sum(1, keepdims=True)

    def uniform_answer(self) -> SharedAnswer:
        """Return the answerer that gives every option the same share."""
        p = self.options / self.options.sum(1, keepdims=True)
        return self.answer(p, is_bound=False, gap=None)

    def mean_answer(self) -> SharedAnswer:
        """Return the answerer that gives the mean of the shares of the groups."""
        return self.answer(weighted_mean(self.y, self.answered), is_bound=False, gap=None)

    def answer(self, p: Array, *, is_bound: bool, gap: float | None) -> SharedAnswer:
        """Return answers with what each group makes of them."""
        scores = self.scores(p)
        return SharedAnswer(
            scores={
                q: {
                    g: float(scores[i, j]) for j, g in enumerate(self.groups) if self.answered[i, j]
                }
                for i, q in enumerate(self.questions)
            },
            answers={
                q: tuple(p[i, :k].tolist())
                for i, (q, k) in enumerate(zip(self.questions, self.width, strict=True))
            },
            is_bound=is_bound,
            gap=gap,
            skipped=self.skipped,
        )
