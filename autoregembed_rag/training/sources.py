"""Where training rows lie: files of several kinds, tables, sequences and streams, as records read in any order.

JSONL files are read in place by byte offset, sequences by number; everything else is copied to an unnamed temporary
file first, in the folder that `TMPDIR` names.
"""

from __future__ import annotations

import errno
import gzip
import json
import os
import tempfile
import weakref
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, TypeAlias, cast

from .tables import arrow_file_records, arrow_records, csv_records, frame_records, needed

if TYPE_CHECKING:
    from .data import _Row

RowSource: TypeAlias = "str | os.PathLike[str] | Iterable[Any]"


class Source(Protocol):
    """Records in some place: a mapping, a row or, for one that cannot be read, the ValueError that says why."""

    name: str  # empty where there is no file
    copied: bool  # what `read` gives is the checked row, under the first schema

    def place(self, number: int) -> str: ...

    def scan(self) -> Iterator[tuple[int, object]]:
        """Every record with its number from 1; to be gone through once."""
        ...

    def mark(self, row: _Row) -> tuple[int, int]:
        """The offset and size by which `read` finds the record that `scan` has just given."""
        ...

    def read(self, offset: int, size: int) -> object: ...


class _JsonLines:
    """A plain JSONL file, read in place."""

    copied = False

    def __init__(self, path: Path) -> None:
        self.path, self.name = path.absolute(), str(path)
        self._open()
        self._state = self._stat()

    def _open(self) -> None:
        self._file = self.path.open("rb")
        weakref.finalize(self, self._file.close)

    def _stat(self) -> tuple[int, int]:
        stat = os.fstat(self._file.fileno())
        return stat.st_size, stat.st_mtime_ns

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "_file"}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._open()

    def place(self, number: int) -> str:
        return f"{self.name}, line {number}"

    def scan(self) -> Iterator[tuple[int, object]]:
        end = 0
        for number, line in enumerate(self._file, start=1):
            self._mark, end = (end, len(line)), end + len(line)
            if line.strip():
                yield number, _outcome(line)
        self._refuse_changes()

    def mark(self, row: _Row) -> tuple[int, int]:  # noqa: ARG002
        return self._mark

    def read(self, offset: int, size: int) -> object:
        self._refuse_changes()
        return _outcome(os.pread(self._file.fileno(), size, offset))

    def _refuse_changes(self) -> None:
        if self._stat() != self._state:
            raise ValueError(f"{self.name} has changed since it was indexed; load its rows again")


class _InPlace:
    """A sequence or a Hugging Face dataset, read by number."""

    name, copied = "", False

    def __init__(self, records: Sequence[object]) -> None:
        self._records = records

    def place(self, number: int) -> str:
        return f"row {number}"

    def scan(self) -> Iterator[tuple[int, object]]:
        for number, record in enumerate(islice(self._records, len(self._records)), start=1):
            self._mark = (number - 1, 0)
            yield number, record

    def mark(self, row: _Row) -> tuple[int, int]:  # noqa: ARG002
        return self._mark

    def read(self, offset: int, size: int) -> object:  # noqa: ARG002
        return self._records[offset]


class _Copied:
    """Records that come only once, or only in order: the rows made of them go to an unnamed temporary file."""

    copied = True

    def __init__(self, name: str, unit: str, records: Iterable[tuple[int, object]]) -> None:
        self.name, self.unit = name, unit
        self._records: Iterable[tuple[int, object]] | None = records
        self._end = 0
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  # closed with this object
        weakref.finalize(self, self._file.close)

    def __reduce__(self) -> str:
        raise TypeError(
            f"rows of {self.name or 'a stream or table'} lie in an unnamed temporary file, which cannot be pickled; "
            "write them to a JSONL file and load that"
        )

    def place(self, number: int) -> str:
        return f"{self.name}, {self.unit} {number}" if self.name else f"{self.unit} {number}"

    def scan(self) -> Iterator[tuple[int, object]]:
        records, self._records = self._records, None  # what it holds is not needed afterwards
        yield from records or ()
        with self._naming_the_disk():
            self._file.flush()

    def mark(self, row: _Row) -> tuple[int, int]:
        line = json.dumps(vars(row), ensure_ascii=False).encode("utf-8", "surrogatepass")
        with self._naming_the_disk():
            self._file.write(line)
        offset, self._end = self._end, self._end + len(line)
        return offset, len(line)

    def read(self, offset: int, size: int) -> object:
        return json.loads(os.pread(self._file.fileno(), size, offset).decode("utf-8", "surrogatepass"))

    @contextmanager
    def _naming_the_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            what = f"{error.strerror} while copying rows; set TMPDIR to a folder with more room"
            raise OSError(error.errno, what, tempfile.gettempdir()) from error


def sources_of(source: RowSource) -> list[Source]:
    """The parts of `source`, each in the cheapest form that can be read in any order."""
    if isinstance(source, str | os.PathLike):
        return [_file(Path(source))]
    if isinstance(source, Mapping):
        raise TypeError(
            f"rows are needed, not a {type(source).__name__} with {field_names(source)}; pass one part of it"
        )
    if isinstance(source, list | tuple) and source and isinstance(source[0], str | os.PathLike):
        return [_file(Path(one)) for one in source]
    if type(source).__module__.split(".")[0] == "pandas":
        return [_Copied("", "row", enumerate(frame_records(source), start=1))]
    if hasattr(source, "__arrow_c_stream__"):
        batches = needed("pyarrow", "an Arrow table").RecordBatchReader.from_stream(source)
        return [_Copied("", "row", enumerate(arrow_records(batches), start=1))]
    if hasattr(source, "__len__") and hasattr(source, "__getitem__"):
        return [_InPlace(cast("Sequence[object]", source))]
    if isinstance(source, Iterable):
        return [_Copied("", "row", enumerate(source, start=1))]
    raise TypeError(
        f"rows are needed: a path, a dataset, a table or an iterable, not {type(source).__name__}"
    )


def _file(path: Path) -> Source:
    if path.is_dir():
        raise IsADirectoryError(
            errno.EISDIR,
            "a folder, not a file of rows; give a file (in Python also a list of files)",
            str(path),
        )
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, "no such file of rows", str(path))
    ending = path.suffix.lower()
    packed = ending in (".gz", ".zst")
    inner = Path(path.stem).suffix.lower() if packed else ending
    if inner in (".csv", ".tsv"):
        cells = csv_records(str(path), _lines(path), "," if inner == ".csv" else "\t")
        return _Copied(str(path), "line", cells)
    if ending in (".parquet", ".arrow", ".feather"):
        return _Copied(str(path), "row", enumerate(arrow_file_records(path), start=1))
    if packed or not path.is_file():  # not a file: a pipe
        lines = ((n, _outcome(line)) for n, line in enumerate(_lines(path), start=1) if line.strip())
        return _Copied(str(path), "line", lines)
    return _JsonLines(path)


def _outcome(line: bytes) -> dict[str, Any] | ValueError:
    try:
        return _object(line)
    except ValueError as error:
        return error


def _object(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.removeprefix(BOM_UTF8).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"broken UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8"
        ) from None
    except (ValueError, RecursionError) as error:  # RecursionError: brackets a thousand deep
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object is needed, not {type(row).__name__}")
    return row


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file, plain, .gz or .zst; blank lines are skipped."""
    return (row for _, row in numbered_rows(path))


def numbered_rows(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSONL file with their line numbers, from 1; ValueError names file and line."""
    for number, line in enumerate(_lines(Path(path)), start=1):
        if not line.strip():
            continue
        try:
            yield number, _object(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, plain, .gz or .zst; ValueError if the compressed data is damaged or cut off."""
    ending = path.suffix.lower()
    damage: tuple[type[Exception], ...] = (EOFError, zlib.error, gzip.BadGzipFile)
    if ending == ".zst":
        zstandard = needed("zstandard", str(path))
        damage = (*damage, zstandard.ZstdError)
    try:
        with path.open("rb") as file:
            if ending == ".zst":
                yield from _split(_zstd_chunks(file, zstandard))
            elif ending == ".gz":
                yield from gzip.GzipFile(fileobj=file)
            else:
                yield from file
    except damage as error:
        raise ValueError(f"{path} is damaged or cut off ({error}); fetch it again") from error


def _zstd_chunks(file: BinaryIO, zstandard: Any) -> Iterator[bytes]:  # noqa: ANN401
    """The decompressed bytes of every frame; zstandard's own stream reader takes a cut-off file for a whole one."""
    # Files written with a long window (zstd --long=27) need the reader to allow it.
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**27)
    frame = None
    while chunk := file.read(2**16):
        while chunk:
            frame = frame or decompressor.decompressobj()
            yield frame.decompress(chunk)
            chunk, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("the last frame has no end")


def _split(chunks: Iterable[bytes]) -> Iterator[bytes]:
    rest: list[bytes] = []
    for chunk in chunks:
        *whole, last = chunk.split(b"\n")
        for line in whole:
            yield b"".join((*rest, line, b"\n"))
            rest = []
        rest.append(last)
    if line := b"".join(rest):
        yield line


def field_names(row: Mapping[str, object]) -> str:
    """Field names for a message; a CSV file without a header has whole texts there."""
    return ", ".join(name if len(name) <= 40 else f"{name[:40]}..." for name in sorted(map(str, row)))
