"""Engine ``trl``: the same jobs through TRL's maintained DPOTrainer (TRL 1.16), on the same model.

Both engines see the same rows in the same order and the same reference log-probabilities, so on
hard labels with one pair a prompt they take the same steps up to rounding; a test holds them
together.  TRL has no vote shares, so labels must be hard.  A step takes ``batch_size`` *pairs*.

What is done about TRL's habits, beside ``trl_session.py``; each changes results if left alone:

- Its reference would move every round.  Rows here carry the base's log-probabilities.
- It refuses tokenised rows; the subclass skips its preparation, a private method.
- A trainer used twice keeps its Adam moments; optimiser and schedule are cleared for every job.
- A new trainer breaks older ones in the same process; one is made for each call and used up.
- It hides NaN losses by default; the filter is off.

``accuracy`` here is TRL's, which counts a tie as wrong (all pairs tie at the first step), and
``margin`` is never length-normalised, for ``ipo`` neither.
One process must not run this in two threads: TRL sets global random state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np

from fedalign.config import LocalConfig
from fedalign.errors import ConfigError
from fedalign.models.base import ResidentModel
from fedalign.randomness import keyed_seed
from fedalign.training.loop import TrainJob, TrainResult, batches, check_job
from fedalign.training.trl_session import (
    check_device,
    no_telemetry,
    prepared,
    snapshots,
    trl_session,
)

TRL_LOSSES = {"sigmoid": "sigmoid", "ipo": "ipo", "robust": "robust"}
"""Our names to TRL's.  TRL's ``sigmoid`` takes no label smoothing, so ``conservative`` has none."""

METRICS = {
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
    "logps/chosen": "chosen_logp",
}


def train_trl(
    resident: ResidentModel, jobs: Sequence[TrainJob], settings: LocalConfig, seed: int
) -> list[TrainResult]:
    """Train each job from its own adapter with TRL; results in the order of the jobs.

    Raises ``ConfigError`` for settings TRL cannot do.  A loss or adapter that is not finite is a
    recorded failure of that job alone.
    """
    _check(resident, settings)
    for job in jobs:
        check_job(job, settings)
    if not jobs:
        return []
    keeper = snapshots(resident)
    with _trainer(resident, jobs[0], settings, seed, keeper) as trainer:
        return [_train_one(trainer, resident, job, settings, seed, keeper) for job in jobs]


def rows_of(job: TrainJob) -> list[dict[str, Any]]:
    """Return one row a pair: ``prompt_ids``, ``chosen_ids``, ``rejected_ids`` and their references.

    Raises ``ConfigError`` for a label other than 0 or 1.
    """
    if job.reference_logps is None:
        raise ConfigError("engine 'trl' needs the base's log-probabilities of every completion.")
    rows: list[dict[str, Any]] = []
    at = 0
    for prompt, labels in zip(job.data.prompts, job.data.labels, strict=True):
        for label in labels:
            if label.q not in (0.0, 1.0):
                raise ConfigError(
                    f"engine 'trl' takes hard labels, but a pair has vote share {label.q:g}. "
                    "Set local.labels = 'hard'."
                )
            won, lost = (label.i, label.j) if label.q == 1.0 else (label.j, label.i)
            rows.append(
                {
                    "prompt_ids": list(prompt.tokens),
                    "chosen_ids": list(prompt.completions[won]),
                    "rejected_ids": list(prompt.completions[lost]),
                    "ref_chosen_logps": float(job.reference_logps[at + won]),
                    "ref_rejected_logps": float(job.reference_logps[at + lost]),
                }
            )
        at += len(prompt.completions)
    return rows


def _check(resident: ResidentModel, settings: LocalConfig) -> None:
    if settings.loss not in TRL_LOSSES:
        raise ConfigError(
            f"local.loss = '{settings.loss}' is not one of TRL's; use one of "
            f"{', '.join(TRL_LOSSES)}, or local.engine = 'torch'."
        )
    if settings.loss == "ipo" and not settings.length_normalised:
        raise ConfigError("TRL's ipo is always length-normalised; use local.engine = 'torch'.")
    if settings.reference != "base":
        raise ConfigError("engine 'trl' needs local.reference = 'base'.")
    check_device(resident)


@contextmanager
def _trainer(
    resident: ResidentModel, job: TrainJob, settings: LocalConfig, seed: int, keeper: Any
) -> Iterator[Any]:
    no_telemetry()
    import datasets
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    class TokenisedDPOTrainer(DPOTrainer):
        """DPOTrainer over rows that are tokenised and carry reference log-probabilities."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    with trl_session(resident) as folder:
        arguments = DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=job.learning_rate,
            max_steps=job.steps,
            lr_scheduler_type="constant",
            optim="adamw_torch",
            weight_decay=0.0,
            max_grad_norm=settings.max_grad_norm,
            beta=settings.beta,
            loss_type=[TRL_LOSSES[settings.loss]],
            label_smoothing=settings.label_noise,
            max_length=None,
            seed=keyed_seed(seed, "trl") % 2**31,
            train_sampling_strategy="sequential",
            bf16=False,
            fp16=False,
            gradient_checkpointing=resident.checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            use_cpu=resident.device.type == "cpu",
            dataloader_pin_memory=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="steps",
            logging_nan_inf_filter=False,
            disable_tqdm=True,
        )
        trainer = TokenisedDPOTrainer(
            model=resident.peft,
            args=arguments,
            train_dataset=datasets.Dataset.from_list(rows_of(job)[:1]),
            processing_class=resident.tokenizer,
            callbacks=[keeper],
        )
        trainer.precompute_ref_logps = True
        yield prepared(trainer, resident)


def _train_one(
    trainer: Any,
    resident: ResidentModel,
    job: TrainJob,
    settings: LocalConfig,
    seed: int,
    keeper: Any,
) -> TrainResult:
    import datasets

    resident.load(job.adapter)
    rows = rows_of(job)
    order = islice(batches(len(rows), settings.batch_size, seed, job.key), job.steps)
    shown = [rows[k] for batch in order for k in batch]
    trainer.train_dataset = datasets.Dataset.from_list(shown)
    trainer.args.per_device_train_batch_size = min(settings.batch_size, len(rows))
    trainer._train_batch_size = trainer.args.per_device_train_batch_size
    trainer.args.learning_rate = job.learning_rate
    trainer.args.max_steps = job.steps
    trainer.args.logging_steps = 1
    trainer.optimizer = None
    trainer.lr_scheduler = None
    keeper.wanted, keeper.kept = job.snapshots, {}
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    losses = [float(entry["loss"]) for entry in logs]
    adapter = resident.read()
    if not np.isfinite(losses).all():
        done = int(np.argmin(np.isfinite(losses)))
        return TrainResult(job.client, None, {}, done, "loss_not_finite")
    if not np.isfinite(adapter).all():
        return TrainResult(job.client, None, {}, len(losses), "adapter_not_finite")
    summary = {
        "loss": float(np.mean(losses)),
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "grad_norm": float(np.mean([float(entry["grad_norm"]) for entry in logs])),
        "tokens": float(sum(map(_tokens, shown))),
    }
    summary |= {
        ours: float(np.mean([entry[theirs] for entry in logs])) for theirs, ours in METRICS.items()
    }
    return TrainResult(job.client, adapter, summary, len(losses), snapshots=keeper.kept)


def _tokens(row: dict[str, Any]) -> int:
    """Return the tokens of a pair's two sequences: TRL runs each as a row of its own."""
    return 2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
