"""Objectives ``rloo`` and ``grpo``: the jobs of local PPO through TRL's trainers (TRL 1.16).

RLOO (Ahmadian et al., arXiv 2402.14740) takes reward minus ``kl * log(pi / base)`` of a whole text
and subtracts the mean of the question's other texts.  GRPO (Shao et al., arXiv 2402.03300)
subtracts the mean of all the question's texts and adds a divergence term to the loss of each token.
Neither has a value head.  Both should lead to the optimum of local PPO,

    pi*(text)  proportional to  pi_base(text) exp(reward(text) / ppo.kl),

and TRL's RLOO does.  GRPO does only with these arguments, all set here:

- ``beta``: TRL's default is 0, so nothing holds the policy at the base.
- ``scale_rewards="none"``: TRL divides by the standard deviation of each question's rewards, which
  makes a question on which all answers are nearly alike count as much as any other.
- ``use_bias_correction_kl=True``: the gradient of the plain term (k3 of the policy's own samples)
  is that of KL(base || pi), another divergence with another optimum.
- ``beta = kl (n - 1) / n`` for n samples: the mean that is subtracted contains the text itself,
  which shrinks the reward's gradient by (n - 1) / n and leaves the divergence's as it is.

For texts of several tokens GRPO's divergence term still looks at one token at a time, so only RLOO
has exactly this optimum there.  ``loss_type="dr_grpo"`` divides by a constant (the longest text)
and so favours no length.

On top of what ``trl_session`` and ``trl_engine`` say about TRL's habits:

- Without its copy of the received adapter TRL switches the adapter off, which is the base.  Doing
  so makes every LoRA factor trainable again; the frozen ones are frozen again after each measuring.
- Prompts are made by us and reach TRL as token ids, through one private method.
- Texts that were sampled but not used up in one job would go on to the next; they are dropped.
- The seed of sampling is global; it is set from the job's key before each job.
- It writes pad ids into the tokenizer and the model's settings; they are put back.

``ppo.gamma``, ``lam``, ``whiten`` and the value head's settings do not apply.  Every sample is a
row of its own here, where ours share rows; ``tokens`` counts that (generation, two measuring
passes, updates).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from fedalign.config import Config
from fedalign.data.records import SurveyItem
from fedalign.errors import ConfigError
from fedalign.models.base import ResidentModel
from fedalign.randomness import keyed_seed
from fedalign.training import tasks
from fedalign.training.generate import end_tokens
from fedalign.training.local_ppo import (
    PolicyJob,
    check_policy_job,
    learnable,
    question_stream,
    score_texts,
)
from fedalign.training.loop import TrainResult
from fedalign.training.trl_session import (
    check_device,
    no_telemetry,
    prepared,
    snapshots,
    trl_session,
)

NOT_FINITE = "probability tensor contains"
"""How torch says that it cannot sample; TRL does not look at its logits."""


@dataclass
class _Texts:
    """The job in hand, and what its texts were worth."""

    items: tuple[SurveyItem, ...] = ()
    group: str = ""
    rewards: list[float] = field(default_factory=list)
    """Mean of each batch."""
    well_formed: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    """Prompt and text tokens of all rows of each batch."""


def train_onpolicy(
    resident: ResidentModel,
    jobs: Sequence[PolicyJob],
    config: Config,
    seed: int,
    replaced: Mapping[str, Any] | None = None,
) -> list[TrainResult]:
    """Train each job from its own adapter by ``local.objective``; results in the order of the jobs.

    ``replaced`` holds TRL arguments that replace ours, to measure what they do.  Metrics: ``loss``,
    ``loss_first``, ``loss_last``, ``reward``, ``format_rate``, ``kl`` (nats a text), ``grad_norm``,
    ``clip_fraction``, ``tokens``.

    Raises ``ConfigError`` for settings TRL cannot do.  A loss, sampling probabilities or an adapter
    that is not finite is a recorded failure of that job alone.
    """
    _check(resident, config)
    for job in jobs:
        check_policy_job(job)
    if not jobs:
        return []
    texts = _Texts()
    keeper = snapshots(resident)
    with _trainer(resident, jobs[0], config, texts, keeper, replaced or {}) as trainer:
        return [_train_one(trainer, resident, job, config, seed, texts, keeper) for job in jobs]


def arguments(config: Config, resident: ResidentModel, folder: str) -> dict[str, Any]:
    """Return the arguments of TRL's RLOOConfig or GRPOConfig, by name, for the run's settings."""
    ppo, kl = config.ppo, config.ppo.kl
    shared: dict[str, Any] = {
        "output_dir": folder,
        "beta": kl,
        "num_generations": ppo.samples,
        "per_device_train_batch_size": ppo.questions * ppo.samples,
        "steps_per_generation": ppo.minibatches,
        "num_iterations": ppo.epochs,
        "epsilon": ppo.clip,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": None,
        "repetition_penalty": 1.0,
        "max_grad_norm": ppo.max_grad_norm,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "weight_decay": 0.0,
        "shuffle_dataset": False,
        "remove_unused_columns": False,
        "bf16": False,
        "fp16": False,
        "gradient_checkpointing": resident.checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "use_cpu": resident.device.type == "cpu",
        "dataloader_pin_memory": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
    }
    if config.local.objective == "rloo":
        return shared | {"normalize_advantages": False}
    return shared | {
        "beta": kl * (ppo.samples - 1) / ppo.samples,
        "scale_rewards": "none",
        "loss_type": "dr_grpo",
        "importance_sampling_level": "token",
        "use_bias_correction_kl": True,
    }


def _check(resident: ResidentModel, config: Config) -> None:
    objective = config.local.objective
    if objective not in ("rloo", "grpo"):
        raise ConfigError(f"local.objective = '{objective}' is not one of rloo, grpo.")
    if config.ppo.samples < 2:
        raise ConfigError(
            f"local.objective = '{objective}' compares the texts of a question with each other: "
            "ppo.samples must be at least 2."
        )
    if config.ppo.kl_target:
        raise ConfigError(
            f"local.objective = '{objective}' keeps ppo.kl; set ppo.kl-target = 0, or use "
            "local.objective = 'ppo'."
        )
    check_device(resident)


@contextmanager
def _trainer(
    resident: ResidentModel,
    job: PolicyJob,
    config: Config,
    texts: _Texts,
    keeper: Any,
    replaced: Mapping[str, Any],
) -> Iterator[Any]:
    no_telemetry()
    import datasets

    if config.local.objective == "rloo":
        from trl.trainer.rloo_config import RLOOConfig as Arguments
        from trl.trainer.rloo_trainer import RLOOTrainer as Trainer
    else:
        from trl.trainer.grpo_config import GRPOConfig as Arguments  # type: ignore[assignment]
        from trl.trainer.grpo_trainer import GRPOTrainer as Trainer  # type: ignore[assignment]

    task = config.rewards.task

    class OwnPrompts(Trainer):
        """The trainer over prompts that are token ids; column ``prompt`` holds their number."""

        def _tokenize_prompts(self, prompts: list[str]) -> tuple[Any, None, Any]:
            asked = (texts.items[int(p)] for p in prompts)
            ids = [list(tasks.task_prompt(resident, task, i.question, i.options)) for i in asked]
            return ids, None, {}

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            scored = super()._generate_and_score_completions(inputs)
            resident.set_trainable()
            return scored

    def reward(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[Any]:
        asked = [texts.items[int(p)] for p in prompts]
        ends = end_tokens(resident)
        written = [tasks.decode(resident, task, tuple(c), c[-1] in ends) for c in completion_ids]
        scored = score_texts(config, texts.group, asked, written)
        texts.rewards.append(float(scored.rewards.mean()))
        texts.well_formed.append(float(scored.well_formed.mean()))
        lengths = (len(tasks.task_prompt(resident, task, i.question, i.options)) for i in asked)
        texts.tokens.append(sum(lengths) + sum(map(len, completion_ids)))
        return [float(r) for r in scored.rewards]

    texts.items, texts.group = learnable(job, config), job.group
    with trl_session(resident) as folder, _pads_kept(resident):
        trainer = OwnPrompts(
            model=resident.peft,
            reward_funcs=reward,
            args=Arguments(**(arguments(config, resident, folder) | dict(replaced))),
            train_dataset=datasets.Dataset.from_list([{"prompt": "0"}]),
            processing_class=resident.tokenizer,
            callbacks=[keeper],
        )
        yield prepared(trainer, resident)


@contextmanager
def _pads_kept(resident: ResidentModel) -> Iterator[None]:
    """Put the pad ids of tokenizer and model back afterwards."""
    tokenizer: Any = resident.tokenizer
    text_config = resident.network.config.get_text_config()
    generation: Any = resident.network.generation_config
    before = tokenizer.pad_token, text_config.pad_token_id, generation.pad_token_id
    try:
        yield
    finally:
        tokenizer.pad_token, text_config.pad_token_id, generation.pad_token_id = before


def _train_one(
    trainer: Any,
    resident: ResidentModel,
    job: PolicyJob,
    config: Config,
    seed: int,
    texts: _Texts,
    keeper: Any,
) -> TrainResult:
    import datasets
    from transformers import set_seed

    ppo = config.ppo
    items = learnable(job, config)
    vars(texts).update(vars(_Texts(items, job.group)))
    per_batch = ppo.minibatches * ppo.questions
    updates = ppo.minibatches * ppo.epochs
    batches = -(-job.steps // updates)
    order = islice(question_stream(len(items), seed, job.key), batches * per_batch)
    longest = max(tasks.max_new_tokens(resident, config.rewards.task, i.options) for i in items)

    resident.load(job.adapter)
    trainer.train_dataset = datasets.Dataset.from_list([{"prompt": str(k)} for k in order])
    trainer.args.learning_rate = job.learning_rate
    trainer.args.max_steps = job.steps
    trainer.args.seed = keyed_seed(seed, "trl-onpolicy", *job.key) % 2**31
    trainer.max_completion_length = trainer.generation_config.max_new_tokens = longest
    trainer.generation_kwargs["max_new_tokens"] = longest
    trainer.optimizer = None
    trainer.lr_scheduler = None
    trainer._step = 0
    trainer._buffered_inputs = None
    trainer._metrics["train"].clear()
    keeper.wanted, keeper.kept = job.snapshots, {}
    set_seed(trainer.args.seed)
    try:
        trainer.train()
    except RuntimeError as error:
        if NOT_FINITE not in str(error):
            raise
        return TrainResult(job.client, None, {}, trainer.state.global_step, "logits_not_finite")
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
        "grad_norm": _mean(logs, "grad_norm"),
        "reward": float(np.mean(texts.rewards)),
        "format_rate": float(np.mean(texts.well_formed)),
        "clip_fraction": _mean(logs, "clip_ratio/region_mean"),
        "tokens": sum(
            3 * n + n / ppo.minibatches * min(updates, job.steps - b * updates)
            for b, n in enumerate(texts.tokens)
        ),
    }
    if trainer.beta:
        summary["kl"] = _mean(logs, "kl") * _mean(logs, "completions/mean_length")
    return TrainResult(job.client, adapter, summary, len(losses), snapshots=keeper.kept)


def _mean(logs: Sequence[Mapping[str, Any]], name: str) -> float:
    """Return the mean over the steps that logged it; some do only when texts were sampled."""
    return float(np.mean([float(entry[name]) for entry in logs if name in entry]))
