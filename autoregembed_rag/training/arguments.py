"""Hyperparameters of both stages; the defaults are the paper's (appendix A)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ..losses import Similarity


@dataclass(frozen=True)
class StageArguments:
    """What both stages share.

    Attributes:
        learning_rate: peak of a cosine schedule.
        batch_size: rows per step and device.
        epochs: passes over the data.
        max_steps: steps at most; None is as many as `epochs` asks for.
        gradient_accumulation_steps: batches per optimizer step.
        warmup_ratio: share of all steps that warms up.
        weight_decay: AdamW's.
        bf16: compute in bfloat16 (weights stay float32); None is wherever the hardware has it.
        seed: of the order of rows.
        save_steps: steps between checkpoints, from which an interrupted run goes on; None: only at the end.
        logging_steps: steps between log lines.
    """

    learning_rate: float
    batch_size: int = 32
    epochs: float = 1.0
    max_steps: int | None = None
    gradient_accumulation_steps: int = 1
    warmup_ratio: float = 0.05
    weight_decay: float = 0.0
    bf16: bool | None = None
    seed: int = 0
    save_steps: int | None = None
    logging_steps: int = 10

    def __post_init__(self) -> None:
        for name in ("learning_rate", "batch_size", "epochs", "gradient_accumulation_steps", "logging_steps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(
                f"warmup_ratio is a share of all steps, between 0 and 1, not {self.warmup_ratio}"
            )

    def for_trainer(self, output: Path, device: torch.device, bf16: bool) -> TrainingArguments:
        """The same, in the words of transformers' Trainer."""
        saving: dict[str, Any] = {"save_strategy": "no"}
        if self.save_steps is not None:
            saving = {"save_strategy": "steps", "save_steps": self.save_steps, "save_total_limit": 2}
        return TrainingArguments(
            output_dir=str(output),
            per_device_train_batch_size=self.batch_size,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            num_train_epochs=self.epochs,
            max_steps=self.max_steps or -1,
            learning_rate=self.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=self.warmup_ratio,
            weight_decay=self.weight_decay,
            bf16=bf16 if self.bf16 is None else self.bf16,
            use_cpu=device.type == "cpu",
            seed=self.seed,
            logging_steps=self.logging_steps,
            logging_nan_inf_filter=False,
            remove_unused_columns=False,
            report_to="none",
            **saving,
        )


@dataclass(frozen=True)
class CompressionArguments(StageArguments):
    """Stage 1, information compression: learning rate 2e-5, batch 32, 2 epochs."""

    learning_rate: float = 2e-5
    epochs: float = 2.0


@dataclass(frozen=True)
class AlignmentArguments(StageArguments):
    """Stage 2, conditional distribution alignment: learning rate 5e-6, batch 32, 4 epochs.

    Attributes:
        beta: scale of differences of log-probabilities.
        temperature: tau of the softmax.
        similarity: "sigmoid" (equation 2) or "log_sigmoid" (appendix B).
        num_negatives: N; a row with fewer gets positives of other rows, chosen by `seed`.
    """

    learning_rate: float = 5e-6
    epochs: float = 4.0
    beta: float = 0.1
    temperature: float = 0.1
    similarity: Similarity = "sigmoid"
    num_negatives: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta", "temperature", "num_negatives"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")


def newest_checkpoint(output: Path) -> str | None:
    """The newest complete `checkpoint-N` below `output`; None where there is none.

    Trainer writes trainer_state.json after everything else, so a folder without it was cut short.
    """
    complete = [p.parent for p in output.glob("checkpoint-*/trainer_state.json")]
    return str(max(complete, key=lambda p: int(p.name.split("-")[1]))) if complete else None
