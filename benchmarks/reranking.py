"""Which way to rerank ranks best: `python -m benchmarks.reranking --data-dir DIR --split dev`.

The best documents of a search are scored once by the decoder, under the query, under themselves and under nothing; from
that every way of `GenerativeReranker` is computed, alone and with its ranking fused with the search's own.
"""

import random
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, NamedTuple, get_args

import numpy as np
import typer
from tqdm import tqdm
from transformers import logging as transformers_logging

try:
    from autoregembed_indexes.ranking import fuse
    from autoregembed_rag import AutoRegEncoder, FrozenDecoder
    from autoregembed_rag.reranking import Prior
    from benchmarks.beir import BenchmarkDataError, RetrievalSet, load_folder
    from benchmarks.report import environment, print_table, write_json
    from benchmarks.scoring import DEPTH, MEASURES, score_run
except ImportError as error:
    raise ImportError(f'{error}; the benchmarks need: pip install -e ".[faiss,bench]"') from error

WEIGHTS = (0.25, 0.5, 1.0, 2.0)
"""Of the reranker's ranking where it is fused with the search's, which has 1."""

app = typer.Typer(add_completion=False)


class Scored(NamedTuple):
    """Of `n` queries and the `depth` documents that a search found for each."""

    found: np.ndarray
    """Places of documents, [n, depth], best first."""
    given_query: np.ndarray
    """log p(d | e_q,next), [n, depth], in nats."""
    given: dict[str, np.ndarray]
    """For each prior its value for all documents, NaN where it is not needed."""
    tokens: np.ndarray
    """Of each document."""


def score(encoder: AutoRegEncoder, decoder: FrozenDecoder, data: RetrievalSet, depth: int) -> Scored:
    """Search, and let the decoder score what is found."""
    texts = [document.content for document in data.documents]
    questions = list(data.queries.values())
    similarity = encoder.encode_queries(questions) @ encoder.encode_documents(texts, show_progress=True).T
    found = np.argsort(-similarity, axis=1, kind="stable")[:, :depth]
    states = encoder.compress(questions, "next")
    needed = np.unique(found)
    some = [texts[i] for i in needed]
    given = {prior: np.full(len(texts), np.nan, dtype=np.float32) for prior in get_args(Prior)}
    given["none"][:] = 0
    given["unconditional"][needed] = decoder.log_prob(None, some, show_progress=True)
    given["document"][needed] = decoder.log_prob(encoder.compress(some, "self"), some, show_progress=True)
    rows = [
        decoder.log_prob(states[i : i + 1], [texts[place] for place in places])
        for i, places in enumerate(tqdm(found, desc="queries", unit="query"))
    ]
    tokens = np.array([len(ids) for ids in decoder.target_ids(texts)])
    return Scored(found, np.stack(rows), given, tokens)


def ways(scored: Scored) -> Iterator[tuple[str, str, list[list[int]]]]:
    """(scores, fused with the search at which weight, each query's documents best first)."""
    found = scored.found.tolist()
    yield "search alone", "", found
    for prior, per_token in product(get_args(Prior), (True, False)):
        scores = scored.given_query - scored.given[prior][scored.found]
        if per_token:
            scores = scores / scored.tokens[scored.found]
        order = np.argsort(-scores, axis=1, kind="stable")
        ranked = np.take_along_axis(scored.found, order, axis=1).tolist()
        name = f"prior {prior}, {'mean' if per_token else 'sum'} over tokens"
        yield name, "", ranked
        for weight in WEIGHTS:
            yield name, f"{weight:g}", [fused(*pair, weight) for pair in zip(found, ranked, strict=True)]


def fused(searched: Sequence[int], ranked: Sequence[int], weight: float) -> list[int]:
    """One ranking of two."""
    return [place for place, _ in fuse([searched, ranked], [1.0, weight])]


@app.command()
def main(
    data_dir: Annotated[Path, typer.Option(help="A folder in BEIR's format.")],
    split: Annotated[str, typer.Option(help="Whose judgements.")] = "dev",
    model: Annotated[str, typer.Option(help="A checkpoint with its decoder.")] = "mini",
    depth: Annotated[int, typer.Option(min=1, help="Documents of each query that are ranked anew.")] = 100,
    queries: Annotated[
        int | None, typer.Option(min=1, help="So many, drawn at random; default: all.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws the queries.")] = 0,
    out: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("results/reranking"),
) -> None:
    """Measure every way to rerank: nDCG@10, MRR@10, and from a depth of 100 on Recall@100."""
    transformers_logging.disable_progress_bar()
    try:
        data = load_folder(data_dir, split)
        encoder = AutoRegEncoder.from_pretrained(model)
        decoder = FrozenDecoder.for_encoder(encoder)
    except (BenchmarkDataError, FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    chosen = random.Random(seed).sample(sorted(data.queries), min(queries or 10**9, len(data.queries)))
    data = data._replace(
        queries={query: data.queries[query] for query in chosen},
        qrels={query: data.qrels[query] for query in chosen},
    )
    scored = score(encoder, decoder, data, depth)
    ids = [document.id for document in data.documents]
    # What lies deeper than the search went cannot be found.
    measures = [name for name in MEASURES if name != "Recall@100" or depth >= DEPTH]
    results = []
    for name, weight, rankings in ways(scored):
        run = {
            query: {ids[place]: -float(rank) for rank, place in enumerate(places)}
            for query, places in zip(data.queries, rankings, strict=True)
        }
        scores = score_run(data.qrels, run)
        results.append({"way": name, "weight": weight, "measures": {name: scores[name] for name in measures}})
    print_table(
        ["way", "weight beside the search", *measures],
        [
            [row["way"], row["weight"], *(f"{row['measures'][name]:.4f}" for name in measures)]
            for row in results
        ],
    )
    record = {
        "dataset": data.name,
        "split": split,
        "queries": len(data.queries),
        "depth": depth,
        "seed": seed,
        "model": model,
        "fingerprint": encoder.fingerprint,
        "results": results,
        **environment(),
    }
    write_json(out / "results.json", record)
    print(f"written: {out / 'results.json'}")


if __name__ == "__main__":
    app()
