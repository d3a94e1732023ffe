"""What a benchmark leaves behind: a table, JSON with all that is needed to repeat it, a bar chart."""

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

PACKAGES = (
    "autoregembed-rag",
    "torch",
    "transformers",
    "numpy",
    "faiss-cpu",
    "faiss-gpu",
    "bm25s",
    "PyStemmer",
    "ir-measures",
)


def environment() -> dict[str, Any]:
    """Python, processor and library versions, and the command that ran."""
    return {
        "command": shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "versions": {package: found for package in PACKAGES if (found := _version(package))},
    }


def cpu_name() -> str:
    """The processor's name as its maker writes it, where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their widest cell; the first to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, ["-" * width for width in widths], *rows]:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        print("  ".join(cells).rstrip())


def write_json(file: Path, record: Mapping[str, Any]) -> None:
    """Write `record`, making the folders above `file`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def bar_chart(file: Path, title: str, groups: Sequence[str], bars: Mapping[str, Sequence[float]]) -> None:
    """A PNG: one group of bars per measure, one colour per system (`bars`: system -> value per group)."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(bars)
    for position, (name, values) in enumerate(bars.items()):
        offsets = [group + (position - (len(bars) - 1) / 2) * width for group in range(len(groups))]
        axes.bar_label(axes.bar(offsets, values, width * 0.95, label=name), fmt="%.3f", padding=2, fontsize=8)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylim(0, 1)
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(bars), frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
