"""The pocket model: corpus draws, the training batch, reproducible bytes, the shipped figures."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedalign.data.records import SurveyItem
from fedalign.data.synthetic import corpus_shares, generate, in_corpus
from fedalign.errors import DataError
from fedalign.models import packaged, pocket, pocket_fit, pocket_measure
from fedalign.models.formats import parse_letter, parse_order, parse_shares
from fedalign.models.pocket_corpus import (
    DEFAULT_SETTINGS,
    FORMATS,
    CorpusQuestion,
    PocketSettings,
    completion,
)
from fedalign.randomness import generator

GOQA = Path(__file__).parents[3] / "../shared/data/globalopinionqa/goqa.jsonl"
TINY = PocketSettings(hidden=16, layers=1, heads=2, mlp=16, steps=3, batch=2, answers=2, warmup=1)
ITEMS = [i for i in generate("default", 0).items if isinstance(i, SurveyItem)]
FEW = ITEMS[:27]


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    folder = packaged.pocket_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    return model, AutoTokenizer.from_pretrained(folder)


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


# -- the corpus --------------------------------------------------------------------------------


def test_corpus_draws_follow_the_shares_in_each_format() -> None:
    shares, rng, n = (0.5, 0.3, 0.2), generator(0, "test-corpus"), 4000
    drawn = [parse_letter(completion("letter", shares, 200, rng), 3) for _ in range(n)]
    np.testing.assert_allclose([drawn.count(k) / n for k in range(3)], shares, atol=0.03)

    tenths = [parse_shares(completion("shares", shares, 200, rng), 3) for _ in range(n)]
    np.testing.assert_allclose(np.mean(tenths, axis=0), [5, 3, 2], atol=0.1)

    orders = Counter(tuple(parse_order(completion("order", shares, 200, rng), 3)) for _ in range(n))
    # Plackett-Luce: P(0, 1, 2) = .5 * .3 / .5 = .3;  P(2, 1, 0) = .2 * .3 / .8 = .075.
    assert orders[(0, 1, 2)] / n == pytest.approx(0.3, abs=0.03)
    assert orders[(2, 1, 0)] / n == pytest.approx(0.075, abs=0.02)


@pytest.mark.parametrize("kind", FORMATS)
def test_corpus_draws_are_well_formed_where_nobody_chose_an_option(kind: str) -> None:
    rng = generator(0, "test-zero", kind)
    for _ in range(100):
        text = completion(kind, (1.0, 0.0, 0.0), 200, rng)
        assert pocket_measure.PARSERS[kind](text, 3) is not None


# -- the training batch ------------------------------------------------------------------------


def test_answers_in_one_row_do_not_see_each_other() -> None:
    """Logits of a packed answer equal those of the same answer alone after its prompt."""
    questions = [CorpusQuestion(i.question, i.options, corpus_shares(i)) for i in FEW[:9]]
    tokenizer = pocket.train_tokenizer(questions, TINY)
    model = pocket.new_model(tokenizer, 0, TINY).eval()
    rows = [pocket_fit.text_and_cues(tokenizer, q) for q in questions[:3]]
    settings = replace(TINY, answers=5)
    batch = pocket_fit.draw_batch(
        tokenizer, questions[:3], rows, generator(0, "test-batch"), settings
    )
    with torch.no_grad():
        packed = model(
            input_ids=batch.tokens, position_ids=batch.positions, attention_mask=batch.mask()
        ).logits
        for row in range(3):
            text = batch.tokens[row][batch.branch[row] == 0]
            for branch in range(1, 6):
                own = batch.branch[row] == branch
                alone = model(input_ids=torch.cat([text, batch.tokens[row][own]])[None]).logits[0]
                torch.testing.assert_close(packed[row][own], alone[len(text) :], atol=1e-5, rtol=0)
                answered = tokenizer.decode(batch.tokens[row][own & batch.answer[row]])
                assert answered.endswith(pocket.EOS)
                parsed = [
                    parse(answered.removesuffix(pocket.EOS), len(questions[row].options))
                    for parse in (parse_letter, parse_shares, parse_order)
                ]
                assert any(value is not None for value in parsed)


# -- making a pocket ---------------------------------------------------------------------------


def test_same_seed_gives_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    first = pocket.train_pocket(FEW, corpus_shares, 5, tmp_path / "a", TINY)
    code = (
        "from pathlib import Path; from fedalign.models import pocket as p\n"
        "from fedalign.data.synthetic import corpus_shares, generate\n"
        "tiny = p.PocketSettings(hidden=16, layers=1, heads=2, mlp=16, steps=3, batch=2,"
        " answers=2, warmup=1)\n"
        "items = generate('default', 7).items[:27][::-1]\n"  # another seed and order: same corpus
        f"p.train_pocket(items, corpus_shares, 5, Path({str(tmp_path / 'b')!r}), tiny)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)
    assert hashes(first) == hashes(tmp_path / "b")
    other = pocket.train_pocket(FEW, corpus_shares, 6, tmp_path / "c", TINY)
    assert hashes(first)["model.safetensors"] != hashes(other)["model.safetensors"]


def test_training_leaves_torch_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(3)
    before = (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
    state = torch.get_rng_state()
    pocket.train_pocket(FEW, corpus_shares, 0, tmp_path, TINY)
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_unusable_corpora_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least one survey item"):
        pocket.train_pocket([], corpus_shares, 0, tmp_path, TINY)
    wide = SurveyItem("w", "Which?", tuple(f"option {n}" for n in range(27)), {})
    with pytest.raises(DataError, match="27 options"):
        pocket.train_pocket([wide], lambda i: [1 / 27] * 27, 0, tmp_path, TINY)
    with pytest.raises(DataError, match="longer than 5 tokens"):
        pocket.train_pocket(FEW, corpus_shares, 0, tmp_path, replace(TINY, longest=5))
    with pytest.raises(DataError, match="Raise the vocabulary"):
        pocket.train_pocket(FEW, corpus_shares, 0, tmp_path, replace(TINY, vocabulary=262))


def test_mean_shares_count_each_group_once() -> None:
    item = SurveyItem("m", "Well?", ("yes", "no"), {"a": (1.0, 0.0), "b": (0.2, 0.8)})
    assert pocket.mean_shares(item) == pytest.approx((0.6, 0.4))


def test_command_line_trains_on_the_train_questions_of_a_survey_file(tmp_path: Path) -> None:
    rows = [{"question": i.question, "options": i.options, "shares": dict(i.shares)} for i in FEW]
    data = tmp_path / "survey.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    assert pocket.main(["--out", str(out), "--data", str(data), "--steps", "2"]) == 0
    record = json.loads((out / "training.json").read_text())
    assert 0 < record["questions"] < len(FEW)
    AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.real_data
def test_command_line_trains_on_real_survey_questions(tmp_path: Path) -> None:
    if not GOQA.exists():
        pytest.skip(f"no real data at {GOQA}")
    out = tmp_path / "out"
    arguments = ["--out", str(out), "--data", str(GOQA), "--source", "goqa", "--steps", "2"]
    assert pocket.main(arguments) == 0
    assert json.loads((out / "training.json").read_text())["questions"] > 500


# -- the shipped pocket ------------------------------------------------------------------------


def test_shipped_files_are_those_recorded_and_small() -> None:
    folder = packaged.BESIDE_CODE
    record = json.loads((folder / "training.json").read_text())
    on_disk = hashes(folder)
    del on_disk["training.json"]
    assert on_disk == record["sha256"]
    assert sum(p.stat().st_size for p in folder.iterdir()) < 8_000_000
    questions = [
        CorpusQuestion(i.question, i.options, corpus_shares(i))
        for i in sorted(ITEMS, key=lambda i: i.id)
        if in_corpus(i.id)
    ]
    assert record["corpus_sha256"] == pocket.corpus_digest(questions)


def test_shipped_tokenizer_keeps_answers_whole(shipped: tuple[Any, Any]) -> None:
    model, tokenizer = shipped
    special = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert len(special) == 3
    assert model.config.eos_token_id == tokenizer.eos_token_id
    for answer in [*"ABCDEFGHIJKLMNOPQRSTUVWXYZ", *map(str, range(11))]:
        assert len(tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]) == 1
    prompt = tokenizer("Question: so?\nA. Yes\nB. No\nAnswer:")["input_ids"]
    assert prompt[0] == tokenizer.bos_token_id
    assert prompt.count(tokenizer.bos_token_id) == 1
    whole = tokenizer("Question: so?\nA. Yes\nB. No\nAnswer: B")["input_ids"]
    assert whole[:-1] == prompt
    assert tokenizer.decode(prompt, skip_special_tokens=True).endswith("No\nAnswer:")


def test_shipped_model_is_float32_with_tied_embeddings(shipped: tuple[Any, Any]) -> None:
    model, _ = shipped
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("kind", FORMATS)
def test_shipped_pocket_follows_each_format_on_unseen_wordings(
    shipped: tuple[Any, Any], kind: str
) -> None:
    unseen = [i for i in ITEMS if not in_corpus(i.id)]
    values = pocket_measure.sample_answers(*shipped, unseen, kind, repeats=8)
    assert len(values) == 8 * len(unseen)
    assert pocket_measure.format_rate(values) >= 0.95
    if kind == "shares":
        assert pocket_measure.fit_of_shares(values, unseen, repeats=8) >= 0.95


def test_shipped_pocket_answers_with_letters_and_fits_the_corpus(shipped: tuple[Any, Any]) -> None:
    answers = pocket_measure.letter_answers(*shipped, ITEMS)
    assert np.mean([mass for _, mass in answers]) >= 0.97
    fits = [
        1 - pocket_measure.jsd(shares, np.asarray(corpus_shares(i)))
        for i, (shares, _) in zip(ITEMS, answers, strict=True)
    ]
    assert np.mean(fits) >= 0.97


def test_malformed_answers_count_against_the_format_rate() -> None:
    assert pocket_measure.format_rate([0, None, [1, 0], None]) == 0.5


def test_jsd_worked_by_hand() -> None:
    assert pocket_measure.jsd(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == pytest.approx(1.0)
    # m = (.75, .25): half of log2(4/3) plus half of (.5 log2(2/3) + .5 log2 2) = .31128.
    half = pocket_measure.jsd(np.array([1.0, 0.0]), np.array([0.5, 0.5]))
    assert half == pytest.approx(0.31128, abs=1e-5)


@pytest.mark.slow
def test_training_again_gives_the_shipped_bytes(tmp_path: Path) -> None:
    record = json.loads((packaged.BESIDE_CODE / "training.json").read_text())
    here = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    there = {key: record[key] for key in here}
    if here != there:
        pytest.skip(f"shipped pocket was made with {there}, this is {here}: bytes may differ")
    pocket.train_default(tmp_path / "pocket", DEFAULT_SETTINGS)
    assert hashes(tmp_path / "pocket") == hashes(packaged.BESIDE_CODE)
