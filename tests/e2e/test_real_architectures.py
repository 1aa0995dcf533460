"""Whole federated runs on the architectures of published models, small and with random weights.

Each goes through its packaged scenario, from a file in the layout of GlobalOpinionQA to an adapter
that plain PEFT loads.  What these do not show is how the published weights behave.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from clients.app import app
from clients.trainer import resident_trainer
from fedalign.config import Config
from fedalign.ledger import Ledger
from fedalign.runfolder import ADAPTER, LEDGER, prepare
from server.progress import LogProgress
from server.run import Outcome, execute
from simulations import scenario
from simulations.grid import InProcessGrid

COUNTRIES = ("Nigeria", "Egypt")
QUESTIONS = 16
# As Qwen3's: an answer without a thought is preceded by an empty one.
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]"
    "{% if enable_thinking is defined and enable_thinking is false %}-{% endif %}{% endif %}"
)
CASES = {
    "globalopinionqa-qwen3-0.6b": ("qwen3", {"chat": True, "dtype": "bfloat16"}),
    "globalopinionqa-llama-3.2-1b": ("llama", {"dtype": "float32", "checkpointing": "on"}),
    "globalopinionqa-gemma-2-2b": ("gemma2", {"dtype": "float32"}),
}


@pytest.fixture(scope="module")
def makers(root: Path) -> ModuleType:
    """The makers of tiny models and tokenizers that the unit tests use."""
    path = root / "tests" / "unit" / "conftest.py"
    spec = importlib.util.spec_from_file_location("tiny_models", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.set_num_threads(1)
    return module


def published(path: Path) -> Path:
    """Write questions in the published layout: Python's notation inside JSON."""
    rng = np.random.default_rng(0)
    lines = []
    for n in range(QUESTIONS):
        options = ["agree", "disagree", "pass"][: 2 + n % 2]
        shares = {c: rng.dirichlet(np.ones(len(options))).round(4).tolist() for c in COUNTRIES}
        for vector in shares.values():
            vector[-1] = round(1 - sum(vector[:-1]), 4)
        row = {
            "question": f"Is river {n} wide?",
            "selections": f"defaultdict(<class 'list'>, {shares})",
            "options": str(options),
            "source": "GAS",
        }
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def small(name: str, model: Path, data: Path, out: Path, **more: Any) -> Config:
    """Return a packaged scenario with its model and its size replaced, and nothing else."""
    return prepare(
        scenario.load(
            name,
            [
                f"data.path={data}",
                f"data.groups={'; '.join(COUNTRIES)}",
                f"model.name={model}",
                "model.device=cpu",
                f"model.dtype={more['dtype']}",
                f"model.gradient-checkpointing={more.get('checkpointing', 'auto')}",
                "model.rank=4",
                "model.alpha=8.0",
                "run.rounds=2",
                "local.steps=2",
                "local.batch-size=4",
                "local.learning-rate=0.01",
                "personal.steps=2",
                "score.min-option-mass=0.0",  # random weights put little on the letters
            ],
            {"run.out": str(out)},
        )
    )


def run(config: Config) -> Outcome:
    return execute(InProcessGrid(app, 1), config, LogProgress(), 0.001)


def check_outcome(config: Config, outcome: Outcome) -> None:
    """The run is complete, every score has an option mass, and plain PEFT loads the adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with Ledger(outcome.folder / LEDGER, readonly=True) as ledger:
        assert ledger.run()["status"] == "completed"
        for stage in ("base", "shared", "personal"):
            scores = list(ledger.scores(stage, "test"))
            assert {s.group for s in scores} == set(config.data.groups.split("; "))
            for score in scores:
                assert 0 <= score.score <= 1
                assert score.option_mass is not None
                assert 0 < score.option_mass < 1
    assert outcome.rounds == config.run.rounds
    assert outcome.report.stat().st_size > 1000
    folder = outcome.folder / ADAPTER
    tensors = load_file(folder / "adapter_model.safetensors")
    assert all(t.dtype == np.float32 for t in tensors.values())
    assert any(t.any() for n, t in tensors.items() if ".lora_B." in n)
    row = torch.tensor([[1, 9, 30, 31, 44]])
    base = AutoModelForCausalLM.from_pretrained(config.model.name, dtype="float32").eval()
    with torch.no_grad():
        before = base(input_ids=row).logits
        after = PeftModel.from_pretrained(base, folder).eval()(input_ids=row).logits
    assert torch.isfinite(after).all()
    assert not torch.equal(before, after)


@pytest.mark.parametrize("name", CASES)
def test_a_run_on_each_architecture(name: str, makers: ModuleType, tmp_path: Path) -> None:
    kind, more = CASES[name]
    model = makers.save_tiny(kind, tmp_path / "model")
    if more.get("chat"):
        tokenizer = makers.make_tokenizer(bos=False)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(model)
    config = small(name, model, published(tmp_path / "opinions.jsonl"), tmp_path / "run", **more)
    outcome = run(config)
    check_outcome(config, outcome)

    resident = resident_trainer(config).model  # the one that trained
    assert next(resident.network.parameters()).dtype == getattr(torch, str(more["dtype"]))
    assert resident.checkpointing == (more.get("checkpointing") == "on")
    assert config.model.chat_template == bool(more.get("chat"))
    prompts = [resident.tokenizer.decode(p.tokens) for p in resident.encoded.values()]
    assert len(prompts) == QUESTIONS
    end = "Answer:\n[assistant]-" if more.get("chat") else "Answer:"
    assert all(p.endswith(end) for p in prompts)


@pytest.mark.real_data
def test_any_local_folder_works(real_data: Path, tmp_path: Path) -> None:
    """The main job for one round on a small model that somebody else trained."""
    folder = real_data / "models" / "stories260k"
    if not folder.is_dir():
        pytest.skip(f"no model at {folder}")
    config = prepare(
        scenario.load(
            "default",
            [
                f"model.name={folder.resolve()}",
                "model.device=cpu",
                "run.rounds=1",
                "data.questions=24",
                "data.clients-per-group=1",
                "local.steps=2",
                "personal.steps=0",
                "score.min-option-mass=0.0",  # it writes stories and has never seen a survey
            ],
            {"run.out": str(tmp_path / "run")},
        )
    )
    outcome = run(config)
    with Ledger(outcome.folder / LEDGER, readonly=True) as ledger:
        assert ledger.run()["status"] == "completed"
        scores = list(ledger.scores("shared", "test"))
    assert {s.group for s in scores} == {"coast", "valley", "hills", "isles"}
    assert all(s.option_mass is not None and 0 < s.option_mass < 1 for s in scores)
    tensors = load_file(outcome.folder / ADAPTER / "adapter_model.safetensors")
    assert any(t.any() for n, t in tensors.items() if ".lora_B." in n)
    saved = json.loads((outcome.folder / ADAPTER / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == "stories260k"
