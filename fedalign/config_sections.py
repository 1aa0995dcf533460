"""The sections of the configuration: every setting, its default and its meaning.

The docstring under a field is its documentation; ``docs/configuration.md`` is made from them.
Allowed values and ranges are in ``config_rules.py``, reading and writing in ``config.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class RunConfig:
    """How the run goes: seeds, rounds, waiting, where the output goes."""

    mode: str = "adapters"
    """``adapters`` (clients train, the server aggregates) or ``rewards`` (the server trains a
    policy with PPO on rewards that groups give to its texts)."""
    name: str = "default"
    """Name of the run; part of the folder name when ``out`` is empty."""
    seed: int = 0
    """Draws group values, pairs, split, initial adapter, sampling. The pocket model is fixed."""
    rounds: int = 8
    """Rounds of training, at least 1; in mode ``rewards`` exchanges of rollouts for rewards."""
    out: str = ""
    """Run folder. Empty: a new folder under the user's data directory, printed at start and end."""
    resume: bool = False
    """Go on with the unfinished run in ``out``; without it a folder that holds a run is refused."""
    clients_per_round: int = 0
    """Clients sampled in each round; 0 takes all."""
    clients_per_message: int = 64
    """Logical clients that one message asks a node for; bounds the memory of a reply. Fewer are
    asked to train in one message where their updates would be more than 256 MB."""
    round_timeout: float = 3600.0
    """Seconds to wait for a phase or round; also the time to live of its messages."""
    quorum: float = 0.5
    """Least share of the asked clients whose replies must be usable, in (0, 1]."""
    max_attempts: int = 2
    """How often a round below quorum is tried before the run fails."""
    early_stop_patience: int = 0
    """Stop after this many rounds without a better validation value; 0 never stops early."""
    early_stop_on: str = "worst"
    """What early stop watches on validation: ``worst`` or ``average`` over groups."""


@dataclass(frozen=True)
class DataConfig:
    """Where preferences come from and how they are split and dealt to clients."""

    source: str = "synthetic"
    """``synthetic``, ``survey``, ``pairs``, ``globalopinionqa``, ``goqa``, ``polis``, or ``hf``."""
    path: str = ""
    """Absolute path of the file or folder (not for ``synthetic``); for ``hf`` the dataset name."""
    form: str = "auto"
    """``survey`` or ``pairs``; ``auto`` takes what the source gives (polis gives ``pairs``)."""
    hf_split: str = "train"
    """Split of the Hugging Face dataset to read."""
    world: str = "default"
    """Synthetic population: ``default`` (conflict, unequal sizes), ``balanced`` or ``many`` (50
    groups)."""
    groups: str = ""
    """Comma-separated groups to keep; empty keeps all. Use ``;`` where names hold commas."""
    max_groups: int = 0
    """Keep only this many groups, those with most questions; 0 keeps all."""
    questions: int = 0
    """Keep only this many questions, drawn by seed; 0 keeps all."""
    keep_nonresponse: bool = True
    """Keep options such as "don't know" where the source marks them."""
    min_votes: int = 5
    """Least votes for a polis cell to count."""
    skip_bad: bool = False
    """Count and list bad rows instead of stopping at the first."""
    validation: float = 0.2
    """Share of questions in validation."""
    test: float = 0.2
    """Share of questions in test; the rest is train."""
    partition: str = "group"
    """How a group's questions go to its clients: ``group`` (one client), ``sizes``,
    ``dirichlet`` or ``column``."""
    clients_per_group: str = "1"
    """One number for all groups, or ``name=3,other=1``."""
    dirichlet_alpha: float = 0.5
    """Concentration for ``dirichlet``; small is uneven. More than 0."""
    partition_column: str = ""
    """Column whose value names the client, for ``column``; a value belongs to one group."""


@dataclass(frozen=True)
class ModelConfig:
    """The frozen base model and the shape of the adapter."""

    name: str = "pocket"
    """``pocket``, a Hugging Face model name, or the absolute path of a model folder."""
    revision: str = ""
    """Revision of a hub model; empty takes the newest and records its hash."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N``."""
    dtype: str = "auto"
    """``auto`` (bfloat16 on GPU, float32 on CPU), ``float32`` or ``bfloat16``."""
    gradient_checkpointing: str = "auto"
    """``auto`` (on for models of 0.5 billion parameters and more), ``on`` or ``off``."""
    chat_template: bool = False
    """Wrap survey prompts in the tokenizer's chat template (instruction-tuned models)."""
    max_length: int = 1024
    """Longest prompt plus completion in tokens; longer rows are bad rows."""
    rank: int = 8
    """LoRA rank r."""
    alpha: float = 16.0
    """LoRA alpha; the update is alpha / r times B A."""
    targets: str = "all-linear"
    """Module-name suffixes to adapt, comma-separated, or ``all-linear``."""


@dataclass(frozen=True)
class LocalConfig:
    """Training on a client."""

    engine: str = "torch"
    """``torch`` (our loop) or ``trl`` (TRL's trainers; DPO with hard labels, RLOO, GRPO)."""
    objective: str = "dpo"
    """``dpo``, ``ppo`` (rewards of sampled texts, section ``ppo``), or with engine ``trl`` also
    ``rloo`` and ``grpo``."""
    loss: str = "sigmoid"
    """``sigmoid`` (DPO), ``ipo``, ``conservative`` or ``robust``."""
    beta: float = 1.0
    """Strength of the reference; 1 with no reference matches the group's distribution."""
    label_noise: float = 0.0
    """Assumed share of flipped labels, for ``conservative`` and ``robust``; in [0, 0.5)."""
    length_normalised: bool = True
    """Divide log-ratios by completion length in ``ipo``."""
    reference: str = "none"
    """``base``, ``none``, or the absolute path of a PEFT adapter folder of the same shape."""
    labels: str = "shares"
    """``shares`` (vote share of a pair) or ``hard`` (one drawn vote a pair)."""
    pairs_per_question: int = 6
    """Option pairs drawn from each survey question; 0 takes all."""
    steps: int = 12
    """Optimiser steps a round."""
    batch_size: int = 16
    """Prompts a step (each with all its pairs); pairs a step for engine ``trl``."""
    learning_rate: float = 0.006
    """AdamW learning rate in round 1."""
    schedule: str = "cosine"
    """Learning rate over rounds: ``cosine`` (to a tenth of the first) or ``constant``."""
    max_grad_norm: float = 1.0
    """Gradient clipping by global norm; 0 switches it off."""
    cohort_size: int = 0
    """Clients of a message trained as one batch; 0 takes what fits, 1 trains one after another."""
    threads: int = 0
    """Processor threads that train a cohort; 0: all cores in ``fedalign simulate``, else 1."""


@dataclass(frozen=True)
class WeightsConfig:
    """How much each group counts in the aggregate."""

    rule: str = "adaptive"
    """``uniform``, ``size``, ``adaptive``, ``worst``, ``afl``, ``qffl`` or ``placebo``."""
    temperature: float = 0.05
    """Softmax temperature of ``adaptive``, in units of the score."""
    decay: float = 0.0
    """History h <- decay * h + (1 - decay) * score, in [0, 1)."""
    floor: float = 0.2
    """Least weight of a group, in units of 1/n, in [0, 1]."""
    ceiling: float = 3.0
    """Largest weight, in units of 1/n, at least 1; never above (1 + 1/n) / 2."""
    step: float = 0.1
    """Step size of ``afl``."""
    q: float = 1.0
    """Exponent of ``qffl``; 0 is uniform."""
    within_group: str = "size"
    """How a group's weight goes to its clients: ``size`` (capped) or ``equal``."""


@dataclass(frozen=True)
class AggregationConfig:
    """How adapters are combined."""

    method: str = "product"
    """``product`` (exact, truncated once), ``frozen-a`` (exact), ``factor-mean`` (baseline)."""


@dataclass(frozen=True)
class WireConfig:
    """In how many bytes adapters travel in rounds of training. See ``docs/bytes.md``."""

    upload: str = "float32"
    """What clients send: ``float32`` (factors), ``bfloat16`` or ``int8`` (their change)."""
    download: str = "float32"
    """What clients get: ``float32``, ``bfloat16`` or ``int8``; the last two need a coarse upload.
    Scoring and the personal phase always get float32."""
    feedback: bool = False
    """Error feedback: a client keeps what rounding took and adds it in its next round. Needs a
    coarse upload and ``aggregation.method = frozen-a``."""


@dataclass(frozen=True)
class RewardsConfig:
    """What a sampled text is worth to a group, and how the groups' rewards become one."""

    task: str = "letter"
    """What the policy writes: ``letter`` (one answer), ``shares`` (the share of each option in
    tenths) or ``order`` (all options, most to least chosen). Scores follow the task."""
    score: str = "auto"
    """Reward of a text, in [0, 1]. ``letter``: ``log`` or ``share``. ``shares``:
    ``js_divergence``, ``js_distance``, ``wasserstein``, ``cosine``. ``order``: ``borda``,
    ``kendall``, ``binary``. ``auto``: log, js_divergence, borda."""
    floor: float = 0.01
    """Share below which ``log`` does not distinguish: r = 1 - ln(max(p, floor)) / ln(floor)."""
    malformed: float = 0.0
    """Reward of a text that is no answer, in [0, 1]; such texts are counted."""
    rule: str = "reweighted"
    """``mean``, ``min``, ``max``, ``literal`` (adaptive as published), ``scaled`` (its scale
    kept), ``reweighted``, ``soft-min``, ``mixture``, ``multiplicative``; controls ``mean-over-n``,
    ``mean-kl-n``, ``placebo``."""
    fairness_threshold: float = 0.99
    """``literal``, ``scaled`` and ``placebo`` take the plain mean where the fairness index of the
    rewards is at least this; above 1 they never do."""
    sharpness: float = -10.0
    """k of ``soft-min``, below 0: towards 0 the mean, towards minus infinity the minimum."""
    reference_correction: bool = False
    """Take kl * log pi_ref(text) off the reward of well-formed texts, so that the base's own
    preference among answers does not count."""
    prompts: str = ""
    """Absolute path of a file with questions and options (JSON lines) that the server samples
    answers to. Empty: the training questions of ``data``, without anybody's answers."""
    min_format_rate: float = 0.5
    """A run in whose exchange fewer texts are well formed is stopped as collapsed."""


@dataclass(frozen=True)
class PpoConfig:
    """Proximal policy optimisation, on the server or as a client's local objective."""

    kl: float = 0.2
    """Weight of the KL divergence from the base (nats a text) against the reward."""
    kl_target: float = 0.0
    """Nats a text at which a controller holds the divergence by moving ``kl``; 0 keeps ``kl``."""
    questions: int = 16
    """Questions in a minibatch."""
    samples: int = 8
    """Texts sampled for each question."""
    minibatches: int = 4
    """Minibatches in one exchange (or one local batch)."""
    epochs: int = 2
    """Passes over the minibatches of one exchange."""
    clip: float = 0.2
    """Clipping of the probability ratio."""
    value_clip: float = 0.2
    """Clipping of the value's change, in units of reward; 0 switches it off."""
    gamma: float = 1.0
    """Discount a token."""
    lam: float = 0.95
    """Lambda of generalised advantage estimation."""
    whiten: bool = True
    """Standardise advantages over each exchange."""
    learning_rate: float = 0.003
    """AdamW learning rate of the adapter; on the server it rises for 4 exchanges, then falls."""
    value_learning_rate: float = 0.01
    """AdamW learning rate of the value head."""
    max_grad_norm: float = 1.0
    """Gradient clipping by global norm; 0 switches it off."""
    max_clip_fraction: float = 0.8
    """No further update on an exchange once this share of ratios was clipped in one."""
    max_kl: float = 20.0
    """A run whose divergence exceeds this (nats a text) is stopped as collapsed."""


@dataclass(frozen=True)
class PredictorConfig:
    """The federated preference predictor: answers of a group to questions it never answered."""

    rounds: int = 60
    """Rounds of federated averaging before it is frozen."""
    steps: int = 8
    """Local optimiser steps a round."""
    width: int = 64
    """Width of the transformer."""
    layers: int = 2
    """Layers of the transformer."""
    heads: int = 4
    """Attention heads."""
    context: int = 60
    """Questions of the group that a prediction is made from."""
    targets: int = 40
    """Questions predicted in one training step."""
    loss: str = "cross-entropy"
    """``cross-entropy`` (ours) or ``gaussian`` (published)."""
    learning_rate: float = 0.002
    """AdamW learning rate, with a cosine over all steps of all rounds."""


@dataclass(frozen=True)
class SiteConfig:
    """What a site allows when it is asked for rewards."""

    answers: str = "shares"
    """What rewards are made from: ``shares`` (its true answers), ``predictor`` (the frozen
    predictor only) or ``both`` (true answers where it has them, else the predictor)."""
    rounding: float = 0.0
    """Rewards are rounded to multiples of this; 0 sends them exact."""
    query_budget: int = 0
    """Different texts a question that are ever answered; 0 sets no limit."""


@dataclass(frozen=True)
class ScoreConfig:
    """How well a group is served. One run uses one score."""

    metric: str = "auto"
    """Survey: ``js_divergence``, ``js_distance``, ``js_distance_base2``, ``wasserstein``,
    ``cosine``. Pairs: ``pair_accuracy``. Task ``order``: ``borda``, ``kendall``, ``binary``.
    ``auto``: js_divergence for survey data, borda for task ``order``."""
    samples: int = 8
    """Texts sampled for each question when tasks ``shares`` and ``order`` are scored."""
    items: bool = True
    """Send per-question test scores to the server (needed for the fairness index)."""
    seen: bool = False
    """Also score training questions at the base and at the end (what was *seen*); never used."""
    min_option_mass: float = 0.9
    """A run whose option mass ends below this counts as failed."""


@dataclass(frozen=True)
class PersonalConfig:
    """Local steps after the last round that never leave the client."""

    steps: int = 40
    """Personal steps from the final shared adapter; 0 skips the phase."""
    local_only: bool = True
    """Also train an adapter on local data alone: scored at the same number of steps, and at the
    client's total number of steps in the run."""
    learning_rate: float = 0.003
    """AdamW learning rate of the personal phase, constant."""


@dataclass(frozen=True)
class DeploymentConfig:
    """Real sites: who may take part, and how long to wait for them. Empty in a simulation."""

    registry: str = ""
    """Absolute path of the coordinator's registry of enrolled sites; empty: a simulation."""
    audit: str = ""
    """Absolute path of the coordinator's audit log; empty: events go to the ledger alone."""
    min_sites: int = 0
    """Least enrolled sites that must be online and willing before a run begins; 0: all of them."""
    wait: float = 300.0
    """Seconds to wait for that many sites to come online."""


@dataclass(frozen=True)
class Config:
    """The whole configuration of a run."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    local: LocalConfig = field(default_factory=LocalConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    aggregation: AggregationConfig = field(default_factory=AggregationConfig)
    wire: WireConfig = field(default_factory=WireConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    ppo: PpoConfig = field(default_factory=PpoConfig)
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    site: SiteConfig = field(default_factory=SiteConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    personal: PersonalConfig = field(default_factory=PersonalConfig)
    deployment: DeploymentConfig = field(default_factory=DeploymentConfig)
