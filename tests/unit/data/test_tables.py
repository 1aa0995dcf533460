"""Rows carry the place they came from, and malformed files say where they break."""

from __future__ import annotations

import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedalign.data.rejects import Rejects
from fedalign.data.tables import rows
from fedalign.errors import DataError


def test_jsonl_sources_skip_blank_lines_but_count_them(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"x": 1}\n\n{"x": 2}\n')
    assert [(r.source, r.number, r.values) for r in rows(file)] == [
        (f"{file}:1", 0, {"x": 1}),
        (f"{file}:3", 1, {"x": 2}),
    ]


def test_gzipped_jsonl(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"x": "\xc3\xa9"}\n'))
    assert [(r.source, r.values) for r in rows(file)] == [(f"{file}:1", {"x": "é"})]


def test_truncated_gzip_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"x": 1}\n' * 1000)[:-20])
    with pytest.raises(DataError, match="cannot be read"):
        list(rows(file))


def test_csv_row_with_newlines_in_a_cell_is_named_by_its_first_line(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('text,group\n"one\ntwo\nthree",a\n\nplain,b\n"x\ny",\n')
    assert [(r.source, r.values) for r in rows(file)] == [
        (f"{file}:2", {"text": "one\ntwo\nthree", "group": "a"}),
        (f"{file}:6", {"text": "plain", "group": "b"}),
        (f"{file}:7", {"text": "x\ny"}),
    ]


def test_csv_with_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b"\xef\xbb\xbftext\nx\n")
    assert [r.values for r in rows(file)] == [{"text": "x"}]


def test_parquet_rows(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": [1, 2], "v": [[0.5], [0.25]]}), file)
    assert [(r.source, r.values) for r in rows(file)] == [
        (f"{file}:row 1", {"x": 1, "v": [0.5]}),
        (f"{file}:row 2", {"x": 2, "v": [0.25]}),
    ]


def test_broken_parquet(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    file.write_bytes(b"PAR1 and nothing more")
    with pytest.raises(DataError, match=r"a\.parquet: not a readable Parquet file"):
        list(rows(file))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"x": [1, 2', "not valid JSON"),
        ('{"x": NaN}', "NaN is not a number that JSON allows"),
        ('{"x": -Infinity}', "-Infinity is not a number"),
        ('{"x": 1, "x": 2}', "key 'x' appears twice"),
        ('{"x": "\\ud83d"}', "lone surrogate"),
        ('{"x": ' + "1" * 5000 + "}", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "a row must be a JSON object, not list"),
    ],
)
def test_malformed_line_is_named_and_can_be_listed(tmp_path: Path, line: str, reason: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(f'{{"x": 0}}\n{line}\n{{"x": 3}}\n')
    with pytest.raises(DataError) as error:
        list(rows(file))
    assert str(error.value).startswith(f"{file}:2: ")
    assert reason in str(error.value)
    assert "--set data.skip-bad=true" in str(error.value)

    rejects = Rejects(skip=True)
    # The number of a row does not depend on the rows before it being good.
    assert [(r.number, r.values["x"]) for r in rows(file, rejects)] == [(0, 0), (2, 3)]
    assert [r.source for r in rejects.rows] == [f"{file}:2"]
    assert reason in rejects.rows[0].reason


def test_csv_of_wrong_width_and_open_quote(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('a,b\n1\n2,3\n"open,4\n5,6\n')
    rejects = Rejects(skip=True)
    assert [r.values for r in rows(file, rejects)] == [{"a": "2", "b": "3"}]
    assert [(r.source, r.reason.split(";")[0]) for r in rejects.rows] == [
        (f"{file}:2", "1 cells for 2 columns."),
        (f"{file}:4", "not valid CSV: unexpected end of data"),
    ]


def test_bytes_that_are_not_utf8_name_the_line(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b"a,b\n1,2\ncaf\xe9,3\n")
    with pytest.raises(DataError, match=r"a\.csv:3: not UTF-8"):
        list(rows(file))


def test_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"x": 2}\n')
    (tmp_path / "a.csv").write_text("x\n1\n")
    (tmp_path / "README.md").write_text("no data")
    assert [(r.number, r.values) for r in rows(tmp_path)] == [(0, {"x": "1"}), (1, {"x": 2})]


def test_path_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        list(rows(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match=r"no \.jsonl"):
        list(rows(tmp_path))
    (tmp_path / "a.xlsx").write_text("")
    with pytest.raises(DataError, match="cannot read this kind of file"):
        list(rows(tmp_path / "a.xlsx"))
