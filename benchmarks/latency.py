"""How long a question takes: `python -m benchmarks.latency --data-dir build/passages`.

From a question's text to the ten nearest documents, one question at a time, with the index in several kinds; beside
each kind its recall of what exact search finds, and beside exact search the time that reading all vectors once takes at
the memory bandwidth measured here.
"""

import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

try:
    from autoregembed_indexes import DocumentIndex
    from autoregembed_rag import AutoRegEncoder
    from autoregembed_rag.cli_index import human_bytes
    from benchmarks.beir import BenchmarkDataError, load_folder
    from benchmarks.report import environment, print_table, write_json
except ImportError as error:
    raise ImportError(f'{error}; the benchmarks need: pip install -e ".[faiss,bench]"') from error

EXACT = "SQfp16"
DEPTH = 10

app = typer.Typer(add_completion=False)


def memory_bandwidth(seconds: float = 2.0) -> float:
    """Bytes a second at which the sum of an array too large for any cache is taken, the fastest of many."""
    array = torch.ones(2**28 // 4)
    fastest = float("inf")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        array.sum()
        fastest = min(fastest, time.perf_counter() - start)
    return array.nbytes / fastest


def milliseconds(work: Callable[[Any], object], arguments: Sequence[Any]) -> dict[str, float]:
    """Median and 95th percentile of a call, after one that warms up."""
    work(arguments[0])
    found = []
    for argument in arguments:
        start = time.perf_counter()
        work(argument)
        found.append(1000 * (time.perf_counter() - start))
    return {"p50": statistics.median(found), "p95": float(np.percentile(found, 95))}


@app.command()
def main(
    data_dir: Annotated[Path, typer.Option(help="A folder in BEIR's format.")],
    model: Annotated[str, typer.Option(help="A checkpoint.")] = "mini",
    kinds: Annotated[list[str] | None, typer.Option(help="Kinds of index beside the exact one.")] = None,
    questions: Annotated[int, typer.Option(min=1, help="Questions that are timed.")] = 200,
    out: Annotated[Path, typer.Option(help="Where JSON and table go.")] = Path("results/latency"),
    seed: Annotated[int, typer.Option(help="Draws the questions.")] = 0,
) -> None:
    """Measure the time from a question to its documents."""
    try:
        data = load_folder(data_dir)
    except BenchmarkDataError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    encoder = AutoRegEncoder.from_pretrained(model)
    asked = random.Random(seed).sample(sorted(data.queries.values()), min(questions, len(data.queries)))
    documents = list(data.documents)
    texts = [document.content for document in documents]
    ids = [document.id for document in documents]
    vectors = encoder.encode_documents(texts, show_progress=True)
    embedding = milliseconds(lambda text: encoder.encode_queries([text]), asked)
    queries = [encoder.encode_queries([text]) for text in asked]

    rows: dict[str, dict[str, Any]] = {}
    truth: list[set[str]] = []
    for kind in (EXACT, *(kinds or ["IVF,SQ8", "IVF,RaBitQ2"])):
        print(f"{kind}: adding {len(texts):,} documents ...", flush=True)
        with DocumentIndex.create(dimension=encoder.dimension, factory=kind) as index:
            index.add(vectors, texts, ids=ids)
            hits = [{hit.id for hit in index.search(query, DEPTH)[0]} for query in queries]
            truth = truth or hits
            rows[kind] = {
                "search": milliseconds(lambda query, index=index: index.search(query, DEPTH), queries),
                "from text": milliseconds(
                    lambda text, index=index: index.search(encoder.encode_queries([text]), DEPTH), asked
                ),
                "recall": statistics.mean(len(a & b) / len(b) for a, b in zip(hits, truth, strict=True)),
            }
    bandwidth = memory_bandwidth()
    floor = 1000 * 2 * vectors.size / bandwidth
    record = {
        "model": model,
        "dimension": encoder.dimension,
        "documents": len(documents),
        "questions": len(asked),
        "embed_query, ms": embedding,
        "kinds": rows,
        "bandwidth": bandwidth,
        "floor of exact search, ms": floor,
        **environment(),
    }
    header = ["index", "search, ms", "from text, ms", "95th percentile", f"recall@{DEPTH}"]
    cells = [
        [
            kind,
            f"{row['search']['p50']:.1f}",
            f"{row['from text']['p50']:.1f}",
            f"{row['from text']['p95']:.1f}",
            f"{row['recall']:.3f}",
        ]
        for kind, row in rows.items()
    ]
    print(f"embed_query: {embedding['p50']:.1f} ms (95th percentile {embedding['p95']:.1f} ms)")
    print_table(header, cells)
    print(
        f"Exact search reads {human_bytes(2 * vectors.size)}: {floor:.1f} ms at {bandwidth / 1e9:.1f} GB/s; "
        f"it takes {rows[EXACT]['search']['p50'] / floor:.2f} times as long."
    )
    write_json(out / "results.json", record)
    print(f"written: {out / 'results.json'}")


if __name__ == "__main__":
    app()
