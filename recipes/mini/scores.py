"""Write what the benchmarks measured into a checkpoint's model card, each table under the command that made it.

python -m recipes.mini.scores autoregembed_rag/checkpoints/mini results/*/*/results.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from autoregembed_rag import AutoRegEncoder

HEADING = "## Scores"


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Folder with the model card.")],
    reports: Annotated[
        list[Path], typer.Argument(help="results.json of benchmarks.retrieval and benchmarks.sts.")
    ],
) -> None:
    """Replace the card's scores by those of `reports`, and print them."""
    fingerprint = AutoRegEncoder.from_pretrained(checkpoint, device="cpu").fingerprint
    tables = [markdown(json.loads(report.read_text(encoding="utf-8")), fingerprint) for report in reports]
    card = checkpoint / "README.md"
    body = card.read_text(encoding="utf-8").split(f"\n{HEADING}\n")[0].rstrip()
    card.write_text(f"{body}\n\n{HEADING}\n\n" + "\n".join(tables), encoding="utf-8")
    print("\n".join(tables))


def markdown(report: dict[str, Any], fingerprint: str) -> str:
    """One report as a table; ValueError if none of its systems is the checkpoint."""
    results = report["results"]
    found = {result.get("fingerprint") or result.get("details", {}).get("fingerprint") for result in results}
    if fingerprint not in found:
        raise ValueError(
            f"the report of {report['command']!r} is not of the checkpoint {fingerprint}: run it again"
        )
    if "file" in report:
        title = f"{Path(report['file']).parent.name} {Path(report['file']).stem} ({report['pairs']:,} pairs)"
        header = ["Spearman x 100"]
        rows = {result["system"]: [f"{result['spearman']:.2f}"] for result in results}
    else:
        size = f"{report['documents']:,} documents, {report['queries']} queries"
        title = f"{report['dataset']} {report['split']} ({size})"
        header = [*results[0]["measures"], "documents/s", "ms/query", "index"]
        rows = {
            result["system"]: [
                *(f"{value:.4f}" for value in result["measures"].values()),
                f"{result['documents_per_second']:,.0f}",
                f"{result['ms_per_query']:.1f}",
                f"{result['index_bytes'] / 1e6:.1f} MB",
            ]
            for result in results
        }
    lines = [
        f"`{report['command']}`",
        "",
        "| " + " | ".join([title, *header]) + " |",
        "|---|" + "---:|" * len(header),
    ]
    lines += ["| " + " | ".join([system, *cells]) + " |" for system, cells in rows.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
