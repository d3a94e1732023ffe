"""The same rows in files and tables of all kinds."""

import csv
import gzip
import json
from pathlib import Path

import pytest

from autoregembed_rag.training.data import AlignmentRow

RECORDS = [
    {"query": "Wo ist\nder Fuchs?", "pos": 'The "fox", there.', "neg": "No fox."},
    {"query": "über Tag", "pos": "by day", "neg": "by night"},
    {"query": "q", "pos": "p", "neg": "n"},
]
EXPECTED = [AlignmentRow(r["query"], r["pos"], (r["neg"],)) for r in RECORDS]


def jsonl(records) -> bytes:
    return "\n".join(json.dumps(record, ensure_ascii=False) for record in records).encode()


def write_table(path: Path, records, delimiter: str) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(records)
    return path


def as_file(suffix: str, data):
    def write(folder):
        (folder / f"rows{suffix}").write_bytes(data(jsonl(RECORDS)))
        return folder / f"rows{suffix}"

    return write


def as_list_of_files(folder):
    (folder / "a.jsonl").write_bytes(jsonl(RECORDS[:1]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(RECORDS[1:])))
    return [folder / "a.jsonl", str(folder / "b.jsonl.gz")]


def as_csv_gz(folder):
    plain = write_table(folder / "rows.csv", RECORDS, ",").read_bytes()
    (folder / "rows.csv.gz").write_bytes(gzip.compress(plain))
    return folder / "rows.csv.gz"


def as_parquet(folder):
    import pyarrow as pa
    import pyarrow.parquet

    pa.parquet.write_table(pa.Table.from_pylist(RECORDS), folder / "rows.parquet", row_group_size=2)
    return folder / "rows.parquet"


def as_arrow(stream: bool):
    def write(folder):
        import pyarrow as pa

        table = pa.Table.from_pylist(RECORDS)
        new = pa.ipc.new_stream if stream else pa.ipc.new_file
        with new(folder / "rows.arrow", table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
        return folder / "rows.arrow"

    return write


def as_dataset(folder):
    return pytest.importorskip("datasets").Dataset.from_list(RECORDS)


def as_frame(folder):
    return pytest.importorskip("pandas").DataFrame(RECORDS)


def as_arrow_table(folder):
    return pytest.importorskip("pyarrow").Table.from_pylist(RECORDS)
