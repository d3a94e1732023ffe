"""Filters for a server that does not compare as a DocumentIndex does.

The metadata that counts is a text that the server does not look into. Beside it lies a JSON field made for the
server: one entry for each key that a filter can name, its values written so that what is equal stays equal and what
is less does not become more. An expression over it is true for every document that a filter matches, and for
some others; `Judge` tells these apart, by the same SQL as a DocumentIndex.
"""

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from autoregembed_indexes.filters import compile_filter, register_functions
from autoregembed_indexes.store import Filter

# What Milvus takes in a JSON field is 65,536 bytes; entries may be longer than the metadata that they come from.
MOST_FIELD_BYTES = 65_000
MOST_NAME = 100
MOST_TEXT_BYTES = 64
LARGEST = float.fromhex("0x1.fffffffffffffp+1023")
# An entry that no key has: this document's metadata are too many to compare.
UNCOMPARED = {"!": 1.0}

EVERYTHING = 'id >= ""'
NOTHING = 'id < ""'


def comparable_fields(metadata: str) -> dict[str, Any]:
    """What the server compares of metadata in JSON."""
    values = json.loads(metadata)
    fields: dict[str, Any] = {}
    for key, value in values.items():
        fields[_name(key)] = _form(value)
        if isinstance(value, dict) and "." not in key:
            _add_nested(fields, value, key, values)
    return fields if len(json.dumps(fields)) <= MOST_FIELD_BYTES else UNCOMPARED


def expression_of(where: Filter | None) -> str:
    """A Milvus expression that holds for every document that `where`, a sound filter, matches; "" for all.

    What a comparison by itself cannot rule out, such as `$ne` or a function, is left to the `Judge`.
    """
    found = None if where is None or callable(where) else _narrowed(where)
    return "" if found is None else f'({found}) or fields["!"] == 1.0'


class Judge:
    """Tells which metadata match a filter, exactly. Raises TypeError or ValueError for what is not a filter."""

    def __init__(self, where: Filter) -> None:
        self._where = where
        if not callable(where):
            self._condition, self._parameters = compile_filter(where)

    def __call__(self, metadatas: Sequence[str]) -> list[bool]:
        """Tell it for each of these metadata in JSON."""
        if callable(self._where):
            return [bool(self._where(json.loads(metadata))) for metadata in metadatas]
        database = sqlite3.connect(":memory:")
        try:
            register_functions(database)
            database.execute("CREATE TABLE documents(row INTEGER PRIMARY KEY, metadata TEXT)")
            database.executemany("INSERT INTO documents VALUES (?, ?)", enumerate(metadatas))
            found = database.execute(
                f"SELECT row FROM documents WHERE {self._condition}",  # noqa: S608
                self._parameters,
            )
            matching = {row for (row,) in found}
        finally:
            database.close()
        return [row in matching for row in range(len(metadatas))]


def joined(word: str, parts: Sequence[str]) -> str:
    """Join expressions in halves, so that a great many nest only a few deep."""
    if len(parts) == 1:
        return parts[0]
    middle = len(parts) // 2
    return f"({joined(word, parts[:middle])} {word} {joined(word, parts[middle:])})"


def _add_nested(
    fields: dict[str, Any], value: Mapping[str, Any], path: str, values: Mapping[str, Any]
) -> None:
    """Add the keys inside an object as "a.b"; a key of that very name comes before them."""
    for key, item in value.items():
        if "." in key:
            continue
        inner = f"{path}.{key}"
        if inner not in values:
            fields[_name(inner)] = _form(item)
        if isinstance(item, dict):
            _add_nested(fields, item, inner, values)


def _name(key: str) -> str:
    """A key in letters that mean nothing in an expression or in a JSON pointer, and never empty."""
    quoted = "k" + quote(key, safe="").replace("~", "%7E")
    return (
        quoted
        if len(quoted) <= MOST_NAME
        else "#" + hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    )


def _form(value: object) -> Any:  # noqa: ANN401
    """A value as the server compares it: of two numbers or two texts in order, the forms are in order or equal."""
    if value is None or isinstance(value, bool):
        return {None: "n", True: "t", False: "f"}[value]
    if isinstance(value, (int, float)):
        return _number(value)
    if isinstance(value, str):  # UTF-8 keeps the order of code points, hexadecimal digits that of bytes
        return "s" + value.encode()[:MOST_TEXT_BYTES].hex()
    if isinstance(value, list):
        return [_form(item) for item in value if not isinstance(item, (list, dict))]
    return "o"


def _number(value: int | float) -> float:
    try:
        near = float(value)
    except OverflowError:
        near = LARGEST if value > 0 else -LARGEST
    return max(-LARGEST, min(near, LARGEST)) + 0.0  # no -0.0


def _literal(value: object) -> str:
    return json.dumps(_form(value))


def _narrowed(where: Mapping[str, Any]) -> str | None:
    """The expression for a filter; None where it would hold for every document."""
    parts = []
    for key, value in where.items():
        if key == "$and":
            parts += [_narrowed(item) for item in value]
        elif key == "$or":
            parts.append(_either(_narrowed(item) for item in value))
        elif key != "$not":
            parts += _on_key(key, value if isinstance(value, Mapping) else {"$eq": value})
    known = [part for part in parts if part is not None]
    return joined("and", known) if known else None


def _either(parts: Iterable[str | None]) -> str | None:
    known = []
    for part in parts:
        if part is None:
            return None
        known.append(part)
    return joined("or", known) if known else NOTHING


def _on_key(key: str, operators: Mapping[str, Any]) -> list[str | None]:
    field = f'fields["{_name(key)}"]'
    return [
        _EXPRESSIONS[name](field, operand) if name in _EXPRESSIONS else None
        for name, operand in operators.items()
    ]


def _in_list(field: str, values: Iterable[object]) -> str:
    return f"json_contains_any({field}, [{', '.join(_literal(value) for value in values)}])"


def _is_text(field: str, *_: object) -> str:
    return f'{field} like "s%"'


def _contains(field: str, value: object) -> str:
    """A list has the value, or a text may have it as a part."""
    listed = _in_list(field, [value])
    return f"({listed} or {_is_text(field)})" if isinstance(value, str) else listed


# The operators that rule documents out; of none of the others can an expression be sure.
_EXPRESSIONS: dict[str, Callable[[str, Any], str | None]] = {
    "$eq": lambda field, value: f"{field} == {_literal(value)}",
    "$in": lambda field, values: _either(f"{field} == {_literal(value)}" for value in values),
    **dict.fromkeys(("$gt", "$gte"), lambda field, value: f"{field} >= {_literal(value)}"),
    **dict.fromkeys(("$lt", "$lte"), lambda field, value: f"{field} <= {_literal(value)}"),
    "$exists": lambda field, wanted: f"exists {field}" if wanted else None,
    "$contains": _contains,
    "$any": lambda field, values: _in_list(field, values) if values else NOTHING,
    "$all": lambda field, values: (
        joined("and", [_in_list(field, [value]) for value in values]) if values else None
    ),
    **dict.fromkeys(("$text_match", "$text_match_insensitive"), _is_text),
}
