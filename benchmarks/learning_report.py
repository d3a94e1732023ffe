"""What the learning benchmark found: means and spreads over the seeds, a table, curves, and what they say."""

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.learning_systems import SYSTEMS
from benchmarks.measures import markdown
from benchmarks.report import write_json

MEAN = "mean"
"""Of the sets, as the paper averages over its ten."""
PAPER_SAMPLES = (
    15_000  # of 50,000, after which the paper's figure 3 has AutoRegEmbed above every InfoNCE's best
)

Summary = dict[str, dict[str, Any]]


def summarise(runs: Sequence[Mapping[str, Any]]) -> Summary:
    """By system, in the order of the table: samples and epochs of its evaluations, and at each of them mean and
    standard deviation over the seeds (None for one seed), by set and for the mean of the sets."""
    summary: Summary = {}
    for name, system in SYSTEMS.items():
        own = [run for run in runs if run["run"]["system"] == name]
        if not own:
            continue
        points = list(zip(*(run["points"] for run in own), strict=True))
        summary[name] = {
            "title": system.title,
            "seeds": len(own),
            "learning_rate": own[0]["run"]["learning_rate"],
            "pooling": own[0]["pooling"],
            "seconds": statistics.fmean(run["seconds"] for run in own),
            "samples": [point[0]["samples"] for point in points],
            "epochs": [point[0]["epochs"] for point in points],
            "scores": _scores(points),
        }
    return summary


def _scores(points: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, list[Any]]]:
    sets = list(points[0][0]["scores"])
    found: dict[str, dict[str, list[Any]]] = {}
    for name in [*sets, MEAN]:
        series = [[_score(seed["scores"], name) for seed in point] for point in points]
        found[name] = {
            "mean": [statistics.fmean(values) for values in series],
            "spread": [statistics.stdev(values) if len(values) > 1 else None for values in series],
        }
    return found


def _score(scores: Mapping[str, float], name: str) -> float:
    return statistics.fmean(scores.values()) if name == MEAN else scores[name]


def table(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Header and rows: what each system scores at its end, and what the paper's own did."""
    sets = list(next(iter(summary.values()))["scores"])
    header = ["system", "learning rate", "samples", *sets, "best mean (at)", "seconds", "paper, 7B"]
    rows = []
    for name, found in summary.items():
        best = _best(found)
        rows.append(
            [
                found["title"],
                f"{found['learning_rate']:g}",
                f"{found['samples'][-1]:,}",
                *(_figure(found, one, -1) for one in sets),
                f"{found['scores'][MEAN]['mean'][best]:.2f} ({found['samples'][best]:,})",
                f"{found['seconds']:.0f}",
                f"{SYSTEMS[name].paper:.2f}",
            ]
        )
    return header, rows


def findings(record: Mapping[str, Any]) -> list[str]:
    """Paragraphs in which every figure was measured, or is the paper's and says so."""
    summary: Summary = record["summary"]
    return [text for text in (_start(record), _order(summary), _efficiency(record), _limits(record)) if text]


def _start(record: Mapping[str, Any]) -> str:
    """What the systems start from, and what compression adds."""
    summary: Summary = record["summary"]
    untrained = {
        found["pooling"]: _figure(found, MEAN, 0)
        for name, found in summary.items()
        if SYSTEMS[name].kind == "infonce"
    }
    words = [f"{pooling} {figure}" for pooling, figure in untrained.items()]
    if "compression" in summary:
        found = summary["compression"]
        words.append(
            f"{found['pooling']} of untrained compressed tokens {_figure(found, MEAN, 0)}, which compression brings "
            f"to {_figure(found, MEAN, -1)} with {found['samples'][-1]:,} rows of its own"
        )
    return f"**Start.** Mean of the sets before any training: {'; '.join(words)}."


def _order(summary: Summary) -> str:
    """The variants of AutoRegEmbed from best to worst, here and in the paper, and what the spread cannot tell apart."""
    variants = [name for name in summary if SYSTEMS[name].kind == "alignment"]
    if len(variants) < 2:
        return ""
    ranked = sorted(variants, key=lambda name: -summary[name]["scores"][MEAN]["mean"][-1])
    here = " > ".join(f"{_short(name)} {_figure(summary[name], MEAN, -1)}" for name in ranked)
    published = sorted(variants, key=lambda name: -SYSTEMS[name].paper)
    there = " > ".join(f"{_short(name)} {SYSTEMS[name].paper:.2f}" for name in published)
    verdict = "The order is the same" if ranked == published else "The order is not the same"
    text = f"**Variants** by the mean of the sets at the end: {here}. The paper's: {there}. {verdict}"
    if summary[ranked[0]]["seeds"] < 2:
        return f"{text}; one seed has no spread to judge it by."
    close = [
        f"{_short(one)} and {_short(two)}"
        for one, two in pairwise(ranked)
        if _gap(summary, one, two) <= _noise(summary, one, two)
    ]
    apart = (
        f"not told apart by the spread: {', '.join(close)}"
        if close
        else "each step is larger than the spread"
    )
    return f"{text}; neighbours: {apart}."


def _gap(summary: Summary, one: str, two: str) -> float:
    return float(summary[one]["scores"][MEAN]["mean"][-1] - summary[two]["scores"][MEAN]["mean"][-1])


def _noise(summary: Summary, one: str, two: str) -> float:
    return float(max(summary[name]["scores"][MEAN]["spread"][-1] for name in (one, two)))


def _efficiency(record: Mapping[str, Any]) -> str:
    """After how many triplets AutoRegEmbed reaches the best that any InfoNCE baseline ever has."""
    summary: Summary = record["summary"]
    baselines = [name for name in summary if SYSTEMS[name].kind == "infonce"]
    variants = [name for name in summary if SYSTEMS[name].kind == "alignment"]
    if not baselines or not variants:
        return ""
    best = max(baselines, key=lambda name: max(summary[name]["scores"][MEAN]["mean"]))
    at = _best(summary[best])
    level = summary[best]["scores"][MEAN]["mean"][at]
    words = [f"{_short(name)} {_reached(summary[name], level)}" for name in variants]
    rows = summary["compression"]["samples"][-1]
    return (
        f"**Learning efficiency.** The best mean of any InfoNCE baseline is {level:.2f} ({summary[best]['title']}, "
        f"after {summary[best]['samples'][at]:,} triplets). AutoRegEmbed, which has seen {rows:,} rows of compression "
        f"before its first triplet: {'; '.join(words)}. In the paper it took {PAPER_SAMPLES:,} samples. A run's mean "
        f"training time was {_times(summary, baselines)} for InfoNCE, {_times(summary, variants)} for alignment and "
        f"{_times(summary, ['compression'])} for the compression before it."
    )


def _reached(found: Mapping[str, Any], level: float) -> str:
    means = found["scores"][MEAN]["mean"]
    for samples, mean in zip(found["samples"], means, strict=True):
        if mean >= level:
            return f"is there after {samples:,} triplets ({mean:.2f})"
    return f"is not there after {found['samples'][-1]:,} triplets (best {max(means):.2f})"


def _limits(record: Mapping[str, Any]) -> str:
    its, base = record["settings"], record["base"]
    return (
        f"**What this size can show.** Systems trained alike are compared on one base of {base['parameters']:,} "
        f"parameters, {its['samples']:,} triplets in {its['epochs']} epochs and {its['seeds']} seeds; the paper's base "
        "has 7 billion, its triplets number 50,000. So its figures stand beside these for their order and not for "
        "their height, and how either way of training gains from a better language model is not measured here. "
        f"In-batch negatives come from batches of {its['batch_size']}, as all systems have; the paper's baselines had "
        "512. Learning rates are the best of three on STS-B dev for each system"
        f"{_at_an_end(record['sweep'])}."
    )


def _at_an_end(sweep: Mapping[str, Any]) -> str:
    """Which systems took the lowest or highest rate tried, where a better one may lie beyond."""
    ends = []
    for name, found in sweep.items():
        rates = [float(rate) for rate in found["STS-B dev"]]
        if found["chosen"] in (min(rates), max(rates)):
            ends.append(f"{_short(name)} ({found['chosen']:g})")
    return f", at an end of what was tried for {', '.join(ends)}" if ends else ""


def write_report(out: Path, record: Mapping[str, Any]) -> None:
    """Write results.json, table.md and results.png."""
    write_json(out / "results.json", record)
    its, summary = record["settings"], record["summary"]
    versions = ", ".join(f"{name} {found}" for name, found in record["versions"].items())
    sets = " and ".join(name for name in next(iter(summary.values()))["scores"] if name != MEAN)
    pooling = {found["pooling"] for name, found in summary.items() if SYSTEMS[name].kind != "infonce"}
    how = f" AutoRegEmbed: I_self on both sides, {', '.join(pooling)} pooling." if pooling else ""
    head = (
        f"Spearman x 100 on {sets} test; mean ± standard deviation of {its['seeds']} seeds, each with rows and an "
        f"order of its own. Samples are triplets seen, for compression its rows. Seconds are spent training, on "
        f"{record['cpu']}, {record['cpu_count']} cores. `paper, 7B` is another measure: 10 STS sets.{how}\n"
    )
    foot = (
        f"`{record['command']}`; base {base_words(record['base'])}; Python {record['python']}, {versions}\n"
    )
    parts = [head, markdown(*table(summary)), _rates(record["sweep"]), *findings(record), foot]
    (out / "table.md").write_text(
        "\n\n".join(part.strip() for part in parts if part) + "\n", encoding="utf-8"
    )
    chart(out / "results.png", record)


def base_words(base: Mapping[str, Any]) -> str:
    """The base LM in a few words."""
    return f"{base['name']} ({base['parameters']:,} parameters, {base['fingerprint']})"


def _rates(sweep: Mapping[str, Any]) -> str:
    if not sweep:
        return ""
    rows = [
        [
            SYSTEMS[name].title,
            *(
                f"{rate}: {'diverged' if score is None else f'{score:.2f}'}"
                for rate, score in found["STS-B dev"].items()
            ),
        ]
        for name, found in sweep.items()
    ]
    return "Learning rates: STS-B dev, one seed that is none of the measured ones\n\n" + markdown(
        ["system", "low", "middle", "high"], rows
    )


def chart(file: Path, record: Mapping[str, Any]) -> None:
    """A PNG: a panel per set, one curve per system over triplets and epochs, a band of one standard deviation."""
    summary: Summary = record["summary"]
    sets = [name for name in next(iter(summary.values()))["scores"] if name != MEAN]
    figure = Figure(figsize=(5.5 * len(sets), 5.2), layout="constrained")
    all_axes = figure.subplots(1, len(sets), squeeze=False)[0]
    rows = record["settings"]["samples"]
    for axes, one in zip(all_axes, sets, strict=True):
        for number, (name, found) in enumerate(summary.items()):
            _curve(axes, found, one, f"C{number}", SYSTEMS[name].kind)
        axes.set_title(f"{one} test", loc="left", fontsize=10)
        axes.set_xlabel("triplets seen")
        axes.set_ylabel("Spearman x 100")
        axes.spines["right"].set_visible(False)
        epochs = axes.secondary_xaxis("top", functions=(lambda n: n / rows, lambda n: n * rows))
        epochs.set_xlabel("epochs")
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def _curve(axes: Any, found: Mapping[str, Any], one: str, colour: str, kind: str) -> None:  # noqa: ANN401
    mean, spread = (found["scores"][one][name] for name in ("mean", "spread"))
    if kind == "compression":
        # It sees no triplets: its end is where alignment starts.
        axes.axhline(
            mean[-1], color=colour, linestyle=":", label=f"{found['title']} ({found['samples'][-1]:,} rows)"
        )
        return
    style = "--" if kind == "infonce" else "-"
    axes.plot(
        found["samples"], mean, color=colour, linestyle=style, marker="o", markersize=3, label=found["title"]
    )
    if None not in spread:
        low, high = ([m + sign * s for m, s in zip(mean, spread, strict=True)] for sign in (-1, 1))
        axes.fill_between(found["samples"], low, high, color=colour, alpha=0.15, linewidth=0)


def _best(found: Mapping[str, Any]) -> int:
    means = found["scores"][MEAN]["mean"]
    return max(range(len(means)), key=means.__getitem__)


def _figure(found: Mapping[str, Any], one: str, at: int) -> str:
    mean, spread = found["scores"][one]["mean"][at], found["scores"][one]["spread"][at]
    return f"{mean:.2f}" if spread is None else f"{mean:.2f} ± {spread:.2f}"


def _short(name: str) -> str:
    return SYSTEMS[name].title.removeprefix("AutoRegEmbed, ")


def _times(summary: Summary, names: Sequence[str]) -> str:
    seconds = [summary[name]["seconds"] for name in names]
    low, high = f"{min(seconds):.0f}", f"{max(seconds):.0f}"
    return f"{low} s" if low == high else f"{low}-{high} s"
