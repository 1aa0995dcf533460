"""What the predictor knows of an option: the frozen base's hidden states for "question + option".

As in GPO (arXiv 2310.11523): the mean over all tokens of the text of the last hidden layer (after
the final normalisation).  The adapter is off, so an embedding is the same on every site and in
every round, and it holds nothing about anybody's answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch

from fedalign.errors import DataError
from fedalign.models.base import ResidentModel
from fedalign.models.layout import Array
from fedalign.training.batch import ROW_TOKENS, output_head


def embedding_dim(resident: ResidentModel) -> int:
    """Return D, the width of the base's last hidden layer."""
    return int(output_head(resident.network).weight.shape[1])


def option_text(question: str, option: str) -> str:
    """Return the text that is embedded."""
    return f"Question: {question}\nAnswer: {option}"


class Embedder:
    """Embeds options with a resident base; each distinct text once in the life of the object."""

    def __init__(self, resident: ResidentModel) -> None:
        self.resident = resident
        self.dim = embedding_dim(resident)
        self._known: dict[str, Array] = {}

    def options(self, question: str, options: Sequence[str]) -> Array:
        """Return the embeddings (K, D) float32 of a question's options."""
        return self.questions([(question, options)])[0]

    def questions(self, items: Sequence[tuple[str, Sequence[str]]]) -> list[Array]:
        """Return (K, D) float32 for each (question, options), in order.

        Raises ``DataError`` for a text longer than ``model.max-length``, or whose embedding is not
        finite.
        """
        wanted = [[option_text(q, o) for o in options] for q, options in items]
        new = list(dict.fromkeys(t for texts in wanted for t in texts if t not in self._known))
        self._known.update(zip(new, self._embed(new), strict=True))
        return [np.stack([self._known[t] for t in texts]) for texts in wanted]

    def _embed(self, texts: Sequence[str]) -> list[Array]:
        ids = [list(self.resident.tokenizer(t)["input_ids"]) for t in texts]
        for text, row in zip(texts, ids, strict=True):
            if not 0 < len(row) <= self.resident.max_length:
                raise DataError(
                    f"'{text[:60]}' has {len(row)} tokens; the predictor takes 1 to "
                    f"{self.resident.max_length} (model.max-length)."
                )
        found: dict[int, Array] = {}
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        # The backbone below the output head: its last hidden state needs no logits.
        backbone = cast(Any, self.resident.network).base_model
        with self.resident.reference("base"):
            for rows in _passes(order, [len(row) for row in ids]):
                width = max(len(ids[i]) for i in rows)
                table = np.zeros((len(rows), width), dtype=np.int64)
                real = np.zeros((len(rows), width), dtype=np.float32)
                for place, i in enumerate(rows):
                    table[place, : len(ids[i])] = ids[i]
                    real[place, : len(ids[i])] = 1.0
                tokens = torch.from_numpy(table).to(self.resident.device)
                mask = torch.from_numpy(real).to(self.resident.device).unsqueeze(-1)
                # Padded on the right without an attention mask: a token never sees what follows.
                hidden = backbone(input_ids=tokens, use_cache=False).last_hidden_state.float()
                means = ((hidden * mask).sum(1) / mask.sum(1)).cpu().numpy()
                found.update(zip(rows, means, strict=True))
        out = [found[i] for i in range(len(texts))]
        for text, vector in zip(texts, out, strict=True):
            if not np.isfinite(vector).all():
                raise DataError(f"the base's embedding of '{text[:60]}' is not finite.")
        return out


def _passes(order: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Cut texts, sorted by length, into passes of at most ROW_TOKENS padded tokens."""
    passes: list[list[int]] = []
    for i in order:
        if passes and (len(passes[-1]) + 1) * lengths[i] <= ROW_TOKENS:
            passes[-1].append(i)
        else:
            passes.append([i])
    return passes
