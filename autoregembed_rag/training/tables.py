"""Tables as records: CSV files, pandas frames, and Arrow tables and files."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 1000  # rows of a table turned into Python objects at a time
# Characters in a cell of a CSV file at most: an unclosed quote would take in the rest of the file.
LONGEST_CELL = 2**24


def csv_records(name: str, lines: Iterable[bytes], delimiter: str) -> Iterator[tuple[int, object]]:
    """The rows below the header, each with the line it begins on; ValueError if two columns have one name."""
    texts = (
        line.decode("utf-8-sig" if i == 0 else "utf-8", "surrogateescape") for i, line in enumerate(lines)
    )
    limit = csv.field_size_limit(LONGEST_CELL)
    try:
        cells = csv.reader(texts, delimiter=delimiter, strict=True)
        header: list[str] = []
        while True:
            number = cells.line_num + 1
            try:
                row = next(cells)
            except StopIteration:
                return
            except csv.Error as error:
                yield number, ValueError(f"not CSV ({error}); is a quote left open?")
                continue
            if header and row:
                yield number, _csv_record(header, row)
            elif row:
                header = row
                _refuse_repeats(f"{name}, line {number}", header)
    finally:
        csv.field_size_limit(limit)


def _refuse_repeats(place: str, header: list[str]) -> None:
    for column in filter(None, header):
        if header.count(column) > 1:
            raise ValueError(f"{place}: two columns have the name {column!r}; rename or remove one")


def _csv_record(header: list[str], row: list[str]) -> dict[str, str | None] | ValueError:
    try:
        "".join(row).encode()
    except UnicodeEncodeError:  # what surrogateescape made of bytes that are not UTF-8
        return ValueError("broken UTF-8; save the file as UTF-8")
    if len(row) != len(header):
        return ValueError(f"{len(row)} cells, but the header has {len(header)}")
    return {name: cell or None for name, cell in zip(header, row, strict=True)}


def frame_records(frame: Any) -> Iterator[object]:  # noqa: ANN401
    """The rows of a pandas.DataFrame as mappings; missing values are None, arrays lists."""
    for start in range(0, len(frame), BATCH):
        part = frame.iloc[start : start + BATCH]
        for record in part.astype(object).where(part.notna(), None).to_dict("records"):
            yield {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in record.items()}


def arrow_file_records(path: Path) -> Iterator[object]:
    """The rows of a .parquet, .arrow or .feather file; ValueError names one that is damaged."""
    pyarrow = needed("pyarrow", str(path))
    try:
        if path.suffix.lower() == ".parquet":
            with needed("pyarrow.parquet", str(path)).ParquetFile(path) as file:
                yield from arrow_records(file.iter_batches(batch_size=BATCH))
        else:
            with pyarrow.memory_map(str(path)) as mapped:
                yield from arrow_records(_ipc_batches(pyarrow, mapped))
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:  # the system's own, which names the file
            raise
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is damaged or cut off ({reason}); fetch it again") from error


def _ipc_batches(pyarrow: Any, mapped: Any) -> Iterator[Any]:  # noqa: ANN401
    """Both formats that go by the name .arrow: the file, and the stream that Hugging Face datasets write."""
    magic = mapped.read(6)
    mapped.seek(0)
    if magic == b"ARROW1":
        file = pyarrow.ipc.open_file(mapped)
        return (file.get_batch(i) for i in range(file.num_record_batches))
    return iter(pyarrow.ipc.open_stream(mapped))


def arrow_records(batches: Iterable[Any]) -> Iterator[object]:
    """The rows of Arrow batches as mappings or, where a text is no UTF-8, the ValueError that says so."""
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH):
            part = batch.slice(start, BATCH)
            try:
                yield from part.to_pylist()
            except UnicodeDecodeError:
                yield from (_arrow_record(part.slice(i, 1)) for i in range(part.num_rows))


def _arrow_record(row: Any) -> object:  # noqa: ANN401
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError as error:
        return ValueError(f"broken UTF-8 ({error.reason}); write the table with valid texts")


def needed(module: str, what: str) -> Any:  # noqa: ANN401
    """The imported module; ImportError says that `what` needs it, and how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.split(".")[0]
        raise ImportError(f'{what} needs {package}: pip install "autoregembed-rag[train]"') from None
