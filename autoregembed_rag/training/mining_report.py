"""What negative mining found: counts, quantiles and a picture of the scores."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REPORT, HISTOGRAM = "report.json", "histogram.png"
BINS = 2000
BARS = 100  # in a picture
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
POSITIVE, NEGATIVE, CANDIDATE = "tab:green", "tab:red", "0.6"


class Histogram:
    """Counts of numbers between `low` and `high`, in 2,000 bins: memory does not grow with how many they are."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high
        self.counts = np.zeros(BINS, np.int64)

    def add(self, values: ArrayLike) -> None:
        """Count numbers [n]; those outside go to the first and last bin."""
        places = (np.asarray(values) - self.low) / (self.high - self.low) * BINS
        np.add.at(self.counts, np.clip(places, 0, BINS - 1).astype(int), 1)

    def quantile(self, share: float) -> float | None:
        """The number below which `share` of the numbers lie, to within a bin; None where none was counted."""
        sums = np.cumsum(self.counts)
        if sums[-1] == 0:
            return None
        place = int(np.searchsorted(sums, max(1, share * sums[-1])))
        return round(self.low + (place + 0.5) * (self.high - self.low) / BINS, 4)

    def draw(self, axes: Axes, label: str, colour: str) -> None:
        """Add bars, as the share of all numbers."""
        bars = self.counts.reshape(BARS, -1).sum(axis=1) / max(1, self.counts.sum())
        edges = np.linspace(self.low, self.high, BARS + 1)
        axes.stairs(bars, edges, fill=True, alpha=0.5, color=colour, label=label)


@dataclass(frozen=True)
class MiningReport:
    """The outcome of `mine_negatives`.

    Attributes:
        rows: rows written.
        negatives: negatives that were mined.
        own_negatives: negatives that the rows had before.
        positives_found: rows whose positive was among the `top_k` of its query.
        positives: candidates left out because they answer the query: its positives in all rows, and its own text.
        near_duplicates: candidates left out as near-duplicates of the positive or of another negative of the row.
        false_negatives: candidates left out because they score too near to the positive, or above it.
        short_rows: rows with fewer than `num_negatives` negatives, their own included.
        empty_rows: rows without any negative.
        positive_scores, negative_scores: cosines of the query with the positives and with the mined negatives.
        candidate_shares, negative_shares: scores of all candidates and of the mined negatives as a share of the
            positive's (see `mining.share_of`).
        settings: the arguments, the encoder's fingerprint, the number of documents, the digest of the rows.
    """

    rows: int
    negatives: int
    own_negatives: int
    positives_found: int
    positives: int
    near_duplicates: int
    false_negatives: int
    short_rows: int
    empty_rows: int
    positive_scores: Histogram = field(repr=False, compare=False)
    negative_scores: Histogram = field(repr=False, compare=False)
    candidate_shares: Histogram = field(repr=False, compare=False)
    negative_shares: Histogram = field(repr=False, compare=False)
    settings: dict[str, Any] = field(repr=False)

    @property
    def facts(self) -> dict[str, Any]:
        """All of it as JSON values; quantiles are None where there are no scores."""
        return {
            **{name: getattr(self, name) for name in COUNTS},
            "positive_quantiles": _quantiles(self.positive_scores),
            "negative_quantiles": _quantiles(self.negative_scores),
            "settings": self.settings,
        }

    def save(self, folder: str | Path) -> None:
        """Write `report.json` and `histogram.png` into `folder`, making it; ImportError without matplotlib."""
        figure = new_figure()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / REPORT).write_text(json.dumps(self.facts, indent=2) + "\n", encoding="utf-8")
        scores, shares = figure.subplots(1, 2)
        self._draw_scores(scores)
        self._draw_shares(shares)
        figure.savefig(folder / HISTOGRAM, dpi=150)

    def _draw_scores(self, axes: Axes) -> None:
        self.positive_scores.draw(axes, "positives", POSITIVE)
        self.negative_scores.draw(axes, "mined negatives", NEGATIVE)
        axes.set_title("score: cosine with the query")
        axes.set_ylabel("share of texts")
        lows = [histogram.quantile(0.001) for histogram in (self.positive_scores, self.negative_scores)]
        axes.set_xlim(min(low for low in (*lows, 0) if low is not None) - 0.05, 1)
        _finish(axes)

    def _draw_shares(self, axes: Axes) -> None:
        limit = self.settings["max_share"]
        self.candidate_shares.draw(axes, "all candidates", CANDIDATE)
        self.negative_shares.draw(axes, "mined negatives", NEGATIVE)
        axes.axvline(limit, color="black", linestyle="--", label=f"max_share = {limit:g}")
        axes.set_title("score as a share of the positive's")
        axes.set_xlabel("the last bar holds all from there on")
        _finish(axes)


COUNTS = tuple(field.name for field in fields(MiningReport) if field.type == "int")


def new_figure() -> Figure:
    """An empty figure; ImportError that names the extra where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError('a histogram needs matplotlib: pip install "autoregembed-rag[train]"') from None
    return Figure(figsize=(10, 4), layout="constrained")


def _quantiles(histogram: Histogram) -> dict[str, float | None]:
    return {f"{share:g}": histogram.quantile(share) for share in QUANTILES}


def _finish(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
