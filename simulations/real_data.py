"""Two studies on answers of real people, each beside the answerers that need no training.

*goqa*: countries of GlobalOpinionQA (arXiv 2306.16388) as groups, survey letters, score 1 minus the
Jensen-Shannon distance.  *polis*: opinion clusters of public conversations as groups, pairs of
statements, score pair accuracy.  Arms are the weight rules ``uniform`` and ``adaptive``; others can
be asked for.  ``size`` is no arm by default: the data say nothing of a group's people, so it would
count questions, of which groups hold nearly equal numbers (goqa), or pairs, of which they hold
equal numbers (polis).

For each seed a pocket is trained on that seed's training questions, so that neither the base nor
the adapter has met a test question.  The weights stay in the output folder; they are not shipped.
Every run scores its training questions as well (*seen*), which no rule or stop looks at.

The settings below were chosen once, before any result, and are the defaults of the configuration
wherever no reason is given against them:

- *goqa*: questions of at most ``MAX_OPTIONS`` options and ``MAX_CHARACTERS`` characters (so that
  none exceeds the pocket's 192 tokens).  The eight countries with most questions among those that
  five countries or more were asked; of these only questions that two of the eight were asked,
  because nothing ties countries together that were asked different things.
- *polis*: the three conversations with most votes.  The reference is the base and beta is 0.1, as
  in DPO (arXiv 2305.18290): statements are texts of some forty tokens, and without a reference the
  shorter of two would be preferred.
- pockets: letters only, because no run uses another format; for polis the loss also covers the text
  in every step at full weight, because there the base is used as a language model of statements;
- six rounds (goqa) and four (polis, where scoring thousands of texts costs most), for time.

    python -m simulations.real_data goqa --data FOLDER --out DIR --seeds 5

Resumable: a pocket is recognised by its corpus, settings and seed, a run by its configuration.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedalign.config import (
    Config,
    DataConfig,
    Scalar,
    config_hash,
    from_flat,
    parse_override,
    to_flat,
)
from fedalign.data import polis
from fedalign.data.load import load_dataset
from fedalign.data.records import SurveyItem
from fedalign.data.rejects import Rejects
from fedalign.data.split import assign_roles, response_key, role
from fedalign.errors import DataError, FedalignError
from fedalign.models.pocket_corpus import DEFAULT_SETTINGS, PocketSettings
from simulations.compare import Task, finished, run_task
from simulations.real_data_report import Study, write_report

RULES = ("uniform", "adaptive")
"""The first is the baseline."""
COUNTRIES = 8
MAX_OPTIONS = 10
MAX_CHARACTERS = 400
"""Question and options together."""
WIDE = 5
"""Countries are ranked by questions that at least this many countries were asked."""
ASKED = 2
"""A question is used when at least this many of the chosen countries were asked."""
CONVERSATIONS = 3


@dataclass(frozen=True)
class Prepared:
    """A study with its data made ready."""

    study: Study
    settings: dict[str, Scalar]
    pocket: PocketSettings
    corpus: Path
    """What pockets are trained on: the file (goqa) or folder (polis)."""


def prepare_goqa(data: Path, out: Path) -> Prepared:
    """Choose countries and questions, and write them under ``out``."""
    source = data / "globalopinionqa" / "goqa.jsonl"
    rows = [row for row in _wordings(_json_lines(source)) if _fits(row)]
    asked = Counter(c for r in rows if len(_countries(r)) >= WIDE for c in _countries(r))
    countries = sorted(sorted(asked), key=lambda c: -asked[c])[:COUNTRIES]
    chosen = []
    for row in rows:
        own = {c: s for c, s in row["distribution"].items() if c in countries}
        if len(own) >= ASKED:
            chosen.append({**row, "distribution": own})
    if len(countries) < COUNTRIES or not chosen:
        raise DataError(
            f"{source}: {len(countries)} countries and {len(chosen)} questions are left; the study "
            f"needs {COUNTRIES} countries that share questions."
        )
    study = Study(
        name="goqa",
        title="GlobalOpinionQA: countries",
        data=(
            f"{len(chosen)} questions that at least {ASKED} of {COUNTRIES} countries were asked: "
            f"{', '.join(countries)}. At most {MAX_OPTIONS} options and {MAX_CHARACTERS} "
            f"characters. Base: a pocket trained on the training questions among {len(rows)} "
            "questions, with the mean of all countries that were asked."
        ),
        licence=(
            "Data: CC BY-NC-SA 4.0 (non-commercial), Anthropic/llm_global_opinions, arXiv "
            "2306.16388, partial rebuild."
        ),
        caveats=(
            "The optimum of this score is a policy that was found, not a proven bound.",
            "Surveys repeat questions in nearly the same words. A question has one role by its "
            "exact wording, so an unseen question may have a seen near-copy.",
        ),
    )
    settings: dict[str, Scalar] = {
        "data.source": "goqa",
        "data.path": str(_write_rows(out / "data", "questions", chosen)),
        "score.metric": "js_distance",
        "run.rounds": 6,
    }
    pocket = replace(DEFAULT_SETTINGS, mix=(1.0, 0.0, 0.0))
    return Prepared(study, settings, pocket, _write_rows(out / "data", "corpus", rows))


def prepare_polis(data: Path, out: Path) -> Prepared:
    """Choose the conversations with most votes; the folder is read as it is."""
    folder = (data / "polis").resolve()
    statements = polis.read_statements(folder, Rejects(skip=False))
    votes: Counter[str] = Counter()
    for s in statements:
        votes[s.conversation] += sum(sum(cell) for cell in s.votes.values())
    names = sorted(sorted(votes), key=lambda c: -votes[c])[:CONVERSATIONS]
    study = Study(
        name="polis",
        title="Polis: opinion clusters",
        data=(
            f"The {CONVERSATIONS} conversations with most votes: "
            f"{', '.join(f'{n} ({votes[n]:,} votes)' for n in names)}. Pairs of statements; a "
            "statement has one role, so an unseen pair consists of two unseen statements. Base: a "
            f"pocket trained on the training statements of all {len(votes)} conversations."
        ),
        licence=f"Data: {polis.LICENCE}.",
        caveats=(
            'A voter who agreed with X and disagreed with Y is taken to prefer X. "Agreed with X, '
            'disagreed with Y" implies a preference; nobody compared X with Y.',
            "The clusters were computed from the same votes, so groups differ by construction.",
            "The reference is the base, so every margin of the base is 0 and it scores 1/2, like "
            "the uniform answerer. No group is then worst at the base: the column shows the first "
            "group by name.",
            "The worst group is the lowest of six noisy scores, the untrained answerers' is 1/2 "
            "without noise. A worst group a little below 1/2 is no sign of harm.",
            "Pairs of one conversation share statements; they are far fewer independent facts "
            "than pairs.",
        ),
    )
    settings: dict[str, Scalar] = {
        "data.source": "polis",
        "data.path": str(folder),
        "data.form": "pairs",
        "data.groups": ",".join(names),
        "score.metric": "pair_accuracy",
        "run.rounds": 4,
        "local.reference": "base",
        "local.beta": 0.1,
    }
    pocket = replace(DEFAULT_SETTINGS, mix=(1.0, 0.0, 0.0), text_every=1, text_weight=1.0)
    return Prepared(study, settings, pocket, folder)


PREPARE = {"goqa": prepare_goqa, "polis": prepare_polis}


def corpus(prepared: Prepared, data: DataConfig, seed: int) -> list[SurveyItem]:
    """Return what the pocket of a seed is trained on: nothing that a run of that seed holds out.

    The roles are those of the run.  In polis they belong to statements: a survey item's own key
    holds the prompt as well and would give another split.
    """
    if data.source == "polis":
        statements = polis.read_statements(prepared.corpus, Rejects(skip=False))
        kept = [
            s
            for s in statements
            if role(seed, response_key(s.text), data.validation, data.test) == "train"
        ]
        return polis.survey_items(kept, data.min_votes, Rejects(skip=False))
    everything = replace(data, path=str(prepared.corpus), questions=0)
    items = load_dataset(everything, seed).items
    return [
        item
        for item, found in assign_roles(items, seed, data.validation, data.test)
        if found == "train" and isinstance(item, SurveyItem)
    ]


def base_model(prepared: Prepared, data: DataConfig, seed: int, out: Path) -> Path:
    """Return the pocket of a seed, trained if it is not there."""
    from fedalign.models.pocket import (
        CorpusQuestion,
        corpus_digest,
        mean_shares,
        train_pocket,
    )

    items = sorted(corpus(prepared, data, seed), key=lambda i: i.id)
    digest = corpus_digest([CorpusQuestion(i.question, i.options, mean_shares(i)) for i in items])
    folder = out / "pockets" / f"seed{seed}-{prepared.pocket.digest()}-{digest[:8]}"
    if not (folder / "training.json").is_file():  # it is written last
        _say(f"pocket of seed {seed}: {len(items)} questions, {prepared.pocket.steps} steps")
        note = f"{prepared.study.name}, train split of seed {seed}, mean of groups"
        train_pocket(items, mean_shares, seed, folder, prepared.pocket, note)
    return folder.resolve()


def run_config(
    prepared: Prepared, rule: str, seed: int, model: Path, out: Path, more: Mapping[str, Scalar]
) -> Config:
    """Return the configuration of one run; ``more`` wins over the study's settings."""
    config = from_flat(
        {
            "personal.steps": 0,
            "score.seen": True,
            **prepared.settings,
            **more,
            "run.seed": seed,
            "run.name": rule,
            "weights.rule": rule,
            "model.name": str(model),
        }
    )
    folder = out / "runs" / f"{rule}-seed{seed}-{config_hash(config)[:8]}"
    return replace(config, run=replace(config.run, out=str(folder.resolve())))


def real_data(
    name: str,
    data: Path,
    out: Path,
    seeds: int,
    workers: int = 1,
    more: Mapping[str, Scalar] | None = None,
    pocket_steps: int = 0,
    rules: Sequence[str] = RULES,
) -> Path:
    """Train the pockets and do the runs that are missing; write the report; return its page.

    Args:
        name: ``goqa`` or ``polis``.
        data: folder that holds ``globalopinionqa`` and ``polis``.
        out: folder for pockets, runs and report.
        seeds: number of seeds, from 0; fewer than 3 give no interval.
        workers: runs done at a time.
        more: settings that win over those of the study.
        pocket_steps: steps of a pocket's training; 0 takes the default.
        rules: weight rules, one arm each; the first is the baseline.
    """
    prepared = PREPARE[name](data, out)
    if pocket_steps:
        prepared = replace(prepared, pocket=replace(prepared.pocket, steps=pocket_steps))
    more = more or {}
    settings = from_flat({**prepared.settings, **more}).data
    models = {seed: base_model(prepared, settings, seed, out) for seed in range(seeds)}
    tasks = [
        Task(rule, seed, run_config(prepared, rule, seed, models[seed], out, more))
        for seed in range(seeds)
        for rule in rules
    ]
    todo = [t for t in tasks if not finished(t.config)]
    _say(f"{name}: {len(tasks)} runs, {len(tasks) - len(todo)} are finished already")
    for done, (task, seconds) in enumerate(_run(todo, workers), 1):
        _say(f"{done}/{len(todo)} {task.arm}, seed {task.seed}: {seconds:.0f} s")
    shown = {
        "run": {k: v for k, v in to_flat(tasks[0].config).items() if k not in _OF_ONE_RUN},
        "pocket": asdict(prepared.pocket),
    }
    return write_report(out, prepared.study, tasks, rules[0], shown)


_OF_ONE_RUN = ("run.seed", "run.name", "run.out", "weights.rule", "model.name", "data.path")


def _run(tasks: Sequence[Task], workers: int) -> Iterator[tuple[Task, float]]:
    if workers == 1:
        for task in tasks:
            yield task, run_task(task)
        return
    # Spawned, not forked: a forked torch may hang in its thread pools.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from zip(tasks, pool.map(run_task, tasks), strict=True)


def _json_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise DataError(f"{path}: no such file. Give the folder that holds it with --data.")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def _wordings(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keep one row for each wording of a question, the one with most countries.

    A question under two lists of options has two keys, hence maybe two roles.
    """
    found: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda r: (-len(_countries(r)), str(r["qid"]))):
        found.setdefault(" ".join(str(row["question"]).split()).casefold(), row)
    return sorted(found.values(), key=lambda r: str(r["qid"]))


def _fits(row: Mapping[str, Any]) -> bool:
    options = row["options"]
    characters = len(row["question"]) + sum(len(o) for o in options)
    return len(options) <= MAX_OPTIONS and characters <= MAX_CHARACTERS


def _countries(row: Mapping[str, Any]) -> list[str]:
    return list(row["distribution"])


def _write_rows(folder: Path, name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write JSON lines under a name that holds their hash, so that a run knows what it read."""
    text = "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    path = (folder / f"{name}-{digest}.jsonl").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0 when the report was written, 1 with a message when something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m simulations.real_data")
    parser.add_argument("study", choices=sorted(PREPARE))
    parser.add_argument("--data", type=Path, required=True, help="folder of the real data")
    parser.add_argument("--out", type=Path, required=True, help="folder for pockets, runs, report")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rules", default=",".join(RULES), help="weight rules; first: baseline")
    parser.add_argument("--pocket-steps", type=int, default=0, help="0: the default")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args(arguments)
    if given.seeds < 1 or given.workers < 1:
        parser.error("--seeds and --workers must be at least 1")
    try:
        more = dict(parse_override(text) for text in given.set)
        page = real_data(
            given.study,
            given.data,
            given.out,
            given.seeds,
            given.workers,
            more,
            given.pocket_steps,
            given.rules.split(","),
        )
    except FedalignError as error:
        _say(f"error: {error}")
        return 1
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
