"""Filters are exact as sets, with an index on a key or without, and hits are the best of those that match."""

import itertools
import math
import random
import re
import sqlite3

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from metadata_filters import (
    BY_VALUE,
    FILTERS,
    METADATA,
    NUMBERS,
    PLAIN_KEYS,
    TEXTS,
    matches,
)

from autoregembed_indexes import DocumentIndex, filters
from autoregembed_indexes.filters import compile_filter, index_expression, register_functions
from autoregembed_indexes.records import to_json


def database(metadatas, indexed=()):
    connection = sqlite3.connect(":memory:")
    register_functions(connection)
    connection.execute("CREATE TABLE documents(row INTEGER PRIMARY KEY, id TEXT, metadata TEXT, text TEXT)")
    for number, key in enumerate(indexed):
        connection.execute(f"CREATE INDEX metadata_{number} ON documents({index_expression(key)})")
    rows = ((i, str(i), to_json(metadata), "") for i, metadata in enumerate(metadatas))
    connection.executemany("INSERT INTO documents VALUES (?, ?, ?, ?)", rows)
    return connection


def found_by(connection, where, indexed=()):
    """The rows that SQLite finds, after a look at what the condition is for each row: 0 or 1."""
    condition, parameters = compile_filter(where, indexed)
    each = connection.execute(f"SELECT row, {condition} FROM documents ORDER BY row", parameters).fetchall()  # noqa: S608
    assert {value for _, value in each} <= {0, 1}
    found = connection.execute(f"SELECT row FROM documents WHERE {condition} ORDER BY row", parameters)  # noqa: S608
    rows = [row for (row,) in found]
    assert rows == [row for row, value in each if value]
    return rows


def rows_of(metadatas, where):
    return [row for row, metadata in enumerate(metadatas) if matches(metadata, where)]


def query_plan(connection, where, indexed):
    condition, parameters = compile_filter(where, indexed)
    query = f"EXPLAIN QUERY PLAN SELECT row FROM documents WHERE {condition} ORDER BY row"  # noqa: S608
    return "; ".join(step[3] for step in connection.execute(query, parameters))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(metadatas=st.lists(METADATA, min_size=1, max_size=12), where=FILTERS)
def test_a_filter_finds_what_it_means_with_and_without_indexes(metadatas, where):
    connection = database(metadatas, PLAIN_KEYS)
    expected = rows_of(metadatas, where)
    assert found_by(connection, where) == expected
    assert found_by(connection, where, PLAIN_KEYS) == expected


@pytest.mark.parametrize("key", ["k", "k.l", 'k"l'])
def test_every_operator_agrees_with_python_on_every_pair_of_values(key):
    values = [None, True, False, *NUMBERS, *TEXTS]
    others = [[], {}, [None], [1, "a"], [True, "1"], [1.0, [2]], ["\0", ["a"]], {"l": 1}, [{"l": 1}]]
    metadatas = [{key: value} for value in values + others]
    metadatas += [{}, {"k": {"l": 1}}, {"k": {"l": "a"}}, {"k": {}}, {"k": [1]}]
    indexed = () if '"' in key else (key,)
    connection = database(metadatas, indexed)
    for name, value in itertools.product(BY_VALUE, values):
        if name in ("$in", "$nin", "$any", "$all"):
            operand = [value, 1, "a"]
        elif name in ("$exists", "$empty"):
            operand = value is True
        elif (name in ("$gt", "$gte", "$lt", "$lte") and (value is None or isinstance(value, bool))) or (
            name.startswith("$text") and not isinstance(value, str)
        ):
            continue
        else:
            operand = value
        where = {key: {name: operand}}
        expected = rows_of(metadatas, where)
        for keys in {(), indexed}:
            assert found_by(connection, where, keys) == expected, where


@settings(max_examples=200, deadline=None, derandomize=True)
@given(value=st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**70), 2**70))
def test_numbers_keep_their_exact_order_beside_their_neighbours(value):
    if isinstance(value, int):
        near = [value - 1, value, value + 1, float(value)]
    else:
        near = [math.nextafter(value, -math.inf), value, math.nextafter(value, math.inf), int(value)]
    metadatas = [{"k": number} for number in near if abs(number) < math.inf]
    metadatas += [{"k": True}, {"k": "1"}, {"k": None}, {}]
    connection = database(metadatas, ["k"])
    for name in ("$eq", "$gt", "$gte", "$lt", "$lte"):
        where = {"k": {name: value}}
        assert found_by(connection, where) == found_by(connection, where, ["k"]) == rows_of(metadatas, where)


@pytest.mark.parametrize("key", ["k", "it's", "a.b", "[0]", "é", "a b", "a{}b"])
@pytest.mark.parametrize(
    "operators",
    [
        *({"$eq": value} for value in ("x", 1, 0.1, 2**70, True, "a\0b")),
        {"$in": ["x", 1, 0.1, "a\0b"]},
        {"$in": list(range(100))},
        {"$gt": 1},
        {"$gte": "x"},
        {"$lt": 0.5},
        {"$lte": "x"},
        {"$gte": 1, "$lt": 2},
    ],
)
def test_sqlite_uses_the_index_on_a_key(key, operators):
    connection = database([{key: 1}], ["other", key])
    for where in (
        {key: operators},
        {"z": 1, key: operators, "y": {"$gt": 1}},
        {"$and": [{"z": 1}, {"$and": [{"y": 2}, {key: operators}]}]},
        {"$or": [{key: operators}, {"other": 3}]},
    ):
        plan = query_plan(connection, where, ["other", key])
        assert "INDEX metadata_1" in plan and "SCAN documents" not in plan
    assert "metadata_1" not in query_plan(connection, {key: operators}, [])


@pytest.mark.parametrize("key", ["", ".", "a.", "a..b", 'q"', "b\\s", "\n", "\0", "\ud800", "$a", 1])
def test_a_key_without_a_plain_path_cannot_have_an_index(key):
    with pytest.raises(ValueError, match=f"metadata key {re.escape(repr(key))} cannot have an index"):
        index_expression(key)


def test_a_dotted_key_is_itself_first_and_then_a_path_through_objects():
    connection = database(
        [
            {"a": {"b": {"c": 1}}},
            {"a": {"b": {"c": 1}}, "a.b.c": 2},
            {"a.b": {"c": 1}},
            {"a": [{"b": {"c": 1}}], "b": {"0": 1}},
            {"a.b.c": None, "a": {"b": {"c": 1}}},
            {"a": ["line\n"], "b": {"line\n": 1}},
        ]
    )
    assert found_by(connection, {"a.b.c": 1}) == [0]
    assert found_by(connection, {"a.b.c": 2}) == [1]
    assert found_by(connection, {"a.b.c": {"$exists": True}}) == [0, 1, 4]
    assert found_by(connection, {"a.b.c": {"$empty": True}}) == [2, 3, 4, 5]
    assert found_by(connection, {"a.0.b.c": {"$exists": True}}) == []
    assert found_by(connection, {"b.0": 1}) == [3]
    assert found_by(connection, {"a.line\n": {"$exists": True}}) == []
    assert found_by(connection, {"b.line\n": 1}) == [5]


def test_a_key_is_never_read_as_sql():
    keys = ["'", "';--", "') OR 1 --", "a'.'b", "?", ":a", "%s", "{0}", "{metadata}"]
    connection = database([{key: 1} for key in keys], keys)
    for row, key in enumerate(keys):
        for operators in ({"$eq": 1}, {"$gt": 0}, {"$exists": True}):
            where = {key: operators}
            assert found_by(connection, where) == found_by(connection, where, keys) == [row]


def test_python_judges_only_what_sql_leaves_open():
    connection = database([{"number": number, "text": "word" * (number % 2)} for number in range(100)])
    judged = []

    def count_and_judge(text, name, operand):
        judged.append(text)
        return filters._json_matches(text, name, operand)

    connection.create_function("json_matches", 3, count_and_judge, deterministic=True)
    condition, parameters = compile_filter({"text": {"$contains": "or"}, "number": {"$lte": 9}})
    found = connection.execute(f"SELECT row FROM documents WHERE {condition}", parameters)  # noqa: S608
    assert [row for (row,) in found] == [1, 3, 5, 7, 9]
    assert sorted(judged) == ['["",null]'] * 5 + ['["word",null]'] * 5 + ["[9,null]"]


def test_filters_of_thousands_of_values_run():
    metadatas = [{"a": 1}, {"a": 4999}, {"b": 3}]
    connection = database(metadatas, ["a"])
    wide = {"$or": [{"a": number} for number in range(1000)]}
    assert found_by(connection, wide, ["a"]) == found_by(connection, {"$not": {"$not": wide}}) == [0]
    assert found_by(connection, {"$and": [{"a": {"$ne": number}} for number in range(1000)]}) == [1, 2]
    many = list(range(-5000, 5000))
    assert found_by(connection, {"a": {"$in": many}}, ["a"]) == [0, 1]
    assert found_by(connection, {"a": {"$nin": {*many}}}, ["a"]) == [2]
    assert found_by(connection, {"a": {"$in": [number + 0.5 for number in many]}}, ["a"]) == []


def test_filters_run_to_fifty_levels_and_no_further():
    metadatas = [{"b.c": 2}, {"b.c": 0}, {"b": {"c": 3}}]
    connection = database(metadatas, ["b.c"])
    operators = {"$gt": 1, "$lt": 3}
    where = {"$or": [{"b.c": {"$in": [2, None, 0.5, "x"]}}] * 500}
    for level in range(49):
        operators = {"$not": operators}
        if level < 48:
            also = {"b.c": {"$gte": 2}}
            where = [{"$and": [also, where]}, {"$or": [where, {"b.c": -1}]}, {"$not": where}][level % 3]
    assert found_by(connection, {"b.c": operators}, ["b.c"]) == [1, 2]
    assert found_by(connection, where, ["b.c"]) == found_by(connection, where) == rows_of(metadatas, where)
    for deeper in ({"b.c": {"$not": operators}}, {"$and": [{"$or": [where]}]}):
        with pytest.raises(ValueError, match="nested more than 50 deep"):
            compile_filter(deeper)


@pytest.mark.parametrize("negated", [False, True])
def test_what_is_too_deep_for_sqlite_is_refused_before_it_sees_it(negated):
    metadatas = [{"a.b": 1.5, "z": 1}, {"a": {"b": 1}}, {}]
    connection = database(metadatas, ["a.b"])
    where = {"a.b": {"$gt": 1}}
    for _ in range(3):
        where = {"$or": [where, where], "$and": [where, where]}
    for level in range(40):
        where = {"z": 1, "$or": [{"z": 2}, {"$not": where} if negated else where]}
        try:
            compile_filter(where, ["a.b"])
        except ValueError as error:
            assert "nested" in str(error) and level > 15
            break
        assert found_by(connection, where, ["a.b"]) == rows_of(metadatas, where)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), levels=st.integers(2, 49), leaves=st.integers(1, 200))
def test_no_shape_of_filter_exceeds_a_limit_of_sqlite(seed, levels, leaves):
    choose = random.Random(seed)
    metadatas = [{"a": 1, "b": {"c": 2.5}}, {"a": "x"}, {"b.c": None}, {}]

    def build(levels, leaves):
        if levels == 1 or leaves == 1:
            key = choose.choice(["a", "b.c", 'q"'])
            return {key: choose.choice([1, {"$gt": 2}, {"$in": [None, 1, 2.5, "x"]}, {"$not": {"$lt": "y"}}])}
        name = choose.choice(["$and", "$or", "$not"])
        if name == "$not":
            return {"$not": build(levels - 1, leaves)}
        count = min(choose.choice([1, 2, 3, 40]), leaves)
        sizes = choose.choice([[leaves // count] * count, [1] * (count - 1) + [leaves - count + 1]])
        return {name: [build(levels - 1, size) for size in sizes]}

    where = build(levels, leaves)
    connection = database(metadatas, ["a", "b.c"])
    assert found_by(connection, where, ["a", "b.c"]) == rows_of(metadatas, where)


@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        ({"$xor": [{"a": 1}]}, ValueError, r"'\$xor' does not join.*\$and, \$or, \$not.*\$eq.*\$empty"),
        ({"a": {"$re": "x"}}, ValueError, r"filter on 'a': '\$re' is not an operator.*\$eq, \$ne, \$gt"),
        ({"a": {"$and": [{"$gt": 1}]}}, ValueError, r"filter on 'a': '\$and' is not an operator"),
        ({"$and": []}, ValueError, r"\$and needs at least one filter"),
        ({"$or": ()}, ValueError, r"\$or needs at least one filter"),
        ({"$or": {"a": 1}}, TypeError, r"\$or must be a list of filters, got dict"),
        ({"$and": [None]}, TypeError, "a filter must be a dict.*got NoneType"),
        ({"$not": [{"a": 1}]}, TypeError, "a filter must be a dict.*got list"),
        ({"a": {"$not": 1}}, TypeError, r"filter on 'a', \$not: must be a dict of operators.*\$ne"),
        ({"a": {}}, TypeError, "filter on 'a': {} holds no operator"),
        ({"a": {"b": 1}}, TypeError, "filter on 'a': a dict.*got 'b'.*write 'a.b'"),
        ({"a": {"$gt": 1, "b": 1}}, TypeError, "filter on 'a': a dict.*got 'b'.*write 'a.b'"),
        ({"a": {1: 1}}, TypeError, "filter on 'a': a dict.*got 1"),
        ({"a": {"$eq": {"b": 1}}}, TypeError, r"filter on 'a', \$eq: got a dict.*'a.KEY'"),
        ({"a": [1]}, TypeError, r"filter on 'a', \$eq: got a list.*\$in.*\$contains"),
        ({"a": {"$in": [[1]]}}, TypeError, r"filter on 'a', \$in: got a list"),
        ({"a": {"$contains": ["x"]}}, TypeError, r"filter on 'a', \$contains: got a list"),
        ({"a": {"$in": "xy"}}, TypeError, r"filter on 'a', \$in: must be a list, got str"),
        ({"a": {"$any": {"x": 1}}}, TypeError, r"filter on 'a', \$any: must be a list, got dict"),
        ({"a": {"$gt": None}}, TypeError, r"filter on 'a', \$gt: only numbers and texts .*got None"),
        ({"a": {"$lte": True}}, TypeError, r"filter on 'a', \$lte: only numbers and texts .*got True"),
        ({"a": {"$exists": 1}}, TypeError, r"filter on 'a', \$exists: must be True or False, got int"),
        ({"a": {"$empty": None}}, TypeError, r"filter on 'a', \$empty: must be True or False"),
        ({"a": {"$text_match": 1}}, TypeError, r"filter on 'a', \$text_match: must be str, got int"),
        ({"a": b"x"}, TypeError, r"filter on 'a', \$eq: bytes is not JSON"),
        ({"a": math.nan}, ValueError, r"filter on 'a', \$eq: nan"),
        ({"a": {"$lt": math.inf}}, ValueError, r"filter on 'a', \$lt: inf"),
        ({"a": {"$all": [1, -math.inf]}}, ValueError, r"filter on 'a', \$all: -inf"),
        ({"a": 10**4000}, ValueError, r"filter on 'a', \$eq: an integer of more than 10000 bits"),
        ({"a": "\ud800"}, ValueError, r"filter on 'a', \$eq: a lone surrogate"),
        ({"\ud800": 1}, ValueError, r"filter on '\\ud800': a lone surrogate"),
        ({1: "x"}, TypeError, "key must be str, got 1"),
        ({"$or": [{"a.b": {"$gt": 1}}] * 2000}, ValueError, r"SQL parameters.* 32,766.*\$in"),
        ("a = 1", TypeError, "must be a dict {key: value}, got str"),
        ([("a", 1)], TypeError, "must be a dict {key: value}, got list"),
        (len, TypeError, "must be a dict {key: value}, got builtin_function_or_method"),
    ],
)
def test_what_is_not_a_filter_is_refused_by_key_and_operator(where, error, message):
    with pytest.raises(error, match=message):
        compile_filter(where, ["a"])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(metadatas=st.lists(METADATA, min_size=1, max_size=12), where=FILTERS, k=st.integers(1, 15))
def test_filtered_search_equals_brute_force(metadatas, where, k):
    count = len(metadatas)
    vectors = np.random.default_rng(count).normal(size=(count, 4))
    ids = [str(i) for i in range(count)]
    expected = [str(row) for row in rows_of(metadatas, where)]
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
        ({"$xor": []}, ValueError, r"'\$xor'"),
        ({"a": {"$gt": None}}, TypeError, r"filter on 'a', \$gt"),
        ("a = 1", TypeError, "must be a dict"),
    ],
)
def test_a_refused_filter_leaves_the_index_as_it_was(where, error, message):
    with DocumentIndex.create(dimension=2) as index:
        index.add(np.ones((1, 2)), ["x"])
        for call in (lambda: index.search(np.ones((1, 2)), filter=where), lambda: index.ids(where)):
            with pytest.raises(error, match=message):
                call()
        assert len(index) == 1 and len(index.search(np.ones((1, 2)))[0]) == 1


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
