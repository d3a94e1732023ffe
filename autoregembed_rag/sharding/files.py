"""Files on this machine or in a store (s3://, gs://, ...), through pyarrow's filesystems; files appear whole."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

BLOCK = 4 << 20
UNFINISHED = ".new"


def needed(module: str) -> Any:  # noqa: ANN401
    """A module of the extra `scale`; ImportError says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'{error}; encoding in shards needs: pip install "autoregembed-rag[scale]"'
        ) from error


class Info(NamedTuple):
    """A file: its name, its bytes, and when it was changed, in nanoseconds (None where a store does not say)."""

    name: str
    size: int
    mtime: int | None


class Place:
    """A file or folder on a filesystem. Pickles by its address, and so goes to other machines."""

    def __init__(self, address: str | os.PathLike[str]) -> None:
        """`address` is a path, which is made absolute, or a URI.

        ValueError: no filesystem is known for the URI.
        """
        text = os.fspath(address)
        if "://" in text:
            self._base, _, self._query = text.partition("?")
            self._base = self._base.rstrip("/")
            self.fs, self.path = _resolve(self.address)
        else:
            self._base, self._query = str(Path(text).absolute()), ""
            self.fs, self.path = _local(), self._base

    @property
    def address(self) -> str:
        """By which another process finds it; may hold credentials."""
        return f"{self._base}?{self._query}" if self._query else self._base

    def __reduce__(self) -> tuple[Any, ...]:
        return Place, (self.address,)

    def __str__(self) -> str:
        """Without what a URI may say of credentials and connections."""
        return re.sub(r"(?<=://)[^/@]*@", "", self._base)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rsplit("/", 1)[-1]

    @property
    def parent(self) -> Place:
        """The folder that this is in."""
        return self._moved(self._base.rsplit("/", 1)[0], self.path.rsplit("/", 1)[0])

    def __truediv__(self, name: str) -> Place:
        return self._moved(f"{self._base}/{name}", f"{self.path}/{name}")

    def _moved(self, base: str, path: str) -> Place:
        moved: Place = object.__new__(Place)
        moved.fs, moved._query = self.fs, self._query
        moved._base, moved.path = base, path
        return moved

    @property
    def kind(self) -> str:
        """ "file", "folder" or "nothing"; some stores have no folders that are empty."""
        found = str(self.fs.get_file_info(self.path).type.name)
        return {"File": "file", "Directory": "folder"}.get(found, "nothing")

    def info(self, name: str) -> Info | None:
        """What there is to know of a file in this folder; None if it is not there."""
        found = self.fs.get_file_info(f"{self.path}/{name}")
        return Info(name, found.size, _mtime(found)) if found.is_file else None

    def files(self, *, recursive: bool = False) -> list[Info]:
        """The files in this folder, in the order of their names relative to it; none if there is no folder."""
        selector = needed("pyarrow.fs").FileSelector(self.path, allow_not_found=True, recursive=recursive)
        start = len(self.path.rstrip("/")) + 1
        found = self.fs.get_file_info(selector)
        return sorted(Info(item.path[start:], item.size, _mtime(item)) for item in found if item.is_file)

    def make_folder(self) -> None:
        """Make this folder, and those above it, unless they are there."""
        self.fs.create_dir(self.path, recursive=True)

    def delete(self, name: str) -> None:
        """Delete a file in this folder; one that is not there is fine."""
        with suppress(FileNotFoundError):
            self.fs.delete_file(f"{self.path}/{name}")

    @contextmanager
    def opened(self) -> Iterator[Any]:
        """This file, to be read from any offset."""
        with self.fs.open_input_file(self.path) as file:
            yield file

    def read_json(self, name: str) -> Any:  # noqa: ANN401
        """The JSON in a file of this folder; ValueError names a file that holds none."""
        with self.fs.open_input_file(f"{self.path}/{name}") as file:
            content = file.read()
        try:
            return json.loads(content)
        except ValueError as error:
            raise ValueError(f"{self}/{name} is damaged: it holds no JSON ({error})") from error

    def write_json(self, name: str, record: object) -> None:
        """Write a JSON file into this folder, whole or not at all."""
        content = json.dumps(record, ensure_ascii=False).encode()
        with self.unfinished(name) as file:
            file.write(content)
            file.finish(name)

    @contextmanager
    def unfinished(self, name: str) -> Iterator[UnfinishedFile]:
        """A file of this folder that appears when `finish` is called; without that nothing is left of it."""
        file = UnfinishedFile(self, name)
        try:
            yield file
        finally:
            file.discard()

    def sha256(self) -> str:
        """Of this file's bytes."""
        digest = hashlib.sha256()
        with self.opened() as file:
            while block := file.read(BLOCK):
                digest.update(block)
        return digest.hexdigest()


class UnfinishedFile:
    """Bytes on their way into a file, counted and hashed; for pyarrow it looks like an open file."""

    def __init__(self, folder: Place, name: str) -> None:
        self._folder = folder
        self._name = f".{name}-{uuid.uuid4().hex}{UNFINISHED}"
        self._file: BinaryIO | None = folder.fs.open_output_stream(f"{folder.path}/{self._name}")
        self._digest = hashlib.sha256()
        self.size = 0

    @property
    def closed(self) -> bool:
        return self._file is None

    def write(self, data: Any) -> int:  # noqa: ANN401
        assert self._file is not None  # noqa: S101
        view = memoryview(data)
        self._file.write(view)
        self._digest.update(view)
        self.size += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        """Nothing to do: `finish` does."""

    @property
    def sha256(self) -> str:
        """Of what was written."""
        return self._digest.hexdigest()

    def finish(self, name: str) -> None:
        """Give the file its name, once it is on disk."""
        assert self._file is not None  # noqa: S101
        self._file.close()
        fs, unnamed = self._folder.fs, f"{self._folder.path}/{self._name}"
        if fs.type_name == "local":
            _sync(unnamed)
        fs.move(unnamed, f"{self._folder.path}/{name}")
        if fs.type_name == "local":
            _sync(self._folder.path)
        self._file = None

    def discard(self) -> None:
        """Leave nothing of a file that was not finished."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            with suppress(OSError):
                self._folder.delete(self._name)
            self._file = None


def _local() -> Any:  # noqa: ANN401
    return needed("pyarrow.fs").LocalFileSystem()


def _resolve(uri: str) -> tuple[Any, str]:
    """pyarrow's own filesystems (file, s3, gs, abfs, hdfs), else what fsspec knows."""
    fs, arrow = needed("pyarrow.fs"), needed("pyarrow")
    try:
        found, path = fs.FileSystem.from_uri(uri)
    except arrow.ArrowInvalid as error:
        try:
            other, path = needed("fsspec.core").url_to_fs(uri)
        except (ImportError, ValueError):
            raise ValueError(f"{uri} is on no filesystem that pyarrow knows: {error}") from None
        found = fs.PyFileSystem(fs.FSSpecHandler(other))
    return found, str(path).rstrip("/")


def _mtime(found: Any) -> int | None:  # noqa: ANN401
    return None if found.mtime_ns is None else int(found.mtime_ns)


def _sync(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def in_order(work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """`work` of each item, several at a time: waiting for a store is most of reading many small files."""
    with ThreadPoolExecutor(16) as threads:
        yield from threads.map(work, items)
