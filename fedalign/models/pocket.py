"""The pocket model: a very small causal language model, trained here from scratch.

A Llama of about 0.2 million parameters with its own byte-level BPE tokenizer.  It reads a survey
question and answers in three formats (a letter, shares in tenths, an ordering); it knows nothing
else.  It stands in for a pretrained model where nothing can be downloaded, and it is a toy.

What it learns is the *corpus mixture* of each question: the answers of the groups that wrote the
corpus, in fixed proportion.  As with web text, the questions are known to the model, while a group
that did not write is unknown to it.  A run splits questions by its own seed, so the questions of
the corpus cannot be disjoint from the test questions of every run; but one wording in nine of each
statement is left out of the corpus (``synthetic.in_corpus``), to measure the formats on wordings
that the model has not seen.

Reproducible: one thread, deterministic algorithms, every draw keyed by the seed, so that the same
script, seed, library versions and processor give the same bytes.

    python -m fedalign.models.pocket --out DIR                       # the pocket that is shipped
    python -m fedalign.models.pocket --out DIR --data FILE --source goqa --split train
    python -m fedalign.models.pocket --measure DIR
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedalign.data.records import SurveyItem
from fedalign.data.synthetic import corpus_shares, generate, in_corpus
from fedalign.errors import DataError
from fedalign.models.formats import ALPHABET, TENTHS
from fedalign.models.pocket_corpus import (
    DEFAULT_SEED,
    DEFAULT_SETTINGS,
    CorpusQuestion,
    PocketSettings,
    tokenizer_text,
)
from fedalign.models.pocket_fit import fit, reproducible
from fedalign.randomness import keyed_seed

PAD, BOS, EOS = "<pad>", "<s>", "</s>"


def train_pocket(
    items: Sequence[SurveyItem],
    shares_of: Callable[[SurveyItem], Sequence[float]],
    seed: int,
    out: Path,
    settings: PocketSettings = DEFAULT_SETTINGS,
    note: str = "",
) -> Path:
    """Train a pocket on survey items and write a Hugging Face model folder; return ``out``.

    ``shares_of(item)`` gives the shares (K,) with which the corpus answers the item.  ``note`` says
    where the items come from and is kept in ``training.json``.  Items with more than 26 options are
    a ``DataError``, as is an empty list.
    """
    questions = [
        CorpusQuestion(i.question, i.options, tuple(shares_of(i)))
        for i in sorted(items, key=lambda i: i.id)
    ]
    if not questions:
        raise DataError("no questions to train a pocket on; give at least one survey item.")
    for q in questions:
        if len(q.options) > len(ALPHABET):
            raise DataError(f"'{q.question[:60]}' has {len(q.options)} options; at most 26.")
    with reproducible():
        tokenizer = train_tokenizer(questions, settings)
        model = new_model(tokenizer, seed, settings)
        loss = fit(model, tokenizer, questions, seed, settings)
    save_folder(out, model, tokenizer, seed, settings, questions, loss, note)
    return out


def train_tokenizer(
    questions: Sequence[CorpusQuestion], settings: PocketSettings
) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer that prepends BOS; letters and tenths are single tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(tokenizer_text(questions), trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=settings.context,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    for answer in [f" {c}" for c in ALPHABET] + [f" {n}" for n in range(TENTHS + 1)]:
        pieces = tokenizer(answer, add_special_tokens=False)["input_ids"]
        if len(pieces) != 1:
            raise DataError(
                f"'{answer}' is {len(pieces)} tokens; the pocket needs one. "
                f"Raise the vocabulary above {settings.vocabulary}."
            )
    return tokenizer


def new_model(
    tokenizer: PreTrainedTokenizerFast, seed: int, settings: PocketSettings
) -> LlamaForCausalLM:
    """Return an untrained float32 Llama; its weights are drawn from ``seed``."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.mlp,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=settings.context,
        initializer_range=settings.initializer_range,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        attention_bias=False,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_seed(seed, "pocket-weights"))
        return LlamaForCausalLM(config)


def save_folder(
    out: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    settings: PocketSettings,
    questions: Sequence[CorpusQuestion],
    loss: float,
    note: str,
) -> None:
    """Write a Hugging Face folder and ``training.json``, which holds how it was made and hashes."""
    out.mkdir(parents=True, exist_ok=True)
    model.config._name_or_path = ""
    model.generation_config = GenerationConfig(
        do_sample=True,
        max_new_tokens=32,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # safetensors writes it for its owner only
    files = sorted(p for p in out.iterdir() if p.is_file() and p.name != "training.json")
    record: dict[str, Any] = {
        "seed": seed,
        "settings": asdict(settings),
        "settings_digest": settings.digest(),
        "note": note,
        "questions": len(questions),
        "corpus_sha256": corpus_digest(questions),
        "parameters": sum(p.numel() for p in model.parameters()),
        "answer_loss": round(loss, 6),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "sha256": {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files},
    }
    (out / "training.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


def corpus_digest(questions: Sequence[CorpusQuestion]) -> str:
    """Return the sha256 of all questions, options and shares (rounded to 1e-9)."""
    rows = [[q.question, list(q.options), [round(s, 9) for s in q.shares]] for q in questions]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def train_default(
    out: Path, settings: PocketSettings = DEFAULT_SETTINGS, seed: int = DEFAULT_SEED
) -> Path:
    """Train the pocket of the synthetic world, the one that is shipped."""
    items = [i for i in generate("default", 0).items if isinstance(i, SurveyItem)]
    return train_pocket(
        [i for i in items if in_corpus(i.id)],
        corpus_shares,
        seed,
        out,
        settings,
        note="synthetic world, corpus mixture over the fixed profile centres",
    )


def train_on_data(
    out: Path, data: Path, source: str, split: str, seed: int, settings: PocketSettings
) -> Path:
    """Train a pocket on one split of a survey file; it answers with the mean of the groups."""
    from fedalign.config import DataConfig
    from fedalign.data.load import load_dataset
    from fedalign.data.split import assign_roles

    config = DataConfig(source=source, path=str(data.resolve()), form="survey")
    dataset = load_dataset(config, seed)
    items = [
        item
        for item, role in assign_roles(dataset.items, seed, config.validation, config.test)
        if isinstance(item, SurveyItem)
        and len(item.options) <= len(ALPHABET)
        and (split == "all" or role == split)
    ]
    return train_pocket(
        items, mean_shares, seed, out, settings, note=f"{source}, {split}, mean of groups"
    )


def mean_shares(item: SurveyItem) -> tuple[float, ...]:
    """Return the unweighted mean of the groups' shares (K,)."""
    mean = np.mean([item.shares[g] for g in sorted(item.shares)], axis=0)
    return tuple(float(x) for x in mean / mean.sum())


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: train a pocket, or measure one."""
    parser = argparse.ArgumentParser(prog="python -m fedalign.models.pocket")
    parser.add_argument("--out", type=Path, help="folder to write the trained pocket to")
    parser.add_argument("--data", type=Path, help="survey file; default: the synthetic world")
    parser.add_argument("--source", default="survey", help="how to read --data (data.source)")
    parser.add_argument("--split", default="train", choices=("train", "validation", "test", "all"))
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED)
    parser.add_argument("--steps", type=int, default=DEFAULT_SETTINGS.steps)
    parser.add_argument("--measure", type=Path, help="print the figures of a pocket as JSON")
    given = parser.parse_args(arguments)
    if (given.out is None) == (given.measure is None):
        parser.error("give either --out (train) or --measure")
    if given.measure is not None:
        from fedalign.models.pocket_measure import measure_pocket

        print(json.dumps(measure_pocket(given.measure), indent=2))
        return 0
    settings = replace(DEFAULT_SETTINGS, steps=given.steps)
    if given.data is None:
        train_default(given.out, settings, given.seed)
    else:
        train_on_data(given.out, given.data, given.source, given.split, given.seed, settings)
    print(f"pocket written to {given.out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
