"""How fast texts become vectors, beside sentence-transformers and a plain loop: `python -m benchmarks.encode`.

Short texts (sentences of STS-B), mixed (pydoc) and long ones (NFCorpus), the same tokens for all systems, from the same
weights in the same precision. Each system is a process of its own, and they take turns. What they compute is compared:
systems that do not agree are an error, not a result.
"""

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from transformers import logging as transformers_logging

try:
    from autoregembed_rag import AutoRegEncoder
    from autoregembed_rag.cli_index import human_bytes
    from autoregembed_rag.loading import resolve_device, resolve_dtype, resolve_folder
    from benchmarks.beir import BenchmarkDataError, load_folder
    from benchmarks.encode_systems import LIBRARY, LOOP, OURS, Job, fitting, take_turns
    from benchmarks.machine import circumstances, encode_operations, matmul_peak
    from benchmarks.measures import RATE, Measures, markdown, paired, ratio_chart, spread
    from benchmarks.pydoc import load_pydoc
    from benchmarks.report import environment, print_table, write_json
    from benchmarks.shapes import SHAPES
    from benchmarks.sts import read_pairs
    from benchmarks.turns import Worker
except ImportError as error:
    raise ImportError(f'{error}; the benchmarks need: pip install -e ".[faiss,bench]"') from error

SYSTEMS = (OURS, LIBRARY, LOOP)
SHARED = Path(__file__).parents[2] / "shared" / "data"
# Cosines of vectors that should be equal, in the middle of the texts: some are tokenised a little otherwise where text
# and instruction meet, and half precision rounds at other places.
AGREEMENT = {"float32": 0.9999, "bfloat16": 0.995, "float16": 0.995}
PEAK_SECONDS = 0.5
READING = f"""documents/s are medians over the rounds; ratios are medians of {OURS} / the other, round by round, with
the least and the most in brackets. The share of the matmul peak counts the operations that the texts need at least: no
padding, and of the last layer what is read; it is the median of shares of the peak measured in the same round. Memory
is the highest that a process of its own reaches while it encodes, less what it had once the model was loaded and
warm."""

app = typer.Typer(add_completion=False)


def short_texts() -> list[str]:
    """Sentences."""
    pairs = read_pairs(SHARED / "sts" / "stsb" / "dev.tsv")
    return [*pairs.first, *pairs.second]


def mixed_texts() -> list[str]:
    """Docstrings."""
    return [document.content for document in load_pydoc().documents]


def long_texts() -> list[str]:
    """Titles and abstracts."""
    return [document.content for document in load_folder(SHARED / "beir" / "nfcorpus").documents]


TEXTS: dict[str, Callable[[], list[str]]] = {"short": short_texts, "mixed": mixed_texts, "long": long_texts}


def draw(encoder: AutoRegEncoder, texts: list[str], tokens: int, seed: int) -> list[str]:
    """Distinct texts in random order, until they make up so many tokens."""
    order = list(dict.fromkeys(texts))
    random.Random(seed).shuffle(order)
    chosen = []
    for text, count in zip(fitting(encoder, order), encoder.count_tokens(order), strict=True):
        chosen.append(text)
        tokens -= min(count, encoder.max_text_tokens)
        if tokens <= 0:
            break
    return chosen


def measure(job: Job, encoder: AutoRegEncoder) -> dict[str, Any]:
    """Let the systems take turns over the texts of `job`; each round measures the matmul peak, too, as others' work on
    the machine slows both."""
    measures, vectors = Measures(), {}
    peaks = []
    with ExitStack() as stack:
        workers = [
            stack.enter_context(Worker(take_turns, replace(job, system=system), system)) for system in SYSTEMS
        ]
        loaded = {worker.job.system: worker.loaded()["memory"] for worker in workers}
        last: dict[str, Any] = {}
        for number in range(job.rounds):
            peaks.append(matmul_peak(torch.device(job.device), getattr(torch, job.dtype), PEAK_SECONDS))
            for worker in workers[:: 1 if number % 2 else -1]:
                system = worker.job.system
                last[system] = turn = worker.step()
                measures.put(RATE, RATE, system, len(job.texts) / turn["seconds"])
                vectors[system] = turn["vectors"]
    for system in SYSTEMS:
        if last[system]["peak"] is not None:
            measures.put("memory beyond the model", "B", system, last[system]["peak"] - loaded[system])
    lengths = [len(ids) for ids in encoder.prompts.build(job.texts, encoder.config.document_instruction).ids]
    least = encode_operations(encoder, lengths)
    found = measures.record(OURS)
    rates, each = found[RATE]["medians"], found[RATE]["rounds"]
    shares = {
        system: [rate * least / len(lengths) / peak for rate, peak in zip(each[system], peaks, strict=True)]
        for system in SYSTEMS
    }
    return {
        "texts": len(job.texts),
        "tokens": sum(lengths),
        "longest": max(lengths),
        "measures": found,
        "times as fast": {other: paired(found[RATE], OURS, other) for other in SYSTEMS[1:]},
        "tokens/s": {system: rates[system] * sum(lengths) / len(lengths) for system in SYSTEMS},
        "matmul peaks": peaks,
        "share of matmul peak": {system: statistics.median(found) for system, found in shares.items()},
        "cosine": agreement(vectors, job.dtype),
    }


def agreement(vectors: dict[str, np.ndarray], dtype: str) -> dict[str, float]:
    """The median cosine of each system's vectors with ours; RuntimeError where they are not the same."""
    found = {}
    for other in SYSTEMS[1:]:
        found[other] = float(np.median((vectors[OURS] * vectors[other]).sum(axis=1)))
        if not found[other] >= AGREEMENT[dtype]:
            raise RuntimeError(
                f"{other} does not compute the vectors of {OURS}: the median cosine is {found[other]:.4f}, "
                f"less than {AGREEMENT[dtype]}"
            )
    return found


def table(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one for each kind of texts."""
    rows = []
    for name, result in record["texts"].items():
        rate = result["measures"][RATE]["medians"]
        memory = result["measures"].get("memory beyond the model", {}).get("medians", {})
        rows.append(
            [
                f"{name} ({result['texts']:,} texts of {result['tokens'] / result['texts']:.0f} tokens)",
                *(f"{rate[system]:,.1f}" for system in SYSTEMS),
                *(spread(result["times as fast"][other], "x") for other in SYSTEMS[1:]),
                f"{result['tokens/s'][OURS]:,.0f}",
                *(f"{result['share of matmul peak'][system]:.0%}" for system in SYSTEMS),
                *(human_bytes(memory[system]) if memory else "-" for system in SYSTEMS),
            ]
        )
    each = [OURS, LIBRARY, LOOP]
    return [
        "texts",
        *(f"{system}, {RATE}" for system in each),
        *(f"vs {other}" for other in each[1:]),
        "tokens/s",
        *(f"{system}, of matmul peak" for system in each),
        *(f"{system}, memory" for system in each),
    ], rows


@app.command(epilog="Example: python -m benchmarks.encode --shape 58m --out benchmarks/reports/encode")
def main(
    model: Annotated[str, typer.Option(help="A checkpoint: bundled name, folder or hub id.")] = "mini",
    shape: Annotated[
        str | None, typer.Option(help=f"Random weights instead: {', '.join(SHAPES)}.", show_default=False)
    ] = None,
    texts: Annotated[list[str] | None, typer.Option(help=f"Only {', '.join(TEXTS)}.")] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of texts in a turn; default: what takes ours some ten seconds.", show_default=False
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="In each of which every system encodes all texts.")] = 5,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, or auto.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Of a process; by default PyTorch's.")] = None,
    out: Annotated[Path, typer.Option(help="Where JSON, table and PNG go.")] = Path("results/encode"),
    seed: Annotated[int, typer.Option(help="Draws the texts.")] = 0,
) -> None:
    """Measure encoding: documents/s, tokens/s, share of the matmul peak, memory."""
    for name, values, known in (("shape", [shape] if shape else [], SHAPES), ("texts", texts or [], TEXTS)):
        if unknown := [value for value in values if value not in known]:
            print(f"error: no {name} is called {unknown[0]!r}: {', '.join(known)}", file=sys.stderr)
            raise typer.Exit(2)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(threads or torch.get_num_threads())
    place = resolve_device(device)
    kind = resolve_dtype(dtype, place)
    start = time.perf_counter()
    peak = matmul_peak(place, kind)
    with tempfile.TemporaryDirectory() as folder:
        source = SHAPES[shape].write_checkpoint(Path(folder), kind) if shape else resolve_folder(model)
        encoder = AutoRegEncoder.from_pretrained(source, device="cpu", dtype=kind)
        results: dict[str, Any] = {}
        for name in texts or TEXTS:
            try:
                found = TEXTS[name]()
            except BenchmarkDataError as error:
                print(f"{name}: left out, {error}", flush=True)
                continue
            amount = tokens or _tokens_for(10, encoder, peak)
            chosen = draw(encoder, found, amount, seed)
            print(f"{name}: {len(chosen):,} texts, {rounds} rounds ...", flush=True)
            job = Job(
                OURS,
                source,
                tuple(chosen),
                rounds,
                str(place),
                str(kind).removeprefix("torch."),
                torch.get_num_threads(),
            )
            results[name] = measure(job, encoder)
    if not results:
        print("error: there are no texts to encode", file=sys.stderr)
        raise typer.Exit(2)
    record = {
        "model": f"random {shape}" if shape else model,
        "parameters": encoder.model.num_parameters(),
        "rounds": rounds,
        "seed": seed,
        **circumstances(place, kind, peak, start),
        **environment(),
        "texts": results,
    }
    print_table(*table(record))
    write_report(out, record)
    print(f"written: {', '.join(str(out / name) for name in ('results.json', 'table.md', 'results.png'))}")


def _tokens_for(seconds: float, encoder: AutoRegEncoder, peak: float) -> int:
    """Tokens that take about so long at half of the peak; not many more than any of the sets has."""
    return min(300_000, int(seconds * peak / 2 / (encode_operations(encoder, [200]) / 200)))


def write_report(out: Path, record: dict[str, Any]) -> None:
    """Write results.json, table.md and results.png."""
    write_json(out / "results.json", record)
    versions = ", ".join(f"{name} {found}" for name, found in record["versions"].items())
    head = (
        f"{record['model']}, {record['parameters'] / 1e6:,.1f}M parameters, {record['precision']}; {record['rounds']} "
        f"rounds on {record['cpu']}, device {record['device']}, {record['threads']} threads. {READING}\n\n"
    )
    foot = (
        f"\nMatmul peak here: {record['matmul peak'] / 1e9:,.0f} GFLOP/s in {record['precision']}, the fastest of "
        "many square products in two seconds at the start.\n\n"
        f"`{record['command']}`; Python {record['python']}, {versions}\n"
    )
    (out / "table.md").write_text(head + markdown(*table(record)) + foot, encoding="utf-8")
    panels = {
        name: {
            RATE: {
                **result["measures"][RATE],
                "ratios": {
                    other: statistics.median(times) for other, times in result["times as fast"].items()
                },
            }
        }
        for name, result in record["texts"].items()
    }
    ratio_chart(out / "results.png", f"times as fast, {record['model']}", panels, list(SYSTEMS[1:]))


if __name__ == "__main__":
    app()
