"""A part's documents, encoded and written to a shard."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .documents import Document, read_part
from .files import Place, UnfinishedFile, needed
from .manifest import Manifest, Shard, record_name
from .source import Part

if TYPE_CHECKING:
    from ..config import Pooling
    from ..encoder import AutoRegEncoder

GROUP_BYTES = 16 << 20  # of rows that are written, and later read and added, together

# How many shapes of a product PyTorch on a CPU remembers what it has prepared for. Its 1,024 take hundreds of MB, and
# where passes are made of texts of like length few shapes come twice.
KEPT_SHAPES = {"LRU_CACHE_CAPACITY": "16", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}


def keep_few_shapes() -> None:
    """Keep memory flat in a process that only encodes in bulk; to be called before PyTorch is imported."""
    for name, number in KEPT_SHAPES.items():
        os.environ.setdefault(name, number)


@dataclass(frozen=True)
class Job:
    """What every process that encodes must know.

    Attributes:
        folder: what the names of the input's files are relative to.
        output: where shards go.
        name: of the manifest there.
        encoder: the fingerprint.
        instruction: in words.
        dimension: entries of a vector.
    """

    folder: Place
    output: Place
    name: str
    encoder: str
    instruction: str
    dimension: int

    @classmethod
    def of(cls, manifest: Manifest, folder: Place, output: Place) -> Job:
        """The job that a manifest describes."""
        return cls(folder, output, manifest.job, manifest.encoder, manifest.instruction, manifest.dimension)


class Loading(NamedTuple):
    """How an encoder is loaded, here or on another machine; `device` may be several."""

    model: str
    num_tokens: int | None
    pooling: Pooling | None
    device: str | Sequence[str]
    dtype: str

    def encoder(self, device: str | Sequence[str]) -> AutoRegEncoder:
        """The encoder, on a device."""
        from ..encoder import AutoRegEncoder

        return AutoRegEncoder.from_pretrained(
            self.model, device=device, dtype=self.dtype, num_tokens=self.num_tokens, pooling=self.pooling
        )


def encode_parts(
    job: Job, parts: Iterator[Part], encoder: AutoRegEncoder, on_rows: Callable[[Part, int], None]
) -> Iterator[Shard]:
    """Encode parts one after another, writing in a thread what is encoded; each shard comes once it is on disk.

    `on_rows` is called with how many more documents of a part are encoded.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="write") as thread:
        before: Future[Shard] | None = None
        for part in parts:
            coming = _encode_part(job, part, encoder, thread, on_rows)
            if before is not None:
                yield before.result()
            before = coming
        if before is not None:
            yield before.result()


def _encode_part(
    job: Job,
    part: Part,
    encoder: AutoRegEncoder,
    thread: ThreadPoolExecutor,
    on_rows: Callable[[Part, int], None],
) -> Future[Shard]:
    taken: deque[Document] = deque()

    def texts() -> Iterator[str]:
        for document in read_part(job.folder, part):
            taken.append(document)
            yield document.text

    writer = _Writer(job, part)
    written: Future[Any] | None = None
    cut: list[int] = []
    try:
        for vectors in encoder.encode_stream(texts(), job.instruction, on_cut=cut.append):
            documents = [taken.popleft() for _ in range(len(vectors))]
            if written is not None:
                written.result()  # so that no more than one batch waits
            written = thread.submit(writer.write, documents, vectors)
            on_rows(part, len(vectors))
        if written is not None:
            written.result()
    except BaseException:
        thread.submit(writer.discard)
        raise
    return thread.submit(writer.finish, sum(cut))


class _Writer:
    """One shard's file, which appears when it is whole."""

    def __init__(self, job: Job, part: Part) -> None:
        self._job, self._part = job, part
        self._rows = 0
        self._waiting: list[Any] = []
        self._file: UnfinishedFile | None = None
        self._table: Any = None

    def _begin(self) -> None:
        self._file = UnfinishedFile(self._job.output, f"part-{self._part.number:06}")
        self._table = needed("pyarrow.parquet").ParquetWriter(
            self._file,
            schema(self._job.dimension),
            compression={"id": "zstd", "text": "zstd", "metadata": "zstd", "vector.list.element": "none"},
            use_dictionary=["metadata"],
            write_statistics=False,
        )

    def write(self, documents: list[Document], vectors: np.ndarray) -> None:
        arrow = needed("pyarrow")
        flat = arrow.array(vectors.astype(np.float16).ravel())
        texts = zip(zip(*documents, strict=True), _texts(), strict=True)
        columns = [arrow.array(column, kind) for column, kind in texts]
        columns.append(arrow.FixedSizeListArray.from_arrays(flat, self._job.dimension))
        self._waiting.append(arrow.record_batch(columns, schema=schema(self._job.dimension)))
        self._rows += len(documents)
        if sum(batch.nbytes for batch in self._waiting) >= GROUP_BYTES:
            self._write_group()

    def _write_group(self) -> None:
        if self._file is None:
            self._begin()
        if self._waiting:
            table = needed("pyarrow").Table.from_batches(self._waiting)
            self._table.write_table(table, row_group_size=len(table))
            self._waiting.clear()

    def finish(self, cut: int) -> Shard:
        try:
            self._write_group()
            assert self._file is not None  # noqa: S101
            self._table.close()
            digest, number = self._file.sha256, self._part.number
            # Named by what it holds: should a part be encoded twice at once, neither writes over the other's file.
            name = f"part-{number:06}-{digest[:8]}.parquet"
            self._file.finish(name)
        finally:
            self.discard()
        shard = Shard(number, name, self._rows, self._file.size, digest, self._job.encoder, cut)
        self._job.output.write_json(record_name(number), shard._asdict())
        return shard

    def discard(self) -> None:
        if self._file is not None:
            self._file.discard()


def _texts() -> list[Any]:
    arrow = needed("pyarrow")
    return [arrow.string(), arrow.large_string(), arrow.string()]  # texts of a batch may pass 2 GiB


def schema(dimension: int) -> Any:  # noqa: ANN401
    """The columns of a shard."""
    arrow = needed("pyarrow")
    vector = arrow.list_(arrow.field("element", arrow.float16(), nullable=False), dimension)
    return arrow.schema(
        [
            arrow.field(name, kind, nullable=False)
            for name, kind in zip(("id", "text", "metadata", "vector"), [*_texts(), vector], strict=True)
        ]
    )
