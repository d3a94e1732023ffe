"""What goes wrong with a server is said in a line that names it and what to do."""

import logging
import pickle
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from autoregembed_indexes import (
    DocumentIndexError,
    IndexMismatchError,
    IndexMissingError,
    MilvusDocumentIndex,
)


@pytest.fixture(autouse=True)
def quiet(caplog):
    """Nothing is logged that is raised."""
    yield
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


def assert_plain(error, *parts):
    """In a few words, without gRPC's."""
    message = str(error.value)
    assert all(part in message for part in parts) and len(message) < 700 and "\n" not in message
    assert "StatusCode" not in message and "_InactiveRpcError" not in message
    assert error.value.__cause__ is None and error.value.__suppress_context__


@pytest.mark.parametrize("call", ["create", "open", "exists"])
def test_a_server_that_is_not_there_is_named_within_seconds(call):
    with socket.socket() as taken:  # a port where nobody listens
        taken.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{taken.getsockname()[1]}"
        start = time.monotonic()
        with pytest.raises(DocumentIndexError) as error:
            getattr(MilvusDocumentIndex, call)(uri)
        assert time.monotonic() - start < 30
    assert_plain(error, uri, "no server answers", "check that it runs")


@pytest.mark.parametrize("given", ["root:wrong", ""])
def test_a_wrong_token_is_told_from_a_missing_server(server, given):
    with pytest.raises(DocumentIndexError) as error:
        MilvusDocumentIndex.open(server, token=given)
    assert_plain(error, server, "refuses the token", "MILVUS_TOKEN")
    assert "wrong" not in str(error.value)


def test_a_missing_collection_is_named(uri):
    with pytest.raises(
        IndexMissingError, match=r"has no collection 'nowhere'; MilvusDocumentIndex.create makes one"
    ):
        MilvusDocumentIndex.open(uri, "nowhere")
    with pytest.raises(FileNotFoundError):
        MilvusDocumentIndex.open(uri, "nowhere", read_only=True)
    assert not MilvusDocumentIndex.exists(uri, "nowhere")


def test_an_index_that_is_there_is_not_made_again_and_only_with_its_encoder_opened(uri, collections):
    index = collections(uri, dimension=12, tokens=3, encoder="an encoder")
    name = index.collection_name
    with pytest.raises(FileExistsError, match=f"there is a collection {name!r}"):
        MilvusDocumentIndex.create(uri, name, dimension=12)
    with pytest.raises(IndexMismatchError, match="vectors of encoder an encoder, not of encoder another"):
        MilvusDocumentIndex.open(uri, name, encoder="another")
    with pytest.raises(IndexMismatchError, match="vectors of dimension 12, not 13"):
        MilvusDocumentIndex.open(uri, name, dimension=13)
    with MilvusDocumentIndex.open(uri, name, encoder="an encoder", dimension=12) as same:
        assert (same.dimension, same.tokens, same.encoder) == (12, 3, "an encoder")
        with pytest.raises(IndexMismatchError, match="vectors have dimension 3, the index has dimension 12"):
            same.add(np.eye(3), ["a", "b", "c"])


def test_a_collection_of_another_program_is_left_alone(uri, token):
    from pymilvus import MilvusClient

    MilvusClient(uri, token=token).create_collection("of_another_program", dimension=3)
    with pytest.raises(
        DocumentIndexError, match=r"'of_another_program' .* was not made by MilvusDocumentIndex"
    ):
        MilvusDocumentIndex.open(uri, "of_another_program")
    with pytest.raises(FileExistsError):
        MilvusDocumentIndex.create(uri, "of_another_program")


def test_a_collection_that_was_dropped_is_an_error_that_names_it(make, token):
    from pymilvus import MilvusClient

    index = make(dimension=3)
    MilvusClient(index.uri, token=token).drop_collection(index.collection_name)
    for call in (
        lambda: index.search(np.eye(3)),
        lambda: index.add(np.eye(3), ["a", "b", "c"]),
        lambda: len(index),
    ):
        with pytest.raises(DocumentIndexError) as error:
            call()
        assert_plain(error, index.uri, index.collection_name)


def test_the_first_add_of_two_clients_makes_one_collection(make):
    first = make(dimension=None, encoder="an encoder")
    uri, name = first.uri, first.collection_name
    second = MilvusDocumentIndex.create(uri, name, encoder="an encoder")
    other = MilvusDocumentIndex.create(uri, name, encoder="another")
    assert first.dimension is None and first.search(np.eye(3)) == [[], [], []] and first.ids({"a": 1}) == []
    first.add([[1, 0, 0]], ["a"], ["a"])
    second.add([[0, 1, 0]], ["b"], ["b"])
    assert sorted(second.ids()) == ["a", "b"] and second.dimension == 3
    with pytest.raises(IndexMismatchError, match="vectors of encoder an encoder, not of encoder another"):
        other.add([[0, 1, 0]], ["c"])


def test_words_need_a_newer_server_and_the_error_names_this_one(server, collections):
    index = collections(server, dimension=3)
    for call in (lambda: index.search_text("red"), lambda: index.search_hybrid(np.eye(3)[:1], ["red"])):
        with pytest.raises(
            DocumentIndexError, match=r"Milvus v2\.3\.5.* cannot search by words.*Milvus 2\.5.*search_mmr"
        ):
            call()


def test_missing_pymilvus_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(ImportError, match=r'pip install "autoregembed-rag\[scale\]"'):
        MilvusDocumentIndex.create("http://localhost:19530")


def test_importing_the_package_does_not_import_pymilvus():
    code = "import sys, autoregembed_indexes; sys.exit('pymilvus' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0  # noqa: S603


FORKED = """
import os, sys
import numpy as np
from autoregembed_indexes import MilvusDocumentIndex
index = MilvusDocumentIndex.open(*sys.argv[1:])
assert index.search([[1, 0, 0]], 1)[0][0].id == "a"
child = os.fork()
if child == 0:
    os._exit(0 if index.search([[1, 0, 0]], 1)[0][0].id == "a" and len(index) == 1 else 1)
assert os.waitpid(child, 0)[1] == 0
assert len(index) == 1
"""


def test_a_fork_goes_on_searching(server, collections):
    index = collections(server, dimension=3)
    index.add([[1, 0, 0]], ["text"], ["a"])
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", FORKED, server, index.collection_name],
        check=False,
        timeout=60,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode()


def test_a_pickle_without_the_token_in_the_environment_is_refused_by_the_server(
    server, collections, monkeypatch
):
    frozen = pickle.dumps(collections(server, dimension=3))
    monkeypatch.delenv("MILVUS_TOKEN")
    with pytest.raises(DocumentIndexError, match="refuses the token"):
        pickle.loads(frozen)  # noqa: S301
