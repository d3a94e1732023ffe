"""Documents into shards: every kind of input, every instruction, and what is refused before anything is encoded."""

import gzip
import json
import logging
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shard_files import rows_of, write_lines

from autoregembed_rag import AutoRegEncoder
from autoregembed_rag.sharding import read_shards


def content(document):
    return f"{document['title']}\n{document['text']}" if document["title"] else document["text"]


def whole(folder):
    """All rows in one: ids, texts, metadatas, vectors [n, dimension]."""
    ids, texts, metadatas, vectors = zip(*read_shards(folder), strict=True)
    return *([*chain(*column)] for column in (ids, texts, metadatas)), np.concatenate(vectors)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_records_come_back_with_the_vectors_of_encode_documents(kind, run, documents, encoder, tmp_path):
    file = tmp_path / f"corpus.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(documents), file, row_group_size=33)
    else:
        lines = "\n".join(json.dumps(one) for one in documents).encode()
        file.write_bytes(gzip.compress(lines) if kind.endswith("gz") else lines)
    manifest = run(file, tmp_path / "shards", part_bytes=4000)
    ids, texts, metadatas, vectors = whole(tmp_path / "shards")
    assert len(manifest.parts) > 3 or kind == "jsonl.gz"  # which cannot be cut
    assert ids == [one["_id"] for one in documents]
    assert texts == [content(one) for one in documents]
    assert metadatas == [one["metadata"] for one in documents]
    assert vectors.dtype == np.float16
    assert np.abs(vectors - encoder.encode_documents(texts)).max() < 1e-3
    assert (manifest.documents, manifest.encoder) == (len(documents), encoder.fingerprint)


def test_text_files_are_documents_named_by_their_paths(run, encoder, tmp_path):
    texts = {"a.txt": "One.\r\nTwo.", "b/c.md": "# Größe", "b/d.txt": "x" * 50}
    for name, text in texts.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(text.encode("utf-16" if name == "b/c.md" else "utf-8"))
    (tmp_path / "in" / ".hidden.txt").write_text("hidden")
    manifest = run(tmp_path / "in", tmp_path / "shards", part_bytes=30)
    ids, found, metadatas, vectors = whole(tmp_path / "shards")
    assert (ids, found) == ([*texts], ["One.\nTwo.", "# Größe", "x" * 50])
    assert metadatas == [{}] * 3
    assert np.abs(vectors - encoder.encode_documents(found)).max() < 1e-3
    assert len(manifest.parts) == 2


@pytest.mark.parametrize("part_bytes", [1, 137, 5000])
def test_a_document_is_in_one_part_wherever_the_cuts_fall(part_bytes, documents, tmp_path):
    from autoregembed_rag.sharding.documents import read_part
    from autoregembed_rag.sharding.source import find_source, plan

    few = documents[:20]
    write_lines(tmp_path / "in" / "a.jsonl", few)
    (tmp_path / "in" / "a.jsonl").open("ab").write(b"\n\n")
    renamed = [{**one, "_id": one["_id"] + "p"} for one in few]
    pq.write_table(pa.Table.from_pylist(renamed), tmp_path / "in" / "b.parquet")
    source = find_source(str(tmp_path / "in"))
    found = [document.id for part in plan(source, part_bytes) for document in read_part(source.folder, part)]
    assert found == [one["_id"] for one in few] + [one["_id"] + "p" for one in few]


def test_fields_beside_the_known_ones_are_metadata(run, tmp_path):
    records = [
        {"id": 7, "text": "a", "year": 1999, "metadata": {"x": 1}},
        {"_id": "u", "id": 3, "text": "b", "metadata": "words"},
        {"text": "c", "title": None},
        {"text": "d"},
    ]
    file = write_lines(tmp_path / "corpus.jsonl", records)
    run(file, tmp_path / "shards")
    ids, _, metadatas, _ = whole(tmp_path / "shards")
    assert metadatas == [{"year": 1999, "x": 1}, {"id": 3, "metadata": "words"}, {}, {}]
    assert ids[:2] == ["7", "u"]
    run(file, tmp_path / "again")
    assert ids == whole(tmp_path / "again")[0]  # an id that was missing is the same every time
    assert len({*ids}) == 4


def test_instruction_and_num_tokens_are_the_encoders(run, corpus, tiny_checkpoint, tmp_path):
    short = AutoRegEncoder.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32", num_tokens=2)
    for name, instruction in {"document": "self", "query": "next", "Say it again.": "Say it again."}.items():
        manifest = run(corpus, tmp_path / name, instruction=name, num_tokens=2)
        _, texts, _, vectors = whole(tmp_path / name)
        assert np.abs(vectors - short.encode(texts, instruction)).max() < 1e-3
        assert (manifest.dimension, manifest.tokens) == (64, 2)


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_files_may_lie_in_a_store(scheme, run, corpus, documents, tmp_path):
    import fsspec

    base = f"{scheme}://{tmp_path}"
    with fsspec.open(f"{base}/in/corpus.jsonl", "wb") as file:
        file.write(corpus.read_bytes())
    run(f"{base}/in/corpus.jsonl", f"{base}/shards", part_bytes=9000)
    first = rows_of(f"{base}/shards")
    assert [row[0] for row in first] == [one["_id"] for one in documents]
    run(f"{base}/in/corpus.jsonl", f"{base}/shards", part_bytes=9000)
    assert rows_of(f"{base}/shards") == first


GOOD = '{"_id": "x", "text": "a text"}'


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"_id": "y"}', "'text' is missing"),
        ('{"_id": "y", "text": null}', "'text' is null"),
        ('{"_id": "y", "text": ["a"]}', "'text' is of type list"),
        ('{"_id": "y", "text": " \\n"}', "'text' is empty"),
        ('{"_id": "y", "text": "a", "title": 3}', "'title' is of type int"),
        ('{"_id": 1.5, "text": "a"}', "the id is of type float"),
        ('{"_id": "y", "text": "a"', "not JSON"),
        ('{"_id": "y", "text": "a", "n": NaN}', "NaN is no JSON"),
        ('{"_id": "y", "text": "a\\ud800"}', "half a surrogate pair"),
        ("[1]", "a JSON object is needed"),
        (b'{"_id": "y", "text": "\xff"}', "broken UTF-8"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_encoded(line, reason, run, tmp_path):
    file = tmp_path / "corpus.jsonl"
    raw = line if isinstance(line, bytes) else line.encode()
    file.write_bytes(GOOD.encode() + b"\n\n" + raw + b"\n")
    with pytest.raises(ValueError, match=f"corpus.jsonl, line 3 \\(byte {len(GOOD) + 2}\\): .*{reason}"):
        run(file, tmp_path / "shards", part_bytes=10)
    assert not (tmp_path / "shards").exists()


def test_a_bad_row_or_file_is_named(run, tmp_path):
    rows = [{"_id": f"r{number}", "text": "a"} for number in range(30)]
    rows[21]["text"] = ""
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=10)
    with pytest.raises(ValueError, match=r"a.parquet, row 21: 'text' is empty"):
        run(tmp_path / "a.parquet", tmp_path / "shards", part_bytes=50)
    pq.write_table(pa.table({"_id": ["a"], "text": ["b"], "raw": [b"bytes"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="row 0: the metadata 'raw' has no JSON form"):
        run(tmp_path / "a.parquet", tmp_path / "shards")
    pq.write_table(pa.table({"body": ["b"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="no column 'text', but body"):
        run(tmp_path / "a.parquet", tmp_path / "shards")
    for content, reason in {
        b"": "holds no text",
        b"\xff\xfe\x00": "truncated data",
        b"\xe4": "byte 0",
    }.items():
        (tmp_path / "bad.txt").write_bytes(content)
        with pytest.raises(ValueError, match=f"bad.txt: .*{reason}"):
            run(tmp_path / "bad.txt", tmp_path / "shards")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(GOOD.encode() * 1000)[:-20])
    with pytest.raises(ValueError, match=r"cut.jsonl.gz is damaged or cut off"):
        run(tmp_path / "cut.jsonl.gz", tmp_path / "shards")


def test_an_id_that_occurs_twice_is_named_before_anything_is_encoded(run, documents, tmp_path):
    write_lines(tmp_path / "in" / "a.jsonl", documents)
    write_lines(tmp_path / "in" / "b.jsonl", [{"text": "z"}, {"id": "doc-77", "text": "again"}])
    with pytest.raises(ValueError, match=r"'doc-77' occurs twice, in a.jsonl \(part \d\) and in b.jsonl"):
        run(tmp_path / "in", tmp_path / "shards", part_bytes=9000)
    assert not (tmp_path / "shards").exists()


def test_what_is_no_input_is_an_error(run, corpus, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing at .*missing"):
        run(tmp_path / "missing", tmp_path / "shards")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.docx").write_text("x")
    with pytest.raises(ValueError, match="holds nothing that can be read"):
        run(tmp_path / "in", tmp_path / "shards")
    for name in ("corpus.jsonl", "queries.jsonl"):
        write_lines(tmp_path / "in" / name, [json.loads(GOOD)])
    with pytest.raises(ValueError, match=r"BEIR.*corpus.jsonl"):
        run(tmp_path / "in", tmp_path / "shards")
    with pytest.raises(ValueError, match="inside the input"):
        run(tmp_path / "in", tmp_path / "in" / "shards")
    with pytest.raises(FileExistsError, match="holds something else"):
        run(corpus, tmp_path / "in")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="holds no documents"):
        run(tmp_path / "blank.jsonl", tmp_path / "shards")
    with pytest.raises(ValueError, match="no filesystem"):
        run("nowhere://x/y.jsonl", tmp_path / "shards")


def test_texts_that_are_cut_are_counted_once_for_all_parts(run, tmp_path, caplog):
    file = write_lines(tmp_path / "corpus.jsonl", [{"text": "word " * 300}, {"text": "short"}] * 4)
    with caplog.at_level(logging.WARNING):
        run(file, tmp_path / "shards", part_bytes=2000)
    assert [record.getMessage()[:22] for record in caplog.records] == ["4 of 8 texts were cut:"]
