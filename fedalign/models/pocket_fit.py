"""Training the pocket: batches in which answers share their question, the loss, the loop.

AdamW with warm-up and a cosine to zero.  The loss is the mean cross-entropy (nats a token) of the
answer tokens and the end token, plus, in every ``text_every``-th step, ``text_weight`` times that
of the question's text.  Everything runs on one thread with deterministic algorithms.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from fedalign.errors import DataError
from fedalign.models.pocket_corpus import (
    FORMATS,
    PROMPTS,
    CorpusQuestion,
    PocketSettings,
    completion,
)
from fedalign.randomness import generator


@dataclass(frozen=True)
class Batch:
    """Rows of one question each: its text, then several answers to it that do not see each other.

    Sharing the text makes an answer cost a few tokens instead of a whole prompt.
    """

    tokens: torch.Tensor  # (B, T) int64, right-padded
    positions: torch.Tensor  # (B, T) int64; every answer starts where the text ends
    branch: torch.Tensor  # (B, T) int64; 0 text, 1.. answers, -1 padding
    answer: torch.Tensor  # (B, T) bool; tokens of a completion, the end token included

    def mask(self) -> torch.Tensor:
        """Who may look at whom: (B, 1, T, T) bool; causal, at the text and its own branch."""
        earlier = torch.ones(self.tokens.shape[1], self.tokens.shape[1], dtype=torch.bool).tril()
        looked_at, looking = self.branch[:, None, None, :], self.branch[:, None, :, None]
        return earlier & ((looked_at == 0) | (looked_at == looking))


def fit(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[CorpusQuestion],
    seed: int,
    settings: PocketSettings,
) -> float:
    """Train in place; return the mean answer loss (nats a token) of the last tenth of the steps."""
    rows = [text_and_cues(tokenizer, q) for q in questions]
    usable = [n for n, (text, _) in enumerate(rows) if len(text) <= settings.longest]
    if not usable:
        raise DataError(f"every question is longer than {settings.longest} tokens.")
    optimiser = torch.optim.AdamW(
        model.parameters(),
        lr=settings.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=settings.weight_decay,
        foreach=True,
    )
    model.train()
    losses: list[float] = []
    for step in range(settings.steps):
        rng = generator(seed, "pocket-batch", step)
        chosen = [int(n) for n in rng.choice(np.asarray(usable), size=settings.batch)]
        batch = draw_batch(
            tokenizer, [questions[n] for n in chosen], [rows[n] for n in chosen], rng, settings
        )
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * _schedule(step, settings)
        answer, text = _losses(model, batch, with_text=step % settings.text_every == 0)
        optimiser.zero_grad()
        (answer + settings.text_weight * text).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(float(answer.detach()))
    model.eval()
    last = losses[-max(1, settings.steps // 10) :]
    if not all(math.isfinite(x) for x in losses):
        raise DataError("training diverged (loss is not finite); lower the learning rate.")
    return sum(last) / len(last)


def text_and_cues(
    tokenizer: PreTrainedTokenizerFast, question: CorpusQuestion
) -> tuple[list[int], dict[str, list[int]]]:
    """Return the tokens that a question's prompts share, and what each format adds to them."""
    ids = {
        kind: tokenizer(PROMPTS[kind](question.question, question.options))["input_ids"]
        for kind in FORMATS
    }
    every = list(ids.values())
    same = [all(prompt[n] == every[0][n] for prompt in every) for n in range(min(map(len, every)))]
    shared = every[0][: same.index(False)]  # the cues differ
    return shared, {kind: prompt[len(shared) :] for kind, prompt in ids.items()}


def draw_batch(
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[CorpusQuestion],
    rows: Sequence[tuple[list[int], dict[str, list[int]]]],
    rng: np.random.Generator,
    settings: PocketSettings,
) -> Batch:
    """Draw ``settings.answers`` answers to each question; ``rows`` are their texts and cues."""
    columns: list[list[tuple[int, int, int, bool]]] = []  # token, position, branch, is answer
    for question, (text, cues) in zip(questions, rows, strict=True):
        row = [(token, place, 0, False) for place, token in enumerate(text)]
        for branch in range(1, settings.answers + 1):
            kind = FORMATS[int(rng.choice(len(FORMATS), p=settings.mix))]
            drawn = completion(kind, question.shares, settings.share_noise, rng)
            answer = [
                *tokenizer(drawn, add_special_tokens=False)["input_ids"],
                tokenizer.eos_token_id,
            ]
            row += [
                (token, len(text) + n, branch, n >= len(cues[kind]))
                for n, token in enumerate([*cues[kind], *answer])
            ]
        columns.append(row)
    width = max(len(row) for row in columns)
    padded = torch.tensor(
        [row + [(tokenizer.pad_token_id, 0, -1, False)] * (width - len(row)) for row in columns]
    )
    return Batch(padded[..., 0], padded[..., 1], padded[..., 2], padded[..., 3].bool())


def _losses(
    model: LlamaForCausalLM, batch: Batch, with_text: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean cross-entropy (nats a token) of answers and, if asked, of texts (else 0)."""
    hidden = model.model(
        input_ids=batch.tokens, position_ids=batch.positions, attention_mask=batch.mask()
    ).last_hidden_state[:, :-1]  # (B, T-1, H); place t predicts token t+1
    target = batch.tokens[:, 1:]
    # A completion follows its cue, so the token before an answer token is in the same branch.
    is_answer = batch.answer[:, 1:]
    answer = F.cross_entropy(model.lm_head(hidden[is_answer]), target[is_answer])
    if not with_text:
        return answer, torch.zeros(())
    is_text = batch.branch[:, 1:] == 0
    return answer, F.cross_entropy(model.lm_head(hidden[is_text]), target[is_text])


def _schedule(step: int, settings: PocketSettings) -> float:
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return 0.5 * (1 + math.cos(math.pi * done))


@contextmanager
def reproducible() -> Iterator[None]:
    """One thread and deterministic algorithms inside; the caller's settings afterwards."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    parallel = os.environ.get("TOKENIZERS_PARALLELISM")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        del os.environ["TOKENIZERS_PARALLELISM"]
        if parallel is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = parallel
