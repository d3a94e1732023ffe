"""Fine-tuning on somebody's own corpus: data, a plan, the stages, and whether retrieval became better.

Notable decisions:
- better is what `evaluation.compare` calls better, on documents or queries that training never saw; a model that is
  not is kept for inspection and never called better;
- one process; a run that was killed goes on in the same output folder with the plan that it began with, and its scores
  before training are measured once;
- every stage starts from the folder that the one before it left, so that no two encoders are in memory while it trains;
- a checkpoint is not replaced by what was trained but met half way, see `weights.blend_weights`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from pathlib import Path
from types import NoneType
from typing import Any, cast

from ..card import write_card
from ..config import DECODER_FOLDER
from ..decoder import FrozenDecoder
from ..encoder import AutoRegEncoder
from ..history import REPORT, earlier_stages, read_history
from ..loading import BUNDLED, resolve_folder
from ..training.alignment import train_alignment
from ..training.arguments import AlignmentArguments, CompressionArguments, ContrastArguments, StageArguments
from ..training.checkpoints import sole_writer
from ..training.compression import train_compression
from ..training.contrast import train_contrast
from ..training.data import Rows, alignment_rows, compression_rows
from ..training.stage import read_record
from ..weights import blend_weights
from .corpus import CorpusArguments, Prepared, prepare, prepare_documents, prepare_judged
from .curves import new_figure
from .documents import Document
from .evaluation import Scores, compare, retrieval_score
from .judged import Judged
from .models import is_base, load_encoder, load_pair
from .planning import Plan, StagePlan, measure_evaluation, measure_stage, plan_stages
from .report import FinetuneReport
from .state import (
    EVENTS,
    STAGES,
    check_output,
    read_before,
    read_plan,
    remove_remains,
    stages_done,
    write_before,
    write_plan,
)

logger = logging.getLogger(__name__)


DEFAULT_BLEND = 0.5
"""Share of the trained weights in what becomes of a checkpoint."""

NUMBERS = {
    "minutes": (Real, NoneType),
    "held_out": (Real,),
    "max_tokens": (Integral, NoneType),
    "lora": (Integral, NoneType),
    "blend": (Real, NoneType),
    "seed": (Integral,),
}
"""What the numbers among the settings may be."""

Source = str | Path | Sequence[Document] | Judged
"""A path as `corpus.prepare` takes it, documents, or a judged corpus whose train queries are also held out from."""


@dataclass(frozen=True)
class FinetuneArguments:
    """How to fine-tune; a stage that is None is left out.

    Attributes:
        compression: stage 1, at the paper's rate.
        alignment: stage 2, at the paper's rate.
        contrast: a last stage that trains the cosines of retrieval, which the paper does not have.
        minutes: for everything together; most of it goes to the contrast stage. None: all epochs of every stage.
        held_out: share of the documents, or of labelled queries, that training does not see.
        max_tokens: of a passage; None is as many as the encoder reads.
        use_labels: False takes the documents of a BEIR folder alone.
        lora: rank of an adapter to train instead of all weights; the result is merged. Needs a base language model or
            a checkpoint that is an adapter. None: all weights.
        blend: share of the trained weights in the result, in (0, 1]; the rest is the weights' before training. None:
            a half if `model` is a checkpoint, all if it is a base language model.
        seed: decides what is held out, which rows a short stage reads, and everything that the stages draw.

    Raises TypeError or ValueError, naming the setting, for one that cannot be used.
    """

    compression: CompressionArguments | None = field(default_factory=CompressionArguments)
    alignment: AlignmentArguments | None = field(default_factory=AlignmentArguments)
    contrast: ContrastArguments | None = field(default_factory=ContrastArguments)
    minutes: float | None = None
    held_out: float = 0.1
    max_tokens: int | None = None
    use_labels: bool = True
    lora: int | None = None
    blend: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.compression or self.alignment or self.contrast):
            raise ValueError("no stage is left to train: give compression, alignment or contrast")
        for name, kind in NUMBERS.items():
            if not isinstance(getattr(self, name), kind):
                what = "a whole number" if Integral in kind else "a number"
                raise TypeError(f"{name} must be {what}, not {getattr(self, name)!r}")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise ValueError(f"minutes must be above 0 and finite, not {self.minutes}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must be between 0 and 1, not {self.held_out}: 0.1 holds out a tenth")
        if self.blend is not None and not 0 < self.blend <= 1:
            raise ValueError(f"blend must be above 0 and at most 1, not {self.blend}: 0.5 averages")
        for name in ("max_tokens", "lora"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be at least 0 and below 2^32, not {self.seed}")

    @property
    def stages(self) -> dict[str, StageArguments]:
        """The stages that run, in order, under the seed of the whole."""
        chosen = {"compression": self.compression, "alignment": self.alignment, "contrast": self.contrast}
        return {name: replace(s, seed=self.seed) for name, s in chosen.items() if s is not None}

    def identity(self) -> dict[str, Any]:
        """What decides the result."""
        whole = ("minutes", "held_out", "max_tokens", "use_labels", "lora", "blend", "seed")
        stages = dict.fromkeys(("compression", "alignment", "contrast"))
        return {
            **{name: getattr(self, name) for name in whole},
            **stages,
            **{name: settings.identity() for name, settings in self.stages.items()},
        }


def finetune(
    source: Source,
    output: str | Path,
    model: str | Path = "mini",
    arguments: FinetuneArguments | None = None,
    *,
    device: str = "auto",
    announce: Callable[[str], object] = logger.info,
) -> FinetuneReport:
    """Fine-tune `model` on a corpus and measure on a held-out part of it whether retrieval became better.

    The corpus is held in memory. An interrupted run goes on with the same call; a finished one returns its report.

    Args:
        source: a folder or file of documents, labelled pairs, a BEIR folder (see `corpus.prepare`), or documents or a
            judged corpus in memory.
        output: folder for the checkpoint, `report.json`, `losses.png` and TensorBoard's events in `runs`; new or empty.
        model: a checkpoint (bundled name, folder or hub id), or a base language model.
        arguments: what to train and how long; by default `default_arguments(model)`.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        announce: is given the plan as text, before anything is trained, and before that a line if a run goes on.

    Returns:
        Scores before and after; the trained encoder is in `output`.

    Raises:
        ImportError: matplotlib or ir-measures is missing; both come with the extra `train`.
        FileNotFoundError: there is no such path or model.
        TypeError: the source is of another type.
        ValueError: the path holds nothing to train on or too little to hold out; `output` holds something else, a run
            of other data or settings, or other weights than its run left; this is one of several processes.
        FloatingPointError, MemoryError, CheckpointError: as `train_compression` does.
    """
    arguments = arguments or default_arguments(model)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "finetune runs in one process: under torchrun use train_compression and train_alignment"
        )
    new_figure(1)  # says now, not after the training, that matplotlib is missing
    output = Path(output)
    check_output(output)
    run = _Run(source, output, model, arguments, device)
    output.mkdir(parents=True, exist_ok=True)
    with sole_writer(output):
        return run.finish(announce)


class _Run:
    """One call: what was prepared, and where it is written."""

    def __init__(
        self, source: Source, output: Path, model: str | Path, arguments: FinetuneArguments, device: str
    ) -> None:
        self.output, self.model, self.arguments, self.device = output, model, arguments, device
        self.encoder = load_encoder(model, device)
        self.prepared = _prepared(source, self.encoder, arguments)
        self.rows: dict[str, Rows[Any]] = {
            "compression": compression_rows(self.prepared.compression),
            "alignment": (pairs := alignment_rows(self.prepared.alignment)),
            "contrast": pairs,
        }
        self.identity = {
            "model": self.encoder.fingerprint,
            "data": self._digest(),
            **arguments.identity(),
        }

    def finish(self, announce: Callable[[str], object]) -> FinetuneReport:
        """Do what is left to do."""
        begun = read_plan(self.output, self.identity)
        if begun is not None and (self.output / REPORT).exists():
            report = FinetuneReport.load(self.output)
            shutil.rmtree(self.output / STAGES, ignore_errors=True)
            return report
        plan = begun or self._new_plan()
        if begun is not None:
            remove_remains(self.output)
            done = f"{stages_done(self.output)} of {len(plan.stages)} stages are done"
            announce(f"going on with the run that {self.output} holds: {done}")
        announce(str(plan))
        started = time.monotonic()
        before = self._before()
        del self.encoder
        last: str | Path = self.model
        for stage in plan.stages:
            last = self._train(stage, last)
        self._with_decoder(self._blended(last)).save_pretrained(self.output, card=False)
        trained = AutoRegEncoder.from_pretrained(self.output, device=self.device, dtype="float32")
        after = retrieval_score(trained, self.prepared.evaluation, show_progress=True)
        report = FinetuneReport(
            before=before,
            after=after,
            comparison=compare(before, after, seed=self.arguments.seed),
            plan=plan,
            losses={s.name: read_record(self._folder(s.name))["losses"] for s in plan.stages},
            seconds=time.monotonic() - started,
            fingerprint=trained.fingerprint,
        )
        report.save(self.output)
        write_card(trained, self.output, read_history(self.output))
        shutil.rmtree(self.output / STAGES)
        return report

    def _digest(self) -> str:
        evaluation = self.prepared.evaluation
        held_out = json.dumps([dict(evaluation.queries), dict(evaluation.corpus), dict(evaluation.qrels)])
        parts = [self.rows["compression"].digest, self.rows["alignment"].digest, held_out]
        return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()

    def _folder(self, stage: str) -> Path:
        return self.output / STAGES / stage

    def _new_plan(self) -> Plan:
        """Measured, and kept for calls that go on."""
        stages = self.arguments.stages
        evaluation = 2 * measure_evaluation(self.encoder, self.prepared.evaluation)
        encoder, decoder = self._pair(self.model, decoder=set(stages) != {"contrast"})
        speeds = {
            name: measure_stage(encoder, None if name == "contrast" else decoder, self.rows[name], settings)
            for name, settings in stages.items()
        }
        minutes = self.arguments.minutes
        budget = None if minutes is None else 60 * minutes - evaluation
        planned = plan_stages({name: len(self.rows[name]) for name in stages}, stages, speeds, budget)
        plan = Plan(self.prepared.kind, self.prepared.counts, planned, evaluation, minutes)
        write_plan(self.output, self.identity, plan, earlier_stages(resolve_folder(self.model)))
        return plan

    def _before(self) -> Scores:
        """Measured once for all calls that go on in this folder."""
        scores = read_before(self.output, self.prepared.evaluation)
        if scores is None:
            scores = retrieval_score(self.encoder, self.prepared.evaluation, show_progress=True)
            write_before(self.output, scores)
        return scores

    def _pair(self, start: str | Path, *, decoder: bool) -> tuple[AutoRegEncoder, FrozenDecoder | None]:
        """What a stage trains, from the model `start`."""
        lora, seed = self.arguments.lora, self.arguments.seed
        return load_pair(start, self.device, lora=lora, seed=seed, decoder=decoder)

    def _train(self, stage: StagePlan, start: str | Path) -> Path:
        """Run a stage from the model `start`; the folder of what came out."""
        folder = self._folder(stage.name)
        reports = "tensorboard" if importlib.util.find_spec("tensorboard") else "none"
        settings = replace(stage.apply(self.arguments.stages[stage.name]), report_to=reports)
        rows = self._rows(stage)
        encoder, decoder = self._pair(start, decoder=stage.name != "contrast")
        with _events(self.output / EVENTS / stage.name):
            if stage.name == "contrast":
                train_contrast(encoder, rows, folder, cast(ContrastArguments, settings))
            else:
                assert decoder is not None  # noqa: S101
                if stage.name == "alignment":
                    train_alignment(encoder, decoder, rows, folder, cast(AlignmentArguments, settings))
                else:
                    train_compression(encoder, decoder, rows, folder, cast(CompressionArguments, settings))
        return folder

    def _blended(self, last: str | Path) -> AutoRegEncoder:
        """What the last stage left, averaged with the weights before training."""
        trained = AutoRegEncoder.from_pretrained(last, device="cpu", dtype="float32")
        share = self.arguments.blend or (1.0 if is_base(self.model) else DEFAULT_BLEND)
        if share < 1:
            blend_weights(trained.model, load_encoder(self.model, "cpu").model.state_dict(), share)
        return trained

    def _with_decoder(self, trained: AutoRegEncoder) -> AutoRegEncoder:
        """With a copy of a decoder that is part of this package: another release may bundle another."""
        decoder = trained.config.decoder
        if decoder is not None and Path(decoder).is_relative_to(BUNDLED):
            copy = self.output.resolve() / DECODER_FOLDER
            shutil.copytree(decoder, copy, dirs_exist_ok=True)
            trained.config = replace(trained.config, decoder=str(copy))
        return trained

    def _rows(self, stage: StagePlan) -> Rows[Any]:
        """All rows of a stage, or a random part of them where it is too short for all."""
        rows = self.rows[stage.name]
        if stage.rows == len(rows):
            return rows
        chosen = random.Random(self.arguments.seed).sample(range(len(rows)), stage.rows)
        part = [rows[i] for i in sorted(chosen)]
        return compression_rows(part) if stage.name == "compression" else alignment_rows(part)


def _prepared(source: Source, encoder: AutoRegEncoder, arguments: FinetuneArguments) -> Prepared:
    most = encoder.max_text_tokens
    settings = CorpusArguments(
        count_tokens=encoder.count_tokens,
        max_tokens=most if arguments.max_tokens is None else min(most, arguments.max_tokens),
        seed=arguments.seed,
        held_out=arguments.held_out,
        query_instruction=encoder.config.query_instruction,
        document_instruction=encoder.config.document_instruction,
    )
    if isinstance(source, Judged):
        return prepare_judged(source, settings)
    if isinstance(source, str | Path):
        return prepare(source, settings, use_labels=arguments.use_labels)
    _check_documents(source)
    return prepare_documents(source, settings)


def _check_documents(source: object) -> None:
    if not isinstance(source, Sequence):
        raise TypeError(f"a path, a list of documents or a Judged is needed, not {type(source).__name__}")
    for number, document in enumerate(source, start=1):
        if not isinstance(document, Document):
            raise TypeError(
                f"document {number} is a {type(document).__name__}: make a Document of it, for example with "
                "documents.plain_document(id, title, text)"
            )


def default_arguments(model: str | Path) -> FinetuneArguments:
    """All three stages for a base language model. A checkpoint has the paper's two behind it: the contrast stage."""
    if is_base(model):
        return FinetuneArguments()
    return FinetuneArguments(compression=None, alignment=None)


@contextmanager
def _events(folder: Path) -> Iterator[None]:
    """Inside, TensorBoard's events go to `folder`: Trainer takes it from the environment alone."""
    name = "TENSORBOARD_LOGGING_DIR"
    earlier = os.environ.get(name)
    os.environ[name] = str(folder)
    try:
        yield
    finally:
        if earlier is None:
            del os.environ[name]
        else:
            os.environ[name] = earlier
