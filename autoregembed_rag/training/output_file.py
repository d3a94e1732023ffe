"""The file that mining writes: it appears when it is whole, and takes the place of nothing that is read."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from .mining_report import HISTOGRAM, REPORT


def check_output(output: Path, read: Iterable[str | os.PathLike[str]], report: Path | None = None) -> None:
    """Raise, before the hours that mining may take, for what cannot be written or would replace what is read.

    Args:
        output: the file to be.
        read: the files that the rows and documents come from.
        report: the folder of a report, if there is to be one.

    Raises:
        ValueError: `output` is not named .jsonl, or it or the report is a file of `read` or in each other's place.
        IsADirectoryError, NotADirectoryError: `output` is a folder, or `report` is a file.
    """
    if output.suffix.lower() != ".jsonl":
        packed = output.stem.lower().endswith(".jsonl")
        raise ValueError(
            "mined rows are written as plain JSONL: name the output "
            f"{output.with_suffix('' if packed else '.jsonl')}"
        )
    if output.is_dir():
        raise IsADirectoryError(errno.EISDIR, "the output is a folder; name a file in it", str(output))
    written = [output]
    if report is not None:
        if report.exists() and not report.is_dir():
            raise NotADirectoryError(
                errno.ENOTDIR, "the report is a folder, not a file; name one", str(report)
            )
        if report.resolve() == output.resolve():
            raise ValueError(
                f"{output} cannot be both the output and the folder of the report: name another folder"
            )
        written += [report / REPORT, report / HISTOGRAM]
    kept = {Path(file).resolve(): file for file in read}
    for file in written:
        if (source := kept.get(file.resolve())) is not None:
            raise ValueError(f"{file} would take the place of {source}, which is read: write to another file")


@contextmanager
def whole_or_not_at_all(path: Path) -> Iterator[TextIO]:
    """A file to write that gets its name once it is whole and on disk; after an error nothing is left of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        # Half a surrogate pair, which UTF-8 cannot hold, is written as the escape \udXXX, which JSON can.
        with beside.open("x", encoding="utf-8", errors="backslashreplace") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
