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
from collections import Counter

import numpy as np
import pytest

from autoregembed_indexes import (
    DocumentIndex,
    DocumentIndexError,
    IndexDamagedError,
    IndexLockedError,
    IndexMismatchError,
)

VECTORS = np.random.default_rng(0).normal(size=(40, 16)).astype(np.float32)

# Starts writers by fork, which spares each the imports; reads "path log seed", prints the writer's pid.
NURSERY = """
import os, random, sys
import faiss  # here, not in each child
import numpy as np
from autoregembed_indexes import DocumentIndex

def write_for_ever(path, log, seed):
    chance = random.Random(seed)
    out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    say = lambda *words: os.write(out, (" ".join(words) + "\\n").encode())
    index = DocumentIndex.open(path)
    known = sorted({doc_id.split("-")[0] for doc_id in index.ids()})
    for step in range(10**6):
        verb = chance.choice(["add", "add", "add", "delete", "replace", "snapshot", "compact"])
        if verb == "add":
            batch = f"{seed}.{step}"
        elif known:
            batch = chance.choice(known)
        else:
            continue
        ids = [f"{batch}-{i}" for i in range(20)]
        say("start", verb, batch)
        if verb in ("add", "replace"):
            vectors = np.random.default_rng(step).normal(size=(20, 16))
            index.add(vectors, [f"{verb} {doc_id}" for doc_id in ids], ids)
        elif verb == "delete":
            index.delete(ids)
        else:
            getattr(index, verb)()
        say("done", verb, batch)
        if verb == "add":
            known.append(batch)
        elif verb == "delete":
            known.remove(batch)

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        write_for_ever(*line.split())
    print(child, flush=True)
    os.waitpid(child, 0)
    print("dead", flush=True)
"""

WRITES = {"add", "delete", "replace", "snapshot", "compact"}


@pytest.fixture
def folder(tmp_path):
    with DocumentIndex.create(tmp_path / "index", dimension=16) as index:
        index.add(VECTORS, [f"text {i}" for i in range(40)], [str(i) for i in range(40)])
    return tmp_path / "index"


def test_acknowledged_writes_survive_kill_at_any_moment_and_no_call_is_half_done(tmp_path):
    chance = random.Random(0)
    path, log = tmp_path / "index", tmp_path / "log"
    DocumentIndex.create(path, dimension=16).close()
    texts, verbs = {}, Counter()  # what each batch of 20 documents must say; where the kill struck
    with subprocess.Popen(  # noqa: S603
        [sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as nursery:
        for seed in range(1000):
            if seed >= 200 and verbs.keys() >= WRITES:  # a busy machine takes longer to get to all of them
                break
            log.unlink(missing_ok=True)
            nursery.stdin.write(f"{path} {log} {seed}\n")
            nursery.stdin.flush()
            writer = int(nursery.stdout.readline())
            while seed % 10 and not log.exists():  # every tenth may die while it opens the index
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.05))
            os.kill(writer, signal.SIGKILL)
            assert nursery.stdout.readline() == "dead\n"
            unsure = None
            for what, verb, batch in map(str.split, log.read_text().splitlines() if log.exists() else []):
                unsure = (verb, batch) if what == "start" else None
                if what == "done" and verb in ("add", "replace"):
                    texts[batch] = verb
                elif what == "done" and verb == "delete":
                    del texts[batch]
            verbs[unsure[0] if unsure else "between"] += 1
            texts = check_after_kill(path, texts, unsure)
            if len(texts) > 40:
                with DocumentIndex.open(path) as index:
                    index.clear()
                texts = {}
        nursery.stdin.close()
    assert verbs.keys() >= WRITES, verbs


def check_after_kill(path, expected, unsure):
    """Compare all that the index holds with what was acknowledged; the call that was cut off may have happened."""
    with DocumentIndex.open(path, read_only=True) as reader:
        seen = reader.get(reader.ids())
    found = {}
    for document in seen:
        verb, doc_id = document.text.split()
        assert doc_id == document.id
        found.setdefault(doc_id.split("-")[0], []).append((verb, doc_id))
    states = {batch: {verb for verb, _ in documents} for batch, documents in found.items()}
    assert all(len(documents) == 20 and len(states[batch]) == 1 for batch, documents in found.items())
    now = {batch: state.pop() for batch, state in states.items()}
    verb, batch = unsure or (None, None)
    done = {key: value for key, value in {**expected, batch: verb}.items() if key is not None}
    if verb == "delete":
        del done[batch]
    assert now == expected or (verb in ("add", "replace", "delete") and now == done)
    with DocumentIndex.open(path) as index:
        ids = [document.id for document in seen]
        assert index.ids() == ids
        if ids:
            assert {hits[0].id for hits in index.search(index.vectors(ids), k=1)} <= set(ids)
            assert {hit.id for hit in index.search(VECTORS[:1], k=len(ids) + 1)[0]} == set(ids)
            assert {hit.id for hit in index.search_text("add replace", k=len(ids) + 1)} == set(ids)
    return now


def test_a_full_disk_is_an_error_that_changes_nothing(folder):
    code = """
import resource, sys
import numpy as np
from autoregembed_indexes import DocumentIndex, DocumentIndexError
index = DocumentIndex.open(sys.argv[1])
before = index.get(index.ids())
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
try:
    index.add(np.ones((20_000, 16)), ["some text"] * 20_000)
except DocumentIndexError as error:
    print(error)
assert index.get(index.ids()) == before and len(index.search(np.ones((1, 16)), k=100)[0]) == 40
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, resource.RLIM_INFINITY))
try:
    index.snapshot()
except DocumentIndexError as error:
    print(error)
assert len(index.search(np.ones((1, 16)), k=100)[0]) == 40
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
index.delete(["0"])
"""
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "nothing was changed" in done.stdout and str(folder) in done.stdout
    assert "vectors-16.faiss could not be written" in done.stdout
    assert sorted(item.name for item in folder.iterdir()) == ["documents.sqlite", "writer.lock"]
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
    with pytest.raises(DocumentIndexError, match=r"format 99.*format 3"):
        DocumentIndex.open(folder)
    database.unlink()
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE mine (x)")
    connection.close()
    with pytest.raises(DocumentIndexError, match="not the database of a document index"):
        DocumentIndex.open(folder)


ADD_ONE = """
import sys
from autoregembed_indexes import DocumentIndex
with DocumentIndex.open(sys.argv[1]) as index:
    index.add([[1.0] * 16], ["from another process"])
"""


def test_a_reader_sees_writers_that_come_and_go(folder):
    with DocumentIndex.open(folder, read_only=True) as reader:
        for count in (41, 42, 43):
            subprocess.run([sys.executable, "-c", ADD_ONE, str(folder)], check=True)  # noqa: S603
            assert len(reader) == len(reader.search(VECTORS[:1], k=100)[0]) == count


def test_writes_survive_kill_though_another_program_read_the_database_meanwhile(folder):
    code = """
import os, subprocess, sys
from autoregembed_indexes import DocumentIndex
index = DocumentIndex.open(sys.argv[1])
read = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('SELECT * FROM state').fetchall(); c.close()"
subprocess.run([sys.executable, "-c", read, sys.argv[1] + "/documents.sqlite"], check=True)
index.add([[1.0] * 16], ["acknowledged"], ["new"])
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", code, str(folder)], check=False)  # noqa: S603
    with DocumentIndex.open(folder) as index:
        assert [document.text for document in index.get(["new"])] == ["acknowledged"]


def test_exiting_beside_a_thread_that_writes_leaves_whole_calls(tmp_path):
    code = """
import sys, threading, time
import numpy as np
from autoregembed_indexes import DocumentIndex
index = DocumentIndex.create(sys.argv[1], dimension=16)
write = lambda: [index.add(np.ones((1000, 16)), ["text"] * 1000) for _ in range(1000)]
threading.Thread(target=write, daemon=True).start()
time.sleep(float(sys.argv[2]))
"""
    for number, seconds in enumerate((0.1, 0.15, 0.2, 0.3)):
        path = tmp_path / str(number)
        subprocess.run([sys.executable, "-c", code, str(path), str(seconds)], check=False, timeout=60)  # noqa: S603
        with DocumentIndex.open(path) as index:
            assert len(index) % 1000 == 0 and index.verify() == []


def test_a_reader_that_cannot_see_changes_says_so(folder, monkeypatch):
    real_access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and real_access(path, mode))
    with DocumentIndex.open(folder, read_only=True) as reader:
        assert len(reader) == 40
        with DocumentIndex.open(folder) as writer:
            writer.add(VECTORS, ["new"] * 40)
            with DocumentIndex.open(folder, read_only=True) as beside_it:
                writer.delete(["0"])
                assert len(beside_it) == 79
        with pytest.raises(DocumentIndexError, match="open it again"):
            reader.search(VECTORS[:1])


def test_a_lock_that_cannot_be_taken_is_let_go(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(DocumentIndexError, match="No space left"):
            DocumentIndex.open(folder)
    DocumentIndex.open(folder).close()


def test_a_refused_opening_leaves_nothing_behind(folder, caplog):
    for _ in range(2):
        with pytest.raises(IndexMismatchError):
            DocumentIndex.open(folder, dimension=3)
    assert not caplog.records


@pytest.mark.parametrize("change", ["tokens = 2", "factory = 'nothing'", "dimension = 0", "version = 'x'"])
def test_damaged_settings_are_a_clear_error(folder, change):
    with sqlite3.connect(folder / "documents.sqlite") as connection:
        connection.execute(f"UPDATE state SET {change}")  # noqa: S608
    connection.close()
    with pytest.raises(IndexDamagedError, match="settings"):
        DocumentIndex.open(folder)


def test_settings_that_no_index_can_have_are_refused(tmp_path):
    for settings in (
        {"encoder": "\ud800"},
        {"memory_budget": 2**63},
        {"dimension": 2**63},
        {"tokens": 2**63},
    ):
        with pytest.raises(ValueError, match=next(iter(settings))):
            DocumentIndex.create(tmp_path / "other", **settings)
    assert not (tmp_path / "other").exists()
