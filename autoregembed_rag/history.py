"""How the weights of a checkpoint came about, as training and fine-tuning record it beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .fingerprint import sound_weights_digest

RECORD = "training.json"
"""What a stage of training leaves."""
REPORT = "report.json"
PLAN = "plan.json"
"""What a fine-tuning run leaves: the one says what came of it, the other with which settings."""

STAGE_NAMES = ("compression", "alignment", "contrast")
# Of a stage's record, what says nothing about how it trains, or is said elsewhere.
_NOT_SETTINGS = {"stage", "encoder", "decoder", "rows"}


@dataclass(frozen=True)
class StageHistory:
    """One stage that the weights went through.

    Attributes:
        name: "compression", "alignment" or "contrast".
        rows: different rows that it read.
        settings: its hyperparameters by name.
        losses: the first and the last that were logged; empty if none was.
        seconds: it took; None: not recorded.
    """

    name: str
    rows: int
    settings: Mapping[str, Any]
    losses: tuple[float, ...] = ()
    seconds: float | None = None


@dataclass(frozen=True)
class History:
    """All that is known of a checkpoint's training.

    Attributes:
        stages: oldest first.
        finetuned: of a fine-tuning run, which then had the last stages: "kind" and "counts" of what it found, its
            "settings", and the "comparison" and "verdict" of its report, which are of the encoder with "fingerprint"
            (None: not recorded); empty if there was none.
    """

    stages: tuple[StageHistory, ...] = ()
    finetuned: Mapping[str, Any] = field(default_factory=dict)


def read_history(folder: Path | None) -> History:
    """What is recorded in `folder` about the weights that are there; nothing if no record is, or only of others."""
    found = None if folder is None else _record_of_these_weights(folder)
    if found is None:
        return History()
    return finetune_history(*found) if "comparison" in found[0] else stage_history(found[0])


def earlier_stages(folder: Path | None) -> list[dict[str, Any]]:
    """The stages in `read_history(folder)` as JSON values: what a record of the next stage holds as "earlier"."""
    return [asdict(stage) for stage in read_history(folder).stages]


def stage_history(record: Mapping[str, Any]) -> History:
    """From the content of a `training.json`."""
    run = record["run"]
    last = StageHistory(
        name=run["stage"],
        rows=record["rows"],
        settings={name: value for name, value in run.items() if name not in _NOT_SETTINGS},
        losses=_ends(record["losses"]),
        seconds=record["seconds"],
    )
    return History((*_earlier(record), last))


def finetune_history(report: Mapping[str, Any], plan: Mapping[str, Any]) -> History:
    """From the contents of a `report.json` and its `plan.json`."""
    run = plan["run"]
    stages = [
        StageHistory(
            name=stage["name"],
            rows=stage["rows"],
            settings={**run[stage["name"]], "max_steps": stage["steps"]},
            losses=_ends(report["losses"][stage["name"]]),
        )
        for stage in report["plan"]["stages"]
    ]
    settings = {name: value for name, value in run.items() if name not in (*STAGE_NAMES, "data", "model")}
    finetuned = {
        "kind": report["plan"]["kind"],
        "counts": report["plan"]["counts"],
        "from": run["model"],
        "settings": settings,
        "comparison": report["comparison"],
        "verdict": report["verdict"],
        "fingerprint": report.get("fingerprint"),
    }
    return History((*_earlier(plan), *stages), finetuned)


def _record_of_these_weights(folder: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """A report with its plan, or a stage's record with nothing; the digest of the weights says whose it is."""
    for name, beside in ((REPORT, PLAN), (RECORD, None)):
        record = _read(folder / name)
        plan = {} if beside is None else _read(folder / beside)
        if (
            "weights" in record
            and (beside is None or plan)
            and record["weights"] == sound_weights_digest(folder)
        ):
            return record, plan
    return None


def _read(file: Path) -> dict[str, Any]:
    """A JSON object; an empty one where none is: other programs' files may bear these names."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _earlier(record: Mapping[str, Any]) -> list[StageHistory]:
    return [
        StageHistory(**{**stage, "losses": tuple(stage["losses"])}) for stage in record.get("earlier", [])
    ]


def _ends(log: list[Mapping[str, float]]) -> tuple[float, ...]:
    return tuple(log[place]["loss"] for place in (0, -1)) if log else ()
