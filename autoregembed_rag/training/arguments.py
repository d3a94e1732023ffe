"""Hyperparameters of every stage; the defaults are the paper's (appendix A). Imports no PyTorch: the command line
makes its options of them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from numbers import Integral
from typing import Any, Literal, get_args

AlignmentSimilarity = Literal["sigmoid", "log_sigmoid", "kl", "js"]
# Transformers' schedules that need nothing else: others want settings of their own, or an evaluation.
SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)
# What does not change the weights that come out: an interrupted run may go on with others.
NEUTRAL = ("save_steps", "logging_steps", "report_to")


@dataclass(frozen=True)
class StageArguments:
    """What all stages share.

    Attributes:
        learning_rate: peak of the schedule.
        batch_size: rows per device and forward pass.
        epochs: passes over the data.
        max_steps: optimizer steps at most; None is as many as `epochs` asks for.
        gradient_accumulation_steps: batches per optimizer step; the loss of all of them together has one mean.
        warmup_ratio: share of all steps that warms up, the first of them at a rate above 0 already.
        lr_scheduler: transformers' name of the schedule after that, "cosine" or "linear" for example.
        optim: transformers' name of the optimizer, "adamw_torch" or "adamw_torch_fused" for example.
        weight_decay: the optimizer's.
        max_grad_norm: longer gradients are shortened to this; 0 leaves them.
        bf16: compute in bfloat16 (trained weights stay float32); None is wherever the hardware has it.
        gradient_checkpointing: compute activations again in the backward pass: less memory, about a third slower.
        torch_compile: compile the passes of encoder and decoder (the first steps take minutes).
        seed: of the order of rows and of everything drawn.
        save_steps: steps between checkpoints, from which an interrupted run goes on; None: none.
        logging_steps: steps between log lines.
        report_to: where losses go besides the log: "none", "tensorboard", "wandb", ...
    """

    learning_rate: float
    batch_size: int = 32
    epochs: float = 1.0
    max_steps: int | None = None
    gradient_accumulation_steps: int = 1
    warmup_ratio: float = 0.05
    lr_scheduler: str = "cosine"
    optim: str = "adamw_torch"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    bf16: bool | None = None
    gradient_checkpointing: bool = False
    torch_compile: bool = False
    seed: int = 0
    save_steps: int | None = 500
    logging_steps: int = 10
    report_to: str = "none"

    def __post_init__(self) -> None:
        _check_whole(self, "batch_size", "gradient_accumulation_steps", "logging_steps", "seed")
        _check_above(
            0, self, "learning_rate", "batch_size", "epochs", "gradient_accumulation_steps", "logging_steps"
        )
        for name in ("max_steps", "save_steps"):
            if getattr(self, name) is not None:
                _check_whole(self, name)
                _check_above(0, self, name)
        for name in ("max_grad_norm", "weight_decay", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or above, not {getattr(self, name)}")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(
                f"warmup_ratio is a share of all steps, from 0 up to but not including 1, not {self.warmup_ratio}"
            )

        if self.lr_scheduler not in SCHEDULERS:
            raise ValueError(
                f"lr_scheduler must be one of {', '.join(SCHEDULERS)}, not {self.lr_scheduler!r}"
            )

    def identity(self) -> dict[str, Any]:
        """What decides the result."""
        return {name: value for name, value in asdict(self).items() if name not in NEUTRAL}


@dataclass(frozen=True)
class CompressionArguments(StageArguments):
    """Stage 1, information compression: learning rate 2e-5, batch 32, 2 epochs."""

    learning_rate: float = 2e-5
    epochs: float = 2.0


@dataclass(frozen=True)
class AlignmentArguments(StageArguments):
    """Stage 2, conditional distribution alignment: learning rate 5e-6, batch 32, 4 epochs.

    Attributes:
        beta: scale of differences of log-probabilities ("sigmoid" and "log_sigmoid").
        temperature: tau of the softmax.
        similarity: "sigmoid" (equation 2), or one of appendix B's: "log_sigmoid", "kl", "js".
        num_negatives: N of each row's own; a row with fewer gets positives of other queries, drawn by `seed`.
        in_batch_negatives: M more, positives of other queries of the batch; not in the paper.
        length_normalized: log-probabilities are means over a text's tokens instead of sums, which saturate the
            sigmoid on long passages; not in the paper. Divergences always are means.
    """

    learning_rate: float = 5e-6
    epochs: float = 4.0
    beta: float = 0.1
    temperature: float = 0.1
    similarity: AlignmentSimilarity = "sigmoid"
    num_negatives: int = 1
    in_batch_negatives: int = 0
    length_normalized: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_above(0, self, "beta", "temperature")
        names = get_args(AlignmentSimilarity)
        if self.similarity not in names:
            raise ValueError(f"similarity must be one of {', '.join(names)}, not {self.similarity!r}")
        _check_whole(self, "num_negatives", "in_batch_negatives")
        if (
            min(self.num_negatives, self.in_batch_negatives) < 0
            or not self.num_negatives + self.in_batch_negatives
        ):
            raise ValueError(
                "every query needs a negative: num_negatives + in_batch_negatives must be at least 1, not "
                f"{self.num_negatives} + {self.in_batch_negatives}"
            )
        if self.in_batch_negatives >= self.batch_size:
            raise ValueError(
                f"a batch of {self.batch_size} has {self.batch_size - 1} other rows, fewer than "
                f"in_batch_negatives={self.in_batch_negatives}: lower it or raise batch_size"
            )


@dataclass(frozen=True)
class ContrastArguments(StageArguments):
    """A third stage that the paper does not have: an in-batch softmax over the cosines of embeddings.

    Attributes:
        temperature: of the softmax.
    """

    learning_rate: float = 2e-4
    batch_size: int = 64
    epochs: float = 3.0
    temperature: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_above(0, self, "temperature")
        _check_above(1, self, "batch_size")


def _check_above(bound: float, settings: object, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if not value > bound:
            raise ValueError(f"{name} must be above {bound}, not {value}")
        if value == math.inf:
            raise ValueError(f"{name} must be finite, not {value}")


def _check_whole(settings: object, *names: str) -> None:
    for name in names:
        if not isinstance(getattr(settings, name), Integral):
            raise ValueError(f"{name} must be a whole number, not {getattr(settings, name)!r}")
