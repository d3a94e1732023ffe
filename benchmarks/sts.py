"""Semantic textual similarity: `python -m benchmarks.sts FILE.tsv`.

Spearman's rank correlation x 100 between human scores and the cosines of sentence pairs, both sentences
embedded as documents. FILE.tsv has the columns score, sentence1 and sentence2, with a header line.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.beir import BenchmarkDataError
from benchmarks.models import Bases, Encoder, Models, load_encoders
from benchmarks.report import environment, print_table, write_json
from benchmarks.scoring import spearman

app = typer.Typer(add_completion=False)


def evaluate_pairs(encoder: Encoder, scores: np.ndarray, first: list[str], second: list[str]) -> float:
    """Spearman x 100 of the cosines of (first[i], second[i]) with scores[i]."""
    vectors = encoder.encode_documents(first + second, show_progress=True)
    cosines = (vectors[: len(first)] * vectors[len(first) :]).sum(axis=1)
    return 100 * spearman(scores, cosines)


def read_pairs(file: Path) -> tuple[np.ndarray, list[str], list[str]]:
    """Scores and both sentences of each pair; `BenchmarkDataError` names file and line of what is wrong."""
    if not file.is_file():
        raise BenchmarkDataError(f"{file} does not exist; a TSV of score, sentence1, sentence2 is needed")
    scores, first, second = [], [], []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip() or (number == 1 and line.startswith("score\t")):
            continue
        try:
            score, one, two = line.rstrip("\r").split("\t")
            scores.append(float(score))
        except ValueError as error:
            raise BenchmarkDataError(
                f"{file}, line {number}: expected score, sentence1 and sentence2 separated by tabs, "
                f"found {line!r}"
            ) from error
        first.append(one)
        second.append(two)
    if len(scores) < 2:
        raise BenchmarkDataError(f"{file} holds {len(scores)} pairs; a correlation needs at least 2")
    return np.array(scores), first, second


@app.command(epilog="Example: python -m benchmarks.sts stsb/test.tsv --base mini")
def main(
    file: Annotated[Path, typer.Argument(help="TSV of score, sentence1, sentence2.")],
    model: Models = None,
    base: Bases = None,
    out: Annotated[Path, typer.Option(help="Where results.json goes.")] = Path("results/sts"),
) -> None:
    """Measure semantic similarity on one file of sentence pairs."""
    try:
        scores, first, second = read_pairs(file)
        encoders = load_encoders(model, base)
    except (BenchmarkDataError, FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None

    results: list[dict[str, Any]] = [
        {
            "system": name,
            "spearman": evaluate_pairs(encoder, scores, first, second),
            "fingerprint": encoder.fingerprint,
        }
        for name, encoder in encoders.items()
    ]
    print(f"{file} ({len(scores):,} pairs)")
    print_table(["system", "Spearman x 100"], [[r["system"], f"{r['spearman']:.2f}"] for r in results])
    target = out / f"{file.resolve().parent.name}-{file.stem}" / "results.json"
    write_json(target, {"file": str(file), "pairs": len(scores), "results": results, **environment()})
    print(f"written: {target}")


if __name__ == "__main__":
    app()
