"""Metadata filters, compiled to SQL.

SQLite's own JSON values are not exact: text ends at a NUL, integers above 63 bits become floats, true equals 1,
and a float may be off in its last digit. So a filter compares the JSON *text* of a value, which `records.to_json`
writes in one form only: `json_extract` with two paths returns it, in a list of two. Equality compares that text in
SQL. What else there is to judge, Python judges by that text, without reading the rest of the metadata.

SQLite's values serve to find candidates, by an index where a key has one: wide enough to hold every match, with
the exact condition beside them. So an index never changes a result.
"""

import heapq
import json
import math
import operator
import re
import sqlite3
import sys
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from autoregembed_indexes.records import MAX_INT_BITS, is_valid_text, to_json

MAX_LEVELS = 50
MAX_PARAMETERS = 32_766  # what SQLite takes in one statement, by default

# By default SQLite's parser keeps 100 entries on its stack; about ten are for the statement around a condition.
_MAX_STACK = 86
_LEAF_STACK = 20

# Keys that JSON writes with escapes, and the empty key, cannot be named in a path of every SQLite version.
_PLAIN_NAME = re.compile(r'[^"\\\x00-\x1f]+')
_COMPARISONS = {"$gt": operator.gt, "$gte": operator.ge, "$lt": operator.lt, "$lte": operator.le}
_IN_LIST = "IN (SELECT value FROM json_each(?))"

Scalar = str | int | float | bool | None


class _Condition(NamedTuple):
    """SQL that is 0 or 1, the most of the parser's stack that it takes, and how often it calls Python."""

    sql: str
    parameters: list[Any]
    stack: int = _LEAF_STACK
    calls: int = 0


class _Leaf(NamedTuple):
    """One operator on one key; `indexed` is the key's `index_expression` where it has an index."""

    key: str
    operator: str
    operand: Any
    indexed: str | None

    def __str__(self) -> str:
        return f"filter on {self.key!r}, {self.operator}"


def compile_filter(where: Mapping[str, Any] | None, indexed: Collection[str] = ()) -> tuple[str, list[Any]]:
    """Compile a filter to an SQL condition on the table `documents`, 0 or 1 for each row, and its parameters.

    None and {} match every document. `indexed` names the keys that have an index on `index_expression(key)`.
    The connection needs `register_functions`. Raises TypeError or ValueError, naming key and operator, for what
    is not a filter.
    """
    if where is None:
        return "1", []
    condition = _compile(where, frozenset(indexed), 1)
    if condition.stack > _MAX_STACK:
        raise ValueError("the filter is nested too deeply; write it with fewer levels of $and, $or and $not")
    if len(condition.parameters) > MAX_PARAMETERS:
        raise ValueError(
            f"the filter needs {len(condition.parameters):,} SQL parameters, SQLite takes {MAX_PARAMETERS:,}; "
            "write many values of one key as one $in"
        )
    return condition.sql, condition.parameters


def register_functions(connection: sqlite3.Connection) -> None:
    """Give `connection` the Python functions that compiled filters call."""
    connection.create_function("json_text_of", 2, _json_text_of, deterministic=True)
    connection.create_function("json_matches", 3, _json_matches, deterministic=True)


def index_expression(key: str) -> str:
    """The SQL expression over `metadata` that an index on `key` is made of, and that compiled filters use.

    SQLite uses an index only where the text is the same, so the key stands in it. Raises ValueError for a key
    that has no plain JSON path, or that no filter can name.
    """
    paths = _plain_paths(key)
    if not paths or key.startswith("$") or not is_valid_text(key):
        raise ValueError(
            f"metadata key {key!r} cannot have an index: a key must not start with '$', and no part of it between "
            "dots may be empty or hold double quotes, backslashes, control characters or lone surrogates"
        )
    return _first_found("json_extract(metadata, {})", ["'" + path.replace("'", "''") + "'" for path in paths])


def _compile(where: object, indexed: frozenset[str], level: int) -> _Condition:
    if not isinstance(where, Mapping):
        raise TypeError(f"a filter must be a dict {{key: value}}, got {type(where).__name__}")
    parts = []
    for key, value in where.items():
        if not isinstance(key, str):
            raise TypeError(f"a filter's key must be str, got {key!r}")
        if key in ("$and", "$or"):
            if not isinstance(value, (list, tuple)):
                raise TypeError(f"{key} must be a list of filters, got {type(value).__name__}")
            if not value:
                raise ValueError(f"{key} needs at least one filter")
            parts.append(_join(key[1:].upper(), [_compile(item, indexed, _below(level)) for item in value]))
        elif key == "$not":
            parts.append(_negated(_compile(value, indexed, _below(level))))
        elif key.startswith("$"):
            raise ValueError(
                f"{key!r} does not join filters; these do: $and, $or, $not; under a key stand: {_OPERATOR_NAMES}"
            )
        elif not is_valid_text(key):
            raise ValueError(f"filter on {key!r}: a lone surrogate is not valid Unicode")
        else:
            parts.append(_on_key(key, value, index_expression(key) if key in indexed else None, level))
    return _join("AND", parts)


def _on_key(key: str, value: object, indexed: str | None, level: int) -> _Condition:
    operators = value if isinstance(value, Mapping) else {"$eq": value}
    if not operators:
        raise TypeError(f"filter on {key!r}: {{}} holds no operator")
    parts = []
    for name, operand in operators.items():
        if not isinstance(name, str) or not name.startswith("$"):
            raise TypeError(
                f"filter on {key!r}: a dict under a key holds operators such as $gt, got {name!r}; "
                f"for a key inside an object write {f'{key}.{name}'!r}"
            )
        if name == "$not":
            if not isinstance(operand, Mapping):
                raise TypeError(f"filter on {key!r}, $not: must be a dict of operators; for a value write $ne")
            parts.append(_negated(_on_key(key, operand, indexed, _below(level))))
        elif name in _LEAVES:
            parts.append(_LEAVES[name](_Leaf(key, name, operand, indexed)))
        else:
            raise ValueError(f"filter on {key!r}: {name!r} is not an operator; these are: {_OPERATOR_NAMES}")
    return _join("AND", parts)


def _below(level: int) -> int:
    if level == MAX_LEVELS:
        raise ValueError(f"the filter is nested more than {MAX_LEVELS} deep")
    return level + 1


def _join(word: str, parts: list[_Condition]) -> _Condition:
    """Join conditions two by two, those that take the least of the parser's stack first.

    A chain of hundreds would be too deep for SQLite. Of two, the one that takes more of the stack is written
    first, as the parser holds one entry while it reads the first, three while it reads the second. Of equals,
    the one that calls Python less is written first, as SQLite may then not need the other.
    """
    if not parts:
        return _Condition("1", [])
    heap = [(part.stack, -part.calls, -number, part) for number, part in enumerate(parts)]
    heapq.heapify(heap)
    for number in range(len(parts), 2 * len(parts) - 1):
        *_, second = heapq.heappop(heap)
        *_, first = heap[0]
        joined = _Condition(
            f"({first.sql} {word} {second.sql})",
            first.parameters + second.parameters,
            max(first.stack + 1, second.stack + 3),
            first.calls + second.calls,
        )
        heapq.heapreplace(heap, (joined.stack, -joined.calls, -number, joined))
    return heap[0][-1]


def _negated(part: _Condition) -> _Condition:
    # NOT before the parenthesis would take one more entry of the parser's stack.
    return part._replace(sql=f"({part.sql}) = 0", stack=part.stack + 1)


def _as_wanted(leaf: _Leaf, condition: _Condition) -> _Condition:
    if not isinstance(leaf.operand, bool):
        raise TypeError(f"{leaf}: must be True or False, got {type(leaf.operand).__name__}")
    return condition if leaf.operand else _negated(condition)


def _is_one_of(leaf: _Leaf, values: list[Scalar]) -> _Condition:
    exact = _text_in(leaf.key, {form for value in values for form in _json_forms(value)})
    if None in values:  # a missing key reads as null, in an index too
        return _join("AND", [_exists(leaf.key), exact])
    if leaf.indexed is None or not values:
        return exact
    # NULL where the key is missing; there the exact condition is 0, and so are both together.
    return _join("AND", [_equality_candidates(leaf.indexed, values), exact])


def _compares(leaf: _Leaf) -> _Condition:
    """Candidates that SQLite reads far enough from the operand match; Python judges those near it."""
    value = _scalar(leaf, leaf.operand)
    if value is None or isinstance(value, bool):
        raise TypeError(f"{leaf}: only numbers and texts have an order, got {value}")
    exact = _matches(leaf, value)
    if not _plain_paths(leaf.key):
        return exact
    low, high = _bounds(value)
    least, greatest = ("", b"") if isinstance(value, str) else (-math.inf, math.inf)  # SQLite sorts by type
    ends = [low, greatest] if leaf.operator in ("$gt", "$gte") else [least, high]
    types = "('text')" if isinstance(value, str) else "('integer', 'real')"
    number, parameters = (leaf.indexed, []) if leaf.indexed else _read(leaf.key, "json_extract(metadata, {})")
    kind, kind_parameters = _read(leaf.key, "json_type(metadata, {})")
    candidates = _Condition(f"{number} BETWEEN ? AND ?", [*parameters, *ends])
    # As above, for NULL.
    is_type = _Condition(f"ifnull({kind} IN {types}, 0)", kind_parameters)
    far = _Condition(f"{number} NOT BETWEEN ? AND ?", [*parameters, low, high])
    return _join("AND", [candidates, is_type, _join("OR", [far, exact])])


def _holds_text(leaf: _Leaf) -> _Condition:
    if not isinstance(leaf.operand, str):
        raise TypeError(f"{leaf}: must be str, got {type(leaf.operand).__name__}")
    return _matches(leaf, _scalar(leaf, leaf.operand))


def _matches(leaf: _Leaf, operand: object) -> _Condition:
    sql, parameters = _text(leaf.key)
    return _Condition(
        f"json_matches({sql}, ?, ?)", [*parameters, leaf.operator, to_json(operand)], calls=1
    )
