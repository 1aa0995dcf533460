"""What is said at the terminal when Flower's node ends."""

from __future__ import annotations

from pathlib import Path

from clients.node_log import NOT_CONNECTED, why

BEFORE = f"{NOT_CONNECTED}\nan older reason\n"


def log(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "supernode.log"
    path.write_text(BEFORE + text)
    return path


def test_the_reason_of_this_start_and_the_place(tmp_path: Path) -> None:
    path = log(tmp_path, f"INFO: x\n{NOT_CONNECTED}\n\x1b[91mThe clock is off.\nmore\n")
    said = why(path, len(BEFORE))
    assert said == f"[91mThe clock is off. ({path})"


def test_without_a_reason_only_the_place(tmp_path: Path) -> None:
    for text in ("", "INFO: all went well\n", f"{NOT_CONNECTED}\n"):
        path = log(tmp_path, text)
        assert why(path, len(BEFORE)) == f"why is in {path}"


def test_a_certificate_out_of_date_names_this_clock(tmp_path: Path) -> None:
    for words in ("certificate is not yet valid", "certificate has expired"):
        path = log(tmp_path, f"{NOT_CONNECTED}\n[SSL] certificate verify failed: {words} (x)\n")
        assert "This machine's clock says 20" in why(path, len(BEFORE))
