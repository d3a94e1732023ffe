"""What the reports of `benchmarks.retrieval`, `benchmarks.sts` and `benchmarks.latency` say, on one page:
`python -m benchmarks.results`.

Writes RESULTS.md, two pictures and, with `--card`, the same table into a checkpoint's model card. A figure of another
checkpoint than the card's is refused.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from autoregembed_rag import AutoRegEncoder
from benchmarks import latency
from benchmarks.beir import BenchmarkDataError
from benchmarks.measures import markdown
from benchmarks.models import HYBRID

HEADING = "## Scores"
SPEED = "documents/s"

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Figures:
    """What one report says of one system: values by the column of the table that they belong into."""

    system: str
    model: str
    use: str
    parameters: int | None
    dimension: int | None
    fingerprint: str | None
    values: dict[str, float]


def read_report(report: dict[str, Any]) -> list[Figures]:
    """Every system of a report."""
    return [_figures(report, entry) for entry in report["results"]]


def _figures(report: dict[str, Any], entry: dict[str, Any]) -> Figures:
    if "sets" in report:
        values = dict(entry["spearman"])
    else:
        name = f"{report['dataset']} {report['split']}"
        values = {name: entry["measures"]["nDCG@10"], f"{SPEED} ({name})": entry["documents_per_second"]}
    details = entry["details"]
    known = {field: details.get(field) for field in ("parameters", "dimension", "fingerprint")}
    return Figures(
        entry["system"],
        details.get("model", entry["system"]),
        details.get("use", ""),
        values=values,
        **known,
    )


def merge(found: Iterable[Figures]) -> list[Figures]:
    """One row for each system, with the values of all reports.

    `BenchmarkDataError` where reports of one system are of different weights.
    """
    rows: dict[str, Figures] = {}
    for one in found:
        before = rows.setdefault(one.system, one)
        if before is one:
            continue
        if before.fingerprint != one.fingerprint:
            raise BenchmarkDataError(
                f"the reports of {one.system} are of different weights ({before.fingerprint} and "
                f"{one.fingerprint}): measure them again, or name the models differently"
            )
        before.values.update(one.values)
    return list(rows.values())


def overview(rows: list[Figures], columns: list[str]) -> str:
    """All systems but the lesser uses of a checkpoint."""
    shown = [row for row in rows if not is_variant(row)]
    size = lambda row: "" if row.parameters is None else f"{row.parameters / 1e6:.1f}M"  # noqa: E731
    return markdown(["", "size", *columns], [[row.system, size(row), *_cells(row, columns)] for row in shown])


def variants(rows: list[Figures], columns: list[str]) -> str:
    """What each use of a checkpoint is worth."""
    of = {row.model for row in rows if is_variant(row)}
    shown = [row for row in rows if row.model in of and row.use != HYBRID]
    return markdown(
        ["", "dimensions", *columns],
        [[row.system, f"{row.dimension:,}", *_cells(row, columns)] for row in shown],
    )


def is_variant(row: Figures) -> bool:
    """Whether it is a checkpoint with fewer tokens, or their mean."""
    return row.use.endswith("tokens") or row.use == "mean pooling"


def _cells(row: Figures, columns: Sequence[str]) -> list[str]:
    return ["" if (value := row.values.get(name)) is None else _cell(name, value) for name in columns]


def _cell(column: str, value: float) -> str:
    if column.startswith(SPEED):
        return f"{value:,.0f}"
    return f"{value:.2f}" if value > 1 else f"{value:.4f}"


def size_picture(rows: list[Figures], sets: list[str], file: Path) -> None:
    """Quality against the number of parameters, a panel for each set; systems without any as a line."""

    def draw(axes: Axes, name: str) -> None:
        for number, row in enumerate(row for row in rows if not is_variant(row) and name in row.values):
            if row.parameters is None:
                axes.axhline(row.values[name], color="grey", linestyle="--", label=row.system)
            else:
                axes.scatter(row.parameters / 1e6, row.values[name], color=f"C{number}", label=row.system)
        axes.set_xscale("log")
        axes.set_xlabel("million parameters")

    _panels(sets, draw, file)


def token_picture(rows: list[Figures], sets: list[str], file: Path) -> None:
    """Quality against the dimensions of the first j compressed tokens, a panel for each set."""
    of = {row.model for row in rows if is_variant(row)}

    def draw(axes: Axes, name: str) -> None:
        for number, model in enumerate(sorted(of)):
            uses = [row for row in rows if row.model == model and name in row.values and row.use != HYBRID]
            flat = sorted((row.dimension or 0, row.values[name]) for row in uses if row.use != "mean pooling")
            axes.plot(*zip(*flat, strict=True), marker="o", color=f"C{number}", label=f"{model}, flattened")
            for row in uses:
                if row.use == "mean pooling":
                    axes.scatter(
                        row.dimension, row.values[name], marker="x", color=f"C{number}", label=row.system
                    )
        axes.set_xlabel("dimensions")

    _panels(sets, draw, file)


def _panels(sets: list[str], draw: Any, file: Path) -> None:  # noqa: ANN401
    figure = Figure(figsize=(3.2 * len(sets), 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(sets), squeeze=False)[0], sets, strict=True):
        draw(axes, name)
        axes.set_title(name, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    labels: dict[str, Any] = {}
    for axes in figure.axes:
        labels.update(
            {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        )
    figure.legend(
        list(labels.values()), list(labels), loc="outside lower center", ncols=4, frameon=False, fontsize=8
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def commands(reports: Iterable[dict[str, Any]]) -> str:
    """How the figures came about."""
    lines = list(dict.fromkeys(report["command"] for report in reports))
    return "```bash\n" + "\n".join(lines) + "\n```\n"


def latencies(reports: Iterable[dict[str, Any]]) -> str:
    """How fast questions are answered, by all tokens and by fewer: a table for each report of `benchmarks.latency`."""
    parts = []
    for report in reports:
        counts = f"{report['documents']:,} documents, {report['questions']} questions"
        parts.append(
            f"{report['dataset']} ({counts}), {report['model']}:\n\n{markdown(latency.HEADER, latency.table(report))}"
        )
    return "\n".join(parts)


def rerankings(reports: Iterable[dict[str, Any]]) -> str:
    """What ranking anew gains and costs: a row for each system of each set."""
    rows = [
        [
            f"{report['dataset']} {report['split']}, {entry['system']}",
            f"{entry['measures']['nDCG@10']:.4f}",
            f"{entry['measures']['MRR@10']:.4f}",
            f"{entry['ms_per_query']:,.0f}",
        ]
        for report in reports
        for entry in report["results"]
    ]
    return markdown(["", "nDCG@10", "MRR@10", "ms/query"], rows)


def is_reranking(report: dict[str, Any]) -> bool:
    """Whether systems of the report rank anew what others found."""
    return any("reranked" in entry["details"] for entry in report.get("results", []))


def write_scores(card: Path, rows: list[Figures], columns: list[str], how: str) -> None:
    """Put the scores of the checkpoint beside `card` there; `BenchmarkDataError` if they are not in the reports."""
    fingerprint = AutoRegEncoder.from_pretrained(card.parent, device="cpu").fingerprint
    own = {row.model for row in rows if row.fingerprint == fingerprint}
    if not own:
        raise BenchmarkDataError(
            f"no report is of the checkpoint {card.parent} ({fingerprint}): measure it again"
        )
    body = card.read_text(encoding="utf-8").split(f"\n{HEADING}\n")[0].rstrip()
    shown = [
        row
        for row in rows
        if row.model in own or row.model.partition(":")[0] in own or row.parameters is None
    ]
    card.write_text(
        f"{body}\n\n{HEADING}\n\nSpearman x 100 of sentence pairs, nDCG@10 of retrieval.\n\n"
        f"{overview(shown, columns)}\n{how}",
        encoding="utf-8",
    )


@app.command(epilog="Example: python -m benchmarks.results benchmarks/reports/mini/*/results.json")
def main(
    files: Annotated[
        list[Path],
        typer.Argument(help="results.json of benchmarks.retrieval, benchmarks.sts and benchmarks.latency."),
    ],
    output: Annotated[Path, typer.Option(help="The page.")] = Path("benchmarks/RESULTS.md"),
    card: Annotated[
        Path | None, typer.Option(help="A checkpoint's README.md, to carry the same scores.")
    ] = None,
) -> None:
    """Make one page of reports: a table, two pictures, and the commands."""
    try:
        reports = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        timed = [report for report in reports if "kinds" in report]
        reranked = [report for report in reports if is_reranking(report)]
        scored = [report for report in reports if report not in (*timed, *reranked)]
        rows = merge(figures for report in scored for figures in read_report(report))
        columns = list(dict.fromkeys(name for row in rows for name in row.values))
        columns.sort(key=lambda name: name.startswith(SPEED))
        sets = [name for name in columns if not name.startswith(SPEED)]
        how = commands(reports)
        if card is not None:
            write_scores(card, rows, columns, how)
    except (BenchmarkDataError, OSError, KeyError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    pictures = output.with_suffix("")
    size_picture(rows, sets, pictures / "size.png")
    token_picture(rows, sets, pictures / "tokens.png")
    machines = sorted({f"{report['cpu']}, {report['cpu_count']} cores" for report in reports})
    output.write_text(
        PAGE.format(
            machines="; ".join(machines),
            overview=overview(rows, columns),
            variants=variants(rows, columns),
            rerankings=RERANKINGS.format(table=rerankings(reranked)) if reranked else "",
            latencies=LATENCIES.format(tables=latencies(timed)) if timed else "",
            commands=how,
            folder=pictures.name,
        ),
        encoding="utf-8",
    )
    print(f"written: {output}")


LATENCIES = """
## Search by all tokens, and by fewer

"2 of 5 tokens, refined" finds 100 documents by the question's first 2 compressed tokens, and ranks them by all 5. One
question at a time: milliseconds of its search, and from its text to its documents; recall is of the best 10 by exact
search with all tokens; vectors are the bytes that are searched. Passages are judged by pairs that training has seen, so
that their nDCG@10 only compares rows.

{tables}"""

RERANKINGS = """
## Ranking anew by the decoder

"50 reranked" ranks the best 50 of the search anew, as `GenerativeReranker` does by default, with priors that the index
keeps. docs/reranking.md has other ways.

{table}"""

PAGE = """# Results

Spearman x 100 of sentence pairs, nDCG@10 of retrieval, higher is better. documents/s is encoding and indexing.
Measured on {machines}. This page is made of JSON reports by `python -m benchmarks.results`.

{overview}
![Quality against size]({folder}/size.png)

## Fewer tokens, other pooling

{variants}
![Quality against dimensions]({folder}/tokens.png)
{latencies}{rerankings}
## How to measure it again

`build/mini` is the recipe's work folder, which holds what each of its stages left; the fitted ones are `mini` on the
documents, and for NFCorpus the training queries, of that set.

```bash
python -m recipes.mini --corpus ../shared/data/corpus --work build/mini
python -m recipes.mini --corpus ../shared/data/corpus --work build/mini-128 --size cpu-128 --until start
python -m recipes.mini --corpus ../shared/data/corpus --work build/mini-64 --size cpu-64 --until start
autoregembed finetune ../shared/data/beir/cranfield --no-labels --output build/fitted-cranfield
autoregembed finetune ../shared/data/beir/nfcorpus --minutes 25 --output build/fitted-nfcorpus
```

{commands}"""


if __name__ == "__main__":
    app()
