"""Tiny random models and a small tokenizer made here; nothing is downloaded.

Heavy libraries are imported inside functions, so that tests of the core do not load them.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

TEXT = [
    "Question: Should the town build a bridge?\nA. agree\nB. disagree\nC. pass\nD. other\nAnswer:",
    "the river is wide and the bridge is old, people say A B C D",
    "user: what do you think? assistant: I think that taxes are fair.",
]


def make_tokenizer(bos: bool = True):
    """Return a byte-level BPE tokenizer with distinct BOS, EOS and pad."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        TEXT * 4,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<pad>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if bos:
        raw.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def tiny_config(kind: str, vocabulary: int):
    """Return the configuration of a randomly initialised model of two layers."""
    from transformers import Gemma2Config, GPT2Config, LlamaConfig, Qwen3Config

    common = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if kind == "llama":
        return LlamaConfig(**common, tie_word_embeddings=True)
    if kind == "qwen3":
        return Qwen3Config(**common, head_dim=8)
    if kind == "gemma2":
        return Gemma2Config(
            **common,
            head_dim=8,
            query_pre_attn_scalar=8,
            final_logit_softcapping=2.0,
            sliding_window=6,
        )
    if kind == "gpt2":
        return GPT2Config(
            vocab_size=vocabulary,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=128,
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=2,
        )
    raise ValueError(kind)


def save_tiny(kind: str, folder: Path) -> Path:
    """Save a tiny model and its tokenizer as a Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = make_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(kind, len(tokenizer)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def start(resident, seed: int = 0, b: float = 0.0):
    """Return an adapter with orthonormal A and B zero, or random B of standard deviation b."""
    from fedalign.models.layout import pack

    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in resident.layout:
        draw = rng.normal(size=shape)
        if ".lora_A." in name:
            draw = np.linalg.qr(draw.T)[0].T / np.sqrt(3)
        else:
            draw *= b
        tensors[name] = draw.astype(np.float32)
    return pack(tensors, resident.layout)


def survey_like(prompts: int = 12, seed: int = 0, hard: bool = False):
    """Return prompts of 5 to 12 random tokens with four one-token answers and three pairs each."""
    from fedalign.training.batch import Prompt
    from fedalign.training.examples import Label, TrainingSet

    rng = np.random.default_rng(seed)
    made, labels = [], []
    for _ in range(prompts):
        tokens = (1, *rng.integers(3, 250, size=rng.integers(5, 12)).tolist())
        made.append(Prompt(tokens, ((260,), (261,), (262,), (263,))))
        q = rng.random(3)
        if hard:
            q = (q > 0.5).astype(float)
        labels.append(tuple(Label(0, j + 1, float(q[j])) for j in range(3)))
    return TrainingSet(tuple(made), tuple(labels))


def text_like(prompts: int = 8, seed: int = 0):
    """Return one hard pair a prompt, with completions of 1 to 6 tokens, ended by EOS."""
    from fedalign.training.batch import Prompt
    from fedalign.training.examples import Label, TrainingSet

    rng = np.random.default_rng(seed)
    made, labels = [], []
    for k in range(prompts):
        tokens = (1, *rng.integers(3, 250, size=rng.integers(4, 9)).tolist())
        sides = tuple(
            (*rng.integers(3, 250, size=rng.integers(1, 6)).tolist(), 2) for _ in range(2)
        )
        made.append(Prompt(tokens, sides))
        labels.append((Label(0, 1, float(k % 2)),))
    return TrainingSet(tuple(made), tuple(labels))


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """Return the makers of this file, which tests cannot import from one folder to another."""
    import torch

    torch.set_num_threads(1)
    return SimpleNamespace(
        tokenizer=make_tokenizer,
        config=tiny_config,
        save=save_tiny,
        start=start,
        survey_like=survey_like,
        text_like=text_like,
    )


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def resident(tiny, llama_folder):
    """Return a fresh resident model of rank 4 on a tiny random Llama."""
    from fedalign.config import ModelConfig
    from fedalign.models.base import ResidentModel

    return ResidentModel(ModelConfig(name=str(llama_folder), rank=4, alpha=8.0, device="cpu"))
