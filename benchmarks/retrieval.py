"""How well and how fast a model retrieves, beside BM25: `python -m benchmarks.retrieval`.

Without arguments: the offline set `pydoc` and the bundled model. Every system gets the same strings (title,
line break, text). documents/s is encoding and indexing together; ms/query is the median of single queries,
encoded and searched one at a time for the best 10; the index is what lies on disk, with the texts for a
model, without them for BM25.
"""

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

try:
    from autoregembed_rag.cli_index import human_bytes
    from benchmarks.beir import BenchmarkDataError, RetrievalSet, limit_documents, load_folder, load_hub
    from benchmarks.models import Bases, Compares, Models, load_candidates
    from benchmarks.pydoc import load_pydoc
    from benchmarks.report import bar_chart, environment, print_table, write_json
    from benchmarks.scoring import DEPTH, MEASURES, score_run
    from benchmarks.systems import BM25, Dense, System
except ImportError as error:
    raise ImportError(f'{error}; the benchmarks need: pip install -e ".[faiss,bench]"') from error

LATENCY_QUERIES = 50
LATENCY_DEPTH = 10

app = typer.Typer(add_completion=False)


class Pooling(str, Enum):
    """How the k vectors become one."""

    flatten = "flatten"
    mean = "mean"


@dataclass(frozen=True)
class Result:
    """One system's figures on one set."""

    system: str
    measures: dict[str, float]
    documents_per_second: float
    ms_per_query: float
    index_bytes: int
    details: dict[str, Any]


def evaluate(system: System, data: RetrievalSet, seed: int = 0) -> Result:
    """Index the documents, run all queries, then time a seeded sample of them one at a time."""
    seconds = _seconds(lambda: system.index(data.documents))
    rankings = system.search(list(data.queries.values()), DEPTH)
    run = {query: dict(ranking) for query, ranking in zip(data.queries, rankings, strict=True)}
    sample = random.Random(seed).sample(sorted(data.queries), min(LATENCY_QUERIES, len(data.queries)))
    return Result(
        system=system.name,
        measures=score_run(data.qrels, run),
        documents_per_second=len(data.documents) / seconds,
        ms_per_query=1000 * _median_seconds(system, [data.queries[query] for query in sample]),
        index_bytes=system.index_bytes(),
        details=system.details(),
    )


def _median_seconds(system: System, queries: Sequence[str]) -> float:
    system.search(queries[:1], LATENCY_DEPTH)  # the first call pays for caches that later ones use
    return statistics.median(_seconds(partial(system.search, [query], LATENCY_DEPTH)) for query in queries)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@app.command(epilog="Example: python -m benchmarks.retrieval --data-dir ~/beir/nfcorpus --base mini")
def main(
    model: Models = None,
    base: Bases = None,
    compare: Compares = None,
    data_dir: Annotated[Path | None, typer.Option(help="A folder in BEIR's format.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="A BEIR set on the hub: nfcorpus, scifact, msmarco, ...")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Whose judgements; default test (msmarco: validation).")
    ] = None,
    pooling: Annotated[Pooling | None, typer.Option(help="Default: what the checkpoint records.")] = None,
    num_tokens: Annotated[
        int | None, typer.Option(min=1, help="Use the first j compressed tokens only.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="First N documents, and the queries that keep a relevant one.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Texts per batch; default: the encoder's.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where JSON and PNG go; default results/retrieval/NAME.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws the queries that are timed.")] = 0,
) -> None:
    """Measure retrieval: nDCG@10, Recall@100, MRR@10, speed and index size, for models and BM25."""
    try:
        data = load_data(data_dir, dataset, split)
        data = data if limit is None else limit_documents(data, limit)
        candidates = load_candidates(
            model, base, compare, pooling=pooling and pooling.value, num_tokens=num_tokens
        )
    except (BenchmarkDataError, FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None

    print(f"{data.name} ({data.split}): {len(data.documents):,} documents, {len(data.queries):,} queries")
    results = [evaluate(BM25(), data, seed)]
    for candidate in candidates:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()), "index")
            system = Dense(candidate, folder, batch_size)
            stack.callback(system.close)
            results.append(evaluate(system, data, seed))
    _report(data, results, out or Path("results", "retrieval", data.name), limit, seed)


def load_data(data_dir: Path | None, dataset: str | None, split: str | None) -> RetrievalSet:
    """The set that the options ask for; `BenchmarkDataError` if they contradict each other."""
    if data_dir and dataset:
        raise BenchmarkDataError("--data-dir and --dataset name two sets: give one of them")
    if data_dir:
        return load_folder(data_dir, split or "test")
    if dataset:
        return load_hub(dataset, split)
    if split not in (None, "test"):
        raise BenchmarkDataError(f"pydoc has the split test only, not {split!r}: leave --split out")
    return load_pydoc()


def _report(data: RetrievalSet, results: list[Result], out: Path, limit: int | None, seed: int) -> None:
    results = results[1:] + results[:1]  # the models first, BM25 beside them
    print_table(
        ["system", *MEASURES, "documents/s", "ms/query", "index"],
        [
            [
                result.system,
                *(f"{result.measures[name]:.4f}" for name in MEASURES),
                f"{result.documents_per_second:,.0f}",
                f"{result.ms_per_query:.2f}",
                human_bytes(result.index_bytes),
            ]
            for result in results
        ],
    )
    record = {
        "dataset": data.name,
        "split": data.split,
        "documents": len(data.documents),
        "queries": len(data.queries),
        "limit": limit,
        "seed": seed,
        "results": [asdict(result) for result in results],
        **environment(),
    }
    write_json(out / "results.json", record)
    bars = {result.system: [result.measures[name] for name in MEASURES] for result in results}
    bar_chart(out / "results.png", f"{data.name} ({data.split})", list(MEASURES), bars)
    print(f"written: {out / 'results.json'}, {out / 'results.png'}")


if __name__ == "__main__":
    app()
