"""Whose an output folder is: a run takes one that is new or empty, goes on in its own, and touches no other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from doomed_runs import COMPRESSION, broken_off, train
from safetensors.torch import load_file, save_file

from autoregembed_rag import AutoRegEncoder, FrozenDecoder
from autoregembed_rag.training.checkpoints import CheckpointError, sole_writer
from autoregembed_rag.training.compression import train_compression


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    "theirs", ["model.safetensors", "checkpoint-2/model.safetensors", "reference/notes.txt"]
)
def test_what_is_not_ours_is_neither_removed_nor_written_over(theirs, tiny_base, tmp_path):
    file = tmp_path / "out" / theirs
    file.parent.mkdir(parents=True)
    file.write_text("another program's")
    with pytest.raises(
        ValueError, match="out is not empty and holds no training run: give a new or empty folder"
    ):
        train("alignment", tiny_base, tmp_path / "out", max_steps=1)
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [file]
    assert file.read_text() == "another program's"


def test_a_strangers_checkpoint_in_a_folder_of_ours_is_not_removed(tiny_base, tmp_path, monkeypatch):
    output = tmp_path / "out"
    run = lambda: train("compression", tiny_base, output, epochs=1, save_steps=2)  # noqa: E731
    broken_off(monkeypatch, 1, run)
    (output / "checkpoint-2").mkdir()
    with pytest.raises(
        ValueError, match=r"checkpoint-2 has no complete.json, so it is no checkpoint of this"
    ):
        run()
    assert (output / "checkpoint-2").is_dir()


def test_a_folder_called_reference_in_a_finished_run_stays(tiny_base, tmp_path):
    output = tmp_path / "out"
    train("alignment", tiny_base, output, max_steps=1)
    (output / "reference").mkdir()
    (output / "reference" / "notes.txt").write_text("mine")
    train("alignment", tiny_base, output, max_steps=1)
    assert (output / "reference" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("content", ['{"epochs": 3}', '{"run": {"stage": "compr', "[]"])
def test_a_damaged_record_is_named(content, tiny_base, tmp_path):
    (tmp_path / "training.json").write_text(content)
    with pytest.raises(ValueError, match=r"training.json is damaged, or no record of a training run"):
        train("compression", tiny_base, tmp_path, epochs=1)


def test_where_no_folder_can_be_written_no_step_is_trained(tiny_base, tmp_path, monkeypatch):
    """Nor a reference score computed."""
    monkeypatch.setattr(FrozenDecoder, "target_log_probs", None)
    (tmp_path / "file").write_text("mine")
    for stage in ("compression", "alignment", "contrast"):
        with pytest.raises(ValueError, match="file is a file: give a folder"):
            train(stage, tiny_base, tmp_path / "file", max_steps=1)
        # As a folder that is read-only, but for every user.
        with pytest.raises(CheckpointError, match=r"nothing can be written into .*out \(Not a directory\)"):
            train(stage, tiny_base, tmp_path / "file" / "out", max_steps=1)


def test_the_output_is_neither_the_model_nor_its_decoder(tiny_base, tiny_checkpoint, tmp_path):
    encoder = AutoRegEncoder.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32")
    decoder = FrozenDecoder.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32")
    for folder in (tiny_checkpoint, tiny_checkpoint / "decoder"):
        with pytest.raises(ValueError, match="is the model to be trained, or its decoder"):
            train_compression(encoder, decoder, COMPRESSION, folder)


def test_two_runs_do_not_write_to_one_output(tiny_base, tmp_path):
    """The second stops at once; when the first is gone, killed or not, the folder is free."""
    output = tmp_path / "out"
    output.mkdir()
    hold = (
        "import sys, time; from pathlib import Path; from autoregembed_rag.training.checkpoints import sole_writer\n"
        "with sole_writer(Path(sys.argv[1])): print(flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", hold, str(output)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as first:  # noqa: S603
        assert first.stdout is not None
        first.stdout.readline()
        with pytest.raises(CheckpointError, match="another run is writing below"):
            train("compression", tiny_base, output, epochs=1)
        assert names(output) == []
        first.kill()
    train("compression", tiny_base, output, epochs=1)
    assert "training.json" in names(output)
    with sole_writer(output):
        train("compression", tiny_base, output, epochs=1)  # finished: it only reads


def replaced(weights: Path) -> None:
    tensors = load_file(weights)
    tensors["norm.weight"] += 1
    save_file(tensors, weights, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "spoil",
    [replaced, Path.unlink, lambda weights: weights.write_bytes(weights.read_bytes()[:-1])],
    ids=["replaced", "deleted", "cut short"],
)
def test_a_finished_run_vouches_for_its_own_weights_alone(spoil, tiny_base, tmp_path):
    train("compression", tiny_base, tmp_path / "out", max_steps=1)
    spoil(tmp_path / "out" / "model.safetensors")
    with pytest.raises(ValueError, match=r"weights in .*out are not those that this run left there"):
        train("compression", tiny_base, tmp_path / "out", max_steps=1)
