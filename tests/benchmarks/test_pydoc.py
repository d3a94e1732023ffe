"""The offline set: what its documents are, and that every judged object is among them."""

import importlib
import json
import logging
import sys

import pytest

from benchmarks.beir import RetrievalSet
from benchmarks.pydoc import QUERIES_FILE, load_pydoc, standard_library_documents
from benchmarks.standard_library import MIN_CHARACTERS


@pytest.fixture(scope="module")
def pydoc() -> RetrievalSet:
    return load_pydoc()


def test_every_relevant_object_is_a_document(pydoc):
    ids = {document.id for document in pydoc.documents}
    missing = {(query, d) for query, grades in pydoc.qrels.items() for d in grades if d not in ids}
    assert not missing


def test_there_are_at_least_150_distinct_questions(pydoc):
    assert (
        len(set(pydoc.queries.values())) == len(QUERIES_FILE.read_text(encoding="utf-8").splitlines()) >= 150
    )
    assert all(pydoc.qrels[query] for query in pydoc.queries)


def test_a_question_never_names_its_answer():
    rows = [json.loads(line) for line in QUERIES_FILE.read_text(encoding="utf-8").splitlines()]
    told = [
        row["_id"]
        for row in rows
        if any("." in d and d.lower() in row["text"].lower() for d in row["relevant"])
    ]
    assert not told


def test_ids_and_texts_are_unique_and_long_enough(pydoc):
    assert len({document.id for document in pydoc.documents}) == len(pydoc.documents)
    assert len({document.text for document in pydoc.documents}) == len(pydoc.documents)
    assert min(len(document.text) for document in pydoc.documents) >= MIN_CHARACTERS
    assert 2000 < len(pydoc.documents) < 5000


def test_an_object_goes_by_its_shortest_public_name(pydoc):
    ids = {document.id for document in pydoc.documents}
    assert {
        "asyncio.run",
        "os.path.join",
        "open",
        "str.split",
        "random.sample",
        "socket.socket.sendall",
    } <= ids
    assert not {
        "asyncio.runners.run",
        "posixpath.join",
        "io.open",
        "random.Random.sample",
        "os.path",
    } & ids - {"os.path"}
    assert not [i for i in ids if any(part.startswith("_") and part != "__future__" for part in i.split("."))]


def test_a_title_is_the_name_with_the_signature_callers_see(pydoc):
    titles = {document.id: document.title for document in pydoc.documents}
    assert titles["shutil.which"].startswith("shutil.which(cmd, mode=")
    assert titles["str.join"] == "str.join(iterable, /)"
    assert not [title for title in titles.values() if " at 0x" in title]


def test_building_again_after_patching_the_library_gives_the_same(pydoc, monkeypatch):
    def copytree():
        """Something else entirely, which is longer than the sixty characters that a document needs."""

    monkeypatch.setattr("shutil.copytree", copytree)
    assert standard_library_documents() == pydoc.documents


def test_what_other_libraries_put_into_the_standard_one_is_no_document(pydoc):
    """transformers gives `logging.Logger` methods of its own, and the benchmarks import it."""
    importlib.import_module("transformers")
    assert hasattr(logging.Logger, "warning_advice")
    assert "logging.Logger.warning_advice" not in {document.id for document in pydoc.documents}


def test_a_title_is_the_same_wherever_python_lies(pydoc):
    assert not [document.title for document in pydoc.documents if sys.executable in document.title]
