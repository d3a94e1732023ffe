"""Metadata filters, compiled to SQL.

SQLite's own JSON values are not exact: text ends at a NUL, integers above 63 bits become floats, true equals 1,
and a float may be off in its last digit. So a filter compares the JSON *text* of a value, which `records.to_json`
writes in one form only: `json_extract` with two paths returns it, in a list of two. Equality compares that text in
SQL; what else there is to judge, Python judges by it, without reading the rest of the metadata.

SQLite's own values are used within bounds that hold in every release, and an index only to find candidates, with
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
from itertools import count
from typing import Any, NamedTuple

from autoregembed_indexes.records import MAX_INT_BITS, is_valid_text, to_json

MAX_LEVELS = 50
MAX_PARAMETERS = 32_766  # what SQLite takes in one statement, by default

# By default SQLite's parser keeps 100 entries on its stack; about ten are for the statement around a condition.
_MAX_STACK = 86
_LEAF_STACK = 20
_CHAIN = 8  # conditions joined at once; many at once would be too deep for SQLite's expressions

# Keys that JSON writes with escapes, and the empty key, cannot be named in a path of every SQLite version.
_PLAIN_NAME = re.compile(r'[^"\\\x00-\x1f]+')
_COMPARISONS = {"$gt": operator.gt, "$gte": operator.ge, "$lt": operator.lt, "$lte": operator.le}
# The JSON types that have an order, with the ends of their places in SQLite's: numbers, then texts, then blobs.
_NUMBERS = ("'integer', 'real'", -math.inf, math.inf)
_TEXTS = ("'text'", "", b"")
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
    paths = _plain_paths(key) if isinstance(key, str) and is_valid_text(key) else []
    if not paths or key.startswith("$"):
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
                raise TypeError(f"filter on {key!r}, $not: must be a dict of operators; or use $ne")
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
    """Join conditions a few at a time, those that take the least of the parser's stack first.

    The one that takes the most is written first: the parser holds one entry while it reads the first of a chain,
    three while it reads another. Of equals, those that call Python come last, as SQLite may not need them then.
    """
    number = count()
    heap = [(part.stack, -part.calls, -next(number), part) for part in parts]
    heapq.heapify(heap)
    while len(heap) > 1:
        few = [heapq.heappop(heap)[-1] for _ in range(min(_CHAIN, len(heap)))][::-1]
        joined = _Condition(
            f"({f' {word} '.join(part.sql for part in few)})",
            [parameter for part in few for parameter in part.parameters],
            max(few[0].stack + 1, few[1].stack + 3),
            sum(part.calls for part in few),
        )
        heapq.heappush(heap, (joined.stack, -joined.calls, -next(number), joined))
    return heap[0][-1] if heap else _Condition("1", [])


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
        first = _exists(leaf.key)
    elif leaf.indexed:  # NULL where the key is missing, but there `exact` is 0
        first = _equality_candidates(leaf.indexed, values)
    else:
        return exact
    return _Condition(f"({first.sql} AND {exact.sql})", first.parameters + exact.parameters)


def _compares(leaf: _Leaf) -> _Condition:
    """Order by SQLite's value where it is far enough from the operand, by Python where it is near."""
    value = _scalar(leaf, leaf.operand)
    if value is None or isinstance(value, bool):
        raise TypeError(f"{leaf}: only numbers and texts have an order, got {value}")
    exact = _matches(leaf, value)
    if not _plain_paths(leaf.key):
        return exact
    found, path = (leaf.indexed, []) if leaf.indexed else _select("json_extract(metadata, {})", leaf.key)
    kind, kind_path = _select("json_type(metadata, {})", leaf.key)
    types, least, greatest = _TEXTS if isinstance(value, str) else _NUMBERS
    low, high = _bounds(value)
    ends = [low, greatest] if leaf.operator in ("$gt", "$gte") else [least, high]
    return _Condition(
        f"({found} BETWEEN ? AND ? AND ifnull({kind} IN ({types}), 0) "
        f"AND ({found} NOT BETWEEN ? AND ? OR {exact.sql}))",
        [*path, *ends, *kind_path, *path, low, high, *exact.parameters],
    )


def _holds_text(leaf: _Leaf) -> _Condition:
    if not isinstance(leaf.operand, str):
        raise TypeError(f"{leaf}: must be str, got {type(leaf.operand).__name__}")
    return _matches(leaf, _scalar(leaf, leaf.operand))


def _matches(leaf: _Leaf, operand: object) -> _Condition:
    sql, parameters = _text(leaf.key)
    return _Condition(f"json_matches({sql}, ?, ?)", [*parameters, leaf.operator, to_json(operand)], calls=1)


_LEAVES: dict[str, Callable[[_Leaf], _Condition]] = {
    "$eq": lambda leaf: _is_one_of(leaf, [_scalar(leaf, leaf.operand)]),
    "$ne": lambda leaf: _negated(_LEAVES["$eq"](leaf._replace(indexed=None))),
    **dict.fromkeys(_COMPARISONS, _compares),
    "$in": lambda leaf: _is_one_of(leaf, _scalars(leaf)),
    "$nin": lambda leaf: _negated(_LEAVES["$in"](leaf._replace(indexed=None))),
    "$exists": lambda leaf: _as_wanted(leaf, _exists(leaf.key)),
    "$empty": lambda leaf: _as_wanted(leaf, _text_in(leaf.key, {"null", '""', "[]"})),
    "$contains": lambda leaf: _matches(leaf, _scalar(leaf, leaf.operand)),
    **dict.fromkeys(("$any", "$all"), lambda leaf: _matches(leaf, _scalars(leaf))),
    **dict.fromkeys(("$text_match", "$text_match_insensitive"), _holds_text),
}
_OPERATOR_NAMES = ", ".join([*_LEAVES, "$not"])


def _scalars(leaf: _Leaf) -> list[Scalar]:
    if not isinstance(leaf.operand, (list, tuple, set, frozenset)):
        raise TypeError(f"{leaf}: must be a list, got {type(leaf.operand).__name__}")
    return [_scalar(leaf, value) for value in leaf.operand]


def _scalar(leaf: _Leaf, value: Any) -> Scalar:  # noqa: ANN401
    if isinstance(value, (list, tuple, set, frozenset)):
        raise TypeError(f"{leaf}: got a list; use $in for one of several values, $contains for a list's item")
    if isinstance(value, Mapping):
        raise TypeError(f"{leaf}: got a dict; for a key inside an object write {leaf.key + '.KEY'!r}")
    if not (value is None or isinstance(value, (str, int, float))):
        raise TypeError(f"{leaf}: {type(value).__name__} is not JSON; write it as a text or number")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{leaf}: {value} has no JSON form")
    if isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
        raise ValueError(f"{leaf}: an integer of more than {MAX_INT_BITS} bits")
    if isinstance(value, str) and not is_valid_text(value):
        raise ValueError(f"{leaf}: a lone surrogate is not valid Unicode")
    return value


def _plain_paths(key: str) -> list[str]:
    """Where a key may be: under its own name, else inside nested objects. Empty for a key that needs Python."""
    names = key.split(".")
    if not all(_PLAIN_NAME.fullmatch(name) for name in names):
        return []
    return [f'$."{name}"' for name in (".".join(names), '"."'.join(names))][: len(names)]


def _first_found(function: str, paths: list[str]) -> str:
    """SQL for `function` of the first path where there is a value, of one or two; `paths` are SQL too."""
    plain, *nested = (function.format(path) for path in paths)
    if not nested:
        return plain
    return f"CASE WHEN json_type(metadata, {paths[0]}) IS NULL THEN {nested[0]} ELSE {plain} END"


def _select(function: str, key: str) -> tuple[str, list[str]]:
    """SQL for `function` of a plain key, and its parameters."""
    paths = _plain_paths(key)
    return _first_found(function, ["?"] * len(paths)), [*paths, *paths[:-1]]


def _text(key: str) -> tuple[str, list[str]]:
    """SQL for '[VALUE,null]', the JSON text of a key's value, and its parameters; a missing key reads as null."""
    if not _plain_paths(key):
        return "ifnull(json_text_of(metadata, ?), '[null,null]')", [to_json(key)]
    return _select("json_extract(metadata, {}, '$[0]')", key)  # metadata is an object: it has no position 0


def _exists(key: str) -> _Condition:
    if not _plain_paths(key):
        return _Condition("json_text_of(metadata, ?) IS NOT NULL", [to_json(key)])
    kind, path = _select("json_type(metadata, {})", key)
    return _Condition(f"{kind} IS NOT NULL", path)


def _text_in(key: str, forms: Collection[str]) -> _Condition:
    sql, path = _text(key)
    texts = [f"[{form},null]" for form in sorted(forms)]
    if len(texts) <= 3:  # as 0, 0.0 and -0.0 are one value
        return _Condition(f"{sql} IN ({', '.join('?' * len(texts))})", path + texts)
    return _Condition(f"{sql} IN (SELECT value FROM json_each(?))", [*path, to_json(texts)])  # noqa: S608


def _equality_candidates(indexed: str, values: list[Any]) -> _Condition:
    """The documents whose value SQLite may read as one of `values`, which has no None.

    One term, as SQLite does not look into an OR inside another. A range holds more than it must, but only values
    that not every SQLite release reads alike need one.
    """
    if all(_is_read_alike(value) for value in values):
        listed = [value if isinstance(value, str) else int(value) for value in values]
        return _Condition(f"{indexed} IN (SELECT value FROM json_each(?))", [to_json(listed)])  # noqa: S608
    ends = [(isinstance(value, str), end) for value in values for end in _bounds(value)]
    return _Condition(f"{indexed} BETWEEN ? AND ?", [min(ends)[1], max(ends)[1]])


def _is_read_alike(value: str | int | float) -> bool:
    if isinstance(value, str):
        return "\0" not in value
    return value == int(value) and -(2**63) <= value < 2**63


def _bounds(value: str | int | float) -> tuple[Any, Any]:
    """The least and the greatest that any SQLite release may read a text or number as.

    A text may end at its first NUL. A float may differ in the last digits, and a large integer becomes a float
    or infinity; a relative 1e-12 is thousands of units in the last place.
    """
    if isinstance(value, str):
        return value.partition("\0")[0], value
    largest = sys.float_info.max
    near = float(max(-largest, min(value, largest)))
    margin = abs(near) * 1e-12 + 1e-300
    return near - margin, near + margin


def _json_forms(value: Scalar) -> set[str]:
    """Every JSON text of a value equal to `value`: a number is an integer or a float, and 0 has a sign."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return {to_json(value)}
    if value == 0:
        return {"0", "0.0", "-0.0"}
    forms = {to_json(value)}
    if value == int(value):
        forms.add(to_json(int(value)))
    if abs(value) <= sys.float_info.max and value == float(value):
        forms.add(to_json(float(value)))
    return forms


def _json_text_of(metadata: str, key_json: str) -> str | None:
    """What `_text` has SQLite do for plain keys, for any key; None where it is missing."""
    found = json.loads(metadata)
    key = json.loads(key_json)
    if key not in found:
        *parents, key = key.split(".")
        for parent in parents:
            found = found.get(parent)
            if not isinstance(found, dict):
                return None
    return to_json([found[key], None]) if key in found else None


def _json_matches(text: str, operator_name: str, operand_json: str) -> bool:
    return _predicate(operator_name, operand_json)(json.loads(text)[0])


@lru_cache(maxsize=256)
def _predicate(name: str, operand_json: str) -> Callable[[Any], bool]:
    """The test of a metadata value that an operator makes with its operand."""
    operand = json.loads(operand_json)
    if name in _COMPARISONS:
        compare = _COMPARISONS[name]
        types = (str,) if isinstance(operand, str) else (int, float)
        return lambda found: type(found) in types and compare(found, operand)
    if name == "$text_match_insensitive":
        folded = operand.casefold()
        return lambda found: isinstance(found, str) and folded in found.casefold()
    if name == "$text_match":
        return lambda found: isinstance(found, str) and operand in found
    wanted = [_json_forms(value) for value in (operand if isinstance(operand, list) else [operand])]
    quantifier = all if name == "$all" else any

    def holds(found: object) -> bool:
        if isinstance(found, list):
            items = {to_json(item) for item in found}
            return quantifier(forms & items for forms in wanted)
        return isinstance(found, str) and isinstance(operand, str) and operand in found

    return holds
