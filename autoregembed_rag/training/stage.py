"""A run of one stage: who is trained on what, and the folder in which it goes on if it was interrupted."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.trainer import TRAINER_STATE_NAME

from ..card import write_card
from ..decoder import FrozenDecoder
from ..encoder import AutoRegEncoder
from ..fingerprint import sound_weights_digest, weights_digest
from ..history import RECORD, earlier_stages, stage_history
from ..loading import resolve_dtype
from .arguments import StageArguments
from .checkpoints import (
    CheckpointError,
    check_free,
    check_no_stranger,
    claim,
    clean_up,
    end,
    newest_checkpoint,
    remove_all_but,
    run_of,
    saving,
    sole_writer,
    sync_files,
    write_json,
)
from .data import Rows
from .distributed import check_sharding
from .trainer import Collate, StageTrainer, StepLoss, wait_for_everyone

logger = logging.getLogger(__name__)


class Stage:
    """One run of one stage: who is trained on what, and the folder that remembers how far it is."""

    def __init__(
        self,
        name: str,
        encoder: AutoRegEncoder,
        decoder: FrozenDecoder | None,
        rows: Rows[Any],
        output: str | Path,
        arguments: StageArguments,
        *,
        merge_adapter: bool = False,
    ) -> None:
        """Look into `output`.

        Raises:
            ValueError: it holds something else, a run of other rows, another model or other settings, or other weights
                than its run left; or the decoder cannot read the encoder's vectors.
        """
        if decoder is not None:
            check_pair(encoder, decoder)
        self.encoder = encoder
        self.decoder = decoder
        self.rows = rows
        self.output = Path(output)
        self.arguments = arguments
        self._check_output()
        self.earlier = earlier_stages(encoder._source)
        self.bf16 = computes_in_bf16(encoder, arguments)
        check_sharding(encoder)
        self.trainer_arguments = trainer_arguments(arguments, self.output, encoder.model.device, self.bf16)
        place = self.trainer_arguments.device
        encoder.model.to(place)  # type: ignore[arg-type]
        if decoder is not None:
            decoder.to(place)
        self.identity = {
            "stage": name,
            "encoder": encoder.fingerprint,
            "decoder": None if decoder is None else decoder.fingerprint,
            "rows": rows.digest,
            **arguments.identity(),
            "bf16": self.bf16,
            "encoder_dtype": str(encoder.model.dtype),
            "decoder_dtype": None if decoder is None else str(decoder.model.dtype),
            "processes": self.trainer_arguments.world_size,
            "merge_adapter": merge_adapter and encoder.has_adapter,
        }
        self._cut: set[int] = set()
        self.resumed = newest_checkpoint(self.output)
        self.record = self._record()

    @property
    def finished(self) -> bool:
        """Whether this very run has already ended in `output`."""
        return self.record is not None

    def autocast(self) -> AbstractContextManager[None]:
        """The precision of a step's passes."""
        device = self.trainer_arguments.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.bf16)

    def result(self) -> AutoRegEncoder:
        """The encoder in `output`."""
        model = self.encoder.model
        return AutoRegEncoder.from_pretrained(
            self.output, device=self.trainer_arguments.device, dtype=model.dtype
        )

    def prompts(self, texts: Sequence[tuple[str, str]]) -> list[list[int]]:
        """Prompts for texts, each under an instruction of its own, as `PromptBuilder.build_each` makes them; those
        that were cut are counted, each once."""
        ids = self.encoder.prompts.build_each(texts)
        longest = self.encoder.config.max_length
        for (text, instruction), prompt in zip(texts, ids, strict=True):
            if len(prompt) == longest and self.encoder.prompts.build([text], instruction).cut:
                self._cut.add(hash((text, instruction)))
        return ids

    def claim(self) -> None:
        """Make `output` this run's, before anything is written there.

        CheckpointError: nothing can be.
        """
        wait_for_everyone()  # a process that still looks into the folder would take the claim for somebody else's file
        if self._leads:
            claim(self.output)
        wait_for_everyone()

    def run(self, collate: Collate, step_loss: StepLoss) -> AutoRegEncoder:
        """Train, going on from the newest complete checkpoint, and leave the encoder and a record in `output`.

        Raises:
            CheckpointError: `output` cannot be written, a save failed, or another run is writing there.
            FloatingPointError: the loss or a weight is not finite.
            ValueError: `output` holds checkpoints of something else.
        """
        self.claim()
        with sole_writer(self.output) if self._leads else nullcontext():
            if self._leads:
                self._prepare_output()
            started = time.monotonic()
            if self.resumed is not None:
                if self._leads:
                    logger.info("going on from %s", self.resumed)
                self.encoder.load_weights(self.resumed)
            log = self._log_of_all_steps()
            if log is None:
                log = self._train(collate, step_loss)
                self._warn_of_cut_texts()
            elif self._leads:
                with saving(self.output):
                    self.encoder.save_pretrained(self.output, card=False)
            if self._leads:
                with saving(self.output):
                    self._finish(log, time.monotonic() - started)
        wait_for_everyone()
        return self.result()

    @property
    def _leads(self) -> bool:
        return bool(self.trainer_arguments.process_index == 0)

    def _check_output(self) -> None:
        """ValueError where the result would take the place of something else, such as a model that the run needs."""
        for model in (self.encoder._source, self.encoder.config.decoder):
            if model is not None and Path(model).resolve() == self.output.resolve():
                raise ValueError(
                    f"{self.output} is the model to be trained, or its decoder: give another output folder"
                )
        check_free(self.output)

    def _prepare_output(self) -> None:
        check_no_stranger(self.output)
        if (self.output / RECORD).exists() or newest_checkpoint(self.output) != self.resumed:
            raise CheckpointError(
                f"another run has written below {self.output} since this one began: run the same command again"
            )
        remove_all_but(self.resumed, self.output)

    def _log_of_all_steps(self) -> list[dict[str, float]] | None:
        """The log in the last checkpoint of all; None if there are steps to go, for Trainer takes one at least."""
        if self.resumed is None:
            return None
        state = TrainerState.load_from_json(str(self.resumed / TRAINER_STATE_NAME))
        return state.log_history if state.global_step >= state.max_steps else None

    def _train(self, collate: Collate, step_loss: StepLoss) -> list[dict[str, float]]:
        """Train and save; Trainer's log."""
        trainer = StageTrainer(self, collate, step_loss)
        body, recompute = self.encoder.model, self.arguments.gradient_checkpointing
        if recompute:
            recompute_activations(body)
        self._compile()
        try:
            trainer.train(resume_from_checkpoint=None if self.resumed is None else str(self.resumed))
        finally:
            if recompute:
                recompute_activations(body, False)
            body.train(False)
        trainer.check_weights(cast(nn.Module, trainer.model))
        with saving(self.output):
            trainer.save_model(str(self.output))
        return trainer.state.log_history

    def _warn_of_cut_texts(self) -> None:
        if self._cut and self._leads:
            logger.warning(
                "%d texts were cut to fit into prompts of %d tokens: split long texts, or raise max_length",
                len(self._cut),
                self.encoder.config.max_length,
            )

    def _finish(self, log: list[dict[str, float]], seconds: float) -> None:
        if self.identity["merge_adapter"]:
            merged = AutoRegEncoder.from_pretrained(self.output, device="cpu", dtype="float32")
            merged.save_pretrained(self.output, card=False)
        sync_files(self.output)
        record = {
            "run": self.identity,
            "weights": weights_digest(self.output),
            "rows": len(self.rows),
            "seconds": round(seconds, 1),
            "versions": {name: version(name) for name in ("autoregembed-rag", "torch", "transformers")},
            "losses": [entry for entry in log if "loss" in entry],
            "earlier": self.earlier,
        }
        write_card(self.encoder, self.output, stage_history(record))
        write_json(self.output / RECORD, record)
        end(self.output)

    def _compile(self) -> None:
        if not self.arguments.torch_compile:
            return
        self.encoder.model.compile(dynamic=True)
        if self.decoder is not None:
            self.decoder.model.base_model.compile(dynamic=True)

    def _record(self) -> dict[str, Any] | None:
        """What a finished run left; ValueError if that, or a checkpoint, is another run's, or the weights are."""
        file = self.output / RECORD
        record = read_record(self.output) if file.exists() else None
        if record is not None:
            self._check_same(record["run"], file)
            self._check_weights(record)
            if self._leads:
                clean_up(self.output)
                logger.info("%s holds the result of this very run already", self.output)
        elif self.resumed is not None:
            self._check_same(run_of(self.resumed), self.resumed)
        return record

    def _check_weights(self, record: dict[str, Any]) -> None:
        if sound_weights_digest(self.output) != record.get("weights"):
            raise ValueError(
                f"the weights in {self.output} are not those that this run left there: give another output folder, or "
                "empty this one to train again"
            )

    def _check_same(self, found: dict[str, Any], where: Path) -> None:
        other = {
            name for name in self.identity.keys() | found.keys() if self.identity.get(name) != found.get(name)
        }
        if other:
            changes = ", ".join(
                f"{name} {found.get(name)!r} -> {self.identity.get(name)!r}" for name in sorted(other)
            )
            raise ValueError(
                f"{where} is of another run ({changes}): give another output folder, go on with the same settings, or "
                "empty this one"
            )


def trainer_arguments(
    settings: StageArguments, output: Path, device: torch.device, bf16: bool
) -> TrainingArguments:
    """`settings` in the words of transformers' Trainer; ValueError for reports that cannot be made here."""
    _check_reports(settings.report_to)
    arguments = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler,
        warmup_steps=settings.warmup_ratio,
        optim=settings.optim,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=bf16,
        use_cpu=device.type == "cpu",
        seed=settings.seed,
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        report_to=settings.report_to,
        save_strategy="no" if settings.save_steps is None else "steps",
        save_steps=settings.save_steps or 500,
        ddp_find_unused_parameters=False,
    )
    # One process drives one GPU; `torchrun` or `accelerate launch` start one for each.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _check_reports(report_to: str) -> None:
    known = ["none", "all", *get_available_reporting_integrations()]  # type: ignore[no-untyped-call]
    if report_to not in known:
        raise ValueError(
            f"report_to={report_to!r} is not installed, or not known: install it, or use one of {', '.join(known)}"
        )


def recompute_activations(model: PreTrainedModel, on: bool = True) -> None:
    """Have `model` compute its activations again in the backward pass, or no longer."""
    # Transformers 5.23 gave the methods a new name.
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on:
        getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{kind}_checkpointing_disable")()


def read_record(output: str | Path) -> dict[str, Any]:
    """What a finished stage left in its output folder: settings, weights, rows, seconds, versions, losses."""
    file = Path(output, RECORD)
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("run"), dict):
        raise ValueError(f"{file} is damaged, or no record of a training run: give another output folder")
    return record


def computes_in_bf16(encoder: AutoRegEncoder, arguments: StageArguments) -> bool:
    """What `bf16` means on the encoder's device."""
    if arguments.bf16 is not None:
        return arguments.bf16
    return resolve_dtype("auto", encoder.model.device) == torch.bfloat16


def check_pair(encoder: AutoRegEncoder, decoder: FrozenDecoder) -> None:
    """ValueError if the decoder cannot read the encoder's vectors."""
    if encoder.hidden_size != decoder.hidden_size:
        raise ValueError(
            f"the encoder's vectors have {encoder.hidden_size} dimensions and the decoder reads "
            f"{decoder.hidden_size}: use the base model that the encoder was made from"
        )
