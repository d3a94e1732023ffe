"""Filters are exact as sets, and the hits are the true best of the documents that match."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoregembed_indexes import DocumentIndex

KEYS = st.sampled_from(
    ["a", "b", "a.b", 'q"uote', "back\\slash", "", "$.a", "new\nline", "nul\0", "nul", "é", "[0]", "a b"]
)
NUMBERS = [0, 1, -1, 0.0, -0.0, 1.0, 1.5, 0.1, 2**53, 2**53 + 1, 2**64, 2**64 + 1, float(2**64), 1e300]
TEXTS = ["", "1", "true", "null", "a", "a\0", "a\0b", "é", "e\u0301", 'x"y', "x\\y", "[1,1]"]
VALUES = st.sampled_from([None, True, False, *NUMBERS, *TEXTS])
METADATA = st.dictionaries(
    KEYS, VALUES | st.lists(VALUES, max_size=2) | st.dictionaries(KEYS, VALUES, max_size=2), max_size=4
)
FILTERS = st.dictionaries(KEYS.filter(lambda key: not key.startswith("$")), VALUES, min_size=1, max_size=2)


def json_equal(left, right):
    """Equality by JSON type: a number equals a number of the same value, true is not a number."""
    if isinstance(left, bool) or isinstance(right, bool) or left is None or right is None:
        return left is right
    if isinstance(left, str) or isinstance(right, str):
        return type(left) is type(right) and left == right
    return not isinstance(left, (list, dict)) and left == right


def matches(metadata, where):
    return all(key in metadata and json_equal(metadata[key], value) for key, value in where.items())


@settings(max_examples=150, deadline=None)
@given(
    metadatas=st.lists(METADATA, min_size=1, max_size=25), where=FILTERS, k=st.integers(1, 30), data=st.data()
)
def test_filtered_search_equals_brute_force(metadatas, where, k, data):
    if data.draw(st.booleans()):  # a filter that something matches
        scalars = [
            m
            for m in metadatas
            for key, v in m.items()
            if not isinstance(v, (list, dict, bytes)) and key[:1] != "$"
        ]
        if scalars:
            chosen = data.draw(st.sampled_from(scalars))
            where = {
                key: v for key, v in chosen.items() if not isinstance(v, (list, dict)) and key[:1] != "$"
            }
    count = len(metadatas)
    vectors = np.random.default_rng(count).normal(size=(count, 4))
    ids = [str(i) for i in range(count)]
    expected = [i for i in ids if matches(metadatas[int(i)], where)]
    with DocumentIndex.create(dimension=4) as index:
        index.add(vectors, [""] * count, ids, metadatas)
        assert index.ids(where) == expected
        everything = index.search(vectors[:2], k=count)
        for hits, full in zip(index.search(vectors[:2], k=k, filter=where), everything, strict=True):
            best = [hit for hit in full if hit.id in expected][:k]
            assert [hit.id for hit in hits] == [hit.id for hit in best]
            assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in best], abs=1e-6)


def test_a_rare_match_is_found_among_many():
    count = 3000
    vectors = np.random.default_rng(0).normal(size=(count, 8))
    query = vectors[:1]
    order = np.argsort(-(vectors @ query[0]) / np.linalg.norm(vectors, axis=1))
    farthest = sorted(order[-3:].tolist())
    with DocumentIndex.create(dimension=8) as index:
        index.add(vectors, [""] * count, metadatas=[{"rare": i in farthest} for i in range(count)])
        assert len(index.search(query, k=10, filter={"rare": True})[0]) == 3
        assert len(index.search(query, k=2, filter={"rare": True})[0]) == 2
        assert index.search(query, k=2, filter={"rare": 1}) == [[]]
        assert len(index.search(query, k=5000, filter={})[0]) == count


def test_filters_follow_updates_and_deletes():
    with DocumentIndex.create(dimension=2) as index:
        index.add(np.ones((3, 2)), ["", "", ""], ["a", "b", "c"], [{"g": 1}, {"g": 1}, {"g": 2}])
        assert index.ids({"g": 1}) == ["a", "b"]
        index.add(np.ones((1, 2)), [""], ["a"], [{"g": 2}])
        index.delete(index.ids({"g": 1}))
        assert index.ids({"g": 1}) == [] and index.ids({"g": 2}) == ["a", "c"]
        assert [hit.id for hit in index.search(np.ones((1, 2)), filter={"g": 2})[0]] == ["a", "c"]


@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        ({"$or": [{"a": 1}]}, ValueError, r"'\$or' is not supported"),
        ({"a": {"$gt": 1}}, TypeError, r"filter on 'a'.*equality"),
        ({"a": [1]}, TypeError, "filter on 'a'"),
        ({"a": b"x"}, TypeError, "filter on 'a': bytes is not JSON"),
        ({"a": math.nan}, ValueError, "filter on 'a': nan"),
        ({"a": "\ud800"}, ValueError, "filter on 'a'.*surrogate"),
        ({1: "x"}, TypeError, "key must be str, got 1"),
        ("a = 1", TypeError, "must be a dict"),
    ],
)
def test_a_filter_that_is_not_an_equality_is_refused(where, error, message):
    with DocumentIndex.create(dimension=2) as index:
        index.add(np.ones((1, 2)), ["x"])
        for call in (lambda: index.search(np.ones((1, 2)), filter=where), lambda: index.ids(where)):
            with pytest.raises(error, match=message):
                call()
        assert len(index) == 1


def test_ids_limit_the_search_alone_and_together_with_a_filter():
    with DocumentIndex.create() as index:
        index.add(
            np.eye(4) + 0.1,
            list("abcd"),
            ids=list("abcd"),
            metadatas=[{"even": i % 2 == 0} for i in range(4)],
        )
        query = np.eye(4)[:1]
        assert [hit.id for hit in index.search(query, ids=["d", "b", "unknown", "d"])[0]] == ["b", "d"]
        assert [hit.id for hit in index.search(query, ids=["b", "c"], filter={"even": True})[0]] == ["c"]
        assert index.search(query, ids=[])[0] == []
        with pytest.raises(TypeError, match="ids must be a list"):
            index.search(query, ids="abc")
