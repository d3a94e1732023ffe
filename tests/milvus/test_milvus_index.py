"""A MilvusDocumentIndex finds what a DocumentIndex of the same documents finds, and sees its own writes."""

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoregembed_indexes import (
    Document,
    DocumentIndex,
    DocumentIndexError,
    IndexMismatchError,
    MilvusDocumentIndex,
)

DIMENSION, TOKENS, COUNT = 12, 3, 200
RANDOM = np.random.default_rng(5)


def flattened(count):
    """Vectors as flattened embeddings are: every token of the same length."""
    parts = RANDOM.normal(size=(count, TOKENS, DIMENSION // TOKENS))
    parts /= np.linalg.norm(parts, axis=2, keepdims=True)
    return (parts / np.sqrt(TOKENS)).reshape(count, DIMENSION)


IDS = [f"document {number}" for number in range(COUNT)]
TEXTS = [f"text number {number}" for number in range(COUNT)]
METADATAS = [{"n": number, "lang": "de" if number % 3 else "en"} for number in range(COUNT)]
VECTORS = flattened(COUNT)
QUERIES = flattened(4)


@pytest.fixture(scope="module", params=["server", "half", "lite"])
def uri(request):
    """The address of each, with float16 on one."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def plain():
    with DocumentIndex.create(dimension=DIMENSION, tokens=TOKENS, factory="Flat") as index:
        index.add(VECTORS, TEXTS, IDS, METADATAS)
        yield index


@pytest.fixture(scope="module")
def filled(uri, collections):
    index = collections(uri, dimension=DIMENSION, tokens=TOKENS, encoder="an encoder")
    index.add(VECTORS, TEXTS, IDS, METADATAS)
    return index


@pytest.fixture
def empty(uri, collections):
    return collections(uri, dimension=3)


@pytest.fixture
def assert_same(filled):
    """Compare hits: scores are off by what float16 takes from the queries, where the server holds that."""
    return partial(assert_hits, tolerance=2e-4 if filled.info()["vectors"] == "float16" else 2e-6)


def assert_hits(found, expected, tolerance):
    assert len(found) == len(expected)
    for line, wanted in zip(found, expected, strict=True):
        assert [hit[:1] + hit[2:] for hit in line] == [hit[:1] + hit[2:] for hit in wanted]
        np.testing.assert_allclose([hit.score for hit in line], [hit.score for hit in wanted], atol=tolerance)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"k": 300},
        {"filter": {"lang": "en"}},
        {"filter": {"n": {"$lt": 3}}, "k": 5},
        {"filter": lambda metadata: metadata["n"] % 70 == 1},
        {"filter": {"lang": {"$ne": "de"}}, "ids": [*IDS[:50], "not there"]},
        {"ids": []},
        {"min_score": 0.5},
        {"num_tokens": 1, "fetch_k": 30},
        {"num_tokens": 2, "filter": {"lang": "en"}},
    ],
    ids=str,
)
def test_search_finds_the_same_documents_with_the_same_cosines(filled, plain, assert_same, options):
    assert_same(filled.search(QUERIES, **options), plain.search(QUERIES, **options))


def test_a_query_of_the_first_tokens_is_compared_with_that_part_of_documents(filled, plain, assert_same):
    for width in (4, 8):
        assert_same(filled.search(QUERIES[:, :width], 7), plain.search(QUERIES[:, :width], 7))
    assert_same(filled.search(QUERIES[:, :8], 7, num_tokens=1), plain.search(QUERIES[:, :8], 7, num_tokens=1))
    with pytest.raises(IndexMismatchError, match="query vectors have dimension 5, the index needs 12"):
        filled.search(QUERIES[:, :5])


def test_the_other_searches_find_the_same(filled, plain, assert_same):
    for options in (
        {"k": 5},
        {"k": 3, "lambda_mult": 0.1, "filter": {"lang": "en"}},
        {"k": 4, "num_tokens": 2},
    ):
        assert_same(filled.search_mmr(QUERIES, **options), plain.search_mmr(QUERIES, **options))
    assert_same(filled.search_mmr(QUERIES[:, :4], 5), plain.search_mmr(QUERIES[:, :4], 5))
    assert_same(filled.search_similar(IDS[:3], 6), plain.search_similar(IDS[:3], 6))


def test_documents_and_vectors_are_read_by_id(filled, plain):
    assert filled.get([IDS[7], "not there", IDS[3], IDS[7]]) == plain.get([IDS[7], IDS[3], IDS[7]])
    np.testing.assert_allclose(filled.vectors(IDS[5:8]), plain.vectors(IDS[5:8]), atol=1e-7)
    with pytest.raises(KeyError, match="no document has the id 'not there'"):
        filled.vectors([IDS[0], "not there"])
    assert sorted(filled.ids()) == sorted(IDS) and len(filled) == COUNT


def test_info_says_what_it_is(filled, uri, half, server):
    info = filled.info()
    held = {half: "float16", server: "float32"}  # milvus-lite's is its own affair
    assert info["vectors"] == held.get(uri, info["vectors"])
    assert info["uri"] == uri and info["documents"] == COUNT and info["kind"] == "FLAT"
    settings = {"dimension": DIMENSION, "tokens": TOKENS, "encoder": "an encoder", "factory": "Flat"}
    assert settings.items() <= info.items()


def test_a_client_reads_its_own_writes(empty):
    """Not once, but every time: a server answers from a state that lags behind by as much as 0.2 seconds."""
    there = set()
    for turn in range(5):
        vector = np.eye(3)[[turn % 3]]
        name = f"turn {turn}"
        empty.add(vector, ["first"], [name])
        there.add(name)
        assert name in [hit.id for hit in empty.search(vector, 10)[0]]
        empty.add(vector, ["second"], [name])
        assert empty.get([name])[0].text == "second" and len(empty) == len(there)
        if turn % 2:
            assert empty.delete([name, "not there", name]) == 1
            there.remove(name)
            assert len(empty) == len(there)
            assert {hit.id for hit in empty.search(vector, 10)[0]} == there
        assert set(empty.ids()) == there
    assert empty.clear() == len(there)
    assert len(empty) == 0 and empty.search(np.eye(3)) == [[], [], []] and empty.get(["turn 0"]) == []


def test_another_client_sees_what_was_written_before_it_was_opened(empty, uri):
    for turn in range(3):
        empty.add(np.eye(3)[:2], ["a", "b"], ["a", f"b{turn}"])
        with MilvusDocumentIndex.open(uri, empty.collection_name) as other:
            assert set(other.ids()) == {"a", *(f"b{number}" for number in range(turn + 1))}
    with MilvusDocumentIndex.open(uri, empty.collection_name, strong=True) as other:
        assert len(other) == 4
        for left in (3, 2, 1):
            empty.delete([f"b{left - 1}"])
            assert len(other) == left


def test_a_document_replaced_is_replaced_whole(empty):
    empty.add([[1, 0, 0]], ["old"], ["a"], [{"old": 1}])
    empty.add([[0, 1, 0]], ["new"], ["a"])
    assert empty.get(["a"]) == [Document("a", "new", {})]
    [[hit]] = empty.search([[0, 1, 0]])
    assert hit.score == pytest.approx(1)


NASTY = [
    "",
    "\0",
    "a\0b",
    '"',
    "'",
    "\\",
    "\\\\",
    "%",
    "%20",
    "_",
    "é",
    "e\u0301",
    "\U0001f600",
    "\uffff",
    "id in []",
]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=10) | st.sampled_from(NASTY)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**200), 2**200)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


def test_whatever_goes_in_comes_out_equal(empty):
    seen = {name: (name, {name: name}) for name in NASTY}

    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(st.dictionaries(TEXT, st.tuples(TEXT, st.dictionaries(TEXT, JSON, max_size=4)), max_size=8))
    def gather(documents):
        seen.update(documents)

    gather()
    documents = [Document(name, *content) for name, content in seen.items()]
    ids, texts, metadatas = zip(*documents, strict=True)
    assert len(documents) > 2 * len(NASTY)
    assert empty.add(np.ones((len(ids), 3)), texts, ids, metadatas) == list(ids)
    assert json.dumps(empty.get(ids)) == json.dumps(documents)
    hits = {hit.id: hit for hit in empty.search(np.ones((1, 3)), k=len(ids) + 5)[0]}
    assert json.dumps([(hits[name].text, hits[name].metadata) for name in ids]) == json.dumps(
        [d[1:] for d in documents]
    )
    assert sorted(empty.ids()) == sorted(ids)
    assert empty.delete(ids) == len(ids) and len(empty) == 0


def test_threads_can_share_an_index(empty):
    def work(number):
        empty.add([[1, number, 0]], [f"text {number}"], [str(number)])
        return [hit.id for hit in empty.search([[1, number, 0]], k=20)[0]]

    with ThreadPoolExecutor(6) as pool:
        for number, found in enumerate(pool.map(work, range(12))):
            assert str(number) in found
    assert len(empty) == 12


def test_a_pickled_index_opens_to_read_and_carries_no_token(filled, token):
    frozen = pickle.dumps(filled)
    assert token.encode() not in frozen and b"Milvus:" not in frozen
    with pickle.loads(frozen) as copy:  # noqa: S301
        assert copy.read_only and len(copy) == COUNT
        for change in (copy.clear, lambda: copy.delete(["a"]), lambda: copy.add(VECTORS[:1], ["x"])):
            with pytest.raises(DocumentIndexError, match="cannot be changed; open it without read_only"):
                change()
    assert token not in repr(filled) + repr(vars(filled)) + str(filled.info())


def test_a_closed_index_says_so(uri, filled):
    other = MilvusDocumentIndex.open(uri, filled.collection_name)
    other.close()
    other.close()
    for call in (lambda: len(other), lambda: other.search(QUERIES), lambda: other.add(VECTORS[:1], ["x"])):
        with pytest.raises(DocumentIndexError, match="is closed; open it again"):
            call()
    assert len(filled) == COUNT  # the connection is shared, and stays
