"""Semantic textual similarity: `python -m benchmarks.sts FILE.tsv ...`.

Spearman's rank correlation x 100 between human scores and the cosines of sentence pairs, both sentences embedded as
documents. A file has the columns score, sentence1 and sentence2, with a header line or without; `--hub` reads the
paper's ten sets (section 4.1) as MTEB keeps them.
"""

import sys
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer

from benchmarks.beir import BenchmarkDataError, hub_rows
from benchmarks.models import HYBRID, Bases, Compares, Encoder, Models, load_candidates
from benchmarks.report import bar_chart, environment, print_table, write_json
from benchmarks.scoring import spearman

# Dataset and configuration on the hub; each has the columns sentence1, sentence2 and score.
HUB = {
    "biosses": ("mteb/biosses-sts", None),
    "sickr": ("mteb/sickr-sts", None),
    "sts12": ("mteb/sts12-sts", None),
    "sts13": ("mteb/sts13-sts", None),
    "sts14": ("mteb/sts14-sts", None),
    "sts15": ("mteb/sts15-sts", None),
    "sts16": ("mteb/sts16-sts", None),
    "sts17": ("mteb/sts17-crosslingual-sts", "en-en"),
    "sts22": ("mteb/sts22-crosslingual-sts", "en"),
    "stsb": ("mteb/stsbenchmark-sts", None),
}
ALL = "all"

app = typer.Typer(add_completion=False)


class Pairs(NamedTuple):
    """Sentence pairs and how similar people found them."""

    name: str
    scores: np.ndarray
    first: list[str]
    second: list[str]


def evaluate_pairs(encoder: Encoder, pairs: Pairs) -> float:
    """Spearman x 100 of the cosines of both sentences with the scores."""
    vectors = encoder.encode_documents(pairs.first + pairs.second, show_progress=True)
    cosines = (vectors[: len(pairs.first)] * vectors[len(pairs.first) :]).sum(axis=1)
    return 100 * spearman(pairs.scores, cosines)


def read_pairs(file: Path) -> Pairs:
    """The pairs of a file; `BenchmarkDataError` names file and line of what is wrong."""
    if not file.is_file():
        raise BenchmarkDataError(f"{file} does not exist; a TSV of score, sentence1, sentence2 is needed")
    rows: list[tuple[float, str, str]] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip() or (number == 1 and line.startswith("score\t")):
            continue
        try:
            score, one, two = line.rstrip("\r").split("\t")
            rows.append((float(score), one, two))
        except ValueError as error:
            raise BenchmarkDataError(
                f"{file}, line {number}: expected score, sentence1 and sentence2 separated by tabs, "
                f"found {line!r}"
            ) from error
    return _pairs(f"{file.resolve().parent.name} {file.stem}", rows)


def load_pairs(name: str) -> Pairs:
    """The test split of one of the sets of `HUB`; `BenchmarkDataError` if it cannot be had."""
    if name not in HUB:
        raise BenchmarkDataError(f"{name!r} is no set of the paper: choose from {', '.join(HUB)}, or {ALL}")
    path, configuration = HUB[name]
    rows = hub_rows(path, configuration, "test", "give its file, a TSV of score, sentence1 and sentence2")
    return _pairs(name, [(float(row["score"]), row["sentence1"], row["sentence2"]) for row in rows])


def _pairs(name: str, rows: list[tuple[float, str, str]]) -> Pairs:
    if len(rows) < 2:
        raise BenchmarkDataError(f"{name} holds {len(rows)} pairs; a correlation needs at least 2")
    scores, first, second = zip(*rows, strict=True)
    return Pairs(name, np.array(scores), list(first), list(second))


@app.command(epilog="Example: python -m benchmarks.sts stsb/test.tsv sickr/test.tsv --base mini")
def main(
    files: Annotated[
        list[Path] | None, typer.Argument(help="TSVs of score, sentence1, sentence2.", show_default=False)
    ] = None,
    hub: Annotated[
        list[str] | None,
        typer.Option(help=f"A set of the paper: {', '.join(HUB)}, or {ALL}.", show_default=False),
    ] = None,
    model: Models = None,
    base: Bases = None,
    compare: Compares = None,
    out: Annotated[Path, typer.Option(help="Where results.json and results.png go.")] = Path("results/sts"),
) -> None:
    """Measure semantic similarity on files of sentence pairs, and on the paper's sets."""
    try:
        names = list(HUB) if hub and ALL in hub else hub or []
        sets = [*map(read_pairs, files or []), *map(load_pairs, names)]
        if not sets:
            raise BenchmarkDataError(
                "nothing to measure: give a TSV of score, sentence1, sentence2, or --hub all"
            )
        candidates = load_candidates(model, base, compare)
    except (BenchmarkDataError, FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None

    results = [
        {
            "system": candidate.name,
            "spearman": {pairs.name: evaluate_pairs(candidate.encoder, pairs) for pairs in sets},
            "details": candidate.details,
        }
        for candidate in candidates
        if candidate.use != HYBRID  # there is nothing to search
    ]
    columns = {result["system"]: list(result["spearman"].values()) for result in results}
    mean = ["mean"] if len(sets) > 1 else []
    print("Spearman x 100")
    print_table(
        ["system", *(f"{pairs.name} ({len(pairs.first):,})" for pairs in sets), *mean],
        [
            [name, *(f"{value:.2f}" for value in values), *(f"{np.mean(values):.2f}" for _ in mean)]
            for name, values in columns.items()
        ],
    )
    record = {"sets": {pairs.name: len(pairs.first) for pairs in sets}, "results": results, **environment()}
    write_json(out / "results.json", record)
    shares = {name: [value / 100 for value in values] for name, values in columns.items()}
    bar_chart(out / "results.png", "Spearman", [pairs.name for pairs in sets], shares)
    print(f"written: {out / 'results.json'}, {out / 'results.png'}")


if __name__ == "__main__":
    app()
