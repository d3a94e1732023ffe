"""Scores of a checkpoint, as the reports of `benchmarks.retrieval` and `benchmarks.sts` have them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple


class Score(NamedTuple):
    """One measured value: `use` is how the checkpoint was used, "" as it is."""

    task: str
    dataset: str
    split: str | None
    use: str
    metric: str
    value: float


def read_scores(reports: Iterable[Mapping[str, Any]], fingerprint: str) -> list[Score]:
    """What reports of `benchmarks.retrieval` and `benchmarks.sts` say of the encoder with this fingerprint.

    ValueError: a report is neither, or nothing in it is of this encoder.
    """
    scores = []
    for report in reports:
        try:
            found = [score for system, score in _report_scores(report) if system == fingerprint]
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"this is no report of benchmarks.retrieval or benchmarks.sts: {str(report)[:60]} ..."
            ) from error
        if not found:
            raise ValueError(
                f"no score in the report on {report.get('dataset') or ', '.join(report.get('sets', []))} is of the "
                f"encoder with fingerprint {fingerprint}: measure this checkpoint, or leave the report out"
            )
        scores += found
    return scores


def _report_scores(report: Mapping[str, Any]) -> Iterator[tuple[str | None, Score]]:
    """Every score with the fingerprint of what was measured."""
    for system in report["results"]:
        details = system["details"]
        use = str(details.get("use", ""))
        if "reranked" in details:
            use = f"{use}, {details['reranked']} reranked".removeprefix(", ")
        if "sets" in report:
            for dataset, value in system["spearman"].items():
                yield (
                    details.get("fingerprint"),
                    Score("semantic-similarity", dataset, None, use, "Spearman x 100", value),
                )
        else:
            for metric, value in system["measures"].items():
                yield (
                    details.get("fingerprint"),
                    Score("information-retrieval", report["dataset"], report["split"], use, metric, value),
                )
