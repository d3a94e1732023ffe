"""The runs of the learning benchmark: which there are, in what order, and that each is made once.

A run is one system, seed and learning rate. Its result is a JSON file that appears whole or not at all; a run whose
file is there is not made again, and a file that other settings made is an error.
"""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from autoregembed_rag import AutoRegEncoder
from autoregembed_rag.training.checkpoints import write_json
from autoregembed_rag.training.data import Rows
from benchmarks.beir import BenchmarkDataError
from benchmarks.learning_data import Sources, draw_compression, draw_triplets
from benchmarks.learning_systems import (
    SYSTEMS,
    Course,
    Embed,
    Evaluate,
    Learned,
    correlations,
    learn_alignment,
    learn_compression,
    learn_infonce,
)
from benchmarks.sts import Pairs

RATES = {
    "infonce": (3e-4, 1e-3, 3e-3),
    "compression": (1e-4, 3e-4, 1e-3),
    "alignment": (3e-5, 1e-4, 3e-4),
}
"""What the sweep tries; a first look at STS-B dev with the bundled base put the ranges where they are. The paper's
rates, 1e-4 for InfoNCE, 2e-5 and 5e-6 for the two stages, are for 7B parameters."""

SWEEP_SEED = 1000  # none of the measured seeds
PACE_BATCHES = 3
PACE_TEXTS = 128

Phase = Literal["sweep", "main"]


@dataclass(frozen=True)
class Settings:
    """How much of everything.

    Attributes:
        samples: distinct triplets of a run.
        epochs: passes over them.
        compress_samples: rows of stage 1.
        compress_epochs: passes over them.
        sweep_samples: triplets, or rows of stage 1, with which each learning rate is tried, one epoch.
        seeds: runs of each system; a seed draws the rows and their order.
        batch_size: rows per step, of every system.
        max_tokens: of a whole prompt.
        evaluations: per run, evenly spread; the start comes on top.
        device: "auto", "cpu", "cuda", ...
    """

    samples: int = 1024
    epochs: int = 2
    compress_samples: int = 1024
    compress_epochs: int = 1
    sweep_samples: int = 512
    seeds: int = 3
    batch_size: int = 32
    max_tokens: int = 128
    evaluations: int = 4
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("samples", "compress_samples", "sweep_samples"):
            if getattr(self, name) < 1 or getattr(self, name) % self.batch_size:
                raise BenchmarkDataError(
                    f"{name} must be a whole number of batches of {self.batch_size}, not {getattr(self, name)}"
                )
        fewest = (
            min(self.samples * self.epochs, self.compress_samples * self.compress_epochs) // self.batch_size
        )
        if not 1 <= self.evaluations <= fewest:
            raise BenchmarkDataError(
                f"evaluations must be between 1 and the {fewest} steps of the shortest run, not {self.evaluations}"
            )


@dataclass(frozen=True)
class Run:
    """One training of one system."""

    phase: Phase
    system: str
    seed: int
    learning_rate: float

    @property
    def name(self) -> str:
        """Of its file; a sweep has one for each rate."""
        rate = f"-{self.learning_rate:g}" if self.phase == "sweep" else ""
        return f"{self.system}-seed{self.seed}{rate}"


class Runs:
    """All runs over one base, one set of data and one work folder."""

    def __init__(self, settings: Settings, base: Path, sources: Sources, work: Path) -> None:
        """Read the data; `BenchmarkDataError` names what is missing."""
        self.settings = settings
        self.base = base
        self.work = work
        self.triplets = sources.read_triplets()
        self.compression = sources.read_compression()
        self.pairs: dict[Phase, dict[str, Pairs]] = {
            "sweep": sources.read_pairs("dev"),
            "main": sources.read_pairs("test"),
        }
        self.base_fingerprint = AutoRegEncoder.from_base(
            base, device="cpu", max_length=settings.max_tokens
        ).fingerprint
        self._drawn = cache(self._draw)
        for seed in range(settings.seeds):  # too few rows show now, not after an hour
            self._drawn("triplets", settings.samples, seed)
            self._drawn("compression", settings.compress_samples, seed)

    def sweep(self, systems: Sequence[str]) -> dict[str, dict[str, Any]]:
        """STS-B dev of every rate and the best of them, by system; one that diverged counts as none."""
        return {name: self._sweep_of(name) for name in systems}

    def main(self, systems: Sequence[str], rates: dict[str, float]) -> list[dict[str, Any]]:
        """The results of all seeds of all systems."""
        return [
            self.result(Run("main", name, seed, rates[name]), rates)
            for seed in range(self.settings.seeds)
            for name in systems
        ]

    def result(self, run: Run, rates: dict[str, float]) -> dict[str, Any]:
        """Of one run, which is made if it is not there; `rates` says which stage 1 an alignment starts from."""
        course = self._course(run)
        start = None
        if SYSTEMS[run.system].kind == "alignment":
            first = Run(run.phase, "compression", run.seed, rates["compression"])
            start = {**self.result(first, rates), "folder": self._folder(first)}
        identity = self._identity(run, course, start)
        found = self._finished(run, identity)
        if found is None:
            started = time.perf_counter()
            found = {"run": identity, **self._make(run, course, start)}
            write_json(self._file(run), found)
            _report(run, found, time.perf_counter() - started)
        return found

    def expected_seconds(self, systems: Sequence[str], sweep: bool) -> float:
        """How long what is not there yet will take, from a few steps of each system made now."""
        tests = [Run("main", name, seed, 0.0) for seed in range(self.settings.seeds) for name in systems]
        tries = [run for name in systems for run in self._tries(name)] if sweep else []
        missing = [run for run in (*tests, *tries) if not self._file(run).exists()]
        paces = {name: self._pace(name) for name in dict.fromkeys(run.system for run in missing)}
        return sum(self._expected(run, *paces[run.system]) for run in missing)

    def _sweep_of(self, name: str) -> dict[str, Any]:
        chosen = {}
        if SYSTEMS[name].kind == "alignment":
            chosen = {"compression": self._sweep_of("compression")["chosen"]}
        dev = {run.learning_rate: self.result(run, chosen) for run in self._tries(name)}
        scores = {
            rate: found["points"][-1]["scores"]["STS-B"] if "points" in found else None
            for rate, found in dev.items()
        }
        known = {rate: score for rate, score in scores.items() if score is not None}
        if not known:
            raise BenchmarkDataError(
                f"{name} diverged at every learning rate of {list(scores)}: try another base"
            )
        return {
            "STS-B dev": {f"{rate:g}": score for rate, score in scores.items()},
            "chosen": max(known, key=lambda rate: known[rate]),
        }

    def _tries(self, name: str) -> list[Run]:
        return [Run("sweep", name, SWEEP_SEED, rate) for rate in RATES[SYSTEMS[name].kind]]

    def _draw(self, kind: str, count: int, seed: int) -> Rows[Any]:
        if kind == "compression":
            return draw_compression(self.compression, count, seed)
        return draw_triplets(self.triplets, count, seed)

    def _course(self, run: Run, batches: int | None = None) -> Course:
        kind, its = SYSTEMS[run.system].kind, self.settings
        count, epochs, evaluations = its.samples, its.epochs, its.evaluations
        if kind == "compression":
            count, epochs = its.compress_samples, its.compress_epochs
        if run.phase == "sweep":
            count, epochs, evaluations = its.sweep_samples, 1, 1
        if batches is not None:
            count, epochs, evaluations = min(count, batches * its.batch_size), 1, 1
        return Course(
            base=self.base,
            rows=self._drawn("compression" if kind == "compression" else "triplets", count, run.seed),
            epochs=epochs,
            batch_size=its.batch_size,
            learning_rate=run.learning_rate,
            seed=run.seed,
            max_tokens=its.max_tokens,
            device=its.device,
            evaluations=evaluations,
        )

    def _identity(self, run: Run, course: Course, start: dict[str, Any] | None) -> dict[str, Any]:
        return {
            **asdict(run),
            "base": self.base_fingerprint,
            "rows": course.rows.digest,
            "epochs": course.epochs,
            "batch_size": course.batch_size,
            "max_tokens": course.max_tokens,
            "evaluations": course.evaluations,
            "bf16": course.bf16,
            "start": start and start["fingerprint"],
        }

    def _finished(self, run: Run, identity: dict[str, Any]) -> dict[str, Any] | None:
        file = self._file(run)
        if not file.exists():
            return None
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        other = [name for name, value in identity.items() if found["run"].get(name) != value]
        if other:
            changes = ", ".join(f"{name} {found['run'].get(name)!r} -> {identity[name]!r}" for name in other)
            raise BenchmarkDataError(
                f"{file} is of another run ({changes}): give another --work folder, or remove it"
            )
        if run.system == "compression" and "points" in found and not self._folder(run).is_dir():
            return None  # the checkpoint, from which alignments start, was removed
        return found

    def _make(self, run: Run, course: Course, start: dict[str, Any] | None) -> dict[str, Any]:
        pairs = self.pairs[run.phase]

        def evaluate(embed: Embed) -> dict[str, float]:
            return correlations(embed, pairs)

        self._file(run).parent.mkdir(parents=True, exist_ok=True)
        try:
            learned = self._learn(run, course, start, evaluate)
        except FloatingPointError as error:
            if run.phase == "sweep":
                return {"diverged": str(error)}
            raise
        return {**learned._asdict(), "seconds": round(learned.seconds, 1)}

    def _learn(
        self, run: Run, course: Course, start: dict[str, Any] | None, evaluate: Evaluate | None
    ) -> Learned:
        system = SYSTEMS[run.system]
        if system.kind == "infonce":
            return learn_infonce(system, course, evaluate)
        if system.kind == "compression":
            shutil.rmtree(self._folder(run), ignore_errors=True)  # what a run that was broken off left
            return learn_compression(course, self._folder(run), evaluate)
        if start is None:
            return learn_alignment(system, course, None, None, evaluate)
        return learn_alignment(system, course, start["folder"], start["points"][-1]["scores"], evaluate)

    def _pace(self, name: str) -> tuple[float, float]:
        """Seconds of a step, and of embedding a text."""
        texts = sorted({text for pairs in self.pairs["main"].values() for text in pairs.first})
        texts = [texts[i] for i in np.random.default_rng(0).permutation(len(texts))[:PACE_TEXTS]]
        seconds = []

        def embed_some(embed: Embed) -> dict[str, float]:
            started = time.perf_counter()
            embed(texts)
            seconds.append(time.perf_counter() - started)
            return {}

        run = Run("main", name, SWEEP_SEED + 1, RATES[SYSTEMS[name].kind][0])
        course = self._course(run, PACE_BATCHES)
        learned = self._learn(run, course, None, embed_some)
        shutil.rmtree(self._folder(run), ignore_errors=True)
        return learned.seconds / course.steps, seconds[-1] / len(texts)

    def _expected(self, run: Run, step: float, text: float) -> float:
        course = self._course(run)
        pairs = self.pairs[run.phase].values()
        texts = len({sentence for one in pairs for sentence in (*one.first, *one.second)})
        looks = course.evaluations + (SYSTEMS[run.system].kind != "alignment")
        return course.steps * step + looks * texts * text

    def _file(self, run: Run) -> Path:
        return self.work / run.phase / f"{run.name}.json"

    def _folder(self, run: Run) -> Path:
        """Where a compression leaves its checkpoint."""
        return self.work / run.phase / run.name


def _report(run: Run, found: dict[str, Any], seconds: float) -> None:
    if "diverged" in found:
        words = found["diverged"]
    else:
        words = ", ".join(f"{name} {score:.2f}" for name, score in found["points"][-1]["scores"].items())
    print(
        f"{run.phase} {run.system}, seed {run.seed}, rate {run.learning_rate:g}: {words} ({seconds:.0f} s)",
        flush=True,
    )
