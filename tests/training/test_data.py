import gc
import gzip
import json
import os
import pickle
import re
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from row_files import (
    EXPECTED,
    RECORDS,
    as_arrow,
    as_arrow_table,
    as_csv_gz,
    as_dataset,
    as_file,
    as_frame,
    as_list_of_files,
    as_parquet,
    jsonl,
    write_table,
)

from autoregembed_rag.training.data import AlignmentRow, CompressionRow, alignment_rows, compression_rows
from autoregembed_rag.training.sources import numbered_rows

SOURCES = {
    "jsonl": as_file(".jsonl", bytes),
    "path as text": lambda folder: str(as_file(".jsonl", bytes)(folder)),
    "jsonl with a byte order mark and CRLF": as_file(
        ".jsonl", lambda b: b"\xef\xbb\xbf" + b.replace(b"\n", b"\r\n\r\n")
    ),
    "gz": as_file(".jsonl.gz", gzip.compress),
    "zst": as_file(".jsonl.zst", zstandard.ZstdCompressor().compress),
    "zst of two frames": as_file(
        ".zst", lambda b: b"".join(map(zstandard.ZstdCompressor().compress, (b[:50], b[50:])))
    ),
    "csv": lambda folder: write_table(folder / "rows.csv", RECORDS, ","),
    "tsv": lambda folder: write_table(folder / "rows.tsv", RECORDS, "\t"),
    "csv.gz": as_csv_gz,
    "endings in capitals": lambda folder: as_csv_gz(folder).rename(folder / "ROWS.CSV.GZ"),
    "other endings in capitals": lambda folder: [
        as_file(".JSONL.ZST", zstandard.ZstdCompressor().compress)(folder)
    ],
    "parquet in capitals": lambda folder: as_parquet(folder).rename(folder / "ROWS.PARQUET"),
    "parquet": as_parquet,
    "arrow file": as_arrow(stream=False),
    "arrow stream": as_arrow(stream=True),
    "list of files": as_list_of_files,
    "dataset": as_dataset,
    "streaming dataset": lambda folder: as_dataset(folder).to_iterable_dataset(),
    "pandas": as_frame,
    "pyarrow": as_arrow_table,
    "list of mappings": lambda folder: RECORDS,
    "tuple of rows": lambda folder: tuple(EXPECTED),
    "generator": lambda folder: (dict(record) for record in RECORDS),
    "generator of rows": lambda folder: iter(EXPECTED),
    "published by sentence-transformers": lambda folder: [
        dict(zip(("anchor", "positive", "negative"), r.values(), strict=True)) for r in RECORDS
    ],
    "published by SimCSE": lambda folder: write_table(
        folder / "nli_for_simcse.csv",
        [dict(zip(("sent0", "sent1", "hard_neg"), r.values(), strict=True)) for r in RECORDS],
        ",",
    ),
}


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
def test_every_source_gives_the_same_rows_lengths_and_digest(tmp_path, make):
    rows = alignment_rows(make(tmp_path))
    assert list(rows) == EXPECTED
    assert [rows[i] for i in (2, 0, -2)] == [EXPECTED[2], EXPECTED[0], EXPECTED[1]]
    assert rows[1:] == EXPECTED[1:]
    assert rows.lengths.tolist() == [41, 22, 3]
    assert rows.lengths.dtype == np.int32
    assert rows.digest == alignment_rows(EXPECTED).digest
    for beyond in (3, -4):
        with pytest.raises(IndexError, match="of 3"):
            rows[beyond]
    assert alignment_rows(rows) is rows


@pytest.mark.parametrize("names", [("context", "instruction", "output"), ("input", "prompt", "answer")])
def test_compression_rows_read_their_own_and_the_published_pwc_fields(names):
    rows = compression_rows([dict(zip(names, "abc", strict=True)) | {"extra": 1}])
    assert list(rows) == [CompressionRow("a", "b", "c")]


def test_negatives_may_be_missing_one_text_a_list_or_numbered():
    records = [
        {"query": "q", "pos": "p"},
        {"query": "q", "pos": "p", "neg": None},
        {"query": "q", "pos": "p", "neg": "n"},
        {"query": "q", "pos": "p", "neg": ["a", "b"]},
    ]
    assert [row.neg for row in alignment_rows(iter(records))] == [(), (), ("n",), ("a", "b")]
    numbered = [{"anchor": "q", "positive": "p", "negative_1": "a", "negative_2": "b", "negative_note": "x"}]
    assert alignment_rows(numbered)[0] == AlignmentRow("q", "p", ("a", "b"))


def test_missing_negatives_in_tables_are_no_negatives(tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {"query": ["q", "r", "s"], "pos": ["p"] * 3, "neg": [float("nan"), np.array(["a", "b"]), "n"]}
    )
    assert [row.neg for row in alignment_rows(frame)] == [(), ("a", "b"), ("n",)]
    (tmp_path / "pairs.csv").write_text("query,pos,neg\nq,p,\nr,p,n\n")
    assert [row.neg for row in alignment_rows(tmp_path / "pairs.csv")] == [(), ("n",)]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"{not json", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"query": ' + b"1" * 5000 + b"}", "not JSON"),
        (b"[1, 2]", "a JSON object is needed, not list"),
        (b'{"query": "q\xff", "pos": "p"}', "broken UTF-8 .*at byte 12"),
        (b'{"query": "q"}', "field 'pos' is missing; the row has query"),
        (b'{"query": "q", "pos": 3}', "field 'pos' must be a text, not int"),
        (b'{"query": "q", "pos": null}', "field 'pos' is empty"),
        (b'{"query": "\\u2003\\n", "pos": "p"}', "field 'query' is empty"),
        (b'{"query": "q", "pos": "p", "neg": 5}', "field 'neg' must be a text or a list of texts, not int"),
        (b'{"query": "q", "pos": "p", "neg": ""}', "field 'neg' is empty"),
        (b'{"query": "q", "pos": "p", "neg": ["a", null]}', r"field 'neg\[1\]' is empty"),
        (b'{"query": "q", "pos": "p", "neg": ["a", 3]}', r"field 'neg\[1\]' must be a text, not int"),
        (b'{"query": "q", "pos": " q\\n"}', "field 'pos' is the same text as 'query'"),
        (b'{"query": "q", "pos": "p", "neg": ["a", "p "]}', r"field 'neg\[1\]' is the same text as 'pos'"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_bad_line_is_named_by_file_line_and_field(tmp_path, line, complaint, suffix):
    file = tmp_path / f"pairs{suffix}"
    lines = b'{"query": "q", "pos": "p"}\n\n' + line + b"\n"
    file.write_bytes(gzip.compress(lines) if suffix.endswith(".gz") else lines)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(file))}, line 3: {complaint}"):
        alignment_rows(file)
    with pytest.raises(ValueError, match=r"none of 1 rows is valid|no known schema|line 1: not JSON"):
        file.write_bytes(gzip.compress(line) if suffix.endswith(".gz") else line)
        alignment_rows(file, skip_invalid=True)


def test_unknown_fields_are_named_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"row 1: the fields question, text are no .*query, pos, neg; anchor, positive"
    ):
        alignment_rows([{"question": "q", "text": "t"}])
    with pytest.raises(ValueError, match="row 2: field 'query' is missing; the row has anchor, positive"):
        alignment_rows([{"query": "q", "pos": "p"}, {"anchor": "q", "positive": "p"}])


def test_one_error_names_the_first_five_bad_rows_of_all_files_and_counts_the_rest(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl([RECORDS[0], {"query": "q"}, {"query": "q", "pos": ""}]))
    (tmp_path / "b.jsonl").write_bytes(jsonl([RECORDS[0]]) + b"\nx" * 5)
    with pytest.raises(ValueError, match=r"^7 of 9 rows are invalid; mend or .*--skip-invalid\):") as error:
        alignment_rows([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    places = re.findall(r"(\w)\.jsonl, line (\d)", str(error.value))
    assert places == [("a", "2"), ("a", "3"), ("b", "2"), ("b", "3"), ("b", "4")]


def test_invalid_rows_are_left_out_on_request_and_counted(tmp_path, caplog):
    (tmp_path / "a.jsonl").write_bytes(jsonl([RECORDS[0], {"query": "q", "pos": "q"}, RECORDS[2]]))
    rows = alignment_rows(tmp_path / "a.jsonl", skip_invalid=True)
    assert list(rows) == [EXPECTED[0], EXPECTED[2]]
    assert rows.place(1).endswith("a.jsonl, line 3")
    assert "left out 1 of 3 rows" in caplog.text
    assert "line 2: field 'pos' is the same text as 'query'" in caplog.text


def test_unique_keeps_the_first_row_of_each_context_and_of_each_triplet(tmp_path):
    pwc = [{"input": c, "prompt": p, "answer": "a"} for c, p in ("xp", "xq", "yq", "xr")]
    assert list(compression_rows(pwc, unique=True)) == [
        CompressionRow("x", "p", "a"),
        CompressionRow("y", "q", "a"),
    ]
    assert len(compression_rows(pwc)) == 4
    (tmp_path / "a.jsonl").write_bytes(jsonl(RECORDS))
    (tmp_path / "b.jsonl").write_bytes(jsonl([*RECORDS, {**RECORDS[0], "neg": "another"}]))
    rows = alignment_rows([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], unique=True)
    assert list(rows) == [*EXPECTED, AlignmentRow(EXPECTED[0].query, EXPECTED[0].pos, ("another",))]
    assert rows.place(3).endswith("b.jsonl, line 4")


def test_places_name_file_and_line_or_the_row(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n\n" + jsonl(RECORDS))
    (tmp_path / "b.csv").write_text('query,pos\n"two\nlines",p\nq,p\n')
    rows = alignment_rows([tmp_path / "a.jsonl", tmp_path / "b.csv"])
    assert [Path(rows.place(i)).name for i in (0, 2, 3, 4, -1)] == [
        "a.jsonl, line 3",
        "a.jsonl, line 5",
        "b.csv, line 2",
        "b.csv, line 4",
        "b.csv, line 4",
    ]
    assert alignment_rows(iter(RECORDS)).place(1) == alignment_rows(RECORDS).place(1) == "row 2"


def test_the_digest_changes_with_any_text_and_with_the_order():
    base = [AlignmentRow("a", "b", ("c", "d")), AlignmentRow("e", "f")]
    others = [
        [AlignmentRow("A", "b", ("c", "d")), base[1]],
        [AlignmentRow("a", "b", ("d", "c")), base[1]],
        [AlignmentRow("a", "b", ("cd",)), base[1]],
        [AlignmentRow("ab", "bc", ("d",)), base[1]],
        base[::-1],
        base[:1],
        [*base, base[1]],
    ]
    assert len({alignment_rows(rows).digest for rows in [base, *others]}) == 1 + len(others)
    assert (
        alignment_rows([AlignmentRow("a", "b", ("c",))]).digest
        != compression_rows([CompressionRow(*"abc")]).digest
    )


texts = st.text(st.characters(), min_size=1).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.builds(CompressionRow, texts, texts, texts), min_size=1, max_size=4))
def test_any_texts_come_back_equal_from_a_file_and_from_a_stream(tmp_path_factory, expected):
    rows = [CompressionRow("a\n\u2028\x85\0b", "\ud800 alone", "\ufeffc"), *expected]
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("\n".join(json.dumps(vars(row)) for row in rows), encoding="utf-8")
    whole = [
        row for row in rows if json.loads(json.dumps(vars(row))) == vars(row)
    ]  # JSON joins split surrogates
    assert [row for row in compression_rows(file) if row in whole] == whole
    assert list(compression_rows(iter(rows))) == rows


def test_an_index_grows_with_the_number_of_rows_and_not_with_their_texts(tmp_path):
    def kept(words: int) -> int:
        file = tmp_path / f"{words}.jsonl"
        with file.open("w") as out:
            out.writelines(
                json.dumps({"query": f"q{i}", "pos": "word " * words, "neg": "n"}) + "\n" for i in range(500)
            )
        tracemalloc.start()
        rows = alignment_rows(file)
        gc.collect()
        size, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(rows) == 500
        return size

    kept(1)  # what is imported and cached on the way
    short, long = kept(1), kept(500)
    assert long < short + 4000
    assert long < 500 * 20 + 20_000


def test_a_file_that_changed_is_refused_at_the_next_read(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_bytes(jsonl(RECORDS))
    rows = alignment_rows(file)
    file.write_bytes(jsonl(RECORDS[::-1]))  # the same size
    os.utime(file, ns=(1, 1))
    with pytest.raises(
        ValueError, match=r"pairs\.jsonl has changed since it was indexed; load its rows again"
    ):
        rows[0]
    records = [dict(record) for record in RECORDS]
    rows = alignment_rows(records)
    records[1]["pos"] = "other"
    with pytest.raises(ValueError, match="row 2: the row has changed"):
        rows[1]


def test_a_file_that_was_replaced_still_gives_its_rows(tmp_path):
    file, new = tmp_path / "pairs.jsonl", tmp_path / "new"
    file.write_bytes(jsonl(RECORDS))
    rows = alignment_rows(file)
    new.write_bytes(b"{}")
    new.replace(file)
    assert list(rows) == EXPECTED


def test_rows_of_a_file_can_be_pickled_and_copied_ones_say_that_they_cannot(tmp_path, monkeypatch):
    (tmp_path / "pairs.jsonl").write_bytes(jsonl(RECORDS))
    monkeypatch.chdir(tmp_path)
    packed = pickle.dumps(alignment_rows("pairs.jsonl"))
    monkeypatch.chdir("/")
    rows = pickle.loads(packed)  # noqa: S301
    assert (list(rows), rows.place(0)) == (EXPECTED, "pairs.jsonl, line 1")
    (tmp_path / "pairs.jsonl").write_bytes(b"other")
    with pytest.raises(ValueError, match="has changed since it was indexed"):
        pickle.loads(packed)[0]  # noqa: S301
    with pytest.raises(
        TypeError, match="unnamed temporary file, which cannot be pickled; write them to a JSONL file"
    ):
        pickle.dumps(alignment_rows(iter(RECORDS)))


@pytest.mark.parametrize("stream", [False, True])
def test_many_threads_read_the_right_rows(tmp_path, stream):
    records = [{"query": f"q{i}", "pos": "x" * (i % 97 + 1)} for i in range(500)]
    (tmp_path / "pairs.jsonl").write_bytes(jsonl(records))
    rows = alignment_rows(iter(records) if stream else tmp_path / "pairs.jsonl")
    order = [i * 37 % 500 for i in range(2000)]
    with ThreadPoolExecutor(8) as pool:
        assert [row.query for row in pool.map(rows.__getitem__, order)] == [f"q{i}" for i in order]


def test_sources_without_rows_or_of_the_wrong_kind_say_so(tmp_path):
    (tmp_path / "none.jsonl").write_text("\n \n")
    (tmp_path / "some.jsonl").write_bytes(jsonl(RECORDS))
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    for source, error, complaint in [
        ([tmp_path / "some.jsonl", tmp_path / "none.jsonl"], ValueError, r"none\.jsonl has no rows"),
        ([], ValueError, "the source has no rows"),
        (iter(()), ValueError, "the source has no rows"),
        (tmp_path / "absent.jsonl", FileNotFoundError, "absent"),
        (tmp_path / "absent.parquet", FileNotFoundError, "absent"),
        (tmp_path, IsADirectoryError, "give a file"),
        (tmp_path / "torn.parquet", ValueError, r"torn\.parquet"),
        ({"train": RECORDS, "test": RECORDS}, TypeError, "a dict with test, train; pass one part of it"),
        (5, TypeError, "not int"),
        (["q", "p"], FileNotFoundError, "'q'"),
        ([5], ValueError, "row 1: a row must be a mapping of field names to texts, not int"),
        (
            compression_rows([CompressionRow(*"abc")]),
            ValueError,
            "AlignmentRow rows are needed, not CompressionRow",
        ),
    ]:
        with pytest.raises(error, match=complaint):
            alignment_rows(source)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_a_full_disk_names_the_folder_and_the_remedy(monkeypatch):
    with Path("/dev/full").open("r+b", buffering=0) as full:
        monkeypatch.setattr("tempfile.TemporaryFile", lambda: full)
        with pytest.raises(OSError, match="No space left on device while copying rows; set TMPDIR"):
            alignment_rows(iter(RECORDS))


def test_the_libraries_of_other_sources_are_not_imported_for_a_file(tmp_path):
    (tmp_path / "pairs.jsonl").write_bytes(jsonl(RECORDS))
    (tmp_path / "pairs.parquet").write_bytes(b"")
    code = (
        "import sys; sys.modules |= dict.fromkeys(('pandas', 'pyarrow', 'datasets', 'zstandard'))\n"
        "from autoregembed_rag.training.data import alignment_rows\n"
        "print(len(alignment_rows('pairs.jsonl')))\n"
        "alignment_rows('pairs.parquet')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)  # noqa: S603
    assert done.stdout == "3\n", done.stderr
    assert 'ImportError: pairs.parquet needs pyarrow: pip install "autoregembed-rag[train]"' in done.stderr


def test_numbered_rows_count_blank_lines_and_name_a_bad_one(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n\n{"a": "\u2028"}\n3\n')
    rows = numbered_rows(tmp_path / "rows.jsonl")
    assert [next(rows), next(rows)] == [(1, {"a": 1}), (3, {"a": "\u2028"})]
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 4: a JSON object is needed, not int"):
        next(rows)
