"""How fast each way of training learns: `python -m benchmarks.learning_efficiency`.

The paper's table 2 and figure 3 at a size that a laptop can run. From one base LM, on the same triplets in the same
order: InfoNCE over the last token's state or the mean of all, with and without in-batch negatives, beside compression
alone and AutoRegEmbed (compression, then alignment) with its four variants. STS-B and SICK-R test are measured at
fixed numbers of samples during each run. Learning rates are chosen before that, on STS-B dev: three for every system,
one seed, fewer samples. What was broken off goes on with the runs that are not finished yet.
"""

import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

try:
    from autoregembed_rag.loading import decoder_folder
    from benchmarks.beir import BenchmarkDataError
    from benchmarks.learning_data import Sources
    from benchmarks.learning_report import findings, summarise, table, write_report
    from benchmarks.learning_runs import RATES, Runs, Settings
    from benchmarks.learning_systems import SYSTEMS
    from benchmarks.report import environment, print_table
except ImportError as error:
    raise ImportError(f'{error}; the benchmarks need: pip install -e ".[train,bench]"') from error

CORPUS = Path("../shared/data/corpus")
DEFAULT = Settings()

app = typer.Typer(add_completion=False)


@app.command(
    epilog="Example: python -m benchmarks.learning_efficiency --systems mean-in-batch,sigmoid --seeds 1"
)
def main(
    base: Annotated[
        str, typer.Option(help="Causal LM (folder, hub id); a checkpoint stands for its own.")
    ] = "mini",
    data: Annotated[Path, typer.Option(help="Triplets: JSONL of query, pos, neg.")] = CORPUS
    / "pairs.jsonl.zst",
    source: Annotated[str, typer.Option(help="Use rows whose `source`, if any, starts so.")] = "SNLI",
    compress_data: Annotated[
        Path, typer.Option(help="Stage 1: JSONL of context, instruction, output.")
    ] = CORPUS / "compress.jsonl.zst",
    sts: Annotated[
        Path, typer.Option(help="Folder of stsb and sickr, each with dev.tsv and test.tsv.")
    ] = Path("../shared/data/sts"),
    systems: Annotated[str, typer.Option(help=f"Some of {','.join(SYSTEMS)}.")] = ",".join(SYSTEMS),
    samples: Annotated[int, typer.Option(min=1, help="Distinct triplets of a run.")] = DEFAULT.samples,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over them.")] = DEFAULT.epochs,
    compress_samples: Annotated[int, typer.Option(min=1, help="Rows of stage 1.")] = DEFAULT.compress_samples,
    compress_epochs: Annotated[int, typer.Option(min=1, help="Passes over them.")] = DEFAULT.compress_epochs,
    sweep: Annotated[bool, typer.Option(help="Choose learning rates on dev; else the middle ones.")] = True,
    sweep_samples: Annotated[
        int, typer.Option(min=1, help="Rows with which each rate is tried, one epoch.")
    ] = DEFAULT.sweep_samples,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each system.")] = DEFAULT.seeds,
    batch_size: Annotated[int, typer.Option(min=2, help="Rows per step.")] = DEFAULT.batch_size,
    max_tokens: Annotated[int, typer.Option(min=16, help="Of a whole prompt.")] = DEFAULT.max_tokens,
    evaluations: Annotated[
        int, typer.Option(min=1, help="Per run, besides its start.")
    ] = DEFAULT.evaluations,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = DEFAULT.device,
    work: Annotated[Path, typer.Option(help="Finished runs; a second call goes on here.")] = Path(
        "build/learning_efficiency"
    ),
    out: Annotated[Path, typer.Option(help="Where JSON, table and PNG go.")] = Path(
        "results/learning_efficiency"
    ),
) -> None:
    """Measure learning efficiency: similarity against the number of triplets seen, for nine ways of training."""
    # Bars of a hundred short runs tell nothing.
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    start = time.perf_counter()
    try:
        settings = Settings(
            samples=samples,
            epochs=epochs,
            compress_samples=compress_samples,
            compress_epochs=compress_epochs,
            sweep_samples=sweep_samples,
            seeds=seeds,
            batch_size=batch_size,
            max_tokens=max_tokens,
            evaluations=evaluations,
            device=device,
        )
        chosen = choose(systems)
        folder = decoder_folder(base)
        sources = Sources(data, source, compress_data, sts)
        runs = Runs(settings, folder, sources, work)
    except (FileNotFoundError, ValueError) as error:
        _stop(error)
    try:
        seconds = runs.expected_seconds(chosen, sweep)
        print(f"systems: {len(chosen)}, seeds: {seeds}; about {seconds / 60:.0f} minutes to go", flush=True)
        rates, swept = learning_rates(runs, chosen, sweep)
        results = runs.main(chosen, rates)
    except BenchmarkDataError as error:
        _stop(error)

    record = {
        "settings": asdict(settings),
        "base": {
            "name": base,
            "parameters": AutoModelForCausalLM.from_pretrained(folder).num_parameters(),
            "fingerprint": runs.base_fingerprint,
        },
        "sources": {name: str(value) for name, value in asdict(sources).items()},
        "seconds": time.perf_counter() - start,
        **environment(),
        "sweep": swept,
        "summary": summarise(results),
        "runs": results,
    }
    added = {name: version(name) for name in ("accelerate", "sentence-transformers")}
    record["versions"] = {**environment()["versions"], **added}
    print_table(*table(record["summary"]))
    print("", *findings(record), sep="\n")
    write_report(out, record)
    print(f"written: {', '.join(str(out / name) for name in ('results.json', 'table.md', 'results.png'))}")


def _stop(error: Exception) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    raise typer.Exit(2) from None


def choose(systems: str) -> list[str]:
    """The named systems in the order of the table, compression among them where an alignment is.

    `BenchmarkDataError` for a name that is none.
    """
    named = {name.strip() for name in systems.split(",") if name.strip()}
    if unknown := sorted(named - SYSTEMS.keys()) or not named:
        raise BenchmarkDataError(f"--systems {systems!r}: {unknown} is none of {', '.join(SYSTEMS)}")
    if any(SYSTEMS[name].kind == "alignment" for name in named):
        named.add("compression")
    return [name for name in SYSTEMS if name in named]


def learning_rates(runs: Runs, systems: list[str], sweep: bool) -> tuple[dict[str, float], dict[str, Any]]:
    """The rate of each system, and what the sweep found, if there is one."""
    if not sweep:
        return {name: RATES[SYSTEMS[name].kind][1] for name in systems}, {}
    swept = runs.sweep(systems)
    return {name: found["chosen"] for name, found in swept.items()}, swept


if __name__ == "__main__":
    app()
