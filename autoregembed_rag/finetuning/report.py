"""What came of a fine-tuning run: scores before and after, and a verdict that says better only where it is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..fingerprint import sound_weights_digest, weights_digest
from ..history import REPORT
from ..training.checkpoints import write_json
from .curves import draw_losses
from .evaluation import FEW_QUERIES, FEWEST, Comparison, Scores
from .planning import Plan

CURVES = "losses.png"


@dataclass(frozen=True)
class FinetuneReport:
    """What came of it.

    Attributes:
        before, after: nDCG@10 of every held-out query.
        comparison: of the two, with an interval.
        plan: what was planned, estimates included.
        losses: stage -> entries with "step" and "loss".
        seconds: that the last call took, all steps of it if it was not interrupted; the measurement of the plan is not
            in it.
        fingerprint: of the trained encoder, which `after` is of; None: not recorded.
    """

    before: Scores
    after: Scores
    comparison: Comparison
    plan: Plan
    losses: Mapping[str, Sequence[Mapping[str, Any]]]
    seconds: float
    fingerprint: str | None = None

    @property
    def better(self) -> bool:
        """Whether retrieval became better, and chance is an unlikely explanation."""
        return self.comparison.better

    @property
    def verdict(self) -> str:
        """ "better", "worse" or "no difference that can be told"."""
        if self.better:
            return "better"
        return "worse" if self.comparison.worse else "no difference that can be told"

    def __str__(self) -> str:
        c = self.comparison
        table = (
            f"held-out queries: {c.queries:,}\n"
            f"nDCG@10 before: {c.before:.4f}\n"
            f"nDCG@10 after:  {c.after:.4f}\n"
            f"difference:    {c.difference:+.4f} (95% interval {c.low:+.4f} to {c.high:+.4f}, p = {c.p_value:.4f})\n"
            f"verdict: {self.verdict}"
        )
        few = [f"Besides, {FEW_QUERIES}."] if c.queries < FEWEST else []
        return table if self.better else "\n".join([table, ADVICE, *few])

    def save(self, folder: str | Path) -> None:
        """Write `report.json` and `losses.png` into `folder`, beside the model that they are about."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        draw_losses(self.losses, folder / CURVES)
        write_json(
            folder / REPORT,
            {
                "verdict": self.verdict,
                "weights": weights_digest(folder),
                "fingerprint": self.fingerprint,
                "comparison": asdict(self.comparison),
                "estimated_seconds": round(self.plan.seconds, 1),
                "seconds": round(self.seconds, 1),
                "plan": self.plan.facts,
                "losses": dict(self.losses),
                "before": dict(self.before.per_query),
                "after": dict(self.after.per_query),
            },
        )

    @classmethod
    def load(cls, folder: str | Path) -> FinetuneReport:
        """The report that `save` wrote into `folder`; ValueError if that does not hold the same weights any more."""
        folder = Path(folder)
        with recorded(folder / REPORT) as found:
            weights = found["weights"]
            report = cls(
                before=Scores(found["before"]),
                after=Scores(found["after"]),
                comparison=Comparison(**found["comparison"]),
                plan=Plan.from_facts(found["plan"]),
                losses=found["losses"],
                seconds=found["seconds"],
                fingerprint=found.get("fingerprint"),
            )
        if sound_weights_digest(folder) != weights:
            raise ValueError(
                f"the weights in {folder} are not those that {folder / REPORT} is about: give another output folder, "
                "or remove this one to train again"
            )
        return report


ADVICE = (
    "The trained model is kept for inspection; the model that it started from is to be preferred. What may help: more "
    "documents (which also makes smaller differences visible), more time, or a lower learning rate."
)


@contextmanager
def recorded(file: Path) -> Iterator[dict[str, Any]]:
    """The JSON object that a run wrote; ValueError names the file if it holds none, or the block finds it wrong."""
    try:
        yield dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            f"{file} is no record of a fine-tuning run ({reason}): give another output folder"
        ) from error
