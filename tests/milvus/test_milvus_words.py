"""Search by words and hybrid search, where the server has them: here milvus-lite."""

import numpy as np
import pytest

TEXTS = {
    "a": "The quick brown fox jumps over the lazy dog.",
    "b": "A dog sleeps; a fox does not.",
    "c": "Whales are blue, and the sea is deep.",
    "d": "Blue, blue is the sea.",
    "e": "Nothing to see here.",
}
VECTORS = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.9, 0.1, 0], [0.1, 0.9, 0]])
METADATAS = [{"n": number} for number in range(5)]


@pytest.fixture(scope="module")
def library(lite, collections):
    index = collections(lite, dimension=3)
    index.add(VECTORS, list(TEXTS.values()), list(TEXTS), METADATAS)
    assert index.info()["words"]
    return index


def names(hits):
    return [hit.id for hit in hits]


def test_text_search_ranks_by_words(library):
    hits = library.search_text("blue sea")
    assert names(hits) == ["d", "c"] and hits[0].score > hits[1].score > 0
    assert hits[0].text == TEXTS["d"] and hits[0].metadata == {"n": 3}
    assert set(names(library.search_text("fox dog"))) == {"a", "b"}
    assert [names(line) for line in library.search_text(["whales", "no such words"])] == [["c"], []]


def test_a_filter_ids_and_k_limit_it(library):
    assert names(library.search_text("blue sea", k=1)) == ["d"]
    assert names(library.search_text("blue sea", filter={"n": {"$lt": 3}})) == ["c"]
    assert names(library.search_text("blue sea", filter=lambda metadata: metadata["n"] == 2)) == ["c"]
    assert names(library.search_text("blue sea", ids=["c", "e", "not there"])) == ["c"]


@pytest.mark.parametrize("query", ["", " ", "?!", '"', "\0", "()", "😀"])
def test_a_query_without_words_finds_nothing(library, query):
    assert library.search_text(query) == []


@pytest.mark.parametrize(
    "query", ['fox" OR "', "fox AND", "NOT fox", "fox*", "(fox", "what's fox?", "fox\0", "fox " * 5_000]
)
def test_nothing_in_a_query_is_an_operator(library, query):
    assert "a" in names(library.search_text(query))


@pytest.mark.parametrize(
    "options",
    [{}, {"weights": (1.0, 0.2)}, {"weights": (0.0, 1.0)}, {"filter": {"n": {"$gt": 1}}}, {"k": 2}],
    ids=str,
)
def test_hybrid_is_the_reciprocal_rank_fusion_of_both_searches(library, options):
    query, words = [[1, 0.05, 0]], "blue fox"
    weights, limits = options.get("weights", (1.0, 1.0)), {"k": 5, "filter": options.get("filter")}
    scores = {}
    for weight, hits in zip(
        weights, (library.search(query, **limits)[0], library.search_text(words, **limits)), strict=True
    ):
        for rank, hit in enumerate(hits if weight else [], 1):
            scores[hit.id] = scores.get(hit.id, 0) + weight / (60 + rank)
    expected = sorted(scores.items(), key=lambda item: (-item[1], item[0]))[: options.get("k", 10)]
    assert len(expected) > 1
    [found] = library.search_hybrid(query, [words], **options)
    assert [(hit.id, hit.score) for hit in found] == [
        (name, pytest.approx(score)) for name, score in expected
    ]


def test_words_follow_what_is_written(lite, collections):
    index = collections(lite, dimension=3, tokens=1)
    index.add(VECTORS[:2], ["red apples", "green pears"], ["a", "b"])
    assert names(index.search_text("apples")) == ["a"]
    index.add(VECTORS[:1], ["green apples"], ["b"])
    assert set(names(index.search_text("apples"))) == {"a", "b"} and index.search_text("pears") == []
    index.delete(["a"])
    assert names(index.search_text("apples")) == ["b"]
