"""What goes in and comes out: documents, hits, and the check that a document would come back equal.

JSON is written with `ensure_ascii=False` and no spaces. Filters compare that text, so the form is part of the
on-disk format.
"""

import json
import math
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))

MAX_DEPTH = 200
MAX_INT_BITS = 10_000  # Python refuses to read integers of more than 4300 digits


class Document(NamedTuple):
    """A stored document, without its vector."""

    id: str
    text: str
    metadata: dict[str, Any]


class Hit(NamedTuple):
    """A document found by a search; `score` is a cosine in [-1, 1], higher is better."""

    id: str
    score: float
    text: str
    metadata: dict[str, Any]


def prepare_ids(ids: Sequence[str | None] | None, count: int) -> list[str]:
    """Check `ids`, giving a new uuid to every None."""
    given = _sized_list("ids", ids, count)
    prepared = [str(uuid.uuid4()) if item is None else item for item in given]
    check_ids(prepared)
    if len(set(prepared)) < count:
        seen: set[str] = set()
        for position, item in enumerate(prepared):
            if item in seen:
                raise ValueError(
                    f"id {item!r} occurs twice in one call, the second time at position {position}"
                )
            seen.add(item)
    return prepared


def check_ids(ids: Iterable[str]) -> None:
    """Raise TypeError or ValueError for an id that is not valid text."""
    for position, item in enumerate(ids):
        if not isinstance(item, str):
            raise TypeError(f"ids[{position}] must be str, got {type(item).__name__}")
        if not is_valid_text(item):
            raise ValueError(f"ids[{position}] {item!r} holds a lone surrogate, which is not valid Unicode")


def prepare_texts(texts: Sequence[str], ids: Sequence[str]) -> list[str]:
    """Check that every text can be stored."""
    if len(texts) != len(ids):
        raise ValueError(f"{len(ids)} vectors but {len(texts)} texts")
    for position, (text, doc_id) in enumerate(zip(texts, ids, strict=True)):
        if not isinstance(text, str):
            raise TypeError(f"texts[{position}] must be str, got {type(text).__name__}")
        if not is_valid_text(text):
            raise ValueError(f"the text of id {doc_id!r} holds a lone surrogate, which is not valid Unicode")
    return list(texts)


def prepare_metadatas(metadatas: Sequence[Mapping[str, Any] | None] | None, ids: Sequence[str]) -> list[str]:
    """Check every metadata and write it as JSON; None becomes {}."""
    given = _sized_list("metadatas", metadatas, len(ids))
    return [_metadata_json(metadata, doc_id) for metadata, doc_id in zip(given, ids, strict=True)]


def to_json(value: object) -> str:
    """Write `value` in the form that the database holds and filters compare."""
    return _ENCODER.encode(value)


def is_valid_text(text: str) -> bool:
    """Tell whether `text` has a UTF-8 form, that is, no lone surrogate."""
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _sized_list(name: str, items: Sequence[Any] | None, count: int) -> list[Any]:
    if items is None:
        return [None] * count
    if isinstance(items, (str, Mapping)):
        raise TypeError(f"{name} must be a list with one item per vector, got {type(items).__name__}")
    if len(items) != count:
        raise ValueError(f"{count} vectors but {len(items)} {name}")
    return list(items)


def _metadata_json(metadata: Mapping[str, Any] | None, doc_id: str) -> str:
    if not metadata and (metadata is None or isinstance(metadata, Mapping)):
        return "{}"
    if not isinstance(metadata, Mapping):
        raise TypeError(f"the metadata of id {doc_id!r} must be a dict, got {type(metadata).__name__}")
    plain = dict(metadata)
    if not _is_plainly_json(plain):
        _check_json(plain, doc_id, ())
    return to_json(plain)


def _is_plainly_json(metadata: dict[Any, Any]) -> bool:
    """Tell in a hurry that metadata is JSON: text keys that are ASCII, and values that need no closer look."""
    return all(
        type(key) is str
        and key.isascii()
        and (
            (type(value) is str and value.isascii())
            or (type(value) is int and abs(value) < 2**63)
            or (type(value) is float and math.isfinite(value))
            or value is None
            or type(value) is bool
        )
        for key, value in metadata.items()
    )


def _check_json(value: object, doc_id: str, keys: tuple[str, ...]) -> None:
    problem = _problem_of(value)
    if problem is None and len(keys) > MAX_DEPTH:
        problem = f"it is nested more than {MAX_DEPTH} deep"
    if problem is not None:
        where = f"metadata key {'.'.join(keys[:8])!r} of id {doc_id!r}"
        error = TypeError if problem.endswith("is not JSON") else ValueError
        raise error(f"{where}: {problem}")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str) or not is_valid_text(key):
                where = f"metadata key {'.'.join((*keys[:8], repr(key)))} of id {doc_id!r}"
                raise ValueError(
                    f"{where}: a key must be str without lone surrogates, got {type(key).__name__}"
                )
            _check_json(item, doc_id, (*keys, key))
    elif isinstance(value, (list, tuple)):
        for position, item in enumerate(value):
            _check_json(item, doc_id, (*keys, str(position)))


def _problem_of(value: object) -> str | None:
    """Say why one value, its children apart, is not JSON that comes back equal."""
    if isinstance(value, str):
        return None if is_valid_text(value) else "the text holds a lone surrogate, which is not valid Unicode"
    if isinstance(value, float):
        return None if math.isfinite(value) else f"{value} has no JSON form"
    if isinstance(value, int):
        return None if value.bit_length() <= MAX_INT_BITS else f"an integer of more than {MAX_INT_BITS} bits"
    if value is None or isinstance(value, (dict, list, tuple)):
        return None
    kind = type(value)
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"{module}{kind.__name__} is not JSON"
