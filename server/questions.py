"""The public question bank: what the server may ask the policy in mode ``rewards``.

Questions and options are public here, answers are not.  They come from a file of the operator's
(``rewards.prompts``, JSON lines with ``question``, ``options`` and, where the sites' data declare
one, ``split``), or, without one, from the data
source itself with everybody's answers left out; a coordinator whose machine does not hold the data
needs the file.  Only questions whose role is *train* are kept, by the same hash of the words as at
every site, so validation and test are never asked.
"""

from __future__ import annotations

import json
from pathlib import Path

from fedalign.config import Config
from fedalign.data.load import load_dataset
from fedalign.data.records import SurveyItem
from fedalign.data.split import assign_roles
from fedalign.errors import ConfigError, DataError
from fedalign.randomness import generator
from fedalign.wire import Question


def question_bank(config: Config) -> tuple[Question, ...]:
    """Return the training questions, each once, in an order that does not depend on the file's.

    Raises ``DataError`` naming file and line for a bad row, and when no question is left.
    """
    if config.rewards.prompts:
        items = read_prompts(Path(config.rewards.prompts))
    else:
        given = load_dataset(config.data, config.run.seed).items
        items = [i for i in given if isinstance(i, SurveyItem)]
        if len(items) < len(given):
            raise ConfigError("run.mode = 'rewards' needs survey data: pairs have no answers.")
    roles = assign_roles(items, config.run.seed, config.data.validation, config.data.test)
    kept = {(i.question, i.options) for i, role in roles if role == "train"}  # type: ignore[union-attr]
    if not kept:
        raise DataError(
            f"none of {len(items)} questions has the role train; give more questions, or lower "
            "data.validation and data.test."
        )
    return tuple(Question(text, options) for text, options in sorted(kept))


def read_prompts(path: Path) -> list[SurveyItem]:
    """Read questions and options from JSON lines; further columns are ignored."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    items = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
            question, options = row["question"], row["options"]
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{where}: not a JSON object with 'question' and 'options'.") from None
        texts = isinstance(options, list) and all(isinstance(o, str) for o in options)
        if not isinstance(question, str) or not texts:
            raise DataError(f"{where}: 'question' must be text and 'options' a list of texts.")
        split = row.get("split", "")
        if not isinstance(split, str):
            raise DataError(f"{where}: 'split' must be text.")
        items.append(SurveyItem(where, question, tuple(options), {}, split=split, source=where))
    if not items:
        raise DataError(f"{path}: no question.")
    return items


def draw_questions(bank: int, count: int, seed: int, exchange: int) -> list[int]:
    """Return the numbers of the questions of one exchange (1, 2, ...), in [0, bank).

    Keyed permutations of the bank are joined end to end and cut into exchanges, so every question
    comes up equally often, and no exchange depends on those before it.
    """
    first = (exchange - 1) * count
    drawn: list[int] = []
    while len(drawn) < count:
        epoch, at = divmod(first + len(drawn), bank)
        order = generator(seed, "questions", epoch).permutation(bank)
        drawn += [int(x) for x in order[at : at + count - len(drawn)]]
    return drawn
