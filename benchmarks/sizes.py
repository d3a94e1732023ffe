"""How many bytes real indexes take, beside what `autoregembed plan` foretells: `python -m benchmarks.sizes`.

Each kind of `DocumentIndex` is filled with real texts and random vectors in a process of its own, closed, and opened
and searched in another. Memory is what either adds to a process that has FAISS loaded: while it is filled (the
highest), and after 64 searches, files mapped into it included. The share of words is FTS5's index by the bytes of the
texts. A shard is what pyarrow writes, without compression and with its default. Tokens a second are of one core. Linux
only.
"""

import os
import shutil
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

try:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from autoregembed_indexes import DocumentIndex
    from autoregembed_indexes.database import DATABASE_NAME
    from autoregembed_indexes.sizes import FACTORIES, Documents, database_bytes, document_index_size
    from autoregembed_rag.cli_index import human_bytes
    from benchmarks.measures import markdown
    from benchmarks.report import environment, print_table, write_json
except ImportError as error:
    raise ImportError(f'{error}; the benchmarks need: pip install -e ".[faiss,bench,scale]"') from error

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MOST_BYTES = 80 * 10**6  # of an index' vectors in float32
BATCH = 2048
SEARCHES = 64
TOKENISED = 3
HEADER = (
    "dimensions",
    "factory",
    "kind",
    "documents",
    "disk",
    "foretold",
    "searched",
    "foretold",
    "filled",
    "documents/s",
)

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Job:
    """An index to be made."""

    folder: Path
    factory: str
    dimension: int
    texts: Sequence[str]

    @property
    def documents(self) -> Documents:
        """What it holds, as the plan has it."""
        count = len(self.texts)
        ids = sum(len(str(place)) for place in range(count))
        return Documents(count, self.dimension, _bytes(self.texts) / count, 2, ids / count)


def read_texts(data_dir: Path | None, most: int) -> list[str]:
    """Docstrings, or the first documents of a folder."""
    # Here, since it takes PyTorch, which the processes with indexes need not load.
    from benchmarks.beir import BenchmarkDataError, load_folder
    from benchmarks.pydoc import standard_library_documents

    try:
        found = standard_library_documents() if data_dir is None else load_folder(data_dir).documents
    except BenchmarkDataError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    return [document.content for document in islice(found, most)]


def vectors(seed: int, count: int, dimension: int) -> np.ndarray:
    """Random directions, float32 [count, dimension]."""
    return np.random.default_rng(seed).standard_normal((count, dimension), dtype=np.float32)


def fill(job: Job) -> dict[str, Any]:
    """Make the index; its kind, the most memory that this took, and documents/s."""
    _warm(job.folder)
    before = memory("VmRSS")
    RESET.write_text("5", encoding="ascii")  # forget the peak of loading
    begun = time.perf_counter()
    with DocumentIndex.create(
        job.folder, dimension=job.dimension, factory=job.factory, device="cpu"
    ) as index:
        for start in range(0, len(job.texts), BATCH):
            part = job.texts[start : start + BATCH]
            ids = [str(place) for place in range(start, start + len(part))]
            index.add(vectors(start, len(part), job.dimension), part, ids=ids)
        index.snapshot()
        kind = index.info()["kind"]
    rate = len(job.texts) / (time.perf_counter() - begun)
    return {"kind": kind, "filled": memory("VmHWM") - before, "rate": rate}


def search(job: Job) -> float:
    """The memory that opening and searching adds."""
    _warm(job.folder)
    queries = vectors(1, SEARCHES, job.dimension)
    before = memory("VmRSS")
    with DocumentIndex.open(job.folder, read_only=True, device="cpu") as index:
        for query in queries:
            index.search(query[None], 10)
        return memory("VmRSS") - before


def memory(which: str) -> int:
    """Bytes of this process in memory, as Linux tells them: now (VmRSS), or at the highest (VmHWM)."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text(encoding="ascii").splitlines())
    return 1024 * int(lines[which].split()[0])


def _warm(folder: Path) -> None:
    """Load what every index loads."""
    with DocumentIndex.create(folder.with_name("other"), factory="Flat", device="cpu") as index:
        index.add(vectors(0, 8, 8), ["a"] * 8)
        index.search(vectors(1, 1, 8), 1)
    shutil.rmtree(folder.with_name("other"))


def measure(factory: str, dimension: int, texts: Sequence[str]) -> dict[str, Any]:
    """One index: what it takes, and what was foretold."""
    count = max(1, min(len(texts), MOST_BYTES // (4 * dimension)))
    with tempfile.TemporaryDirectory() as beside:
        job = Job(Path(beside, "index"), factory, dimension, texts[:count])
        filled = in_a_process(fill, job)
        searched = in_a_process(search, job)
        disk = sum(file.stat().st_size for file in job.folder.iterdir())
        parts = _parts(job.folder / DATABASE_NAME)
    foretold = document_index_size(job.documents, factory)
    return {
        "dimension": dimension,
        "factory": factory,
        **filled,
        "documents": count,
        "disk": disk,
        "foretold_disk": foretold.disk,
        "searched": searched,
        "foretold_memory": foretold.memory,
        "text": job.documents.text,
        "id": job.documents.id,
        "database": parts,
        "foretold_database": database_bytes(job.documents),
    }


def in_a_process(work: Callable[[Job], Any], job: Job) -> Any:  # noqa: ANN401
    """Work in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, job).result()


def _parts(database: Path) -> dict[str, int]:
    """Bytes of each table and index, where SQLite tells."""
    with closing(sqlite3.connect(database)) as connection:
        try:
            return dict(
                connection.execute("SELECT name, sum(pgsize) FROM dbstat GROUP BY name ORDER BY 2 DESC")
            )
        except sqlite3.OperationalError:
            return {}


def shard(dimension: int, texts: Sequence[str]) -> dict[str, float]:
    """Bytes of a document in a Parquet file, beside those of the plan."""
    texts = texts[: max(1, min(BATCH, MOST_BYTES // (4 * dimension)))]
    unit = vectors(0, len(texts), dimension)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    flat = pa.array(unit.astype(np.float16).ravel())
    columns = {
        "id": [str(place) for place in range(len(texts))],
        "text": list(texts),
        "metadata": ["{}"] * len(texts),
        "vector": pa.FixedSizeListArray.from_arrays(flat, dimension),
    }
    found = {"dimension": dimension, "foretold": 2 * dimension + _bytes(texts) / len(texts) + 6}
    with tempfile.TemporaryDirectory() as beside:
        file = Path(beside, "part.parquet")
        for compression in ("none", "snappy"):
            pq.write_table(pa.table(columns), file, compression=compression)
            found[compression] = file.stat().st_size / len(texts)
    return found


def tokenise(texts: Sequence[str]) -> dict[str, float]:
    """How fast one core tokenises for `mini`, and bytes of a token."""
    from autoregembed_rag import (
        AutoRegEncoder,
    )  # here, so that the processes with indexes need not load PyTorch

    encoder = AutoRegEncoder.from_pretrained("mini", device="cpu")
    rates, tokens = [], 0
    for _ in range(TOKENISED):
        start = time.perf_counter()
        tokens = sum(encoder.count_tokens(texts))
        rates.append(tokens / (time.perf_counter() - start))
    return {"tokens/s": statistics.median(rates), "bytes a token": _bytes(texts) / tokens}


def _bytes(texts: Sequence[str]) -> int:
    return sum(len(text.encode()) for text in texts)


@app.command(epilog="Example: python -m benchmarks.sizes --data-dir build/passages --documents 20000")
def main(
    data_dir: Annotated[
        Path | None, typer.Option(help="A folder in BEIR's format; default: docstrings.")
    ] = None,
    documents: Annotated[int, typer.Option(min=1, help="Documents at most.")] = 20_000,
    dimension: Annotated[list[int] | None, typer.Option(help="Default: 320, 1600, 20480.")] = None,
    factory: Annotated[list[str] | None, typer.Option(help="Default: every kind.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("results/sizes"),
) -> None:
    """Build an index of every kind at each dimension, and compare its bytes with the plan's."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    texts = read_texts(data_dir, documents)
    dimensions = dimension or [320, 1600, 20_480]
    results = []
    for width in dimensions:
        for kind in factory or FACTORIES:
            results.append(measure(kind, width, texts))
            print(" ".join(_row(results[-1])), flush=True)
    words = [result["database"]["words_data"] / (result["documents"] * result["text"]) for result in results]
    record = {
        "texts": "pydoc" if data_dir is None else data_dir.name,
        "indexes": results,
        "words": statistics.median(words),
        "shards": [shard(width, texts) for width in dimensions],
        "tokenising": tokenise(texts),
        **environment(),
    }
    write_json(out / "results.json", record)
    page = _page(record)
    (out / "table.md").write_text(page, encoding="utf-8")
    print_table(HEADER, [_row(result) for result in results])
    print(f"written: {out / 'results.json'}, {out / 'table.md'}")


def _row(result: dict[str, Any]) -> list[str]:
    def beside(measured: str, foretold: str) -> list[str]:
        return [human_bytes(result[measured]), f"{result[foretold] / result[measured] - 1:+.1%}"]

    return [
        f"{result['dimension']:,}",
        result["factory"],
        result["kind"],
        f"{result['documents']:,}",
        *beside("disk", "foretold_disk"),
        *beside("searched", "foretold_memory"),
        human_bytes(result["filled"]),
        f"{result['rate']:,.0f}",
    ]


def _page(record: dict[str, Any]) -> str:
    shards = [
        [f"{found['dimension']:,}", *(f"{found[name]:,.0f}" for name in ("none", "snappy", "foretold"))]
        for found in record["shards"]
    ]
    rates = record["tokenising"]
    return (
        f"Real indexes of {record['texts']} with random vectors, on {record['cpu']}. `foretold` is how far off the "
        f"plan is; `searched` is the memory that opening and {SEARCHES} searches add to a process, `filled` the most "
        "that filling it took, on one core beside other work.\n\n"
        + markdown(HEADER, [_row(result) for result in record["indexes"]])
        + f"\nThe index of words takes {record['words']:.2f} of the bytes of the texts. One core tokenises "
        f"{rates['tokens/s']:,.0f} tokens/s of {rates['bytes a token']:.2f} bytes.\n\n"
        "Bytes of a document in a Parquet shard:\n\n"
        + markdown(("dimensions", "not compressed", "snappy", "foretold"), shards)
        + f"\n`{record['command']}`; Python {record['python']}\n"
    )


if __name__ == "__main__":
    app()
