"""Files and tables that are broken: an error names the file and the line or row."""

import csv
import gzip
import json
import os

import pytest
import row_files
import zstandard
from row_files import RECORDS, as_arrow, as_arrow_table, as_dataset, as_frame, as_parquet

from autoregembed_rag.training.data import alignment_rows
from autoregembed_rag.training.sources import numbered_rows


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b'query,pos\nq,p\n"two\nlines",\n', "line 3: field 'pos' is empty"),
        (b'query,pos\n"two\nlines",p\nq\n', "line 4: 1 cells, but the header has 2"),
        (b"query,pos\nq,p\xff\n", "line 2: broken UTF-8"),
        (b'query,pos\nq,"p\n', "line 2: not CSV .*quote left open"),
        (b"Where is it?,There.\nq,p\n", "line 2: the fields There., Where is it. are no known schema"),
        (b"query,pos\n", "has no rows"),
        (b"\nquery,pos,neg,neg\nq,p,n,m\n", "line 2: two columns have the name 'neg'; rename or remove one"),
    ],
)
def test_a_bad_csv_line_is_named_by_the_line_it_begins_on(tmp_path, text, complaint):
    (tmp_path / "pairs.csv").write_bytes(text)
    with pytest.raises(ValueError, match=rf"pairs\.csv,? {complaint}"):
        alignment_rows(tmp_path / "pairs.csv")
    assert csv.field_size_limit() == 131072


def test_a_csv_cell_may_be_longer_than_the_csv_module_allows_by_default(tmp_path):
    (tmp_path / "pairs.csv").write_text("query,pos\nq," + "long " * 40_000)
    assert alignment_rows(tmp_path / "pairs.csv").lengths.tolist() == [200_001]


@pytest.mark.parametrize(
    "make", [as_dataset, as_frame, as_arrow_table, lambda folder: iter(RECORDS), as_parquet]
)
def test_a_bad_row_outside_a_text_file_is_named_by_row_number(tmp_path, monkeypatch, make):
    monkeypatch.setitem(RECORDS[1], "pos", "  ")
    with pytest.raises(ValueError, match="row 2: field 'pos' is empty"):
        alignment_rows(make(tmp_path))


def test_a_bad_text_in_an_arrow_table_is_named_by_row():
    pa = pytest.importorskip("pyarrow")
    texts = pa.array([b"fine", b"bad\xff"]).view(pa.string())
    with pytest.raises(ValueError, match="row 2: broken UTF-8"):
        alignment_rows(pa.table({"query": texts, "pos": ["a", "b"]}))


@pytest.mark.parametrize(
    ("make", "damage"),
    [
        (as_parquet, lambda data: data[:200] + b"\xff" * 300 + data[500:]),
        (as_parquet, lambda data: data[: len(data) // 2]),
        (as_arrow(stream=True), lambda data: data[: len(data) // 2]),
        (as_arrow(stream=False), lambda data: data[: len(data) // 2]),
        (as_arrow(stream=False), lambda data: data[:200] + b"\xff" * 300 + data[500:]),
    ],
)
def test_a_damaged_table_is_named(tmp_path, monkeypatch, make, damage):
    records = [{"query": f"q {i} {i * i}", "pos": f"p {i * 7}", "neg": f"n {i * 13}"} for i in range(200)]
    monkeypatch.setattr(row_files, "RECORDS", records)
    file = make(tmp_path)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=rf"{file.name} is damaged or cut off \(.*\); fetch it again"):
        alignment_rows(file)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_that_is_cut_off_is_an_error_and_not_fewer_rows(tmp_path, suffix):
    lines = "".join(json.dumps({"query": f"q{i}", "pos": os.urandom(200).hex()}) + "\n" for i in range(2000))
    pack = gzip.compress if suffix == ".gz" else zstandard.ZstdCompressor().compress
    file = tmp_path / f"pairs.jsonl{suffix}"
    file.write_bytes(pack(lines.encode())[:-100])
    with pytest.raises(ValueError, match=r"pairs\.jsonl\.\w+ is damaged or cut off .*; fetch it again"):
        alignment_rows(file)
    with pytest.raises(ValueError, match="damaged or cut off"):
        list(numbered_rows(file))
    file.write_bytes(b"not compressed at all")
    with pytest.raises(ValueError, match="damaged or cut off"):
        alignment_rows(file)
