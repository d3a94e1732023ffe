"""What a fine-tuning run is about to do and how long that takes, by a short measurement.

Measured are forward and backward passes over real batches, short, middling and long ones, without an update: the passes
that each stage makes, with a loss that stands in for its own. Optimizer steps and saves are not in the estimate.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..decoder import FrozenDecoder
from ..encoder import AutoRegEncoder
from ..losses import DIVERGENCES
from ..pooling import pool
from ..training.arguments import AlignmentArguments, CompressionArguments, StageArguments
from ..training.data import Rows
from ..training.stage import computes_in_bf16
from ..training.trainer import Compressor, Distinct
from .evaluation import FEW_QUERIES, FEWEST, Evaluation

QUANTILES = (1 / 6, 1 / 2, 5 / 6)
"""Where batches are taken from rows in the order of their lengths: the middles of three thirds."""

ENCODED = 32
"""Texts encoded to see how long the evaluation takes."""

FEW, LONG = 4, 2.0
"""Rows that stand for a whole batch where that would take more seconds than LONG."""

SAVED = 300.0
"""Seconds between checkpoints, about, if the stage's own settings do not ask for more of them."""

FIRST_SHARE = 0.75
"""Of a limited time, for the contrast stage: in a few minutes the other two move retrieval little."""

LOGGED = 50
"""Points of a loss curve, about."""


@dataclass(frozen=True)
class Speed:
    """Seconds of one optimizer step, and of what is done once for every row before (reference scores)."""

    step: float
    row: float = 0.0


@dataclass(frozen=True)
class StagePlan:
    """One stage: how many different rows in how many steps, and the estimated seconds."""

    name: str
    rows: int
    steps: int
    seconds: float

    def apply(self, arguments: StageArguments) -> StageArguments:
        """`arguments` with these steps, a log line every fiftieth of them and a checkpoint every few minutes."""
        often = max(1, int(self.steps * SAVED / self.seconds))
        return replace(
            arguments,
            max_steps=self.steps,
            logging_steps=max(1, self.steps // LOGGED),
            save_steps=None if arguments.save_steps is None else min(arguments.save_steps, often),
        )


@dataclass(frozen=True)
class Plan:
    """A whole run.

    Attributes:
        kind: what the path was taken for.
        counts: how many of what was found.
        stages: in order.
        evaluation: estimated seconds of measuring retrieval before and after.
        minutes: that were asked for; None is as long as it takes.
    """

    kind: str
    counts: Mapping[str, int]
    stages: tuple[StagePlan, ...]
    evaluation: float
    minutes: float | None = None

    @property
    def seconds(self) -> float:
        """All of it, estimated."""
        return self.evaluation + sum(stage.seconds for stage in self.stages)

    @property
    def facts(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "counts": dict(self.counts), "stages": [asdict(s) for s in self.stages]}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Plan:
        """The plan whose `facts` these are."""
        return cls(**{**facts, "stages": tuple(StagePlan(**stage) for stage in facts["stages"])})

    def __str__(self) -> str:
        found = [f"  {name}: {count:,}" for name, count in self.counts.items()]
        stages = [
            f"  {s.name}: {s.steps:,} steps, {s.rows:,} rows, about {duration(s.seconds)}"
            for s in self.stages
        ]
        return "\n".join(
            [
                f"found ({self.kind}):",
                *found,
                "stages:",
                *stages,
                f"  retrieval before and after: about {duration(self.evaluation)}",
                f"estimated time: {duration(self.seconds)}",
                *self._doubts(),
            ]
        )

    def _doubts(self) -> Iterator[str]:
        """What to mend before time is spent on it."""
        if self.minutes is not None and self.seconds > 1.001 * 60 * self.minutes:
            yield (
                f"{self.minutes:g} minutes do not suffice, every stage takes a step even so: give more time, or train "
                "fewer stages"
            )
        if self.counts.get("held-out queries", FEWEST) < FEWEST:
            yield FEW_QUERIES


def duration(seconds: float) -> str:
    """In words: "40 s", "12 min", "3.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def plan_stage(
    name: str, rows: int, arguments: StageArguments, speed: Speed, budget: float | None = None
) -> StagePlan:
    """All epochs, or as many steps as take `budget` seconds, at least one.

    A stage with too little time for a whole epoch gets no more rows than it reads.
    """
    batch = arguments.batch_size * arguments.gradient_accumulation_steps
    epoch = -(-rows // batch)
    steps = max(1, int(np.ceil(epoch * arguments.epochs)))
    steps = steps if arguments.max_steps is None else min(steps, arguments.max_steps)
    if budget is not None:
        whole = (budget - rows * speed.row) / speed.step
        partial = budget / (speed.step + batch * speed.row)
        steps = max(1, min(steps, int(whole if whole >= epoch else min(partial, epoch))))
    used = min(rows, steps * batch)
    return StagePlan(name, used, steps, steps * speed.step + used * speed.row)


def share_out(wanted: Mapping[str, float], total: float) -> dict[str, float]:
    """What each gets of `total`: all that it wants, or an equal share of what the more modest leave."""
    granted, left = {}, max(0.0, total)
    for i, name in enumerate(sorted(wanted, key=lambda name: wanted[name])):
        granted[name] = min(wanted[name], left / (len(wanted) - i))
        left -= granted[name]
    return granted


def plan_stages(
    rows: Mapping[str, int],
    arguments: Mapping[str, StageArguments],
    speeds: Mapping[str, Speed],
    budget: float | None,
) -> tuple[StagePlan, ...]:
    """All stages within `budget` seconds together; None is as long as they want."""
    full = {name: plan_stage(name, rows[name], arguments[name], speeds[name]) for name in arguments}
    if budget is None:
        return tuple(full.values())
    granted = _grants({name: stage.seconds for name, stage in full.items()}, budget)
    return tuple(
        plan_stage(name, rows[name], arguments[name], speeds[name], granted[name])
        if granted[name] < full[name].seconds
        else full[name]
        for name in arguments
    )


def _grants(wanted: Mapping[str, float], budget: float) -> dict[str, float]:
    """Most of a short time goes to the stage that trains what is searched by, the rest to the others."""
    first = {"contrast": min(wanted["contrast"], FIRST_SHARE * budget)} if "contrast" in wanted else {}
    others = {name: seconds for name, seconds in wanted.items() if name not in first}
    # All of it, if there is no other stage.
    first = first if others else {"contrast": budget}
    return {**first, **share_out(others, budget - sum(first.values()))}


def measure_stage(
    encoder: AutoRegEncoder, decoder: FrozenDecoder | None, rows: Rows[Any], arguments: StageArguments
) -> Speed:
    """The speed of a stage on this machine, from three batches after one to warm up.

    A machine on which a whole batch takes long gets a few rows instead, and time is taken to grow with them: so it
    does there. `decoder` is None for the contrast stage, which has none. Both stay as they are.
    """
    order = np.argsort(rows.lengths, kind="stable")
    whole = min(arguments.batch_size, len(rows))

    def batch_at(quantile: float, size: int) -> list[Any]:
        start = int(quantile * (len(rows) - size))
        return [rows[int(i)] for i in order[start : start + size]]

    compressor = Compressor(encoder)
    device = encoder.model.device.type
    bf16 = computes_in_bf16(encoder, arguments)

    def seconds(batch: list[Any], *, backward: bool) -> float:
        _finish(device)
        started = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=bf16), torch.set_grad_enabled(backward):
            loss = _stand_in(encoder, decoder, compressor, batch, arguments, reference=not backward)
        if backward:
            loss.backward()  # type: ignore[no-untyped-call]
        _finish(device)
        encoder.model.zero_grad(set_to_none=True)
        return time.perf_counter() - started

    few = min(FEW, whole)
    seconds(batch_at(0, few), backward=True)
    probe = seconds(batch_at(0.5, few), backward=True)
    size = few if probe / few * whole > LONG else whole
    batches = [batch_at(quantile, size) for quantile in QUANTILES]
    passes = [seconds(batch, backward=True) for batch in batches]
    row = float(np.mean(passes)) / size
    referenced = isinstance(arguments, AlignmentArguments) and arguments.similarity not in DIVERGENCES
    reference = [seconds(batch, backward=False) for batch in batches] if referenced else [0.0]
    rows_of_step = min(arguments.batch_size * arguments.gradient_accumulation_steps, len(rows))
    return Speed(row * rows_of_step, float(np.mean(reference)) / size)


def _stand_in(
    encoder: AutoRegEncoder,
    decoder: FrozenDecoder | None,
    compressor: Compressor,
    batch: Sequence[Any],
    arguments: StageArguments,
    *,
    reference: bool,
) -> Tensor:
    """A scalar that takes the passes of the stage's own loss; of its reference scores if `reference`."""
    words = encoder.config
    if isinstance(arguments, CompressionArguments):
        assert decoder is not None  # noqa: S101
        prompts = encoder.prompts.build_each([(row.context, row.instruction) for row in batch])
        states = compressor(prompts)
        return decoder.target_log_probs(states, decoder.target_ids([row.output for row in batch])).sum()
    distinct: Distinct[tuple[str, str]] = Distinct()
    queries = [distinct.add((row.query, words.query_instruction)) for row in batch]
    documents = [] if reference else [distinct.add((row.pos, words.document_instruction)) for row in batch]
    if decoder is None:
        for row in batch:
            for text in row.neg:
                distinct.add((text, words.document_instruction))
    states = compressor(encoder.prompts.build_each(list(distinct)))
    if decoder is None:
        vectors = pool(states, words.pooling)
        return (vectors[queries] @ vectors.T).logsumexp(dim=1).sum()
    assert isinstance(arguments, AlignmentArguments)  # noqa: S101
    negatives = arguments.num_negatives + arguments.in_batch_negatives
    others = [row.pos for row in [*batch[1:], batch[0]]] * negatives
    pairs = queries * (1 + negatives) + documents
    targets = [row.pos for row in batch] + others + ([] if reference else [row.pos for row in batch])
    return decoder.target_log_probs(states[pairs], decoder.target_ids(targets)).sum()


def measure_evaluation(encoder: AutoRegEncoder, evaluation: Evaluation) -> float:
    """Estimated seconds of encoding queries and corpus once."""
    texts = sorted(evaluation.corpus.values(), key=len)
    sample = texts[:: -(-len(texts) // ENCODED)]
    encoder.encode_documents(sample[:8])
    started = time.perf_counter()
    encoder.encode_documents(sample)
    return (time.perf_counter() - started) / len(sample) * (len(texts) + len(evaluation.queries))


def _finish(device: str) -> None:
    """Wait for what a device computes beside the program."""
    if device == "cuda":
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()
