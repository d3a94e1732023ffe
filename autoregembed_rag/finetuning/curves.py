"""Loss curves as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANEL = (4.5, 3.5)  # inches


def new_figure(panels: int) -> Figure:
    """An empty figure for so many panels side by side; ImportError names the extra where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError('loss curves need matplotlib: pip install "autoregembed-rag[train]"') from None
    return Figure(figsize=(PANEL[0] * panels, PANEL[1]), layout="constrained")


def draw_losses(losses: Mapping[str, Sequence[Mapping[str, Any]]], file: str | Path) -> None:
    """Write a PNG with a panel for every stage.

    Args:
        losses: stage -> entries with "step" and "loss", as `training.json` has them.
        file: where to write.
    """
    figure = new_figure(len(losses))
    panels = figure.subplots(1, len(losses), squeeze=False)[0]
    for axes, (stage, entries) in zip(panels, losses.items(), strict=True):
        axes.plot(
            [entry["step"] for entry in entries],
            [entry["loss"] for entry in entries],
            marker="." if len(entries) < 3 else "",
        )
        axes.set_title(stage)
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)
