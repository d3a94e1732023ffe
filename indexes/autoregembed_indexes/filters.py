"""Metadata filters, compiled to SQL.

SQLite's own JSON values are not exact: text ends at a NUL, integers above 63 bits become floats, and true
equals 1. So a filter compares the JSON *text* of a value, which `records.to_json` writes in one form only.
`json_extract` with two paths returns that text, as a list of two.
"""

import json
import math
import re
import sqlite3
from collections.abc import Mapping
from typing import Any

from autoregembed_indexes.records import is_valid_text, to_json

# Keys that JSON writes with escapes, and the empty key, cannot be named in a path of every SQLite version.
_PLAIN_KEY = re.compile(r'[^"\\\x00-\x1f]+')


def register_functions(connection: sqlite3.Connection) -> None:
    """Give `connection` the function that compiled filters call for unusual keys."""
    connection.create_function("json_text_of", 2, _json_text_of, deterministic=True)


def compile_filter(where: Mapping[str, Any] | None) -> tuple[str, list[str]]:
    """Compile {key: value, ...}, all of which must hold, to an SQL condition on `documents` and parameters.

    Values compare by JSON type: true is not 1, but 1 and 1.0 are the same number. None matches a null, not a
    missing key. Raises TypeError or ValueError, naming the key, for anything but equality with a JSON scalar.
    """
    if where is not None and not isinstance(where, Mapping):
        raise TypeError(f"a filter must be a dict {{key: value}}, got {type(where).__name__}")
    conditions, parameters = ["1"], []
    for key, value in (where or {}).items():
        _check(key, value)
        if _PLAIN_KEY.fullmatch(key):
            path = f'$."{key}"'
            conditions.append("json_type(metadata, ?) IS NOT NULL")  # a missing key also reads as null below
            expression, arguments = "json_extract(metadata, ?, ?)", [path, path]
            accepted = [f"[{text},{text}]" for text in _json_forms(value)]
            parameters.append(path)
        else:
            expression, arguments = "json_text_of(metadata, ?)", [to_json(key)]
            accepted = _json_forms(value)
        conditions.append(f"{expression} IN ({', '.join('?' * len(accepted))})")
        parameters += [*arguments, *accepted]
    return " AND ".join(conditions), parameters


def _check(key: object, value: object) -> None:
    if not isinstance(key, str):
        raise TypeError(f"a filter's key must be str, got {key!r}")
    if key.startswith("$"):
        raise ValueError(f"filter operator {key!r} is not supported; write {{key: value}} for equality")
    if isinstance(value, (dict, list, tuple, set)):
        raise TypeError(
            f"filter on {key!r}: only equality with a text, number, true, false or null is supported"
        )
    if not (value is None or isinstance(value, (str, int, float))):
        raise TypeError(f"filter on {key!r}: {type(value).__name__} is not JSON")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"filter on {key!r}: {value} has no JSON form")
    if not is_valid_text(key) or (isinstance(value, str) and not is_valid_text(value)):
        raise ValueError(f"filter on {key!r}: a lone surrogate is not valid Unicode")


def _json_forms(value: str | float | bool | None) -> list[str]:
    """Every JSON text of a value equal to `value`: a number is an integer or a float, and 0 has a sign."""
    forms: set[object] = {to_json(value)}
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if isinstance(value, float) and value.is_integer():
            forms.add(to_json(int(value)))
        elif isinstance(value, int) and abs(value) < 2**1023 and float(value) == value:
            forms.add(to_json(float(value)))
        if value == 0:
            forms |= {"0", "0.0", "-0.0"}
    return sorted(str(form) for form in forms)


def _json_text_of(metadata: str, key: str) -> str | None:
    values = json.loads(metadata)
    name = json.loads(key)
    return to_json(values[name]) if name in values else None
