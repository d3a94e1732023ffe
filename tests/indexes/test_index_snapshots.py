"""Snapshots of FAISS: what opening finds in them, and that a missing or damaged one costs nothing but time."""

import logging
import shutil
import sqlite3

import numpy as np
import pytest

from autoregembed_indexes import DocumentIndex, DocumentIndexError

VECTORS = np.random.default_rng(0).normal(size=(700, 16)).astype(np.float32)
QUERIES = np.random.default_rng(1).normal(size=(7, 16)).astype(np.float32)
KINDS = ["Flat", "SQfp16", "IVF,SQ8", "IVF16,RaBitQ"]


def add(index, numbers, text="text"):
    names = [str(number) for number in numbers]
    index.add(VECTORS[list(numbers)], [f"{text} {name}" for name in names], names)


@pytest.fixture(params=KINDS)
def folder(request, tmp_path):
    """A snapshot of 650 vectors, and changes since: 50 added, 20 deleted, 10 replaced."""
    with DocumentIndex.create(tmp_path / "index", factory=request.param) as index:
        add(index, range(650))
        index.snapshot()
        add(index, range(650, 700))
        index.delete([str(number) for number in range(100, 120)])
        index.add(VECTORS[:10], ["moved"] * 10, [str(number) for number in range(200, 210)])
    return tmp_path / "index"


def answers(path, read_only=False):
    with DocumentIndex.open(path, read_only=read_only) as index:
        return both(index)


def both(index):
    return index.search(QUERIES, k=5), index.search(QUERIES, k=700)[0]


def same(found, expected):
    """Tell whether two answers agree; of lists that were trained anew, the nearest few may be others."""
    overlaps = []
    for one, other in zip(found[0], expected[0], strict=True):
        scores = {hit.id: hit.score for hit in other}
        common = [hit for hit in one if hit.id in scores]
        assert all(abs(scores[hit.id] - hit.score) < 1e-6 for hit in common)
        overlaps.append(len(common) / 5)
    return np.mean(overlaps) > 0.6 and {hit.id for hit in found[1]} == {hit.id for hit in expected[1]}


def test_opening_maps_the_snapshot_and_takes_up_what_came_since(folder):
    found = answers(folder)
    with DocumentIndex.open(folder) as index:
        info = index.info()
        assert (info["snapshot"], info["pending"]) == ("vectors-16.faiss", 90)
        assert index.search(QUERIES, k=5) == found[0]
    (folder / "vectors-16.faiss").unlink()
    assert same(answers(folder), found)
    with DocumentIndex.open(folder) as index:
        assert index.info()["snapshot"] in (None, "vectors-16.faiss")
        index.snapshot()
        assert (index.info()["snapshot"], index.info()["pending"]) == ("vectors-16.faiss", 0)
        assert same(both(index), found)
        assert index.verify() == []


def test_a_small_change_leaves_the_snapshot_and_a_large_one_renews_it(tmp_path):
    path = tmp_path / "index"
    with DocumentIndex.create(path) as index:
        index.add(np.tile(VECTORS, (3, 1)), ["text"] * 2100)
    snapshot = path / "vectors-16.faiss"
    written = snapshot.read_bytes()
    with DocumentIndex.open(path) as index:
        index.add(VECTORS[:100], ["text"] * 100)
    assert snapshot.read_bytes() == written
    with DocumentIndex.open(path) as index:
        index.add(np.tile(VECTORS, (2, 1)), ["text"] * 1400)
    assert snapshot.read_bytes() != written
    with DocumentIndex.open(path) as index:
        assert index.info()["pending"] == 0
        index.clear()
        index.snapshot()
    assert not snapshot.exists()


def test_an_index_dropped_without_close_writes_its_snapshot(tmp_path):
    index = DocumentIndex.create(tmp_path / "index")
    index.add(np.tile(VECTORS, (2, 1)), ["text"] * 1400)
    del index
    assert (tmp_path / "index" / "vectors-16.faiss").exists()


@pytest.mark.parametrize("read_only", [False, True])
def test_a_truncated_snapshot_is_rebuilt(folder, read_only, caplog):
    expected = answers(folder)
    snapshot = folder / "vectors-16.faiss"
    whole = snapshot.read_bytes()
    for kept in [0, 10, len(whole) // 3, len(whole) // 2, len(whole) - 30, len(whole) - 1]:
        snapshot.write_bytes(whole[:kept])
        caplog.clear()
        assert same(answers(folder, read_only), expected)
        assert "loaded from the database" in caplog.text
        assert snapshot.exists() == read_only or snapshot.stat().st_size > len(whole) // 2


@pytest.mark.parametrize("read_only", [False, True])
def test_one_flipped_bit_anywhere_in_a_snapshot_is_noticed(folder, read_only, caplog):
    expected = answers(folder)
    snapshot = folder / "vectors-16.faiss"
    whole = snapshot.read_bytes()
    chance = np.random.default_rng(0)
    for place in [0, 4, len(whole) - 1, *chance.integers(0, len(whole), 25)]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(chance.integers(8))
        snapshot.write_bytes(damaged)
        caplog.clear()
        assert same(answers(folder, read_only), expected)
        # The few bytes that fill up to a multiple of eight belong to no section, and mean nothing.
        assert "loaded from the database" in caplog.text or place > len(whole) // 2


def test_a_snapshot_of_another_index_is_not_used(folder, tmp_path, caplog):
    expected = answers(folder)
    with DocumentIndex.create(tmp_path / "other") as other:
        other.add(-VECTORS, ["other"] * 700)
        other.snapshot()
    shutil.copy(tmp_path / "other" / "vectors-16.faiss", folder)
    assert same(answers(folder, read_only=True), expected)
    assert "belongs to another index" in caplog.text


def test_a_restored_database_is_not_mixed_with_a_newer_snapshot(tmp_path, caplog):
    path, backup = tmp_path / "index", tmp_path / "backup.sqlite"
    with DocumentIndex.create(path) as index:
        add(index, range(20))
    shutil.copy(path / "documents.sqlite", backup)
    with DocumentIndex.open(path) as index:
        add(index, range(20, 40))
        index.snapshot()
    shutil.copy(backup, path / "documents.sqlite")
    with DocumentIndex.open(path) as index:
        assert {hit.id for hit in index.search(QUERIES, k=40)[0]} == {str(number) for number in range(20)}
        assert "newer than the database" in caplog.text
        add(index, range(50, 70), "other")
    with DocumentIndex.open(path) as index:
        assert index.search(VECTORS[50:51], k=1)[0][0].text == "other 50"
        assert len(index.search(QUERIES, k=100)[0]) == 40


def test_readers_follow_a_writer_through_snapshots_and_compaction(folder, caplog):
    caplog.set_level(logging.WARNING)
    with DocumentIndex.open(folder) as writer, DocumentIndex.open(folder, read_only=True) as reader:
        for numbers in (range(300), range(300, 600), range(50, 650)):
            writer.delete([str(number) for number in numbers])
            writer.snapshot()
            assert same(both(reader), both(writer))
            add(writer, numbers, "again")
            reader.refresh()
            assert same(both(reader), both(writer))
            writer.compact()
            assert same(both(reader), both(writer))
        assert reader.verify() == writer.verify() == []
    assert not caplog.records


def test_a_reader_cannot_write_a_snapshot(folder):
    with DocumentIndex.open(folder, read_only=True) as reader:
        for call in (reader.snapshot, reader.compact, lambda: reader.create_metadata_index("x")):
            with pytest.raises(DocumentIndexError, match="cannot be changed"):
                call()


def test_leftovers_of_a_killed_snapshot_are_removed(folder):
    (folder / "vectors-16.faiss.new").write_bytes(b"half")
    with DocumentIndex.open(folder):
        assert not (folder / "vectors-16.faiss.new").exists()


def test_compaction_gives_the_space_of_deleted_documents_back(folder):
    with DocumentIndex.open(folder) as index:
        index.delete([str(number) for number in range(20, 700)])
        before = index.info()["bytes"]
        index.compact()
        assert index.info()["bytes"] < before / 2
        assert (len(index), index.info()["pending"], index.verify()) == (20, 0, [])
        assert len(index.search(QUERIES, k=30)[0]) == 20
    with DocumentIndex.open(folder) as index:
        assert len(index.search(QUERIES, k=30)[0]) == 20


def test_an_index_in_memory_has_the_same_calls():
    with DocumentIndex.create(factory="IVF,SQ8") as index:
        add(index, range(700))
        index.snapshot()
        index.compact()
        assert index.info()["kind"] == "IVF16,SQ8"
        assert (index.info()["snapshot"], index.verify(), len(index.search(QUERIES, k=5)[0])) == (None, [], 5)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("UPDATE documents SET text = 'other' WHERE row = 3", "document '2' does not have its checksum"),
        ("UPDATE vectors SET vector = zeroblob(32) WHERE row = 3", "row 3 does not have its checksum"),
        ("DELETE FROM vectors WHERE row = 3", "documents without a vector"),
        ("INSERT INTO words(words) VALUES ('delete-all')", "index of words"),
    ],
)
def test_verify_names_what_is_wrong_with_the_database(tmp_path, change, problem):
    with DocumentIndex.create(tmp_path / "index") as index:
        add(index, range(20))
        index.snapshot()
    with DocumentIndex.open(tmp_path / "index") as index:
        assert index.verify() == []
        with sqlite3.connect(tmp_path / "index" / "documents.sqlite") as connection:
            connection.execute(change)
        connection.close()
        assert any(problem in found for found in index.verify())


def test_verify_names_a_damaged_snapshot(folder):
    with DocumentIndex.open(folder, read_only=True) as index:
        with (folder / "vectors-16.faiss").open("r+b") as file:
            file.seek(1000)
            file.write(b"damaged")
        assert index.verify() == [f"{folder / 'vectors-16.faiss'}: its vectors do not have their checksum"]


@pytest.mark.parametrize("call", ["snapshot", "compact"])
def test_a_damaged_snapshot_is_not_written_again_as_a_sound_one(tmp_path, call):
    path = tmp_path / "index"
    with DocumentIndex.create(path, factory="Flat") as index:
        add(index, range(50))
        index.snapshot()
        expected = index.search(VECTORS[5:6], k=3)
        row = index.vectors(["5"]).tobytes()
    damaged = bytearray((path / "vectors-16.faiss").read_bytes())
    damaged[damaged.index(row) + 7] ^= 0x80
    (path / "vectors-16.faiss").write_bytes(damaged)
    with DocumentIndex.open(path) as index:
        getattr(index, call)()
    with DocumentIndex.open(path) as index:
        assert index.search(VECTORS[5:6], k=3) == expected


@pytest.mark.parametrize("name", ["vectors-16.faiss", "vectors-16.faiss.new"])
def test_a_folder_in_the_place_of_a_snapshot_is_passed_over(tmp_path, name):
    with DocumentIndex.create(tmp_path / "index") as index:
        add(index, range(20))
    (tmp_path / "index" / name).mkdir()
    with DocumentIndex.open(tmp_path / "index") as index:
        assert len(index.search(QUERIES, k=30)[0]) == 20
        with pytest.raises(DocumentIndexError, match="could not be written"):
            index.snapshot()
        assert len(index.search(QUERIES, k=30)[0]) == 20
