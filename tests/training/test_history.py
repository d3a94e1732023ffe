"""What a checkpoint knows of its training, and says in its card."""

from __future__ import annotations

from pathlib import Path

import pytest
from doomed_runs import ALIGNMENT, COMPRESSION, train
from huggingface_hub import ModelCard

from autoregembed_rag import AutoRegEncoder, FrozenDecoder
from autoregembed_rag.card import is_generated
from autoregembed_rag.history import read_history
from autoregembed_rag.training.alignment import train_alignment
from autoregembed_rag.training.arguments import AlignmentArguments, CompressionArguments
from autoregembed_rag.training.compression import train_compression
from autoregembed_rag.training.stage import read_record


@pytest.fixture(scope="module")
def two_stages(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the second stage ended, which began with what the first left."""
    folder = tmp_path_factory.mktemp("stages")
    short = {"batch_size": 4, "bf16": False, "logging_steps": 1, "save_steps": None, "epochs": 1}
    encoder = AutoRegEncoder.from_base(tiny_base, 3, device="cpu", dtype="float32")
    decoder = FrozenDecoder.from_pretrained(tiny_base, device="cpu", dtype="float32")
    first = train_compression(encoder, decoder, COMPRESSION, folder / "1", CompressionArguments(**short))
    train_alignment(first, decoder, ALIGNMENT, folder / "2", AlignmentArguments(**short, similarity="kl"))
    return folder / "2"


def load(folder: Path, **arguments) -> AutoRegEncoder:
    return AutoRegEncoder.from_pretrained(folder, **{"device": "cpu", "dtype": "float32", **arguments})


def test_a_stage_knows_the_stages_before_it(two_stages: Path):
    history = read_history(two_stages)
    assert [(stage.name, stage.rows) for stage in history.stages] == [("compression", 11), ("alignment", 11)]
    log = [entry["loss"] for entry in read_record(two_stages)["losses"]]
    assert history.stages[1].losses == (log[0], log[-1])
    assert history.stages[0].settings["learning_rate"] == 2e-5
    assert history.stages[1].settings["similarity"] == "kl"
    assert history.finetuned == {}


def test_the_card_says_how_the_weights_were_trained(two_stages: Path):
    card = (two_stages / "README.md").read_text(encoding="utf-8")
    assert load(two_stages).fingerprint in card
    table = card[card.index("## Training") :]
    assert "|  | compression | alignment |" in table
    assert "| rows | 11 | 11 |" in table
    assert "information compression (L_IC) | conditional distribution alignment (L_CDA) |" in table
    assert "| learning_rate | 2e-05 | 5e-06 |" in table
    assert "| similarity |  | kl |" in table
    assert "| seed | 0 | 0 |" in table
    losses = [
        " and ".join(f"{loss:.4g}" for loss in stage.losses) for stage in read_history(two_stages).stages
    ]
    assert f"| loss, first and last | {losses[0]} | {losses[1]} |" in table
    assert "## Scores" not in card
    assert ModelCard(card).data.eval_results is None
    assert is_generated(two_stages / "README.md")


def test_a_copy_keeps_the_history_and_other_weights_have_none(two_stages: Path, tmp_path: Path):
    load(two_stages).save_pretrained(tmp_path / "copy")
    assert "| similarity |  | kl |" in (tmp_path / "copy" / "README.md").read_text()
    trained_on = load(two_stages)
    trained_on.trainable()
    trained_on.save_pretrained(tmp_path / "on")
    assert "## Training" not in (tmp_path / "on" / "README.md").read_text()


def test_a_readme_that_was_there_before_the_training_is_not_written_over(tiny_base: Path, tmp_path: Path):
    train("compression", tiny_base, tmp_path / "out", max_steps=2, save_steps=1)
    (tmp_path / "out" / "README.md").write_text("mine")
    train("compression", tiny_base, tmp_path / "out", max_steps=2, save_steps=1)
    load(tmp_path / "out").save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == "mine"
