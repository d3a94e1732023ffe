"""How well and how fast a model retrieves, beside BM25: `python -m benchmarks.retrieval`.

Without arguments: the offline set `pydoc` and the bundled model. Every system gets the same strings (title,
line break, text). documents/s is encoding and indexing together; ms/query is the median of single queries,
encoded and searched one at a time for the best 10; the index is what lies on disk, with the texts for a
model, without them for BM25.

Documents are read in passes, never held, and indexed on disk below the folder of the report: a run that is killed goes
on where it stopped when it is started again. The indexes are deleted once the report is written.
"""

import random
import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from enum import Enum
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

try:
    from autoregembed_indexes import DocumentIndexError
    from autoregembed_indexes.kinds import DEFAULT_MEMORY_BUDGET, plan
    from autoregembed_rag import AutoRegEncoder, FrozenDecoder, GenerativeReranker
    from autoregembed_rag.cli_index import human_bytes
    from autoregembed_rag.finetuning.planning import duration
    from benchmarks.beir import BenchmarkDataError, RetrievalSet, limit_documents, load_folder, load_hub
    from benchmarks.models import HYBRID, Bases, Candidate, Compares, Models, load_candidates
    from benchmarks.pydoc import load_pydoc
    from benchmarks.report import bar_chart, environment, print_table, write_json
    from benchmarks.scoring import DEPTH, MEASURES, score_run
    from benchmarks.systems import BM25, Dense, OnMilvus, Reranked, System
except ImportError as error:
    raise ImportError(f'{error}; the benchmarks need: pip install -e ".[faiss,bench]"') from error

LATENCY_QUERIES = 50
LATENCY_DEPTH = 10
LARGE = 20_000  # documents, beyond which a run says beforehand what it will take
SAMPLE = 256  # documents, which tell
BM25_DOCUMENTS = 1_000_000  # that bm25s is given, which holds them all
ADDING = 0.2  # of the time of encoding: what adding to the index takes beside it
INDEXES = "indexes"

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
    documents_per_second: float | None
    ms_per_query: float
    index_bytes: int | None
    details: dict[str, Any]


def evaluate(system: System, data: RetrievalSet, seed: int = 0) -> Result:
    """Index the documents, run all queries, then time a seeded sample of them one at a time."""
    seconds = _seconds(lambda: system.index(data.documents))
    indexed = len(data.documents) - system.resumed_at
    rankings = system.search(list(data.queries.values()), DEPTH)
    run = {query: dict(ranking) for query, ranking in zip(data.queries, rankings, strict=True)}
    sample = random.Random(seed).sample(sorted(data.queries), min(LATENCY_QUERIES, len(data.queries)))
    return Result(
        system=system.name,
        measures=score_run(data.qrels, run),
        documents_per_second=indexed / seconds if indexed else None,
        ms_per_query=1000 * _median_seconds(system, [data.queries[query] for query in sample]),
        index_bytes=system.index_bytes(),
        details={**system.details(), **({"resumed_at": system.resumed_at} if system.resumed_at else {})},
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
    rerank: Annotated[
        int | None,
        typer.Option(min=1, help="Rank the best N anew by each model's decoder, too.", show_default=False),
    ] = None,
    milvus: Annotated[
        str | None,
        typer.Option(
            metavar="URI",
            help="Search on the Milvus server there, too: http://host:19530, its token in MILVUS_TOKEN.",
            show_default=False,
        ),
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
        rerankers = load_rerankers(candidates) if rerank else {}
    except (BenchmarkDataError, FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None

    print(f"{data.name} ({data.split}): {len(data.documents):,} documents, {len(data.queries):,} queries")
    out = out or Path("results", "retrieval", data.name)
    results = []
    try:
        for candidate in candidates:
            encoder = candidate.encoder
            which = f"{candidate.name} {encoder.fingerprint} {encoder.dimension}"
            name = re.sub(r"\W+", "-", which).strip("-")
            with closing(Dense(candidate, out / INDEXES / name, batch_size)) as system:
                if len(data.documents) > LARGE:
                    print(forecast(system, data), flush=True)
                results.append(evaluate(system, data, seed))
                if milvus is not None and candidate.use != HYBRID:
                    with closing(OnMilvus(system, milvus)) as elsewhere:
                        results.append(evaluate(elsewhere, data, seed))
                if rerank is not None and candidate.name in rerankers:
                    results.append(evaluate(Reranked(system, rerank, rerankers[candidate.name]), data, seed))
    except (BenchmarkDataError, DocumentIndexError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    if len(data.documents) <= BM25_DOCUMENTS:
        results.append(evaluate(BM25(), data, seed))
    else:
        print(f"BM25 is left out: bm25s would hold all {len(data.documents):,} documents in memory")
    _report(data, results, out, limit, seed)
    shutil.rmtree(out / INDEXES)


def load_rerankers(candidates: Sequence[Candidate]) -> dict[str, GenerativeReranker]:
    """The reranker of each checkpoint, by the candidate's name, with one copy of each decoder.

    FileNotFoundError, ValueError: a checkpoint's decoder cannot be loaded.
    """
    rerankers: dict[str, GenerativeReranker] = {}
    decoders: dict[str, FrozenDecoder] = {}
    for candidate in candidates:
        if isinstance(encoder := candidate.encoder, AutoRegEncoder):
            if candidate.model not in decoders:
                decoders[candidate.model] = FrozenDecoder.for_encoder(encoder)
            rerankers[candidate.name] = GenerativeReranker(encoder, decoders[candidate.model])
    return rerankers


def forecast(system: Dense, data: RetrievalSet) -> str:
    """How long the documents that are left will take, and how much disk and memory all of them; BenchmarkDataError
    where the disk has too little left."""
    sample = [document.content for document in islice(data.documents, SAMPLE)]
    count, left = len(data.documents), len(data.documents) - system.resumed_at
    pace = len(sample) / _seconds(lambda: system.encoder.encode_documents(sample))
    dimension = system.encoder.dimension
    kind = plan("auto", count, dimension, DEFAULT_MEMORY_BUDGET)
    vectors = count * kind.bytes_per_vector(dimension)
    text = sum(len(text.encode()) for text in sample) / len(sample)
    # The vector in half precision, the text, about as much again for the index of its words, and bookkeeping.
    disk = vectors + count * (2 * dimension + 2 * text + 200)
    free = shutil.disk_usage(system.folder).free
    if left / count * disk > free:
        raise BenchmarkDataError(
            f"{human_bytes(disk)} of disk are needed for {count:,} documents, and {system.folder} has "
            f"{human_bytes(free)} left: give an --out with more, or a --limit, --num-tokens or --pooling mean"
        )
    seconds = left / pace * (1 + ADDING)
    return (
        f"{system.name}: {left:,} documents to encode, about {duration(seconds)} at {pace:,.0f} documents/s; "
        f"{human_bytes(disk)} of disk, {human_bytes(vectors)} of memory for vectors. "
        "A run that is killed goes on where it stopped"
    )


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
    print_table(
        ["system", *MEASURES, "documents/s", "ms/query", "index"],
        [
            [
                result.system,
                *(f"{result.measures[name]:.4f}" for name in MEASURES),
                "-" if result.documents_per_second is None else f"{result.documents_per_second:,.0f}",
                f"{result.ms_per_query:.2f}",
                "-" if result.index_bytes is None else human_bytes(result.index_bytes),
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
