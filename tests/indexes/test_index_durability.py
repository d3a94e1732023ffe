"""What survives: kill -9, a full disk, a second writer, a fork, pickling, and a damaged folder."""

import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time

import numpy as np
import pytest

from autoregembed_indexes import DocumentIndex, DocumentIndexError, IndexDamagedError, IndexLockedError

VECTORS = np.random.default_rng(0).normal(size=(40, 16)).astype(np.float32)

# Adds and deletes batches for ever; says what it is about to do, and then that it is done.
WRITER = """
import os
import sys
import numpy as np
from autoregembed_indexes import DocumentIndex

def say(what, batch):
    os.write(1, f"{what} {batch}\\n".encode())  # one write: a kill cannot cut a line in two

index = DocumentIndex.open(sys.argv[1])
for batch in range(int(sys.argv[2]), 10**6):
    ids = [f"{batch}-{i}" for i in range(20)]
    say("add", batch)
    index.add(np.random.default_rng(batch).normal(size=(20, 16)), [f"text {i}" for i in ids], ids)
    say("added", batch)
    if batch % 3 == 2:
        say("delete", batch - 1)
        index.delete([f"{batch - 1}-{i}" for i in range(20)])
        say("deleted", batch - 1)
"""


@pytest.fixture
def folder(tmp_path):
    with DocumentIndex.create(tmp_path / "index", dimension=16) as index:
        index.add(VECTORS, [f"text {i}" for i in range(40)], [str(i) for i in range(40)])
    return tmp_path / "index"


def test_acknowledged_writes_survive_kill_and_no_call_is_half_done(tmp_path):
    chance = random.Random(0)
    path = tmp_path / "index"
    DocumentIndex.create(path, dimension=16).close()
    expected, start = set(), 0
    for _ in range(6):
        writer = subprocess.Popen(  # noqa: S603
            [sys.executable, "-c", WRITER, str(path), str(start)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout.readline() == f"add {start}\n"
        time.sleep(chance.uniform(0, 0.15))
        writer.send_signal(signal.SIGKILL)
        log = [f"add {start}", *writer.stdout.read().splitlines()]
        writer.wait()
        unsure = None
        for verb, batch in (line.split() for line in log):
            unsure = int(batch) if verb in ("add", "delete") else None
            if verb == "added":
                expected.add(int(batch))
            elif verb == "deleted":
                expected.discard(int(batch))  # whose add may have been cut off by the kill before
            start = max(start, int(batch) + 1)
        with DocumentIndex.open(path, read_only=True) as reader:  # reads what the dead writer's log holds
            seen = reader.ids()
        with DocumentIndex.open(path) as index:
            assert index.ids() == seen
            batches = {int(doc_id.split("-")[0]) for doc_id in seen}
            assert batches ^ expected <= {unsure}
            assert sorted(seen) == sorted(f"{batch}-{i}" for batch in batches for i in range(20))
            assert [document.text for document in index.get(seen)] == [f"text {doc_id}" for doc_id in seen]
            if seen:
                assert [hits[0].id for hits in index.search(index.vectors(seen), k=1)] == seen
        expected = batches
    assert start > 6


def test_a_full_disk_is_an_error_that_changes_nothing(folder):
    code = """
import resource, sys
import numpy as np
from autoregembed_indexes import DocumentIndex, DocumentIndexError
index = DocumentIndex.open(sys.argv[1])
before = index.get(index.ids())
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try:
    index.add(np.ones((20_000, 16)), ["some text"] * 20_000)
except DocumentIndexError as error:
    print(error)
assert index.get(index.ids()) == before and len(index.search(np.ones((1, 16)), k=100)[0]) == 40
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
index.delete(["0"])
"""
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "nothing was changed" in done.stdout and str(folder) in done.stdout
    with DocumentIndex.open(folder) as index:
        assert index.ids() == [str(i) for i in range(1, 40)]


def test_a_second_writer_is_told_who_holds_the_index(folder):
    code = "import sys; from autoregembed_indexes import DocumentIndex; DocumentIndex.open(sys.argv[1])"
    with DocumentIndex.open(folder):
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False
        )
        assert (
            f"IndexLockedError: {folder} is open for writing in another process (pid {os.getpid()})"
            in done.stderr
        )
        with pytest.raises(IndexLockedError, match=rf"this process \(pid {os.getpid()}\)"):
            DocumentIndex.open(folder)
    DocumentIndex.open(folder).close()


def test_an_index_dropped_without_close_is_released(folder):
    index = DocumentIndex.open(folder)
    del index
    DocumentIndex.open(folder).close()


def test_readers_see_each_commit_and_cannot_write(folder):
    with DocumentIndex.open(folder) as writer, DocumentIndex.open(folder, read_only=True) as reader:
        assert reader.search(VECTORS[3:4], k=1)[0][0].id == "3"
        writer.add(VECTORS[3:5], ["moved", "new"], ["0", "new"])
        writer.delete(["3", "4"])
        assert [hit.text for hit in reader.search(VECTORS[3:4], k=1)[0]] == ["moved"]
        assert [hit.text for hit in reader.search(VECTORS[4:5], k=1)[0]] == ["new"]
        assert len(reader) == len(writer) == 39
        assert reader.search(VECTORS, k=50) == writer.search(VECTORS, k=50)
        for call in (lambda: reader.add(VECTORS[:1], ["x"]), lambda: reader.delete(["0"]), reader.clear):
            with pytest.raises(DocumentIndexError, match="cannot be changed"):
                call()


def test_a_reader_does_not_wait_for_a_writers_transaction(folder):
    with DocumentIndex.open(folder) as writer, DocumentIndex.open(folder, read_only=True) as reader:
        with writer._session(write=True):
            writer._store.delete(["3"])
            assert reader.search(VECTORS[3:4], k=1)[0][0].id == "3"
        assert reader.search(VECTORS[3:4], k=1)[0][0].id != "3"


def test_a_read_only_folder_opens_after_a_clean_close_only(folder, monkeypatch):
    crashed = folder.with_name("crashed")
    with DocumentIndex.open(folder) as index:
        index.delete(["0"])
        shutil.copytree(folder, crashed)
    real_access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and real_access(path, mode))
    with DocumentIndex.open(folder, read_only=True) as index:
        assert len(index.search(VECTORS[:1], k=100)[0]) == 39
    assert sorted(item.name for item in folder.iterdir()) == ["documents.sqlite", "writer.lock"]
    with pytest.raises(DocumentIndexError, match="not closed cleanly"):
        DocumentIndex.open(crashed, read_only=True)


def test_a_pickled_index_reopens_by_path_for_reading(folder):
    with DocumentIndex.open(folder) as index:
        copy = pickle.loads(pickle.dumps(index))  # noqa: S301
        with copy:
            assert copy.search(VECTORS, k=3) == index.search(VECTORS, k=3)
            with pytest.raises(DocumentIndexError, match="cannot be changed"):
                copy.delete(["0"])
    with DocumentIndex.create(dimension=2) as index, pytest.raises(TypeError, match="create it with a path"):
        pickle.dumps(index)


def use_in_fork(index, path, answers):
    try:
        index.search(VECTORS[:1])
        answers.put("no error")
    except DocumentIndexError as error:
        answers.put(str(error))
    index.close()
    with DocumentIndex.open(path, read_only=True) as own:
        answers.put(own.search(VECTORS[5:6], k=1)[0][0].id)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_use_after_fork_is_refused_and_harms_nothing(folder):
    context = multiprocessing.get_context("fork")
    with DocumentIndex.open(folder) as index:
        answers = context.Queue()
        child = context.Process(target=use_in_fork, args=(index, folder, answers))
        child.start()
        message = answers.get(timeout=60)
        assert f"opened in process {os.getpid()}" in message and "read_only=True" in message
        assert answers.get(timeout=60) == "5"
        child.join()
        assert child.exitcode == 0
        with pytest.raises(IndexLockedError):
            DocumentIndex.open(folder)
        index.add(VECTORS[:1], ["after"], ["after"])
        assert len(index) == 41


def test_paths_that_are_no_index(tmp_path):
    file = tmp_path / "file"
    file.write_text("not an index")
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    for path in (file, other, tmp_path / "missing"):
        assert not DocumentIndex.exists(path)
        for read_only in (False, True):
            with pytest.raises(FileNotFoundError, match=str(path)):
                DocumentIndex.open(path, read_only=read_only)
    for path in (file, other):
        with pytest.raises(FileExistsError, match=str(path)):
            DocumentIndex.create(path, dimension=2)
    assert sorted(item.name for item in tmp_path.rglob("*")) == ["file", "notes.txt", "other"]


def test_create_does_not_touch_an_index_that_is_there(folder):
    with pytest.raises(FileExistsError, match="open opens it"):
        DocumentIndex.create(folder, dimension=16)
    with DocumentIndex.open(folder) as index:
        assert len(index) == 40


def test_create_recovers_from_a_creation_that_did_not_finish(tmp_path):
    path = tmp_path / "index"
    path.mkdir()
    (path / "documents.sqlite.new").write_bytes(b"half")
    (path / "writer.lock").write_bytes(b"1\n")
    with DocumentIndex.create(path, dimension=2) as index:
        index.add(np.ones((1, 2)), ["x"])
    assert sorted(item.name for item in path.iterdir()) == ["documents.sqlite", "writer.lock"]


@pytest.mark.parametrize("read_only", [False, True])
def test_a_truncated_database_is_a_clear_error(folder, read_only):
    database = folder / "documents.sqlite"
    whole = database.read_bytes()
    for kept in [0, 50, 100, *range(1000, len(whole), 9001), len(whole) - 1]:
        database.write_bytes(whole[:kept])
        with pytest.raises(DocumentIndexError, match=re.escape(str(database))) as caught:
            DocumentIndex.open(folder, read_only=read_only)
        # Less than the header of a database is nothing that could be recognised.
        assert isinstance(caught.value, IndexDamagedError) or kept < 100
        database.write_bytes(whole)
        with DocumentIndex.open(folder, read_only=read_only) as index:  # and nothing holds the lock
            assert len(index) == 40


@pytest.mark.parametrize(
    "change",
    [
        "vector = x'00'",
        "vector = replace(hex(vector), '0', '0')",
        "vector = CAST(x'007E' || substr(vector, 3) AS BLOB)",
    ],
)
def test_a_damaged_vector_is_a_clear_error(folder, change):
    with sqlite3.connect(folder / "documents.sqlite") as connection:
        connection.execute(f"UPDATE vectors SET {change} WHERE row = 7")  # noqa: S608
    connection.close()
    with pytest.raises(IndexDamagedError, match="damaged"):
        DocumentIndex.open(folder)


def test_foreign_and_newer_databases_are_refused_by_name(folder):
    database = folder / "documents.sqlite"
    with sqlite3.connect(database) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(DocumentIndexError, match=r"format 99.*format 1"):
        DocumentIndex.open(folder)
    database.unlink()
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE mine (x)")
    connection.close()
    with pytest.raises(DocumentIndexError, match="not the database of a document index"):
        DocumentIndex.open(folder)
