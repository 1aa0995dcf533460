"""The model card: valid front matter, every group, no path."""

from __future__ import annotations

import yaml

from fedalign.ledger import Ledger
from fedalign.report.card import model_card
from fedalign.runfolder import LEDGER


def card(folder) -> str:
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        return model_card(ledger)


def front_matter(text: str) -> dict:
    _, head, _ = text.split("---\n", 2)
    return yaml.safe_load(head)


def test_front_matter_and_groups(run_folder):
    text = card(run_folder())
    head = front_matter(text)
    assert head["base_model"] == "fedalign pocket (trained from scratch)"
    assert head["library_name"] == "peft"
    assert {"lora", "federated-learning"} <= set(head["tags"])
    assert "licence" in head["license_name"]
    for group in ("Coast", "Highland", "River & Lakes", "Far North"):
        assert f"| {group} |" in text
    assert "| `weights.rule` | adaptive |" in text


def test_a_hub_name_stays_and_a_local_folder_shows_its_last_part(run_folder):
    hub = card(run_folder(config={"model.name": "owner/tiny-llama"}))
    assert front_matter(hub)["base_model"] == "owner/tiny-llama"
    assert 'from_pretrained("owner/tiny-llama")' in hub
    local = card(
        run_folder(config={"model.name": "/home/x/tiny", "local.reference": "/home/x/ref"})
    )
    assert front_matter(local)["base_model"] == "tiny"
    assert "/home" not in local


def test_names_from_data_break_no_table(run_folder):
    names = ("a|b", "<b>bold</b>", "two\nlines", "[link](x)")
    text = card(run_folder(names=names))
    rows = [line for line in text.splitlines() if "a\\|b" in line and line.startswith("|")]
    assert len(rows) == 1
    assert "<b>" not in text
    assert "| two lines |" in text


def test_a_failed_run_says_so(run_folder):
    assert "**Failed: round 5 missed its quorum twice.**" in card(run_folder(status="failed"))
    assert "not defined: the groups share no comparison" in card(run_folder(optimum=False))


def test_an_empty_ledger_has_a_card(tmp_path):
    Ledger(tmp_path / LEDGER).close()
    assert front_matter(card(tmp_path))["library_name"] == "peft"
