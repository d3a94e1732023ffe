"""What a training step costs beside a plain one: `python -m benchmarks.train`.

Both stages, ours and as `benchmarks.plain_training` writes them, on the same rows in the same batches, from the same
weights in the same precision and with the same optimizer. Each side of a pair is a process of its own, and they take
turns: a turn is one whole step, from texts to updated weights. The learning rate is so small that weights stay as they
were, so every step's loss and gradient can be compared: a pair that does not agree is an error, not a result.
"""

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from transformers import logging as transformers_logging

try:
    from autoregembed_rag import AutoRegEncoder, FrozenDecoder
    from autoregembed_rag.cli_index import human_bytes
    from autoregembed_rag.loading import resolve_device, resolve_dtype
    from autoregembed_rag.training.data import AlignmentRow, CompressionRow
    from autoregembed_rag.training.sources import read_jsonl
    from benchmarks.machine import attention, circumstances, encode_operations, matmul_peak, matrix_entries
    from benchmarks.measures import Measures, markdown, paired, spread
    from benchmarks.report import environment, print_table, write_json
    from benchmarks.shapes import SHAPES
    from benchmarks.training_steps import OURS, PLAIN, Job, Row, take_steps
    from benchmarks.turns import Worker
except ImportError as error:
    raise ImportError(f'{error}; the benchmarks need: pip install -e ".[train,bench]"') from error

STAGES = ("alignment", "compression")
WARM_UP = 1  # steps before the first that counts: they make the optimizer's state
# How far losses and gradient norms may differ, relatively. Half precision rounds in both, at other places: of a gap
# |log p(d+|q) - log p(d+|self)| close to 0 even the sign, and with it that row's gradient, may then be another.
TOLERANCES = {
    torch.bfloat16: {"loss": 0.01, "gradient norm": 0.1},
    torch.float32: {"loss": 1e-4, "gradient norm": 1e-3},
}
CORPUS = Path(__file__).parents[2] / "shared" / "data" / "corpus"
READING = f"""A step is everything from texts to updated weights. Times are medians, with the least and the most in
brackets; ratios are medians over the rounds of {PLAIN} / {OURS}, likewise. Memory is the highest that a process of its
own reaches while it steps, libraries, weights and optimizer included."""

app = typer.Typer(add_completion=False)


def read_rows(corpus: Path, stage: str, count: int, seed: int) -> tuple[str, list[Row]]:
    """Where rows come from, and `count` of them, drawn by `seed`: SNLI's for alignment; generated without a corpus."""
    rng = random.Random(seed)
    file = corpus / ("pairs.jsonl.zst" if stage == "alignment" else "compress.jsonl.zst")
    if not file.is_file():
        return f"generated, as {file.name} is missing", [generated_row(stage, rng) for _ in range(count)]
    rows: list[Row]
    if stage == "compression":
        rows = [CompressionRow.parse(row) for row in read_jsonl(file)]
        return file.name, rng.sample(rows, count)
    snli = (row for row in read_jsonl(file) if row["source"].startswith("SNLI") and row.get("neg"))
    rows = [
        AlignmentRow(row["query"], row["pos"], tuple(row["neg"][:1]))
        for row in snli
        if row["pos"] not in (row["query"], row["neg"][0])
    ]
    return f"{file.name}, SNLI", rng.sample(rows, count)


def generated_row(stage: str, rng: random.Random) -> Row:
    """Random words in about as many characters as the corpus has: medians of 67, 32 and 34 for SNLI."""

    def text(characters: int) -> str:
        words: list[str] = []
        for _ in range(max(1, round(characters * rng.lognormvariate(0, 0.45) / 6))):
            words.append("".join(rng.choice("etaoinshrdlu") for _ in range(5)))
        return " ".join(words)

    if stage == "alignment":
        return AlignmentRow(text(67), text(32), (text(34),))
    return CompressionRow(text(358), text(42), text(43))


def least_operations(
    encoder: AutoRegEncoder, decoder: FrozenDecoder, stage: str, rows: Sequence[Row]
) -> float:
    """Floating-point operations without which no step over `rows` can be made: nothing padded, encoded twice or
    computed again, of the encoder's last layer keys and values of all tokens and the rest at the compressed ones, and
    no gradient for the decoder's weights."""
    body = matrix_entries(encoder.model)
    head = decoder.model.get_output_embeddings().weight.numel()
    config = encoder.model.config
    k = encoder.num_compressed_tokens

    def decoded(targets: int) -> int:  # forward, and backward for states alone; the last token is not read
        read = k + targets - 1
        return 2 * (2 * body * read + 2 * head * targets) + 3 * attention(
            config, read, config.num_hidden_layers
        )

    prompts, targets = texts_of(encoder, decoder, stage, rows)
    # Forward, and backward for states and weights.
    encoded = 3 * encode_operations(encoder, [len(prompt) for prompt in prompts])
    return float(encoded + sum(map(decoded, map(len, targets))))


def texts_of(
    encoder: AutoRegEncoder, decoder: FrozenDecoder, stage: str, rows: Sequence[Row]
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of every prompt and of every target that a step needs."""
    build, config = encoder.prompts.build, encoder.config
    if stage == "compression":
        prompts = [build([row.context], row.instruction).ids[0] for row in rows]
        return prompts, decoder.target_ids([row.output for row in rows])
    queries = build([row.query for row in rows], config.query_instruction).ids
    selves = build([row.pos for row in rows], config.document_instruction).ids
    positives = decoder.target_ids([row.pos for row in rows])
    return queries + selves, positives * 2 + decoder.target_ids([row.neg[0] for row in rows])


def measure(job: Job, rounds: int, measures: Measures) -> dict[str, Any]:
    """Let both systems take turns over the batches of `job`, into `measures`; how far they agree."""
    steps: dict[str, list[dict[str, Any]]] = {OURS: [], PLAIN: []}
    with ExitStack() as stack:
        workers = [
            stack.enter_context(Worker(take_steps, replace(job, system=system), f"{system}, {job.stage}"))
            for system in steps
        ]
        loaded = {worker.job.system: worker.loaded()["memory"] for worker in workers}
        for number in range(WARM_UP + rounds):
            # Who goes first changes: a machine that slows down does so for both.
            for worker in workers[:: 1 if number % 2 else -1]:
                steps[worker.job.system].append(worker.step())
    for system, done in steps.items():
        for step in done[WARM_UP:]:
            measures.put("step", "s", system, step["seconds"])
            measures.put("processor time of a step", "s", system, step["processor seconds"])
        if done[-1]["peak"] is not None:
            measures.put("peak memory", "B", system, done[-1]["peak"])
            measures.put("memory of loaded models", "B", system, loaded[system])
    return agreement(job, steps)


def agreement(job: Job, steps: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Losses and gradient norms of both, step by step, and how far they differ at most; RuntimeError if too far."""
    found: dict[str, Any] = {}
    tolerances = TOLERANCES[torch.bfloat16 if job.bf16 else torch.float32]
    for name, tolerance in tolerances.items():
        values = {system: [step[name] for step in done] for system, done in steps.items()}
        own, other = (np.array(values[system]) for system in (OURS, PLAIN))
        apart = float(np.max(np.abs(own - other) / np.abs(other)))
        if not apart <= tolerance:  # NaN is not
            raise RuntimeError(
                f"{job.stage}: the two do not compute the same: {name} differs by up to {apart:.2g} of itself, "
                f"more than {tolerance:g}: {values}"
            )
        found[name] = {**values, "greatest relative difference": apart, "tolerance": tolerance}
    return found


def table(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: time and memory of each configuration, ours and plain."""
    rows = []
    for name, result in record["configurations"].items():
        step, peak = result["measures"]["step"], result["measures"].get("peak memory")
        row = [
            name,
            *(spread(step["rounds"][system], " s") for system in (OURS, PLAIN)),
            spread(paired(step, OURS, PLAIN), "x"),
        ]
        row += [f"{result['share of matmul peak'][OURS]:.0%}", f"{result['share of matmul peak'][PLAIN]:.0%}"]
        if peak:
            row += [
                *(human_bytes(peak["medians"][system]) for system in (OURS, PLAIN)),
                f"{peak['medians'][OURS] / peak['medians'][PLAIN]:.2f}",
            ]
        rows.append(row + ["-"] * (9 - len(row)))
    header = ["stage", f"step: {OURS}", PLAIN, "times faster", f"of matmul peak: {OURS}", PLAIN]
    return [*header, f"peak memory: {OURS}", PLAIN, f"of {PLAIN}"], rows


def machine_lines(record: dict[str, Any]) -> list[str]:
    """What the machine can do, and so how long the least possible step takes."""
    threads, precision = record["threads"], record["precision"]
    lines = [
        f"Matmul peak here: {record['matmul peak'] / 1e9:,.0f} GFLOP/s in {precision}, {threads} threads."
    ]
    for name, result in record["configurations"].items():
        own, other = (f"{result['share of matmul peak'][system]:.0%}" for system in (OURS, PLAIN))
        lines.append(
            f"{name}: a step needs {result['least operations'] / 1e9:,.3g} GFLOP at least, so {result['floor']:.2g} s "
            f"at that peak; {OURS} reaches {own} of it, {PLAIN} {other}."
        )
    return lines


def compare(job: Job, rounds: int, peak: float) -> dict[str, Any]:
    """Measure one configuration, and hold it against what the machine can do."""
    measures = Measures()
    agreed = measure(job, rounds, measures)
    found = measures.record(OURS)
    for name in ("step", "processor time of a step", "peak memory"):
        if name in found:
            found[name]["ratios"] = {PLAIN: statistics.median(paired(found[name], OURS, PLAIN))}
    encoder, decoder = job.load()
    counted = job.rows[WARM_UP * job.batch_size :]
    least = least_operations(encoder, decoder, job.stage, counted) / rounds
    prompts, targets = texts_of(encoder, decoder, job.stage, counted)
    share = {system: least / peak / seconds for system, seconds in found["step"]["medians"].items()}
    return {
        "stage": job.stage,
        "gradient checkpointing": job.checkpointing,
        "batch size": job.batch_size,
        "prompt tokens of a step": sum(map(len, prompts)) / rounds,
        "target tokens of a step": sum(map(len, targets)) / rounds,
        "least operations": least,
        "floor": least / peak,
        "share of matmul peak": share,
        "measures": found,
        "agreement": agreed,
    }


@app.command(epilog="Example: python -m benchmarks.train --stage alignment --out benchmarks/reports/train")
def main(
    shape: Annotated[str, typer.Option(help=f"The models' size: {', '.join(SHAPES)}.")] = "58m",
    stage: Annotated[str | None, typer.Option(help=f"Only {' or '.join(STAGES)}.")] = None,
    checkpointing: Annotated[
        bool | None, typer.Option(help="Only with, or without, gradient checkpointing.")
    ] = None,
    steps: Annotated[
        int, typer.Option(min=1, max=100, help="Rounds, in which each system makes a step.")
    ] = 5,
    quick: Annotated[
        bool, typer.Option("--quick", help="Two rounds, of batches a quarter as large.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    bf16: Annotated[
        bool | None, typer.Option(help="Compute in bfloat16; by default where there is any.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of a process; by default PyTorch's.")] = None,
    corpus: Annotated[Path, typer.Option(help="Folder of pairs.jsonl.zst and compress.jsonl.zst.")] = CORPUS,
    out: Annotated[Path, typer.Option(help="Where JSON, table and PNG go.")] = Path("results/train"),
    seed: Annotated[int, typer.Option(help="Draws the rows.")] = 0,
) -> None:
    """Measure a step of both training stages beside the plain passes: seconds and memory."""
    for name, value, known in (("shape", shape, tuple(SHAPES)), ("stage", stage, (None, *STAGES))):
        if value not in known:
            print(f"error: no {name} is called {value!r}: {', '.join(filter(None, known))}", file=sys.stderr)
            raise typer.Exit(2)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    size = SHAPES[shape]
    rounds, batch_size = (min(steps, 2), max(2, size.batch_size // 4)) if quick else (steps, size.batch_size)
    place = resolve_device(device)
    dtype = resolve_dtype("auto" if bf16 is None else "bfloat16" if bf16 else "float32", place)
    torch.set_num_threads(threads or torch.get_num_threads())
    start = time.perf_counter()
    peak = matmul_peak(place, dtype)
    with tempfile.TemporaryDirectory() as folder:
        base = size.write(Path(folder))
        sources, configurations = {}, {}
        for name in STAGES if stage is None else (stage,):
            sources[name], rows = read_rows(corpus, name, (WARM_UP + rounds) * batch_size, seed)
            for again in (False, True) if checkpointing is None else (checkpointing,):
                title = f"{name}, checkpointing" if again else name
                print(f"{title}: measuring ...", flush=True)
                half = dtype == torch.bfloat16
                job = Job(
                    OURS,
                    name,
                    again,
                    base,
                    tuple(rows),
                    batch_size,
                    str(place),
                    half,
                    torch.get_num_threads(),
                )
                configurations[title] = compare(job, rounds, peak)
    record = {
        "shape": {"name": shape, **asdict(size), "batch_size": batch_size, "tokenizer": "mini"},
        "rows": sources,
        "rounds": rounds,
        "seed": seed,
        **circumstances(place, dtype, peak, start),
        **environment(),
        "configurations": configurations,
    }
    print_table(*table(record))
    print(*machine_lines(record), sep="\n")
    write_report(out, record)
    print(f"written: {', '.join(str(out / name) for name in ('results.json', 'table.md', 'results.png'))}")


def write_report(out: Path, record: dict[str, Any]) -> None:
    """Write results.json, table.md and results.png."""
    write_json(out / "results.json", record)
    shape = record["shape"]
    versions = ", ".join(f"{name} {found}" for name, found in record["versions"].items())
    rows = "; ".join(f"{stage}: {source}" for stage, source in record["rows"].items())
    head = (
        f"{record['rounds']} rounds on {record['cpu']}, device {record['device']}, {record['threads']} threads, "
        f"{record['precision']}. A random Llama, hidden {shape['hidden']}, {shape['layers']} layers, vocabulary "
        f"{shape['vocabulary']:,}, the tokenizer of {shape['tokenizer']}; batch {shape['batch_size']}. Rows: {rows}. "
        f"{READING}\n\n"
    )
    foot = f"\n{chr(10).join(machine_lines(record))}\n\n`{record['command']}`; Python {record['python']}, {versions}\n"
    (out / "table.md").write_text(head + markdown(*table(record)) + foot, encoding="utf-8")
    chart(out / "results.png", record)


def chart(file: Path, record: dict[str, Any]) -> None:
    """A PNG: seconds and memory of a step, one pair of bars for each configuration."""
    found = record["configurations"]
    panels = {"step, seconds": ("step", 1.0), "peak memory, GB": ("peak memory", 1e9)}
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, (title, (measure, unit)) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        measured = {name: result["measures"].get(measure) for name, result in found.items()}
        shown = {name: values for name, values in measured.items() if values}
        for side, system in enumerate((OURS, PLAIN)):
            heights = [values["medians"][system] / unit for values in shown.values()]
            places = [place + 0.4 * side - 0.2 for place in range(len(shown))]
            axes.bar_label(axes.bar(places, heights, 0.38, label=system), fmt="%.3g", padding=2, fontsize=8)
        names = [f"{name}\n{values['ratios'][PLAIN]:.2f}x" for name, values in shown.items()]
        axes.set_xticks(range(len(shown)), names, fontsize=8)
        axes.set_title(title, fontsize=10, loc="left")
        axes.margins(y=0.12)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    app()
