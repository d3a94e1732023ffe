"""Filters on a server mean what they mean to a DocumentIndex, whatever its expressions make of JSON."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from metadata_filters import BY_VALUE, FILTERS, METADATA, NUMBERS, TEXTS, matches

from autoregembed_indexes.milvus import collection as collections_module
from autoregembed_indexes.milvus import finding
from autoregembed_indexes.milvus.expressions import comparable_fields, expression_of
from autoregembed_indexes.records import to_json

SCALARS = [None, True, False, *NUMBERS, *TEXTS]
WITH_LISTS = [*({"k": value} for value in SCALARS), {}, {"k": {"l": 1}}, {"k.l": 1, "k": {"l": 2}}]
WITH_LISTS += [{"k": []}, {"k": SCALARS[:9]}, {"k": TEXTS}, {"k": [[1], {"a": 1}, 2]}, {"k": "a" * 300}]
# More than a server compares: the fields made of these are larger than the metadata.
WITH_LISTS += [
    {"k": 1, "many": [1] * 20_000},
    {f"key {number}": number for number in range(3_000)} | {"k": "a"},
]


def drawn():
    """Metadata as hypothesis draws it, the same every time."""
    metadatas = []

    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(st.lists(METADATA, min_size=4, max_size=10))
    def gather(more):
        metadatas.extend(more)

    gather()
    return metadatas[-250:]


METADATAS = [*WITH_LISTS, *drawn()]
VECTORS = np.random.default_rng(3).normal(size=(len(METADATAS), 3))


@pytest.fixture(scope="module")
def index(uri, collections):
    filled = collections(uri, dimension=3, tokens=1)
    ids = [str(row) for row in range(len(METADATAS))]
    filled.add(VECTORS, ids, ids, METADATAS)
    return filled


def rows_of(where):
    return [row for row, metadata in enumerate(METADATAS) if matches(metadata, where)]


def test_a_filter_finds_what_it_means(index):
    @settings(max_examples=80, deadline=None, derandomize=True)
    @given(FILTERS)
    def check(where):
        assert sorted(map(int, index.ids(where))) == rows_of(where)

    check()


@pytest.mark.parametrize("name", sorted(BY_VALUE))
def test_every_operator_means_the_same_for_every_value(index, name):
    if name in ("$in", "$nin", "$any", "$all"):
        operands = [[], *([value] for value in SCALARS[::9]), SCALARS[:6], TEXTS[:8], NUMBERS]
    elif name in ("$exists", "$empty"):
        operands = [True, False]
    else:
        operands = TEXTS[::2] if name.startswith("$text") else SCALARS[::5]
    if name in ("$gt", "$gte", "$lt", "$lte"):
        operands = [*NUMBERS[::3], *TEXTS[::4], "a" * 300]
    for operand in operands:
        for key in ("k", "k.l"):
            where = {key: {name: operand}}
            assert sorted(map(int, index.ids(where))) == rows_of(where), where


@pytest.mark.parametrize("k", [1, 20, 1_000])
def test_a_search_finds_the_best_of_those_that_match(index, k):
    unit = VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)

    @settings(max_examples=12, deadline=None, derandomize=True)
    @given(FILTERS)
    def check(where):
        rows = rows_of(where)
        best = sorted(rows, key=lambda row: -unit[row] @ unit[0])[:k]
        found = index.search(VECTORS[:1], k, where)[0]
        assert {int(hit.id) for hit in found} <= set(rows) and len(found) == min(k, len(rows))
        np.testing.assert_allclose([hit.score for hit in found], unit[best] @ unit[0], atol=2e-3)

    check()


@pytest.mark.parametrize(
    "where",
    [
        {"k": "ab"},
        {"k": {"$in": [1, "ab", True]}},
        {"k": {"$gte": 2**62}},
        {"k": {"$lt": "b", "$gt": "a"}},
        {"k": {"$contains": 1.0}},
        {"k": {"$any": ["ab", 2]}},
        {"k": {"$all": ["ab", ""]}},
        {"k.l": 1},
        {"$or": [{"k": 1}, {"k": None}]},
        {"$and": [{"k": {"$ne": 1}}, {"k": {"$exists": True}}]},
    ],
    ids=str,
)
def test_the_server_leaves_out_what_it_can(index, where):
    possible = index._opened().count(expression_of(where))
    assert len(rows_of(where)) <= possible < len(METADATAS) * 0.7


@pytest.mark.parametrize(
    "where", [{"k": {"$ne": 1}}, {"$not": {"k": 1}}, {"$or": [{"k": 1}, {"k": {"$nin": [2]}}]}, {}]
)
def test_what_the_server_cannot_tell_is_left_to_the_metadata(where):
    assert expression_of(where) == ""


def test_a_rare_match_is_found_where_a_server_returns_few(index, monkeypatch):
    """As in a collection of more than the 16,384 that a server returns: all that match are listed, and searched."""
    for module in (collections_module, finding):
        monkeypatch.setattr(module, "MOST_HITS", 32)
    far = np.argsort(VECTORS @ VECTORS[0])[:3]
    judge = lambda metadata: metadata in [METADATAS[row] for row in far]  # noqa: E731
    for where in (judge, {"$not": {"$not": {"k": {"$exists": True}}}}):
        rows = [
            row for row, m in enumerate(METADATAS) if (where(m) if callable(where) else matches(m, where))
        ]
        found = index.search(VECTORS[:2], 30, where)
        for line in found:
            assert len(line) == min(30, len(rows)) and {int(hit.id) for hit in line} <= set(rows)
        assert sorted(map(int, index.ids(where))) == rows


@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        ({"k": {"gt": 1}}, TypeError, "filter on 'k'"),
        ({"k": [1]}, TypeError, "use \\$in"),
        ({"$nor": []}, ValueError, "does not join filters"),
        ("k == 1", TypeError, "a filter must be a dict"),
    ],
)
def test_what_is_not_a_filter_is_refused(index, where, error, message):
    for call in (index.ids, lambda where: index.search(VECTORS[:1], 3, where)):
        with pytest.raises(error, match=message):
            call(where)


def test_fields_keep_the_order_of_what_they_are_made_of():
    for kind in (NUMBERS, TEXTS):
        ordered = sorted(kind)
        forms = [next(iter(comparable_fields(to_json({"k": value})).values())) for value in ordered]
        assert forms == sorted(forms)
