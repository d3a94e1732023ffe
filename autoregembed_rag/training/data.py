"""Rows of training data, read from wherever they lie without holding them.

`compression_rows` and `alignment_rows` go through a source once: every row is checked, hashed and measured. What stays
in memory is an index of 20 bytes a row. JSONL files are read in place by byte offset, sequences and Hugging Face
datasets by number; every other source is copied to an unnamed temporary file first (in the folder that `TMPDIR` names),
so that a stream, a compressed file or a table can be read in any order too.
"""

from __future__ import annotations

import hashlib
import logging
import operator
from array import array
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar, Generic, TypeVar, cast, overload

import numpy as np
from tqdm import tqdm

from .sources import RowSource, Source, field_names, sources_of

logger = logging.getLogger(__name__)

SHOWN = 5  # bad rows that one error names
SKIPPING = "training and mining can leave invalid rows out (skip_invalid=True, --skip-invalid)"


class _Row:
    """What both kinds of rows have: the field names that they are published under, and their texts."""

    schemas: ClassVar[tuple[tuple[str, ...], ...]]
    required: ClassVar[int]  # so many first fields of a schema must be there

    @classmethod
    def parse(cls: type[T], row: Mapping[str, object], fields: Sequence[str] = ()) -> T:
        raise NotImplementedError

    @property
    def texts(self) -> tuple[str, ...]:
        raise NotImplementedError

    @property
    def identity(self) -> tuple[str, ...]:
        raise NotImplementedError


T = TypeVar("T", bound=_Row)


@dataclass(frozen=True)
class CompressionRow(_Row):
    """Stage 1: from `context` under `instruction`, the decoder is to produce `output`."""

    context: str
    instruction: str
    output: str

    schemas: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("context", "instruction", "output"),
        ("input", "prompt", "answer"),  # PWC as published
    )
    required: ClassVar[int] = 3

    @classmethod
    def parse(cls, row: Mapping[str, object], fields: Sequence[str] = schemas[0]) -> CompressionRow:
        """From a mapping whose `fields` are context, instruction and output; ValueError names a bad field."""
        return cls(*(_text(row, field) for field in fields))

    @property
    def texts(self) -> tuple[str, ...]:
        """All texts of the row."""
        return self.context, self.instruction, self.output

    @property
    def identity(self) -> tuple[str, ...]:
        """Rows with the same one are repeats of each other: the context, as in the paper's PWC-Unique."""
        return (self.context,)


@dataclass(frozen=True)
class AlignmentRow(_Row):
    """Stage 2: a query, a document that answers it and documents that do not."""

    query: str
    pos: str
    neg: tuple[str, ...] = ()

    schemas: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("query", "pos", "neg"),
        ("anchor", "positive", "negative"),  # sentence-transformers' all-nli and nli-for-simcse
        ("sent0", "sent1", "hard_neg"),  # SimCSE's nli_for_simcse.csv
    )
    required: ClassVar[int] = 2

    @classmethod
    def parse(cls, row: Mapping[str, object], fields: Sequence[str] = schemas[0]) -> AlignmentRow:
        """From a mapping whose `fields` are the query, its positive and, optionally, a negative or a list of them.

        Negatives may also be numbered fields: `negative_1`, `negative_2` and so on. ValueError names a bad field, a
        query that is its own positive and a positive that is also a negative; blanks at the ends do not count.
        """
        query, pos = _text(row, fields[0]), _text(row, fields[1])
        negatives = _negatives(row, fields[2])
        if query.strip() == pos.strip():
            raise ValueError(f"field {fields[1]!r} is the same text as {fields[0]!r}")
        for name, negative in negatives.items():
            if negative.strip() == pos.strip():
                raise ValueError(f"field {name!r} is the same text as {fields[1]!r}")
        return cls(query, pos, tuple(negatives.values()))

    @property
    def texts(self) -> tuple[str, ...]:
        """All texts of the row."""
        return self.query, self.pos, *self.neg

    @property
    def identity(self) -> tuple[str, ...]:
        """Rows with the same one are repeats of each other: all texts."""
        return self.texts


def _text(row: Mapping[str, object], field: str) -> str:
    if field not in row:
        raise ValueError(f"field {field!r} is missing; the row has {field_names(row)}")
    value = row[field]
    if value is None:
        raise ValueError(f"field {field!r} is empty")
    if not isinstance(value, str):
        raise ValueError(f"field {field!r} must be a text, not {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"field {field!r} is empty")
    return value


def _negatives(row: Mapping[str, object], field: str) -> dict[str, str]:
    """Each negative under the name of its place in the row."""
    value = row.get(field)
    named: dict[str, object]
    if value is None:
        numbered = (
            name for name in row if str(name).startswith(f"{field}_") and name[len(field) + 1 :].isdecimal()
        )
        named = {name: row[name] for name in numbered if row[name] is not None}
    elif isinstance(value, str):
        named = {field: value}
    elif isinstance(value, list | tuple):
        named = {f"{field}[{i}]": text for i, text in enumerate(value)}
    else:
        raise ValueError(f"field {field!r} must be a text or a list of texts, not {type(value).__name__}")
    return {name: _text(named, name) for name in named}


class Rows(Sequence[T]):
    """Checked rows that stay where they lie: `rows[i]` reads and parses that row only.

    Made by `compression_rows` and `alignment_rows`. Rows of JSONL files can be pickled, and rows of a sequence if it
    can; rows that were copied to a temporary file raise TypeError. A source that is changed later gives ValueError
    where the change shows, for files at every read. Reading is safe from many threads and after a fork.
    """

    def __init__(self, kind: type[T], parts: Sequence[_Part[T]], digest: str) -> None:
        self.kind = kind
        self.digest = (
            digest  # hexadecimal; over the texts of all rows in order, whatever source they came from
        )
        self._parts = list(parts)
        self._ends = list(accumulate(len(part.numbers) for part in parts))
        every = [np.asarray(part.lengths, dtype=np.int32) for part in parts]
        self.lengths = every[0] if len(every) == 1 else np.concatenate(every)  # characters per row
        self.lengths.setflags(write=False)

    def __len__(self) -> int:
        return self._ends[-1]

    def __repr__(self) -> str:
        return f"Rows({len(self):,} x {self.kind.__name__}, digest {self.digest})"

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        part, i = self._find(index)
        return part.row(i)

    def place(self, index: int) -> str:
        """Where row `index` came from: "pairs.jsonl, line 17", or "row 17" (from 1) where there is no file."""
        part, i = self._find(index)
        return part.source.place(part.numbers[i])

    def check(self, examine: Callable[[T], None]) -> None:
        """`examine` every row; a ValueError that it raises also names the row's place."""
        for number, row in enumerate(self):
            try:
                examine(row)
            except ValueError as error:
                raise ValueError(f"{self.place(number)}: {error}") from None

    def _find(self, index: int) -> tuple[_Part[T], int]:
        i = operator.index(index)
        i += len(self) if i < 0 else 0
        if not 0 <= i < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        part = bisect_right(self._ends, i)
        return self._parts[part], i - (self._ends[part - 1] if part else 0)


def compression_rows(
    source: RowSource, *, unique: bool = False, skip_invalid: bool = False
) -> Rows[CompressionRow]:
    """Rows of stage 1, from fields `context`, `instruction`, `output` or, as PWC is published, `input`, `prompt`,
    `answer`.

    `source`: a file (.jsonl, .csv, .tsv, the three also as .gz or .zst; .parquet, .arrow) or a list of files; a
    Hugging Face dataset, streaming or not; a pandas.DataFrame, a pyarrow.Table or what else exports an Arrow stream;
    a sequence or any iterable of mappings or of rows; Rows, which are returned as they are.

    `unique` keeps the first row of each context, as the paper did (241,564 rows of PWC became 16,382).
    `skip_invalid` leaves invalid rows out, with a warning that counts them.

    Raises ValueError that names file, line or row, and field: for rows that are not JSON objects in UTF-8, for a
    field that is missing, empty, blank or not a text, for unknown field names, for a file without rows.
    """
    return _load(CompressionRow, source, unique, skip_invalid)


def alignment_rows(
    source: RowSource, *, unique: bool = False, skip_invalid: bool = False
) -> Rows[AlignmentRow]:
    """Rows of stage 2, from fields `query`, `pos`, `neg` (optional, a text or a list of texts) or, as NLI triplets
    are published, `anchor`, `positive`, `negative` (sentence-transformers) or `sent0`, `sent1`, `hard_neg` (SimCSE).

    `source`, `skip_invalid` and the errors are those of `compression_rows`; invalid are also a query that equals its
    positive and a positive that is also a negative, which published NLI data may hold. `unique` leaves out rows whose
    texts are all those of an earlier one.
    """
    return _load(AlignmentRow, source, unique, skip_invalid)


def _load(kind: type[T], source: RowSource, unique: bool, skip_invalid: bool) -> Rows[T]:
    if isinstance(source, Rows):
        if source.kind is not kind:
            raise ValueError(f"{kind.__name__} rows are needed, not {source.kind.__name__} rows")
        if not (unique or skip_invalid):
            return source
    scan = _Scan(kind, unique)
    parts = [scan.part(one) for one in sources_of(source)]
    scan.report(skip_invalid)
    return Rows(kind, parts, scan.digest.hexdigest())


class _Scan(Generic[T]):
    """The one pass over all rows of all files."""

    def __init__(self, kind: type[T], unique: bool) -> None:
        self.kind = kind
        self.digest = hashlib.blake2b(kind.__name__.encode(), digest_size=16)
        self._seen: set[bytes] | None = set() if unique else None
        self._complaints: list[str] = []
        self._rows = self._invalid = self._repeated = 0

    def part(self, source: Source) -> _Part[T]:
        part = _Part(self.kind, source)
        before = self._rows
        name = source.name or "the source"
        for number, record in tqdm(source.scan(), f"reading {name}", unit="row", delay=2, disable=None):
            self._rows += 1
            try:
                row = part.parse(record, number)
            except _UnknownSchemaError:
                raise
            except ValueError as error:
                self._invalid += 1
                if len(self._complaints) < SHOWN:
                    self._complaints.append(f"{source.place(number)}: {error}")
            else:
                self._take(part, number, row)
        if self._rows == before:
            raise ValueError(f"{name} has no rows")
        return part

    def _take(self, part: _Part[T], number: int, row: T) -> None:
        if self._seen is not None:
            key = hashlib.blake2b(_content(row.identity), digest_size=16).digest()
            if key in self._seen:
                self._repeated += 1
                return
            self._seen.add(key)
        self.digest.update(_content(row.texts))
        part.add(number, row)

    def report(self, skip_invalid: bool) -> None:
        if self._repeated:
            logger.info("left out %d of %d rows: repeats", self._repeated, self._rows)
        if not self._invalid:
            return
        shown = "\n".join(self._complaints) + ("\n..." if self._invalid > SHOWN else "")
        if skip_invalid and self._invalid < self._rows:
            logger.warning("left out %d of %d rows, invalid:\n%s", self._invalid, self._rows, shown)
            return
        if self._invalid == self._rows and skip_invalid:
            raise ValueError(f"none of {self._rows:,} rows is valid:\n{shown}")
        if self._invalid == 1:
            raise ValueError(f"{shown}\nmend or remove the row; {SKIPPING}")
        raise ValueError(
            f"{self._invalid:,} of {self._rows:,} rows are invalid; mend or remove them; {SKIPPING}:\n{shown}"
        )


def _content(texts: Sequence[str]) -> bytes:
    """The texts as bytes that no other texts give."""
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    return b"".join(n.to_bytes(8, "little") for n in (len(texts), *map(len, encoded))) + b"".join(encoded)


class _UnknownSchemaError(ValueError):
    """The fields of the first row are none of the known sets."""


class _Part(Generic[T]):
    """One source and where its rows lie in it: 20 bytes a row."""

    def __init__(self, kind: type[T], source: Source) -> None:
        self.kind, self.source = kind, source
        self.numbers, self.offsets, self.sizes = array("I"), array("q"), array("I")
        self.lengths = array("i")
        self._fields: tuple[str, ...] | None = None

    def parse(self, record: object, number: int) -> T:
        if isinstance(record, ValueError):
            raise record
        if isinstance(record, self.kind):
            record = vars(record)
        if not isinstance(record, Mapping):
            raise ValueError(f"a row must be a mapping of field names to texts, not {type(record).__name__}")
        if self._fields is None:
            self._fields = self._schema(record, number)
        return self.kind.parse(record, self._fields)

    def _schema(self, record: Mapping[str, object], number: int) -> tuple[str, ...]:
        for fields in self.kind.schemas:
            if all(field in record for field in fields[: self.kind.required]):
                return fields
        known = "; ".join(", ".join(fields) for fields in self.kind.schemas)
        raise _UnknownSchemaError(
            f"{self.source.place(number)}: the fields {field_names(record)} are no known schema of "
            f"{self.kind.__name__} rows; rename them to one of: {known}"
        )

    def add(self, number: int, row: T) -> None:
        offset, size = self.source.mark(row)
        self.numbers.append(number)
        self.offsets.append(offset)
        self.sizes.append(size)
        self.lengths.append(sum(map(len, row.texts)))

    def row(self, i: int) -> T:
        place = self.source.place(self.numbers[i])
        record = self.source.read(self.offsets[i], self.sizes[i])
        try:
            if self.source.copied:
                return self.kind.parse(cast("dict[str, object]", record), self.kind.schemas[0])
            row = self.parse(record, self.numbers[i])
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        if sum(map(len, row.texts)) != self.lengths[i]:
            raise ValueError(f"{place}: the row has changed since it was indexed; load the rows again")
        return row
