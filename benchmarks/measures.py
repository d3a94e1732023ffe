"""Values that were measured round by round for several systems: medians, ratios, tables and a chart."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from matplotlib.figure import Figure

from autoregembed_rag.cli_index import human_bytes

RATE = "documents/s"
SECONDS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))

T = TypeVar("T")


class Measures:
    """One value per measure, system and round; units are "s", "B", "documents/s", and "" for a plain number."""

    def __init__(self) -> None:
        self._units: dict[str, str] = {}
        self._values: dict[str, dict[str, list[float]]] = {}

    def put(self, measure: str, unit: str, system: str, value: float) -> None:
        """Add the value of a round."""
        self._units[measure] = unit
        self._values.setdefault(measure, {}).setdefault(system, []).append(value)

    def time(self, measure: str, system: str, work: Callable[[], T], calls: int = 1) -> T:
        """Do the work, which is so many calls, and add the seconds of one."""
        start = time.perf_counter()
        result = work()
        self.put(measure, "s", system, (time.perf_counter() - start) / calls)
        return result

    def last(self, measure: str, system: str) -> float:
        """The value of the latest round."""
        return self._values[measure][system][-1]

    def record(self, first: str) -> dict[str, Any]:
        """By measure: unit, medians and all values by system, and how many times better `first` did than others."""
        found = {}
        for measure, rounds in self._values.items():
            unit = self._units[measure]
            medians = {system: statistics.median(values) for system, values in rounds.items()}
            own = medians.get(first)
            ratios = {
                system: own / other if unit == RATE else other / own
                for system, other in medians.items()
                if unit and own and other > 0 and system != first
            }
            found[measure] = {"unit": unit, "medians": medians, "ratios": ratios, "rounds": rounds}
        return found


def table(
    title: str, measures: Mapping[str, Any], systems: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """Header and rows: each system's median, then the first system's ratio to each other."""
    others = systems[1:]
    rows = []
    for measure, found in measures.items():
        medians = [_cell(found["medians"].get(system), found["unit"]) for system in systems]
        rows.append([measure, *medians, *(_times(found["ratios"].get(system)) for system in others)])
    return [title, *systems, *(f"vs {system}" for system in others)], rows


def paired(found: Mapping[str, Any], first: str, other: str) -> list[float]:
    """How many times better the first system did than the other, round by round."""
    pairs = zip(found["rounds"][first], found["rounds"][other], strict=True)
    return [a / b if found["unit"] == RATE else b / a for a, b in pairs]


def spread(values: Sequence[float], unit: str) -> str:
    """The median, with the least and the most."""
    return f"{statistics.median(values):.3g}{unit} [{min(values):.3g}-{max(values):.3g}]"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A GitHub table, numbers to the right."""
    rule = [":--", *["--:"] * (len(header) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in [header, rule, *rows])


def ratio_chart(
    file: Path, title: str, panels: Mapping[str, Mapping[str, Any]], systems: Sequence[str]
) -> None:
    """A PNG: one panel per setting, bars from 1 to the right where the first system is that many times better."""
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    height = 1 + 0.36 * max(len(measures) for measures in panels.values())
    figure = Figure(figsize=(6.5 * columns, 0.8 + height * rows), layout="constrained")
    all_axes = figure.subplots(rows, columns, sharex=True, squeeze=False).flat
    for axes in all_axes[len(panels) :]:
        axes.set_visible(False)
    width = 0.8 / len(systems)
    for axes, (name, measures) in zip(all_axes, panels.items(), strict=False):
        for position, system in enumerate(systems):
            places = [
                (row + (position - (len(systems) - 1) / 2) * width, found["ratios"][system])
                for row, found in enumerate(measures.values())
                if system in found["ratios"]
            ]
            bars = axes.barh(
                [place for place, _ in places],
                [ratio - 1 for _, ratio in places],
                width * 0.95,
                left=1,
                color=f"C{position}",
                label=f"vs {system}",
            )
            axes.bar_label(bars, [_times(ratio) for _, ratio in places], padding=2, fontsize=7)
        axes.set_yticks(range(len(measures)), list(measures), fontsize=8)
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.margins(x=0.15)
        axes.tick_params(axis="x", labelbottom=True)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_title(name, fontsize=9, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(systems), frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def _cell(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    if unit == "s":
        name, scale = next((name, scale) for name, scale in SECONDS if value >= scale or name == "µs")
        return f"{value / scale:.3g} {name}"
    if unit == "B":
        return human_bytes(value)
    return f"{value:,.0f}/s" if unit == RATE else f"{value:.3g}"


def _times(ratio: float | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio:,.0f}x" if ratio >= 10 else f"{ratio:.2f}x" if ratio >= 0.1 else f"{ratio:.2g}x"
