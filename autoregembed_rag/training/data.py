"""Rows of training data and the JSONL files they come from."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO


@dataclass(frozen=True)
class CompressionRow:
    """Stage 1: from `context` under `instruction`, the decoder is to produce `output`."""

    context: str
    instruction: str
    output: str

    @classmethod
    def parse(cls, row: Mapping[str, object]) -> CompressionRow:
        """From a JSON object with `context`, `instruction` and `output`; ValueError names a bad field."""
        return cls(*(_text(row, field) for field in ("context", "instruction", "output")))


@dataclass(frozen=True)
class AlignmentRow:
    """Stage 2: a query, a document that answers it and documents that do not."""

    query: str
    pos: str
    neg: tuple[str, ...] = ()

    @classmethod
    def parse(cls, row: Mapping[str, object]) -> AlignmentRow:
        """From a JSON object with `query`, `pos` and optionally `neg`, a text or a list of texts."""
        negatives = row.get("neg") or []
        if isinstance(negatives, str):
            negatives = [negatives]
        if not isinstance(negatives, list | tuple):
            raise ValueError(f"field 'neg' must be a text or a list of texts, not {type(negatives).__name__}")
        parsed = tuple(_text({f"neg[{i}]": text}, f"neg[{i}]") for i, text in enumerate(negatives))
        return cls(_text(row, "query"), _text(row, "pos"), parsed)


def _text(row: Mapping[str, object], field: str) -> str:
    value = row.get(field)
    if value is None:
        raise ValueError(f"field {field!r} is missing; the row has {sorted(row)}")
    if not isinstance(value, str):
        raise ValueError(f"field {field!r} must be a text, not {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"field {field!r} is empty")
    return value


def read_compression_rows(path: str | Path) -> list[CompressionRow]:
    """All rows of a JSONL file (also .gz, .zst). ValueError names the file, the line and the field."""
    return [_parsed(CompressionRow.parse, path, line, row) for line, row in numbered_rows(path)]


def read_alignment_rows(path: str | Path) -> list[AlignmentRow]:
    """All rows of a JSONL file (also .gz, .zst). ValueError names the file, the line and the field."""
    return [_parsed(AlignmentRow.parse, path, line, row) for line, row in numbered_rows(path)]


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file, plain, .gz or .zst; blank lines are skipped."""
    return (row for _, row in numbered_rows(path))


def _parsed(parse: Any, path: str | Path, line: int, row: dict[str, Any]) -> Any:  # noqa: ANN401
    try:
        return parse(row)
    except ValueError as error:
        raise ValueError(f"{path}, line {line}: {error}") from None


def numbered_rows(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSONL file with their line numbers, from 1; ValueError names file and line."""
    with _open_text(Path(path)) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: a JSON object is needed, not {type(row).__name__}")
            yield number, row


def _open_text(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    if path.suffix == ".zst":
        try:
            import zstandard
        except ImportError:
            raise ImportError(f'{path} needs zstandard: pip install "autoregembed-rag[train]"') from None
        # Files written with a long window (zstd --long=27) need the reader to allow it.
        reader = zstandard.ZstdDecompressor(max_window_size=2**27).stream_reader(
            path.open("rb"), closefd=True
        )
        return io.TextIOWrapper(reader, encoding="utf-8")
    return path.open(encoding="utf-8")
