"""Shards into an index: the same as adding, or an error before anything is added."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from shard_files import make_documents, write_lines
from typer.testing import CliRunner

from autoregembed_indexes import DocumentIndex
from autoregembed_rag.cli import app
from autoregembed_rag.pooling import truncate
from autoregembed_rag.sharding import encoding, from_shards, read_shards


@pytest.fixture(scope="module")
def shards(run, corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loading") / "shards"
    run(corpus, folder, part_bytes=9000)
    return folder


def command(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def contents(index):
    ids = sorted(index.ids())
    return index.get(ids), index.vectors(ids).tobytes()


def test_a_loaded_index_is_as_if_added(shards, documents, encoder, tmp_path):
    texts = [f"{one['title']}\n{one['text']}" if one["title"] else one["text"] for one in documents]
    ids, metadatas = ([one[field] for one in documents] for field in ("_id", "metadata"))
    query = encoder.encode_queries(["A lazy dog."])
    with DocumentIndex.create() as added, DocumentIndex.create() as loaded:
        added.add(encoder.encode_documents(texts), texts, ids, metadatas)
        assert from_shards(loaded, shards) == len(documents)
        assert loaded.get(ids) == added.get(ids)
        (expected,), (found,) = added.search(query, 20), loaded.search(query, 20)
        assert np.allclose([hit.score for hit in found], [hit.score for hit in expected], atol=1e-3)
        assert len({hit.id for hit in found} & {hit.id for hit in expected}) >= 19


def test_fewer_tokens_are_loaded_as_if_no_more_had_been_encoded(shards, encoder, tmp_path):
    assert command("index", tmp_path / "few", "--from-shards", shards, "--num-tokens", 2).exit_code == 0
    with DocumentIndex.open(tmp_path / "few") as few, DocumentIndex.create() as whole:
        assert (few.tokens, few.dimension, few.encoder) == (2, 64, encoder.fingerprint)
        from_shards(whole, shards)
        ids = sorted(whole.ids())
        expected = truncate(whole.vectors(ids), 5, 2)
        assert np.allclose(few.vectors(ids), expected, atol=1e-3)
        with pytest.raises(ValueError, match="num_tokens must be between 1 and 5, not 6"):
            from_shards(whole, shards, num_tokens=6)
        with pytest.raises(ValueError, match="dimension 64, the index of dimension 160"):
            from_shards(whole, shards, num_tokens=2)


def test_both_spellings_of_the_command_make_or_fill_an_index(shards, encoder, tmp_path):
    first = command("index", tmp_path / "a", "--from-shards", shards)
    assert (first.exit_code, first.stdout) == (0, f"200 documents loaded; {tmp_path / 'a'} holds 200\n")
    with DocumentIndex.create(tmp_path / "b", encoder=encoder.fingerprint) as index:
        index.add(np.ones((1, 160)), ["mine"], ["mine"])
    again = command("index", "load", "--from-shards", shards, tmp_path / "b")
    assert again.stdout == f"200 documents loaded; {tmp_path / 'b'} holds 201\n"
    with DocumentIndex.open(tmp_path / "a") as index:
        assert (index.encoder, index.tokens, index.dimension) == (encoder.fingerprint, 5, 160)
    assert "No such command 'inof'" in command("index", "inof", tmp_path / "a").stderr
    assert command("index", "info", tmp_path / "a").exit_code == 0
    assert "give either DIR" in command("index", "load", "--from-shards", shards).stderr


def test_loading_that_was_interrupted_ends_the_same(shards, tmp_path):
    class Interrupted(DocumentIndex):
        def add(self, vectors, texts, ids=None, metadatas=None):
            if len(self) > 60:
                raise KeyboardInterrupt
            return super().add(vectors, texts, ids, metadatas)

    with Interrupted.create(tmp_path / "index") as index, pytest.raises(KeyboardInterrupt):
        from_shards(index, shards)
    with DocumentIndex.open(tmp_path / "index") as index, DocumentIndex.create() as whole:
        assert 60 < len(index) < 200
        from_shards(index, shards)
        from_shards(whole, shards)
        assert contents(index) == contents(whole)


def changed(shards, folder, change):
    """A copy whose manifest `change` has changed."""
    copy = shutil.copytree(shards, folder)
    manifest = json.loads((copy / "manifest.json").read_text())
    change(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def refused(folder, match):
    with DocumentIndex.create() as index:
        with pytest.raises((ValueError, FileNotFoundError), match=match):
            from_shards(index, folder)
        assert len(index) == 0
    return True


def test_nothing_is_added_where_a_shard_is_missing_cut_short_or_foreign(shards, tmp_path):
    missing = shutil.copytree(shards, tmp_path / "missing")
    (file,) = missing.glob("part-000002-*.parquet")
    file.unlink()
    assert refused(missing, "part-000002-.* is missing: copy it again")
    cut = shutil.copytree(shards, tmp_path / "cut")
    (file,) = cut.glob("part-000002-*.parquet")
    file.write_bytes(file.read_bytes()[:-1])
    assert refused(cut, "part-000002-.* is damaged, it has .* bytes")

    def give_another_encoder(manifest):
        manifest["shards"][1]["encoder"] = "0" * 16

    assert refused(changed(shards, tmp_path / "foreign", give_another_encoder), "is of encoder 0000")


def test_nothing_of_a_damaged_shard_is_added(shards, tmp_path):
    damaged = shutil.copytree(shards, tmp_path / "damaged")
    (file,) = damaged.glob("part-000001-*.parquet")
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    rows = [shard["rows"] for shard in json.loads((shards / "manifest.json").read_text())["shards"]]
    with DocumentIndex.create() as index:
        with pytest.raises(ValueError, match=r"part-000001-.* is damaged, it does not have its checksum"):
            from_shards(index, damaged)
        assert len(index) == rows[0]


def test_an_unfinished_folder_is_refused(shards, tmp_path):
    unfinished = changed(
        shards, tmp_path / "unfinished", lambda manifest: manifest.update(complete=False, shards=None)
    )
    assert refused(unfinished, "is not complete: run its autoregembed encode again")
    assert refused(tmp_path, "holds no manifest.json")
    (unfinished / "manifest.json").write_text("{")
    assert refused(unfinished, "manifest.json is damaged")
    (unfinished / "manifest.json").write_text('{"format": 9}')
    assert refused(unfinished, "has the format 9")


def test_an_id_in_two_shards_is_named_with_both(shards, tmp_path):
    def repeat(manifest):
        first, second = manifest["shards"][:2]
        first |= {name: second[name] for name in ("file", "rows", "bytes", "sha256")}

    assert refused(
        changed(shards, tmp_path / "twice", repeat), r"the id 'doc-\d+' is in the shards part-000001-"
    )


def test_shards_of_another_encoder_are_refused(shards, run, corpus, encoder, tmp_path):
    for settings, words in (
        ({"encoder": "f" * 16}, f"encoder {encoder.fingerprint}, the index of encoder ffff"),
        ({"dimension": 96}, "dimension 160, the index of dimension 96"),
        ({"tokens": 4}, "compressed tokens 5, the index of compressed tokens 4"),
    ):
        with DocumentIndex.create(**settings) as index:
            with pytest.raises(ValueError, match=words):
                from_shards(index, shards)
            assert len(index) == 0
    with DocumentIndex.create(tmp_path / "index", encoder="f" * 16):
        pass
    result = command("index", tmp_path / "index", "--from-shards", shards)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")


def test_batches_are_bounded_whatever_a_part_holds(run, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "GROUP_BYTES", 1 << 20)
    run(write_lines(tmp_path / "corpus.jsonl", make_documents(5000, 5)), tmp_path / "shards")
    sizes = [batch.vectors.nbytes for batch in read_shards(tmp_path / "shards")]
    assert len(sizes) > 1 and sum(sizes) == 5000 * 2 * encoder.dimension
    assert max(sizes) < 2 << 20


def test_the_page_on_shards_shows_what_happens(corpus, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "sharding.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    shutil.copy(corpus, "corpus.jsonl")
    (snippet,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(compile(snippet, "sharding.md", "exec"), {})  # noqa: S102
    assert capsys.readouterr().out.splitlines()[-1] == "200 (200, 640)"


def test_the_command_has_pytorch_keep_few_shapes_unless_told(corpus, tiny_checkpoint, tmp_path, monkeypatch):
    name, *others = encoding.KEPT_SHAPES
    monkeypatch.setenv(name, "99")
    for other in others:
        monkeypatch.setenv(other, "")  # so that it is gone again at the end
        monkeypatch.delenv(other)
    result = command("encode", corpus, "--output", tmp_path / "shards", "--model", tiny_checkpoint)
    assert result.exit_code == 0
    assert {key: os.environ[key] for key in encoding.KEPT_SHAPES} == {**encoding.KEPT_SHAPES, name: "99"}
