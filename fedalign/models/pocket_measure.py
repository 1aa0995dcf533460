"""What a trained pocket can do, in figures: formats followed, letter mass, fit, base scores.

All at temperature 1.  ``format_rate`` is the share of sampled completions that the strict parsers
of :mod:`fedalign.models.formats` accept, with the end token in its place.  ``letter_mass`` is the
mean probability of the K letters of a question together.  Scores are 1 - JSD (base 2) between the
letter distribution, renormalised over the K letters, and a group's shares, averaged over questions.
``fit_to_corpus`` is the same score against the corpus mixture; ``fit_of_shares`` is that of the
tenths.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedalign.data.records import SurveyItem
from fedalign.data.synthetic import CENTRES, corpus_shares, generate, in_corpus
from fedalign.models.formats import letters, parse_letter, parse_order, parse_shares
from fedalign.models.pocket_corpus import FORMATS, PROMPTS
from fedalign.models.pocket_fit import reproducible
from fedalign.randomness import keyed_seed

PARSERS = {"letter": parse_letter, "shares": parse_shares, "order": parse_order}


def measure_pocket(folder: Path, seeds: Sequence[int] = (0, 1, 2, 3, 4)) -> dict[str, Any]:
    """Measure a pocket on the synthetic world; return plain JSON types.

    Questions of the corpus and questions left out of it (``unseen``) are measured apart; base
    scores are over all questions, for each world, seed and group.
    """
    with reproducible():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
        items = [i for i in generate("default", 0).items if isinstance(i, SurveyItem)]
        known = [i for i in items if in_corpus(i.id)]
        unseen = [i for i in items if not in_corpus(i.id)]
        answers = {
            i.id: a for i, a in zip(items, letter_answers(model, tokenizer, items), strict=True)
        }
        parts = (("corpus", known, 1), ("unseen", unseen, 8))
        sampled = {
            name: {k: sample_answers(model, tokenizer, part, k, repeats) for k in FORMATS}
            for name, part, repeats in parts
        }
        figures: dict[str, Any] = {
            "format_rate": {
                name: {k: format_rate(values) for k, values in by_format.items()}
                for name, by_format in sampled.items()
            },
            "fit_of_shares": {
                name: fit_of_shares(sampled[name]["shares"], part, repeats)
                for name, part, repeats in parts
            },
            "letter_mass": {
                name: float(np.mean([answers[i.id][1] for i in part]))
                for name, part in (("corpus", known), ("unseen", unseen))
            },
            "lowest_letter_mass": min(mass for _, mass in answers.values()),
            "fit_to_corpus": {
                name: float(
                    np.mean([1 - jsd(answers[i.id][0], np.asarray(corpus_shares(i))) for i in part])
                )
                for name, part in (("corpus", known), ("unseen", unseen))
            },
            "base_score": {},
        }
    for world in ("default", "balanced"):
        for seed in seeds:
            dataset = generate(world, seed)
            figures["base_score"][f"{world}/{seed}"] = {
                group: float(
                    np.mean(
                        [
                            1 - jsd(answers[i.id][0], np.asarray(i.shares[group]))
                            for i in dataset.items
                            if isinstance(i, SurveyItem)
                        ]
                    )
                )
                for group in CENTRES[world]
            }
    return figures


def letter_answers(
    model: Any, tokenizer: Any, items: Sequence[SurveyItem]
) -> list[tuple[np.ndarray, float]]:
    """Return for each item the letter distribution (K,), renormalised, and its mass before that."""
    found: list[tuple[np.ndarray, float]] = []
    for start in range(0, len(items), 64):
        part = items[start : start + 64]
        batch = tokenizer(
            [PROMPTS["letter"](i.question, i.options) for i in part],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        with torch.no_grad():
            logits = model(**_inputs(batch)).logits[:, -1].double()
        probabilities = torch.softmax(logits, -1).numpy()
        for item, row in zip(part, probabilities, strict=True):
            tokens = [
                tokenizer(f" {c}", add_special_tokens=False)["input_ids"][0]
                for c in letters(len(item.options))
            ]
            mass = float(row[tokens].sum())
            found.append((row[tokens] / mass, mass))
    return found


def sample_answers(
    model: Any, tokenizer: Any, items: Sequence[SurveyItem], kind: str, repeats: int
) -> list[Any]:
    """Sample ``repeats`` completions an item at temperature 1; return parsed values, item by item.

    None stands for a completion that the strict parser refuses or that does not end in time.
    """
    values: list[Any] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_seed(0, "pocket-measure", kind))
        for start in range(0, len(items), 64):
            part = [i for i in items[start : start + 64] for _ in range(repeats)]
            batch = tokenizer(
                [PROMPTS[kind](i.question, i.options) for i in part],
                padding=True,
                padding_side="left",
                return_tensors="pt",
            )
            width = batch["input_ids"].shape[1]
            room = max(len(i.options) for i in part) + 1
            with torch.no_grad():
                out = model.generate(
                    **_inputs(batch), do_sample=True, top_k=0, top_p=1.0, max_new_tokens=room
                )
            for item, row in zip(part, out[:, width:].tolist(), strict=True):
                if tokenizer.eos_token_id not in row:
                    values.append(None)
                    continue
                text = tokenizer.decode(row[: row.index(tokenizer.eos_token_id)])
                values.append(PARSERS[kind](text, len(item.options)))
    return values


def format_rate(values: Sequence[Any]) -> float:
    """Return the share of sampled answers that are well formed."""
    return sum(v is not None for v in values) / len(values)


def fit_of_shares(values: Sequence[Any], items: Sequence[SurveyItem], repeats: int) -> float:
    """Return the mean 1 - JSD between each well-formed answer in tenths and the corpus shares."""
    asked = [i for i in items for _ in range(repeats)]
    return float(
        np.mean(
            [
                1 - jsd(np.asarray(tenths) / 10, np.asarray(corpus_shares(item)))
                for item, tenths in zip(asked, values, strict=True)
                if tenths is not None
            ]
        )
    )


def _inputs(batch: Any) -> dict[str, torch.Tensor]:
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def jsd(p: np.ndarray, q: np.ndarray) -> float:
    """Return the Jensen-Shannon divergence in bits, in [0, 1]; p and q are (K,) and sum to 1."""
    m = (p + q) / 2

    def kl(a: np.ndarray) -> float:
        held = a > 0
        return float(np.sum(a[held] * np.log2(a[held] / m[held])))

    return max(0.0, (kl(p) + kl(q)) / 2)
