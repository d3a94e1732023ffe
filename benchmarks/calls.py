"""What each way to encode costs: `python -m benchmarks.calls`.

The frameworks' batch calls beside the encoder's own, both instructions in one call beside two, weights in 8 bits, and,
if asked for, a compiled model: the same documents by each, in turns.
"""

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from transformers import logging as transformers_logging

try:
    from autoregembed_indexes import DocumentIndex
    from autoregembed_rag import AutoRegEncoder
    from benchmarks.measures import RATE, Measures, markdown, paired, spread
    from benchmarks.pydoc import load_pydoc
    from benchmarks.report import environment, print_table, write_json
    from langchain_autoregembed import AutoRegEmbeddings, AutoRegVectorStore
    from llama_index.embeddings.autoregembed import AutoRegEmbedding
except ImportError as error:
    raise ImportError(f'{error}; this needs: pip install -e ".[faiss,langchain,llamaindex,bench]"') from error

app = typer.Typer(add_completion=False)

ENCODE, ENCODE_ADD, TWO = "encode_documents", "encode_documents + DocumentIndex.add", "two calls, one each"
INT8, COMPILED = 'quantize="int8"', "model.compile"


class Way(NamedTuple):
    """A way to encode all documents, and the one it is compared with."""

    name: str
    work: Callable[[], object]
    beside: str = ENCODE


def ways(encoder: AutoRegEncoder, texts: list[str]) -> list[Way]:
    """Each with the same encoder."""
    ids = [str(i) for i in range(len(texts))]
    chain, llama = AutoRegEmbeddings(model=encoder), AutoRegEmbedding(model=encoder)

    def add() -> None:
        with (
            tempfile.TemporaryDirectory() as folder,
            DocumentIndex.create(Path(folder, "index"), dimension=encoder.dimension) as index,
        ):
            index.add(encoder.encode_documents(texts), texts, ids=ids)

    def store() -> None:
        with tempfile.TemporaryDirectory() as folder:
            AutoRegVectorStore.from_texts(texts, chain, ids=ids, path=Path(folder, "index")).close()

    def two() -> None:
        encoder.encode_queries(texts)
        encoder.encode_documents(texts)

    return [
        Way(ENCODE, lambda: encoder.encode_documents(texts)),
        Way("encode_stream", lambda: list(encoder.encode_stream(iter(texts)))),
        Way("LangChain, embed_documents", lambda: chain.embed_documents(texts)),
        Way("LlamaIndex, get_text_embedding_batch", lambda: llama.get_text_embedding_batch(texts)),
        Way(
            "LlamaIndex, aget_text_embedding_batch",
            lambda: asyncio.run(llama.aget_text_embedding_batch(texts)),
        ),
        Way(ENCODE_ADD, add),
        Way("AutoRegVectorStore.from_texts", store, ENCODE_ADD),
        Way(TWO, two),
        Way("encode_both", lambda: encoder.encode_both(texts), TWO),
    ]


@app.command()
def main(
    model: Annotated[str, typer.Option(help="A checkpoint: bundled name, folder or hub id.")] = "mini",
    documents: Annotated[int, typer.Option(min=1, help="Of pydoc.")] = 1500,
    rounds: Annotated[int, typer.Option(min=1, help="In each of which every way takes its turn.")] = 5,
    compiled: Annotated[
        bool, typer.Option("--compile", help="With torch.compile too, which takes a minute.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Where JSON and table go.")] = Path("results/calls"),
) -> None:
    """Measure documents/s of each way to encode."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    texts = [document.content for document in load_pydoc().documents][:documents]
    encoder = AutoRegEncoder.from_pretrained(model)
    found = ways(encoder, texts)
    cosine: dict[str, float] = {}
    others = {}
    if find_spec("torchao"):
        others[INT8] = AutoRegEncoder.from_pretrained(model, quantize="int8")
    else:
        print(f'{INT8}: left out, it needs: pip install "autoregembed-rag[int8]"', file=sys.stderr)
    if compiled:
        others[COMPILED] = AutoRegEncoder.from_pretrained(model)
        others[COMPILED].model.compile(dynamic=True)
    full = AutoRegEncoder.from_pretrained(model, dtype=torch.float32).encode_documents(texts)
    for name, other in {ENCODE: encoder, **others}.items():
        cosine[name] = float(np.median((other.encode_documents(texts) * full).sum(axis=1)))
        if other is not encoder:
            found.append(Way(name, lambda other=other: other.encode_documents(texts)))
    for way in found[1:]:
        way.work()  # each warms up
    measures = Measures()
    for number in range(rounds):
        print(f"round {number + 1} of {rounds} ...", flush=True)
        for way in found[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            way.work()
            measures.put(RATE, RATE, way.name, len(texts) / (time.perf_counter() - start))
    result = measures.record(ENCODE)[RATE]
    times = {way.name: paired(result, way.name, way.beside) for way in found if way.name != way.beside}
    header = ["call", RATE, "compared with", "times as fast", "cosine to float32"]
    rows = [
        [
            way.name,
            f"{result['medians'][way.name]:,.0f}",
            way.beside if way.name in times else "",
            spread(times[way.name], "x") if way.name in times else "",
            f"{cosine[way.name]:.5f}" if way.name in cosine else "",
        ]
        for way in found
    ]
    print_table(header, rows)
    write_json(
        out / "results.json",
        {
            "model": model,
            "precision": str(encoder.model.dtype).removeprefix("torch."),
            "documents": len(texts),
            "rounds": rounds,
            "measures": result,
            "times as fast": {name: statistics.median(values) for name, values in times.items()},
            "cosine": cosine,
            **environment(),
        },
    )
    (out / "table.md").write_text(markdown(header, rows), encoding="utf-8")
    print(f"written: {out / 'results.json'}, {out / 'table.md'}")


if __name__ == "__main__":
    app()
