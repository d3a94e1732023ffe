"""Hyperparameters: the paper's by default, and every bad one refused with its name."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from autoregembed_rag.config import AutoRegConfig
from autoregembed_rag.training.arguments import (
    NEUTRAL,
    SCHEDULERS,
    AlignmentArguments,
    CompressionArguments,
    ContrastArguments,
    StageArguments,
)

STAGES = [CompressionArguments, AlignmentArguments, ContrastArguments]
INFINITE, NAN = float("inf"), float("nan")


def test_compression_defaults_are_the_papers():
    """Appendix A; cosine schedule and 5% warm-up as in the released scripts."""
    found = CompressionArguments()
    assert (found.learning_rate, found.batch_size, found.epochs) == (2e-5, 32, 2)
    assert (found.lr_scheduler, found.warmup_ratio, found.gradient_accumulation_steps) == ("cosine", 0.05, 1)
    assert found.max_steps is None


def test_alignment_defaults_are_the_papers():
    found = AlignmentArguments()
    assert (found.learning_rate, found.batch_size, found.epochs) == (5e-6, 32, 4)
    assert (found.temperature, found.beta, found.num_negatives, found.similarity) == (0.1, 0.1, 1, "sigmoid")
    assert (found.lr_scheduler, found.warmup_ratio) == ("cosine", 0.05)
    assert (found.in_batch_negatives, found.length_normalized) == (0, False), "what the paper lacks is off"


def test_the_papers_five_compressed_tokens_and_512_positions_are_the_configs():
    assert (AutoRegConfig().num_compressed_tokens, AutoRegConfig().max_length) == (5, 512)


ALL = [
    ("learning_rate", (0, -1e-5, NAN, INFINITE)),
    ("batch_size", (0, -1, 1.5)),
    ("epochs", (0, -1.0, NAN, INFINITE)),
    ("max_steps", (0, -1, 2.5)),
    ("gradient_accumulation_steps", (0, 0.5)),
    ("warmup_ratio", (-0.1, 1.0, NAN)),
    ("weight_decay", (-0.1, NAN, INFINITE)),
    ("max_grad_norm", (-1.0, NAN)),
    ("lr_scheduler", ("warmup_stable_decay", "reduce_lr_on_plateau", "COSINE", "")),
    ("seed", (-1, 0.5)),
    ("save_steps", (0, 0.1)),
    ("logging_steps", (0, 1.5)),
]
ALIGNMENT = [
    ("beta", (0, -0.1, NAN, INFINITE)),
    ("temperature", (0, -0.1, NAN, INFINITE)),
    ("similarity", ("cosine", "", "KL")),
    ("num_negatives", (-1, 0, 1.5)),
    ("in_batch_negatives", (-1, 32, 0.5)),
]
CONTRAST = [("temperature", (0, NAN)), ("batch_size", (1,))]
BAD = [(kind, name, value) for kind in STAGES for name, values in ALL for value in values]
BAD += [(AlignmentArguments, name, value) for name, values in ALIGNMENT for value in values]
BAD += [(ContrastArguments, name, value) for name, values in CONTRAST for value in values]


@pytest.mark.parametrize(("kind", "name", "value"), BAD)
def test_a_bad_value_is_refused_with_its_name(kind: type[StageArguments], name: str, value: Any):
    with pytest.raises(ValueError, match=name):
        kind(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=name):
        replace(kind(), **{name: value})  # type: ignore[call-arg]


def test_values_at_the_edge_are_taken():
    assert AlignmentArguments(num_negatives=0, in_batch_negatives=31).in_batch_negatives == 31
    edge = CompressionArguments(
        warmup_ratio=0, weight_decay=0, max_grad_norm=0, seed=0, save_steps=None, epochs=0.5
    )
    assert edge.save_steps is None
    assert ContrastArguments(batch_size=2).batch_size == 2


@pytest.mark.parametrize("kind", STAGES)
def test_they_are_frozen_and_every_field_is_documented(kind: type[StageArguments]):
    with pytest.raises(FrozenInstanceError):
        kind().batch_size = 1  # type: ignore[call-arg, misc]
    words = f"{StageArguments.__doc__}\n{kind.__doc__}"
    missing = [field.name for field in fields(kind) if f"\n        {field.name}: " not in words]
    assert not missing


def test_identity_is_all_but_what_leaves_the_weights_alone():
    found = AlignmentArguments()
    assert found.identity().keys() == {field.name for field in fields(found)} - {
        "save_steps",
        "logging_steps",
        "report_to",
    }
    assert (
        replace(found, save_steps=7, logging_steps=3, report_to="tensorboard").identity() == found.identity()
    )
    assert replace(found, seed=1).identity() != found.identity()
    assert set(NEUTRAL) < {field.name for field in fields(StageArguments)}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_schedule_needs_nothing_else(name):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    get_scheduler(name, optimizer, num_warmup_steps=2, num_training_steps=10)


def test_the_command_line_may_read_them_without_loading_pytorch():
    code = "import sys; import autoregembed_rag.training.arguments; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0  # noqa: S603
