"""What a server cannot take is refused before anything is sent, and what is too much for a message goes in several."""

import numpy as np
import pytest

from autoregembed_indexes import DocumentIndexError, MilvusDocumentIndex
from autoregembed_indexes.milvus import collection as messages

LIMIT = 65_535


@pytest.fixture
def empty(uri, collections):
    return collections(uri, dimension=3)


@pytest.fixture
def written(monkeypatch):
    """How many rows go to a server in each message."""
    counts = []

    def watch(index):
        client = index._opened().server.client
        upsert = client.upsert

        def counting(name, rows, **options):
            counts.append(len(rows))
            return upsert(name, rows, **options)

        monkeypatch.setattr(client, "upsert", counting)
        return counts

    return watch


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (
            ("a", "x" * (LIMIT + 1), {}),
            "the text of id 'a' has 65,536 bytes of UTF-8.*split it into several documents",
        ),
        (("a", "é" * 33_000, {}), "the text of id 'a' has 66,000 bytes"),
        (
            ("a", "x", {"key": "y" * LIMIT}),
            r"the metadata, in JSON, of id 'a' has 65,545 bytes.*keep less of it here",
        ),
        (("\0" * 22_000, "x", {}), "the id, percent-encoded, of id .* has 66,000 bytes.*use shorter ids"),
    ],
)
def test_what_is_longer_than_a_field_is_refused_before_anything_is_sent(empty, document, message):
    documents = [("first", "x", {}), document]
    ids, texts, metadatas = zip(*documents, strict=True)
    with pytest.raises(ValueError, match=message):
        empty.add(np.eye(3)[:2], texts, ids, metadatas)
    assert len(empty) == 0


def test_what_fills_a_field_comes_back(empty):
    longest = [
        ("x" * LIMIT, "text", {}),
        ("text", "é" * 32_767, {}),
        ("metadata", "", {"k": "\\" * ((LIMIT - 8) // 2)}),
        ("many", "", {"k": [0] * ((LIMIT - 7) // 2)}),
    ]
    ids, texts, metadatas = zip(*longest, strict=True)
    empty.add(np.ones((len(ids), 3)), texts, ids, metadatas)
    assert [tuple(document) for document in empty.get(ids)] == longest
    assert {(hit.id, hit.text) for hit in empty.search(np.ones((1, 3)))[0]} == set(
        zip(ids, texts, strict=True)
    )
    assert empty.ids({"k": {"$contains": 0}}) == ["many"] and empty.delete(ids) == len(ids)


@pytest.mark.parametrize(
    ("vectors", "texts", "ids", "metadatas", "error"),
    [
        ([[1, 0, 0], [np.nan, 0, 0]], ["a", "b"], None, None, ValueError),
        ([[1, 0, 0], [0, 0, 0]], ["a", "b"], None, None, ValueError),
        ([[1, 0, 0], [0, 1, 0]], ["a", "\ud800"], None, None, ValueError),
        ([[1, 0, 0], [0, 1, 0]], ["a", "b"], ["c", "c"], None, ValueError),
        ([[1, 0, 0], [0, 1, 0]], ["a", "b"], None, [{}, {"k": float("nan")}], ValueError),
        ([[1, 0, 0], [0, 1, 0]], ["a", "b"], None, [{}, {"k": object()}], TypeError),
        ([[1, 0]], ["a"], None, None, ValueError),
    ],
)
def test_what_a_document_index_refuses_is_refused(empty, vectors, texts, ids, metadatas, error):
    with pytest.raises(error):
        empty.add(vectors, texts, ids, metadatas)
    assert len(empty) == 0


def test_vectors_that_are_too_wide_say_what_to_do(server):
    for call in (
        lambda: MilvusDocumentIndex.create(server, "wide", dimension=32_769),
        lambda: MilvusDocumentIndex.create(server, "wide").add(np.ones((1, 32_769)), ["a"]),
    ):
        with pytest.raises(
            ValueError, match=r"dimension 32,769.*at most 32,768.*num_tokens=.*pooling='mean'"
        ):
            call()
    assert not MilvusDocumentIndex.exists(server, "wide")


def test_the_widest_vectors_go_in_messages_that_a_server_takes(make, written):
    """850 vectors of 20,480 entries are 66 MiB in float32, a message at most 64."""
    count, dimension = 850, 20_480
    index = make(tokens=5, factory="HNSW8")
    assert index.dimension is None and len(index) == 0
    vectors = np.zeros((count, dimension), np.float16)
    vectors[np.arange(count), np.arange(count)] = 1
    vectors[:, -1] = 0.5
    ids = [str(number) for number in range(count)]
    index.add(vectors[:1], ["text"], ["first"])  # makes the collection
    counts = written(index)
    index.add(vectors, ["text"] * count, ids)
    assert len(counts) == 2 and sum(counts) == count
    assert index.dimension == dimension and len(index) == count + 1
    assert [hit.id for hit in index.search(vectors[[848]], 1)[0]] == ["848"]
    assert (index.vectors(ids[-20:]).argmax(axis=1) == np.arange(count - 20, count)).all()
    [line] = index.search(vectors[:1, : dimension // 5], 3)
    assert line[0].score == pytest.approx(1) and {line[0].id, line[1].id} == {"0", "first"}


def test_the_longest_documents_come_back_in_messages_that_a_server_sends(make, written):
    """550 documents with all the text and metadata that fit are 68 MiB."""
    count = 550
    empty = make(dimension=3)
    ids = [str(number) for number in range(count)]
    metadatas = [{"n": number, "fill": "y" * 65_000} for number in range(count)]
    vectors = np.random.default_rng(1).normal(size=(count, 3))
    counts = written(empty)
    empty.add(vectors, ["x" * LIMIT] * count, ids, metadatas)
    assert len(counts) > 1 and sum(counts) == count
    assert len(empty.get(ids)) == count
    [line] = empty.search(vectors[:1], count)
    assert len(line) == count and all(len(hit.text) == LIMIT for hit in line)
    assert len(empty.ids({"fill": {"$ne": "y"}})) == count
    found = empty.search(vectors[:40], 20, {"n": {"$gte": count - 100}})
    assert all(len(line) == 20 and all(hit.metadata["n"] >= count - 100 for hit in line) for line in found)


def test_any_number_of_queries_is_searched(empty):
    empty.add(np.eye(3), ["x", "y", "z"], ["x", "y", "z"])
    found = empty.search(np.tile(np.eye(3), (5_500, 1)), 1)  # a server takes 16,384 in a message
    assert [line[0].id for line in found] == ["x", "y", "z"] * 5_500


def test_an_add_that_fails_half_way_says_how_many_are_stored_and_can_be_repeated(empty, monkeypatch):
    monkeypatch.setattr(messages, "MESSAGE_BYTES", 3_000)
    client, sent = empty._opened().server.client, []
    real = client.upsert

    def fails_at_the_third(name, rows, **options):
        from pymilvus.exceptions import MilvusException

        sent.append(len(rows))
        if len(sent) == 3:
            raise MilvusException(message="disk quota exceeded")
        return real(name, rows, **options)

    ids = [str(number) for number in range(40)]
    vectors = np.random.default_rng(1).normal(size=(40, 3))
    monkeypatch.setattr(client, "upsert", fails_at_the_third)
    with pytest.raises(
        DocumentIndexError, match=r"disk quota exceeded; [0-9]+ of 40 documents were stored"
    ) as caught:
        empty.add(vectors, ids, ids)
    assert f"; {sum(sent[:2])} of 40" in str(caught.value) and len(empty) == sum(sent[:2]) < 40
    empty.add(vectors, ids, ids)
    assert sorted(empty.ids()) == sorted(ids)


def test_more_than_a_server_returns_is_refused(empty):
    for options in ({"k": 16_385}, {"num_tokens": 1, "fetch_k": 16_385}):
        with pytest.raises(
            ValueError, match=r"must be at most 16,384, the most that Milvus returns, got 16,385"
        ):
            empty.search(np.eye(3), **options)
    for k in (0, -1):
        with pytest.raises(ValueError, match="k must be at least 1"):
            empty.search(np.eye(3), k)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"factory": "IVF16,RaBitQ"},
            ValueError,
            "'IVF16,RaBitQ' is not one that Milvus has; use one of 'auto', 'Flat'",
        ),
        ({"factory": "HNSW2"}, ValueError, "asks for 2 links; use 4 to 64"),
        ({"factory": "IVF0,Flat"}, ValueError, "asks for 0 lists"),
        ({"factory": None}, TypeError, "factory must be a str"),
        ({"dimension": 0}, ValueError, "dimension must be at least 1"),
        ({"dimension": 5, "tokens": 2}, ValueError, "dimension 5 is not made of 2 tokens"),
        ({"collection_name": "a-b"}, ValueError, "'a-b' is not one that Milvus takes"),
        ({"collection_name": "ä"}, ValueError, "not one that Milvus takes"),
        ({"uri": "localhost"}, ValueError, "write 'http://host:19530'"),
        ({"uri": "http://me:secret@localhost:19530"}, ValueError, "give it as token='user:password'"),
    ],
)
def test_settings_are_checked(server, options, error, message):
    with pytest.raises(error, match=message) as caught:
        MilvusDocumentIndex.create(**{"uri": server, **options})
    assert "secret" not in str(caught.value)
