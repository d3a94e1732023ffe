"""How long a question takes: `python -m benchmarks.latency --data-dir build/passages`.

From a question's text to the ten nearest documents, one question at a time, with the index in several kinds, each
searched by all tokens and by the first few, which find candidates that all tokens rank. Beside each its recall of what
exact search by all tokens finds, its nDCG@10 by the folder's judgements, and the bytes of vectors that it searches;
beside exact search the time that reading all vectors once takes at the memory bandwidth measured here.
"""

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

try:
    from autoregembed_indexes import DocumentIndex
    from autoregembed_indexes.snapshot import snapshot_path
    from autoregembed_rag import AutoRegEncoder
    from autoregembed_rag.cli_index import human_bytes
    from benchmarks.beir import BenchmarkDataError, load_folder
    from benchmarks.report import environment, print_table, write_json
    from benchmarks.scoring import score_run
except ImportError as error:
    raise ImportError(f'{error}; the benchmarks need: pip install -e ".[faiss,bench]"') from error

EXACT = "SQfp16"
DEPTH = 10
NDCG = "nDCG@10"

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


HEADER = ["index", "search, ms", "from text, ms", "95th percentile", f"recall@{DEPTH}", NDCG, "vectors"]


def table(record: dict[str, Any]) -> list[list[str]]:
    """The rows of a report, under `HEADER`."""
    return [
        [
            kind,
            f"{row['search']['p50']:.1f}",
            f"{row['from text']['p50']:.1f}",
            f"{row['from text']['p95']:.1f}",
            f"{row['recall']:.3f}",
            f"{row[NDCG]:.4f}",
            human_bytes(row["bytes"]),
        ]
        for kind, row in record["kinds"].items()
    ]


@app.command()
def main(
    data_dir: Annotated[Path, typer.Option(help="A folder in BEIR's format.")],
    model: Annotated[str, typer.Option(help="A checkpoint.")] = "mini",
    kinds: Annotated[list[str] | None, typer.Option(help="Kinds of index beside the exact one.")] = None,
    num_tokens: Annotated[
        list[int] | None,
        typer.Option(help="Also find by the first so many tokens, and rank by all; may be given again."),
    ] = None,
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
    fewer = num_tokens or []
    if wrong := [j for j in fewer if not 1 <= j < encoder.num_tokens or encoder.config.pooling == "mean"]:
        print(
            f"error: --num-tokens {wrong[0]}: {model} has {encoder.num_tokens}, give fewer", file=sys.stderr
        )
        raise typer.Exit(2)
    names = random.Random(seed).sample(sorted(data.queries), min(questions, len(data.queries)))
    asked = [data.queries[name] for name in names]
    documents = list(data.documents)
    texts = [document.content for document in documents]
    ids = [document.id for document in documents]
    vectors = encoder.encode_documents(texts, show_progress=True)
    embedding = milliseconds(lambda text: encoder.encode_queries([text]), asked)
    queries = [encoder.encode_queries([text]) for text in asked]
    qrels = {name: data.qrels[name] for name in names}

    rows: dict[str, dict[str, Any]] = {}
    truth: list[set[str]] = []
    for kind in (EXACT, *(kinds or ["IVF,SQ8", "IVF,RaBitQ2"])):
        print(f"{kind}: adding {len(texts):,} documents ...", flush=True)
        tokens = encoder.num_tokens if fewer else None
        with (
            tempfile.TemporaryDirectory() as folder,
            DocumentIndex.create(folder, dimension=encoder.dimension, factory=kind, tokens=tokens) as index,
        ):
            index.add(vectors, texts, ids=ids)
            for j in (None, *fewer):
                index.snapshot(num_tokens=j)
                search = partial(index.search, k=DEPTH, num_tokens=j)
                found = [search(query)[0] for query in queries]
                hits = [{hit.id for hit in line} for line in found]
                truth = truth or hits
                run = {
                    name: {hit.id: hit.score for hit in line} for name, line in zip(names, found, strict=True)
                }
                width = (j or encoder.num_tokens) * encoder.dimension // encoder.num_tokens
                rows[kind if j is None else f"{kind}, {j} of {tokens} tokens, refined"] = {
                    "search": milliseconds(search, queries),
                    "from text": milliseconds(
                        lambda text, search=search: search(encoder.encode_queries([text])), asked
                    ),
                    "recall": statistics.mean(len(a & b) / len(b) for a, b in zip(hits, truth, strict=True)),
                    NDCG: score_run(qrels, run)[NDCG],
                    "bytes": snapshot_path(Path(folder), width).stat().st_size,
                }
    bandwidth = memory_bandwidth()
    floor = 1000 * 2 * vectors.size / bandwidth
    record = {
        "model": model,
        "dimension": encoder.dimension,
        "dataset": data.name,
        "documents": len(documents),
        "questions": len(asked),
        "embed_query, ms": embedding,
        "kinds": rows,
        "bandwidth": bandwidth,
        "floor of exact search, ms": floor,
        **environment(),
    }
    print(f"embed_query: {embedding['p50']:.1f} ms (95th percentile {embedding['p95']:.1f} ms)")
    print_table(HEADER, table(record))
    print(
        f"Exact search reads {human_bytes(2 * vectors.size)}: {floor:.1f} ms at {bandwidth / 1e9:.1f} GB/s; "
        f"it takes {rows[EXACT]['search']['p50'] / floor:.2f} times as long."
    )
    write_json(out / "results.json", record)
    print(f"written: {out / 'results.json'}")


if __name__ == "__main__":
    app()
