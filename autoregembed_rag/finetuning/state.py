"""What a fine-tuning run keeps in its output folder, so that it goes on where it stopped and is told from others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..history import PLAN, RECORD
from ..training.checkpoints import write_json
from .evaluation import Evaluation, Scores
from .planning import Plan
from .report import recorded

BEFORE = "before.json"
STAGES = "stages"
EVENTS = "runs"


def check_output(output: Path) -> None:
    """ValueError where `output` holds anything but a run of this kind."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file: give a folder")
    if (output / PLAN).exists():
        _begun(output)
    elif output.is_dir() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty and holds no fine-tuning run: give a new or empty folder")


def write_plan(output: Path, identity: Mapping[str, Any], plan: Plan, earlier: list[dict[str, Any]]) -> None:
    """Begin a run in `output`; `identity` decides its result, `earlier` are the stages that the model has behind it."""
    write_json(output / PLAN, {"run": dict(identity), "plan": plan.facts, "earlier": earlier})


def read_plan(output: Path, identity: Mapping[str, Any]) -> Plan | None:
    """The plan of the run that was begun in `output`, None if none was; ValueError if it is another run."""
    if not (output / PLAN).exists():
        return None
    found, plan = _begun(output)
    changes = ", ".join(_changes(found, json.loads(json.dumps(identity))))
    if changes:
        raise ValueError(
            f"{output} holds a run of other data or settings ({changes}): give another output folder, or remove it"
        )
    return plan


def _begun(output: Path) -> tuple[dict[str, Any], Plan]:
    with recorded(output / PLAN) as found:
        return dict(found["run"]), Plan.from_facts(found["plan"])


def _changes(found: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    """In words; of a stage, which is a mapping where it is trained and None where it is not, what changed in it."""
    for name in sorted(found.keys() | here.keys()):
        before, now = found.get(name), here.get(name)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            yield from (f"{name}: {change}" for change in _changes(before, now))
        elif isinstance(before, Mapping) or isinstance(now, Mapping):
            yield f"{name} {'left out' if now is None else 'added'}"
        elif before != now:
            yield f"{name} {before!r} -> {now!r}"


def write_before(output: Path, scores: Scores) -> None:
    """Keep the scores before training, which all calls that go on in `output` share."""
    write_json(output / BEFORE, dict(scores.per_query))


def read_before(output: Path, evaluation: Evaluation) -> Scores | None:
    """What `write_before` wrote, None if nothing; ValueError if these are no scores of the queries of `evaluation`."""
    if not (output / BEFORE).exists():
        return None
    with recorded(output / BEFORE) as found:
        scores = {str(query): float(score) for query, score in found.items()}
        if scores.keys() != evaluation.queries.keys() or not all(0 <= s <= 1 for s in scores.values()):
            raise ValueError("its scores are not those of the held-out queries")
    return Scores(scores)


def stages_done(output: Path) -> int:
    """How many stages have ended."""
    return len(list((output / STAGES).glob(f"*/{RECORD}")))


def remove_remains(output: Path) -> None:
    """Remove what a call left that was killed as it saved the result."""
    for folder in output.glob(".saving-*"):
        shutil.rmtree(folder)
