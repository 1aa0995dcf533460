"""What the predictor knows of an option: hidden states of the frozen base.

GPO (arXiv 2310.11523) embeds "question + option" as the mean of the last hidden layer over all
tokens.  Here the text is the letter prompt, which lists all options, and the chosen answer ::

    Question: ...            |
    A. agree                 |  prompt
    B. disagree              |
    Answer:                  |
     B. disagree                answer

and the embedding is the mean over the prompt's tokens beside the mean over the answer's tokens
(ours): D is twice the width of the base.  One mean over everything says little of an option of few
tokens after a long question, and without the list "agree" of three options is the same text as
"agree" of five.  docs/predictor.md has the figures.

The adapter is off, so an embedding is the same on every site and in every round, and it holds
nothing about anybody's answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch

from fedalign.errors import DataError
from fedalign.models.base import ResidentModel
from fedalign.models.formats import letter_prompt, letters
from fedalign.models.layout import Array
from fedalign.training.batch import ROW_TOKENS, output_head
from fedalign.training.encode import Encoded, encode_text


def embedding_dim(resident: ResidentModel) -> int:
    """Return D, the length of an embedding: twice the width of the base's hidden states."""
    return 2 * int(output_head(resident.network).weight.shape[1])


class Embedder:
    """Embeds the options of questions; each distinct question once in the life of the object."""

    def __init__(self, resident: ResidentModel) -> None:
        self.resident = resident
        self.dim = embedding_dim(resident)
        self._known: dict[tuple[str, tuple[str, ...]], Array] = {}

    def embed(self, items: Sequence[tuple[str, Sequence[str]]]) -> list[Array]:
        """Return the embeddings (K, D) float32 of each (question, options), in order.

        A text longer than ``model.max-length`` loses the beginning of its prompt.  Raises
        ``DataError`` for a question with more than 26 options, for a prompt that is no token
        prefix, and for an embedding that is not finite.
        """
        keys = [(question, tuple(options)) for question, options in items]
        for key in dict.fromkeys(keys):
            if key not in self._known:
                # A question goes through the base alone: its embedding is then the same to the
                # last bit on every node, whatever else that node embeds.
                block = self._means(_rows(self.resident, *key))
                if not np.isfinite(block).all():
                    raise DataError(f"the base's embedding of '{key[0][:60]}' is not finite.")
                self._known[key] = block
        return [self._known[key] for key in keys]

    def _means(self, rows: Sequence[Encoded]) -> Array:
        """Return (N, D): mean hidden state of each row's prompt, then of its answer."""
        out = np.empty((len(rows), self.dim), dtype=np.float32)
        device = self.resident.device
        # The backbone below the output head: the last hidden state needs no logits.
        backbone = cast(Any, self.resident.network).base_model
        with self.resident.reference("base"):
            for part in _passes([row.length for row in rows]):
                width = max(rows[i].length for i in part)
                tokens = np.zeros((len(part), width), dtype=np.int64)
                shares = np.zeros((len(part), 2, width), dtype=np.float32)
                for place, i in enumerate(part):
                    row, cut = rows[i], len(rows[i].prompt)
                    tokens[place, : row.length] = row.prompt + row.completion
                    shares[place, 0, :cut] = 1.0 / cut
                    shares[place, 1, cut : row.length] = 1.0 / (row.length - cut)
                # Padded on the right without an attention mask: a token never sees what follows.
                hidden = backbone(
                    input_ids=torch.from_numpy(tokens).to(device), use_cache=False
                ).last_hidden_state.float()
                means = torch.from_numpy(shares).to(device) @ hidden  # (rows, 2, D / 2)
                out[part] = means.flatten(1).cpu().numpy()
        return out


def _rows(resident: ResidentModel, question: str, options: tuple[str, ...]) -> list[Encoded]:
    try:
        names = letters(len(options))
    except ValueError as error:
        raise DataError(f"'{question[:60]}': {error}") from None
    prompt = letter_prompt(question, options)
    rows = [
        encode_text(
            resident.tokenizer, prompt, f" {name}. {option}", eos=False, special_tokens=True
        )
        for name, option in zip(names, options, strict=True)
    ]
    return [_cut(row, resident.max_length) for row in rows]


def _cut(row: Encoded, most: int) -> Encoded:
    """Return the row with at most ``most`` tokens: the end of the prompt, the start of the answer.

    Both keep a token at least; ``most`` is 8 or more.
    """
    answer = row.completion[: most - 1]
    return Encoded(row.prompt[-(most - len(answer)) :], answer)


def _passes(lengths: Sequence[int]) -> list[list[int]]:
    """Cut rows, by length, into passes of at most ROW_TOKENS padded tokens."""
    passes: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if passes and (len(passes[-1]) + 1) * lengths[i] <= ROW_TOKENS:
            passes[-1].append(i)
        else:
            passes.append([i])
    return passes
