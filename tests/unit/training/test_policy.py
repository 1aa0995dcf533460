"""The policy: exact ratios, exact resume, one update against a plain one."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedalign.config import ModelConfig, PpoConfig
from fedalign.errors import DataError, RunFailed
from fedalign.models.base import ResidentModel
from fedalign.models.layout import size
from fedalign.training import policy as module
from fedalign.training import ppo
from fedalign.training.generate import generate
from fedalign.training.policy import (
    Episodes,
    Measured,
    PolicyState,
    controlled_kl,
    improve,
    measure,
    start,
)

SETTINGS = PpoConfig(questions=3, samples=4, minibatches=2, epochs=2, kl=0.1, learning_rate=5e-3)


def texts(prompts: int = 6, samples: int = 4, seed: int = 0, longest: int = 5) -> Episodes:
    """Return random texts of 1 to ``longest`` tokens to random prompts."""
    rng = np.random.default_rng(seed)
    made = [(1, *rng.integers(3, 250, size=rng.integers(4, 12)).tolist()) for _ in range(prompts)]
    return Episodes(
        tuple(p for p in made for _ in range(samples)),
        tuple(
            tuple(rng.integers(3, 250, size=rng.integers(1, longest + 1)).tolist())
            for _ in range(prompts * samples)
        ),
    )


def scores_of(episodes: Episodes) -> np.ndarray:
    """Return a fixed score in [0, 1) for each text."""
    return np.array([(sum(r) % 97) / 97 for r in episodes.responses])


def begin(resident, tiny, b: float = 0.0, settings: PpoConfig = SETTINGS) -> PolicyState:
    return start(resident, tiny.start(resident, b=b), settings, settings.kl)


def step(resident, state, episodes, settings=SETTINGS, key=(1,), seed=0, scores=None, **options):
    scores = scores_of(episodes) if scores is None else scores
    found = measure(resident, state, episodes)
    return improve(resident, state, episodes, found, scores, settings, seed, key, **options)


def same(a: PolicyState, b: PolicyState) -> bool:
    x, y = a.arrays(), b.arrays()
    return x.keys() == y.keys() and all(x[k].tobytes() == y[k].tobytes() for k in x)


def test_measured_numbers_are_those_of_one_plain_pass_a_text(resident, tiny) -> None:
    state = begin(resident, tiny, b=0.3)
    rng = np.random.default_rng(1)
    head = rng.normal(size=state.value_head.shape).astype(np.float32)
    state = replace(state, value_head=head)
    episodes = texts()
    got = measure(resident, state, episodes)
    for k, (prompt, text) in enumerate(zip(episodes.prompts, episodes.responses, strict=True)):
        n = len(text)
        assert got.mask[k].tolist() == [t < n for t in range(got.mask.shape[1])]
        row = torch.tensor([[*prompt, *text]])
        at = slice(len(prompt) - 1, len(prompt) + n - 1)
        with torch.inference_mode():
            trunk = resident.network.model(input_ids=row).last_hidden_state[0, at]
            logps = resident.network(input_ids=row).logits[0, at].log_softmax(-1)
            with resident.reference("base"):
                base = resident.network(input_ids=row).logits[0, at].log_softmax(-1)
        own = logps[range(n), text]
        np.testing.assert_allclose(got.old_logps[k, :n], own, atol=2e-5)
        np.testing.assert_allclose(got.ref_logps[k, :n], base[range(n), text], atol=2e-5)
        value = trunk.numpy() @ head[:-1] / math.sqrt(trunk.shape[1]) + head[-1]
        np.testing.assert_allclose(got.values[k, :n], value, atol=2e-5)
        entropy = torch.distributions.Categorical(logits=logps).entropy()
        np.testing.assert_allclose(got.entropy[k, :n], entropy, atol=2e-5)
        assert got.kl[k] == pytest.approx(float((own - base[range(n), text]).sum()), abs=1e-4)
        assert got.ref_text_logps[k] == pytest.approx(float(base[range(n), text].sum()), abs=1e-4)
        for table in (got.old_logps, got.ref_logps, got.values, got.entropy):
            assert not table[k, n:].any()


def test_with_b_zero_policy_and_reference_are_the_same_bits(resident, tiny) -> None:
    got = measure(resident, begin(resident, tiny), texts())
    assert got.old_logps.tobytes() == got.ref_logps.tobytes()
    assert not got.kl.any()
    assert not got.values.any()
    assert np.abs(got.old_logps[got.mask]).min() > 0


@pytest.mark.parametrize(("minibatches", "tolerance"), [(1, 0.0), (2, 1e-5)])
def test_the_first_ratio_is_one(resident, tiny, monkeypatch, minibatches, tolerance) -> None:
    """Bit for bit where the minibatch has the shape of the measuring pass."""
    differences: list[float] = []
    plain = ppo.policy_loss

    def watched(logps, old_logps, advantages, mask, clip):
        differences.append(float(torch.where(mask, logps - old_logps, 0.0).detach().abs().max()))
        return plain(logps, old_logps, advantages, mask, clip)

    monkeypatch.setattr(ppo, "policy_loss", watched)
    settings = replace(SETTINGS, questions=6 // minibatches, minibatches=minibatches, epochs=2)
    step(resident, begin(resident, tiny, b=0.3), texts(), settings)
    assert differences[0] <= tolerance
    assert differences[minibatches] > 1e-4  # the second epoch has moved


def test_letters_of_a_prompt_share_one_row(resident, tiny) -> None:
    rows: list[int] = []
    hook = resident.network.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        never = replace(SETTINGS, max_clip_fraction=1.0)
        step(resident, begin(resident, tiny), texts(longest=1), never)
    finally:
        hook.remove()
    assert rows == [6, 6, 3, 3, 3, 3]  # policy, reference; two epochs of two minibatches


@pytest.mark.parametrize("whiten", [True, False])
def test_updates_equal_a_plain_loop_over_texts(resident, tiny, whiten) -> None:
    """One text at a time, advantages over lists, the library's AdamW on PEFT's own parameters."""
    settings = replace(SETTINGS, whiten=whiten, max_grad_norm=0.05, kl=0.3, epochs=2, clip=0.05)
    settings = replace(settings, questions=6, minibatches=1, value_clip=0.02, max_clip_fraction=1.0)
    state, episodes = begin(resident, tiny, b=0.2, settings=settings), texts()
    scores = scores_of(episodes)
    found = measure(resident, state, episodes)
    got, metrics = improve(resident, state, episodes, found, scores, settings, 0, (1,))

    advantages, returns = [], []
    for k, text in enumerate(episodes.responses):
        n = len(text)
        r = [-0.3 * float(found.old_logps[k, t] - found.ref_logps[k, t]) for t in range(n)]
        r[-1] += scores[k]
        a = [0.0] * (n + 1)
        for t in reversed(range(n)):
            later = float(found.values[k, t + 1]) if t + 1 < n else 0.0
            a[t] = r[t] + later - float(found.values[k, t]) + settings.lam * a[t + 1]
        advantages.append(a[:n])
        returns.append([a[t] + float(found.values[k, t]) for t in range(n)])
    flat = np.concatenate(advantages)
    if whiten:
        advantages = [[(x - flat.mean()) / flat.std() for x in a] for a in advantages]
    resident.load(state.adapter)
    factors = [p for p in resident.peft.parameters() if p.requires_grad]
    head = torch.zeros(len(state.value_head), requires_grad=True)
    policy_step = torch.optim.AdamW(factors, lr=5e-3, weight_decay=0.0)
    value_step = torch.optim.AdamW([head], lr=settings.value_learning_rate, weight_decay=0.0)
    for _ in range(2):
        losses, errors = [], []
        for k, (prompt, text) in enumerate(zip(episodes.prompts, episodes.responses, strict=True)):
            row = torch.tensor([[*prompt, *text[:-1]]])
            at = slice(len(prompt) - 1, None)
            logps = resident.network(input_ids=row).logits[0, at].log_softmax(-1)
            trunk = resident.network.model(input_ids=row).last_hidden_state[0, at].detach()
            for t, token in enumerate(text):
                ratio = torch.exp(logps[t, token] - float(found.old_logps[k, t]))
                a = advantages[k][t]
                losses.append(-torch.minimum(ratio * a, ratio.clamp(0.95, 1.05) * a))
                value = trunk[t] @ head[:-1] / math.sqrt(trunk.shape[1]) + head[-1]
                old = float(found.values[k, t])
                bounded = old + (value - old).clamp(-0.02, 0.02)
                target = returns[k][t]
                errors.append(torch.maximum((value - target) ** 2, (bounded - target) ** 2) / 2)
        for p in (*factors, head):
            p.grad = None
        (torch.stack(losses).mean() + torch.stack(errors).mean()).backward()
        torch.nn.utils.clip_grad_norm_(factors, 0.05)
        policy_step.step()
        value_step.step()
    assert metrics["updates"] == 2
    np.testing.assert_allclose(got.adapter, resident.read(), atol=5e-5)  # of an update of 1e-2
    np.testing.assert_allclose(got.value_head, head.detach(), atol=2e-5)
    assert np.abs(got.adapter - state.adapter).max() > 5e-3
    assert metrics["clip-fraction-max"] > 0.05


def test_five_exchanges_are_two_and_three_more_after_a_stop(resident, tiny, tmp_path) -> None:
    from safetensors.numpy import load_file, save_file

    settings = replace(SETTINGS, kl_target=0.01)
    straight = begin(resident, tiny, settings=settings)
    first = straight.kl
    for t in range(5):
        straight, _ = step(resident, straight, texts(seed=t), settings, key=(t,))
        if t == 1:
            save_file(dict(straight.arrays()), tmp_path / "state.safetensors")
    resident.load(tiny.start(resident, seed=9, b=1.0))  # whatever was loaded meanwhile
    resumed = PolicyState.from_arrays(load_file(tmp_path / "state.safetensors"))
    for t in range(2, 5):
        resumed, _ = step(resident, resumed, texts(seed=t), settings, key=(t,))
    assert same(straight, resumed)
    assert straight.kl != first
    assert straight.moments["adapter_steps"].tolist() == [20]
    assert {str(a.dtype) for a in straight.arrays().values()} == {"float32", "int64"}


def test_arrays_that_are_no_state_are_refused(resident, tiny) -> None:
    arrays = begin(resident, tiny).arrays()
    del arrays["head_steps"]
    with pytest.raises(DataError, match=r"differs in head_steps, odd\."):
        PolicyState.from_arrays({**arrays, "odd": np.zeros(1)})


def test_same_seed_same_bits_and_the_given_state_stays(resident, tiny) -> None:
    state, episodes = begin(resident, tiny), texts()
    before = {name: array.copy() for name, array in state.arrays().items()}
    a, b, c = (step(resident, state, episodes, seed=s)[0] for s in (0, 0, 1))
    assert same(a, b)
    assert not same(a, c)
    assert all(np.array_equal(before[name], array) for name, array in state.arrays().items())
    assert np.array_equal(resident.read(), c.adapter)


def test_minibatches_hold_each_prompt_once_an_epoch() -> None:
    settings = replace(SETTINGS, questions=4, epochs=3)
    parts = module.minibatches(10, settings, 0, (1, "x"))
    assert [len(p) for p in parts] == [4, 3, 3] * 3
    for epoch in range(3):
        assert sorted(k for p in parts[3 * epoch : 3 * epoch + 3] for k in p) == list(range(10))
    assert parts[:3] != parts[3:6]
    assert parts == module.minibatches(10, settings, 0, (1, "x"))


def test_texts_that_nobody_scored_take_no_part(resident, tiny) -> None:
    state, episodes = begin(resident, tiny, b=0.2), texts()
    scores = scores_of(episodes)
    scores[[0, 5, 6, 20, 21, 22, 23]] = np.nan  # the last prompt with all its texts
    kept = [k for k in range(len(scores)) if not np.isnan(scores[k])]
    some = Episodes(
        tuple(episodes.prompts[k] for k in kept), tuple(episodes.responses[k] for k in kept)
    )
    settings = replace(SETTINGS, questions=6, minibatches=1)
    got, metrics = step(resident, state, episodes, settings, scores=scores)
    expected, plain = step(resident, state, some, settings, scores=scores[kept])
    np.testing.assert_allclose(got.adapter, expected.adapter, atol=1e-5)
    np.testing.assert_allclose(got.value_head, expected.value_head, atol=1e-5)
    assert metrics["unscored"] == 7
    assert metrics["updated-tokens"] == plain["updated-tokens"]
    assert metrics["reward"] == pytest.approx(scores[kept].mean())


def test_passes_do_not_change_the_update(resident, tiny, monkeypatch) -> None:
    import fedalign.training.batch as batch

    state, episodes = begin(resident, tiny, b=0.2), texts()
    whole, metrics = step(resident, state, episodes)
    monkeypatch.setattr(batch, "ROW_TOKENS", 40)
    parts, other = step(resident, state, episodes)
    np.testing.assert_allclose(parts.adapter, whole.adapter, atol=5e-5)
    for name, value in metrics.items():
        assert other[name] == pytest.approx(value, abs=1e-4), name


def test_an_exchange_stops_once_too_many_ratios_were_clipped(resident, tiny) -> None:
    settings = replace(SETTINGS, epochs=4, learning_rate=0.05, max_clip_fraction=0.3)
    _, metrics = step(resident, begin(resident, tiny), texts(), settings)
    assert 1 < metrics["updates"] < 8
    assert metrics["clip-fraction-max"] > 0.3
    never = replace(settings, max_clip_fraction=1.0)
    assert step(resident, begin(resident, tiny), texts(), never)[1]["updates"] == 8


def test_values_are_learnt_and_do_not_bend_the_policy(resident, tiny) -> None:
    state, episodes = begin(resident, tiny), texts()
    first, last = [], []
    for t in range(30):
        state, metrics = step(resident, state, episodes, key=(t,), learning_rate=0.0)
        first.append(metrics["value-loss-first"])
        last.append(metrics["explained-variance"])
    assert np.array_equal(state.adapter, begin(resident, tiny).adapter)  # moments alone moved
    assert first[-1] < first[0] / 4
    assert last[-1] > max(0.0, last[0])
    assert state.moments["adapter_steps"].tolist() == [120]


def test_explained_variance_is_left_out_where_returns_do_not_vary(resident, tiny) -> None:
    settings = replace(SETTINGS, lam=1.0)
    episodes = texts()
    _, metrics = step(
        resident, begin(resident, tiny), episodes, settings, scores=np.full(24, 0.5), kl_factor=0.0
    )
    assert "explained-variance" not in metrics
    assert metrics["reward"] == 0.5


def test_the_controller_is_the_published_one(resident, tiny) -> None:
    held = replace(SETTINGS, kl_target=2.0, minibatches=4)
    assert controlled_kl(0.1, 3.0, held) == pytest.approx(0.1 * 1.02**4)
    assert controlled_kl(0.1, 2.2, held) == pytest.approx(0.1 * 1.01**4)
    assert controlled_kl(0.1, 0.0, held) == pytest.approx(0.1 * 0.98**4)
    assert controlled_kl(1 / 3, 3.0, SETTINGS) == 1 / 3
    state = begin(resident, tiny, b=0.2)
    after, metrics = step(resident, state, texts(), kl_factor=4.0)
    assert metrics["kl-coefficient"] == 4 * state.kl
    assert after.kl == state.kl
    bold = replace(SETTINGS, kl=0.4)
    four, _ = step(resident, begin(resident, tiny, b=0.2, settings=bold), texts(), bold)
    assert np.array_equal(after.adapter, four.adapter)


def test_frozen_a_stays_bit_for_bit(llama_folder, tiny) -> None:
    config = ModelConfig(name=str(llama_folder), rank=4, alpha=8.0, device="cpu")
    resident = ResidentModel(config, frozen_a=True)
    state = begin(resident, tiny)
    after, _ = step(resident, state, texts())
    for name, before in resident.unpack(state.adapter).items():
        assert np.array_equal(before, resident.unpack(after.adapter)[name]) == (".lora_A." in name)


def test_a_bfloat16_base_works(llama_folder, tiny) -> None:
    config = ModelConfig(name=str(llama_folder), rank=4, alpha=8.0, device="cpu", dtype="bfloat16")
    resident = ResidentModel(config)
    state = begin(resident, tiny)
    episodes = Episodes(
        tuple(p for p in texts().prompts),
        tuple(t for t, _ in generate(resident, list(dict.fromkeys(texts().prompts)), 4, 5, 0)),
    )
    after, metrics = step(resident, state, episodes)
    assert metrics["kl"] == 0.0
    assert all(map(math.isfinite, metrics.values()))
    assert np.abs(after.adapter - state.adapter).max() > 1e-3


def test_what_is_not_finite_stops_the_run(resident, tiny) -> None:
    state, episodes = begin(resident, tiny), texts()
    found = measure(resident, state, episodes)
    scores = scores_of(episodes)
    for bad, message in ((np.inf, "1 scores are infinite"), (np.nan, "none of the 24")):
        wrong = scores.copy()
        wrong[slice(None) if np.isnan(bad) else 3] = bad
        with pytest.raises(RunFailed, match=message):
            improve(resident, state, episodes, found, wrong, SETTINGS, 0, (1,))
    huge = replace(state, adapter=tiny.start(resident, b=1.0) * np.float32(1e25))
    with pytest.raises(RunFailed, match="not finite"):
        measure(resident, huge, episodes)
    with pytest.raises(RunFailed, match=r"update 1 .*Lower ppo\.learning-rate"):
        improve(resident, huge, episodes, found, scores, SETTINGS, 0, (1,))
    wild = replace(SETTINGS, learning_rate=1e30)
    with pytest.raises(RunFailed, match=r"not finite|update 2"):
        improve(resident, state, episodes, found, scores, wild, 0, (1,))


def test_bad_input_is_refused(resident, tiny) -> None:
    adapter = tiny.start(resident)
    with pytest.raises(DataError, match="all zeros"):
        start(resident, np.zeros(size(resident.layout), np.float32), SETTINGS, 0.1)
    with pytest.raises(DataError, match="at least 0"):
        start(resident, adapter, SETTINGS, math.nan)
    with pytest.raises(DataError, match="cannot be controlled"):
        start(resident, adapter, replace(SETTINGS, kl_target=1.0), 0.0)
    for prompts, responses in (((), ()), (((1,),), ()), (((1,),), ((),)), (((),), ((1,),))):
        with pytest.raises(DataError):
            Episodes(prompts, responses)
    state, episodes = begin(resident, tiny), texts()
    with pytest.raises(DataError, match=r"shape \(3,\) for 24 texts"):
        step(resident, state, episodes, scores=np.zeros(3))


def test_measured_tables_are_summed_over_tokens() -> None:
    mask = np.array([[True, False], [True, True]])
    old = np.array([[-1.0, 0.0], [-2.0, -1.0]], np.float32)
    ref = np.array([[-1.5, 0.0], [-1.0, -1.0]], np.float32)
    found = Measured(old, ref, np.zeros_like(old), np.zeros_like(old), mask)
    assert found.kl.tolist() == [0.5, -1.0]
    assert found.ref_text_logps.tolist() == [-1.5, -2.0]
