"""The published Polis export: read by column name, sign checked, what is left out counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedalign.config import DataConfig
from fedalign.data.load import load_dataset
from fedalign.data.polis_export import export_folders, read_export
from fedalign.data.rejects import Rejects
from fedalign.errors import DataError

PARTICIPANTS = """participant,group-id,n-comments,n-votes,n-agree,n-disagree,0,1,2
0,0,0,3,2,1,1,1,-1
1,0,0,2,1,1,1,-1,
2,1,0,3,0,1,0,-1,0
3,,0,1,1,0,1,,
"""
COMMENTS = """timestamp,comment-id,author-id,agrees,disagrees,moderated,comment-body
1,0,5,3,0,1,"More trees,
please"
2,1,5,1,2,0,Fewer cars
3,2,5,0,1,-1,Spam
"""
SUMMARY = 'topic,"Our town, tomorrow"\nurl,x\nconversation-description,What should change?\n'


def export(path: Path, participants: str = PARTICIPANTS) -> Path:
    folder = path / "town"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "participants-votes.csv").write_text(participants)
    (folder / "comments.csv").write_text(COMMENTS)
    (folder / "summary.csv").write_text(SUMMARY)
    return folder


def test_statements(tmp_path: Path) -> None:
    folder = export(tmp_path)
    rejects = Rejects()
    trees, cars = read_export(folder, rejects)
    assert trees.text == "More trees,\nplease"
    assert trees.prompt == "Our town, tomorrow\nWhat should change?"
    # The participant without a group is not counted; blank is not a pass.
    assert trees.votes == {"g0": (2, 0, 0), "g1": (0, 0, 1)}
    assert cars.votes == {"g0": (1, 1, 0), "g1": (0, 1, 0)}
    assert (cars.conversation, cars.sid, cars.source) == ("town", "1", f"{folder}/comments.csv:4")
    assert [r.reason for r in rejects.rows] == [
        "1 participants have no group.",
        "comment 2 was rejected by a moderator.",
    ]


def test_one_folder_or_a_folder_of_folders(tmp_path: Path) -> None:
    folder = export(tmp_path)
    assert export_folders(folder) == export_folders(tmp_path) == [folder]
    data = DataConfig(source="polis", path=str(tmp_path), form="survey", min_votes=2)
    dataset = load_dataset(data, 0)
    assert dataset.groups == ("town/g0",)
    assert len(dataset.items) == 2


def test_opposite_sign_is_refused(tmp_path: Path) -> None:
    turned = PARTICIPANTS.replace("2,1,1,1,-1", "1,2,1,1,-1", 1)
    assert turned != PARTICIPANTS
    folder = export(tmp_path, turned)
    with pytest.raises(DataError, match=r"participants-votes\.csv:2: 2 votes of 1 and 1 of -1"):
        read_export(folder, Rejects())
    folder = export(tmp_path, PARTICIPANTS.replace("1,1,-1\n", "1,1,5\n", 1))
    with pytest.raises(DataError, match=r"csv:2: comment 2: vote '5' is not"):
        read_export(folder, Rejects())


def test_topic_is_needed(tmp_path: Path) -> None:
    folder = export(tmp_path)
    (folder / "summary.csv").write_text("url,x\n")
    with pytest.raises(DataError, match="no line 'topic"):
        read_export(folder, Rejects())
