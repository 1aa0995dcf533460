"""The resident trainer: what stays in memory between messages, and the work of each message.

The frozen base, tokenised questions, drawn pairs and reference log-probabilities are made once per
process and client; a round then is: load the adapter, score, k steps, read.  All methods take the
list of clients a message names and answer for each, in that order.

Test questions are read by :meth:`ResidentTrainer.score` when the server asks for ``test`` (base and
final adapter) and by :meth:`ResidentTrainer.personal`; training rounds cannot reach them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib import metadata
from typing import TYPE_CHECKING

# One thread a client process: small matrices run slower on many, and sums keep their order.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from clients.resident import usable, usable_clients
from clients.scores import Scorer
from clients.store import keep_personal_adapter
from fedalign import wire
from fedalign.aggregation.adapters import initial_adapter
from fedalign.config import Config, config_hash, personal_stages, resolve_metric
from fedalign.data.records import ClientData, SurveyItem
from fedalign.models.layout import Array, pack
from fedalign.models.resident import resident_model
from fedalign.randomness import Key
from fedalign.training.cohort import train_cohort
from fedalign.training.cohort_ppo import train_ppo_cohort
from fedalign.training.examples import TrainingSet, training_set
from fedalign.training.local_ppo import PolicyJob, train_ppo
from fedalign.training.loop import TrainJob, TrainResult, round_learning_rate, train
from fedalign.training.reference import ReferenceKind, reference_kind, reference_logps

if TYPE_CHECKING:
    from clients.predictor import PredictorSite

log = logging.getLogger("fedalign.client")

LIBRARIES = ("fedalign", "flwr", "torch", "transformers", "peft", "numpy")


@dataclass(frozen=True)
class _Prepared:
    """What a client trains on, made once."""

    data: TrainingSet
    reference: Array | None


class ResidentTrainer:
    """Serves all clients of one process for one run."""

    def __init__(self, config: Config, own: ClientData | None = None) -> None:
        """Load the base and check the clients' rows.

        Args:
            config: the run's settings.
            own: the one client of an enrolled site; None takes the configured population.
        """
        torch.set_num_threads(1)
        self.config = config
        self.frozen_a = config.aggregation.method == "frozen-a"
        self.model = resident_model(config.model, self.frozen_a)
        if own is None:
            self.clients, self.bad_rows = usable_clients(config)
        else:
            self.clients, self.bad_rows = usable(self.model, (own,), config.data.skip_bad)
        self.form = next(iter(self.clients.values())).form
        self.metric = resolve_metric(config, self.form)
        self.manifest = wire.Manifest(
            layout=self.model.layout,
            rank=config.model.rank,
            alpha=config.model.alpha,
            targets=tuple(self.model.targets),
            base_revision=self.model.base_revision,
            tokenizer_hash=self.model.tokenizer_hash,
            frozen_a=self.frozen_a,
        )
        self._kind: ReferenceKind = reference_kind(self.model, config.local)
        self._prepared: dict[str, _Prepared] = {}
        self.scorer = Scorer(self.model, config, self.clients, self.metric, self._kind)

    # --- messages -----------------------------------------------------------------------------

    def hello(self, names: Sequence[str]) -> wire.Hello:
        """Describe the clients this node hosts: counts, never content."""
        hosted = [self.clients[n] for n in names]
        return wire.Hello(
            clients=tuple(names),
            groups=tuple(c.group for c in hosted),
            form=self.form,
            train=tuple(len(c.train) for c in hosted),
            validation=tuple(len(c.validation) for c in hosted),
            test=tuple(len(c.test) for c in hosted),
            size=tuple(c.size or len(c.train) for c in hosted),
            manifest=self.manifest,
            versions={name: _version(name) for name in LIBRARIES},
        )

    def score(
        self,
        names: Sequence[str],
        adapter: wire.F32,
        splits: Sequence[str],
        hosted: Sequence[str] = (),
    ) -> list[wire.ScoreReply]:
        """Score one adapter for every client on every split asked for.

        ``hosted`` are the clients of the node: every one is asked, in this message or another.
        """
        known, unknown = self._sort_out(names)
        self.model.load(adapter)
        tasks = [(c, split) for c in known for split in splits]
        found = self.scorer.scores(tasks, self._together(hosted))
        replies = {c: dict[str, wire.Score]() for c in known}
        for (client, split), score in found.items():
            if score is not None:
                replies[client][split] = score
        return [
            wire.ScoreReply(n, wire.UNKNOWN_CLIENT if n in unknown else wire.OK, replies.get(n, {}))
            for n in names
        ]

    def train(
        self, names: Sequence[str], adapter: wire.F32, round_: int, hosted: Sequence[str] = ()
    ) -> tuple[list[wire.TrainReply], wire.F32]:
        """Score the received adapter on validation, then train every client from it.

        ``hosted`` are the clients of the node.
        """
        known, unknown = self._sort_out(names)
        self.model.load(adapter)
        among = self._together(hosted) if self.config.run.clients_per_round == 0 else ()
        scores = self.scorer.scores([(c, "validation") for c in known], among)
        local = self.config.local
        if local.objective != "dpo":
            local = replace(local, learning_rate=self.config.ppo.learning_rate)
        rate = round_learning_rate(local, round_, self.config.run.rounds)
        jobs = [self._job(c, adapter, local.steps, rate, (round_, c)) for c in known]
        began = time.perf_counter()
        results = {r.client: r for r in self._train(jobs)}
        seconds = (time.perf_counter() - began) / max(1, len(jobs))
        updates = np.zeros((len(names), self.manifest.upload_size), dtype=np.float32)
        upload = self.upload_mask()
        replies = []
        for i, name in enumerate(names):
            if name in unknown:
                replies.append(wire.TrainReply(name, wire.UNKNOWN_CLIENT))
                continue
            result, score = results[name], scores[(name, "validation")]
            if score is None:
                log.error("client %s: no validation question has a defined score", name)
                replies.append(wire.TrainReply(name, wire.NO_DATA))
                continue
            if result.adapter is None:
                log.error("client %s: %s", name, result.failure)
                replies.append(wire.TrainReply(name, wire.NON_FINITE))
                continue
            updates[i] = result.adapter[upload]
            replies.append(
                wire.TrainReply(
                    name,
                    wire.OK,
                    score,
                    result.metrics["loss"],
                    result.metrics["loss_first"],
                    result.metrics["loss_last"],
                    self._examples(name),
                    result.steps,
                    seconds,
                    int(result.metrics["tokens"]),
                )
            )
        return replies, updates

    def personal(
        self, names: Sequence[str], adapter: wire.F32, rounds: int
    ) -> tuple[list[wire.ScoreReply], tuple[str, ...]]:
        """Train each client on from the shared adapter and, beside it, on local data alone.

        ``local_only`` takes the same number of steps from the untouched base; ``local_only_total``
        takes as many as a client that is sampled in every round takes in all (``rounds`` times the
        local steps, and the personal ones); it is left out in mode ``rewards``.
        The personal adapter is kept on this machine; only its test score is returned.
        """
        known, unknown = self._sort_out(names)
        settings = self.config.personal
        total = rounds * self.config.local.steps + settings.steps
        shapes = dict(self.manifest.layout)
        fresh = pack(initial_adapter(shapes, self.config.run.seed), self.manifest.layout)
        stages = personal_stages(self.config)
        if "local_only_total" not in stages:
            total = settings.steps  # mode ``rewards``: clients took no steps in the run
        places = {name: i for i, name in enumerate(sorted(self.clients))}
        rate = settings.learning_rate
        jobs = [self._job(n, adapter, settings.steps, rate, ("personal", n)) for n in known]
        if settings.local_only:
            jobs += [
                self._job(n, fresh, total, rate, ("local-only", n), (settings.steps,))
                for n in known
            ]
        trained = self._train(jobs)
        own: dict[str, dict[str, Array]] = {}
        for name in known:
            results = [r for r in trained if r.client == name]
            if all(r.adapter is not None for r in results):
                own[name] = self._stage_adapters(results, settings.steps)
                keep_personal_adapter(self.config, places[name], name, own[name]["personal"])
        scores = self._own_scores({(n, stage): own[n][stage] for n in own for stage in stages})
        replies = []
        for name in names:
            if name in own:
                found = {stage: scores[(name, stage)] for stage in stages}
                given = {stage: score for stage, score in found.items() if score is not None}
                replies.append(wire.ScoreReply(name, wire.OK, given))
            else:
                status = wire.UNKNOWN_CLIENT if name in unknown else wire.NON_FINITE
                replies.append(wire.ScoreReply(name, status, {}))
        return replies, stages

    def exchange(
        self, names: Sequence[str], rollouts: wire.Rollouts, predictor: wire.F32 | None
    ) -> list[wire.RewardReply]:
        """Reward the server's texts from the clients' own answers, or by the frozen predictor."""
        from clients.exchange import answer

        predictors = None
        if predictor is not None:
            self.predictor.freeze(predictor, names)
            predictors = {n: partial(self.predictor.predict, n) for n in names if n in self.clients}
        return answer(self.config, self.clients, names, rollouts, predictors)

    @cached_property
    def predictor(self) -> PredictorSite:
        """The site's side of the federated preference predictor."""
        from clients.predictor import PredictorSite

        return PredictorSite(self.model, self.clients, self.config)

    # --- work ---------------------------------------------------------------------------------

    def _together(self, hosted: Sequence[str]) -> tuple[str, ...]:
        """Return the clients that are scored in the same passes as those of a message.

        With one client a message none: there results must not depend on the number of nodes.
        """
        if self.config.run.clients_per_message == 1:
            return ()
        return tuple(name for name in hosted if name in self.clients)

    def _sort_out(self, names: Sequence[str]) -> tuple[list[str], set[str]]:
        unknown = {n for n in names if n not in self.clients}
        return [n for n in names if n not in unknown], unknown

    def _prepare(self, name: str) -> _Prepared:
        if name not in self._prepared:
            data = training_set(
                self.model, self.clients[name], self.config.local, self.config.run.seed
            )
            reference = reference_logps(self.model, data.prompts, self._kind)
            self._prepared[name] = _Prepared(data, reference)
        return self._prepared[name]

    def _job(
        self,
        name: str,
        start: Array,
        steps: int,
        rate: float,
        key: tuple[Key, ...],
        snapshots: tuple[int, ...] = (),
    ) -> TrainJob | PolicyJob:
        """Return a client's work in the form that the run's objective takes."""
        if self.config.local.objective == "dpo":
            own = self._prepare(name)
            return TrainJob(name, start, own.data, own.reference, steps, rate, key, snapshots)
        client = self.clients[name]
        items = tuple(i for i in client.train if isinstance(i, SurveyItem))
        return PolicyJob(name, client.group, start, items, steps, rate, key, snapshots)

    def _examples(self, name: str) -> int:
        """Return what a client trains on: pairs, or questions where texts are sampled."""
        if self.config.local.objective == "dpo":
            return self._prepare(name).data.examples
        return len(self.clients[name].train)

    def _train(self, jobs: Sequence[TrainJob | PolicyJob]) -> list[TrainResult]:
        seed, local = self.config.run.seed, self.config.local
        sampling = [j for j in jobs if isinstance(j, PolicyJob)]
        together = local.cohort_size != 1 and len(jobs) > 1
        if local.objective == "ppo":
            if together:
                with _threads(max(1, local.threads)):
                    return train_ppo_cohort(self.model, sampling, self.config, seed)
            return train_ppo(self.model, sampling, self.config, seed)
        if local.objective != "dpo":
            from fedalign.training.trl_onpolicy import train_onpolicy

            return train_onpolicy(self.model, sampling, self.config, seed)
        comparing = [j for j in jobs if isinstance(j, TrainJob)]
        if local.engine == "trl":
            from fedalign.training.trl_engine import train_trl

            return train_trl(self.model, comparing, local, seed)
        if together:
            with _threads(max(1, local.threads)):
                return train_cohort(self.model, comparing, local, seed)
        return train(self.model, comparing, local, seed)

    def _own_scores(
        self, adapters: Mapping[tuple[str, str], Array]
    ) -> dict[tuple[str, str], wire.Score | None]:
        """Return the test score of each (client, stage) under its own adapter."""
        tasks = [(name, "test") for name, _ in adapters]
        together = self.scorer.together(len(tasks))
        with _threads(max(1, self.config.local.threads) if together else 1):
            found = self.scorer.own_scores(tasks, list(adapters.values()))
        return dict(zip(adapters, found, strict=True))

    @staticmethod
    def _stage_adapters(results: Sequence[TrainResult], steps: int) -> dict[str, Array]:
        adapters: dict[str, Array] = {}
        if results[0].adapter is not None:
            adapters["personal"] = results[0].adapter
        if len(results) > 1 and results[1].adapter is not None:
            adapters["local_only"] = results[1].snapshots[steps]
            adapters["local_only_total"] = results[1].adapter
        return adapters

    def upload_mask(self) -> np.ndarray:
        """Return which entries of an adapter (P,) clients send back."""
        sent = {name for name, _ in self.manifest.upload}
        return np.concatenate(
            [np.full(int(np.prod(shape)), name in sent) for name, shape in self.manifest.layout]
        )


def resident_trainer(config: Config, own: ClientData | None = None) -> ResidentTrainer:
    """Return this process's trainer for a run; it is kept while settings and own data stay."""
    if (config_hash(config), config.run.out, own) != (
        _last.get("key"),
        _last.get("out"),
        _last.get("own"),
    ):
        forget()
        made = ResidentTrainer(config, own)
        _last.update(key=config_hash(config), out=config.run.out, own=own, trainer=made)
    trainer = _last["trainer"]
    assert isinstance(trainer, ResidentTrainer)
    return trainer


def forget() -> None:
    """Let go of the trainer: the next message makes a new one."""
    _last.clear()


_last: dict[str, object] = {}


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(1)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        from fedalign import __version__

        return __version__ if name == "fedalign" else "absent"
