"""What counts as a checkpoint, and what becomes of a save that fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import doomed_runs
import pytest
import torch

from autoregembed_rag import AutoRegEncoder
from autoregembed_rag.training.checkpoints import (
    CheckpointError,
    is_complete,
    newest_checkpoint,
    publish,
    remove_all_but,
    run_of,
    saving,
    staging,
    write_json,
)


def save(output: Path, step: int) -> Path:
    """Publish a checkpoint of two files."""
    folder = staging(output) / f"checkpoint-{step}"
    (folder / "shards").mkdir(parents=True)
    (folder / "weights").write_bytes(b"weights")
    (folder / "shards" / "optimizer").write_bytes(b"optimizer")
    publish(folder, output, {"seed": 0})
    return output / folder.name


def test_a_new_checkpoint_takes_the_place_of_the_one_before(tmp_path):
    (tmp_path / "checkpoint-notes").mkdir()
    (tmp_path / "checkpoint-7.txt").write_text("mine")
    for step in (9, 10, 100):
        folder = save(tmp_path, step)
        assert newest_checkpoint(tmp_path) == folder
        assert run_of(folder) == {"seed": 0}
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["checkpoint-100", "checkpoint-7.txt", "checkpoint-notes"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "weights").write_bytes(b"weight"),
        lambda folder: (folder / "shards" / "optimizer").unlink(),
        lambda folder: (folder / "complete.json").unlink(),
        lambda folder: (folder / "complete.json").write_text('{"files": {"wei'),
        lambda folder: (folder / "complete.json").write_text("[]"),
        lambda folder: (folder / "complete.json").write_text('{"files": ["weights"], "run": {}}'),
        lambda folder: (folder / "complete.json").write_text('{"files": {"weights": 7}}'),
    ],
    ids=["shorter", "missing", "no marker", "half a marker", "a list", "no sizes", "no run"],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage, tmp_path):
    older = save(tmp_path / "other", 2).rename(tmp_path / "checkpoint-2")
    newer = save(tmp_path / "another", 4).rename(tmp_path / "checkpoint-4")
    assert newest_checkpoint(tmp_path) == newer
    damage(newer)
    assert not is_complete(newer)
    assert newest_checkpoint(tmp_path) == older


def test_a_save_that_was_killed_is_no_checkpoint_and_goes(tmp_path):
    kept = save(tmp_path, 2)
    (staging(tmp_path) / "checkpoint-4" / "shards").mkdir(parents=True)
    (tmp_path / ".savings.txt").write_text("mine")
    assert newest_checkpoint(tmp_path) == kept
    remove_all_but(kept, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".savings.txt", "checkpoint-2"]
    assert is_complete(kept)


def writers(base: Path) -> dict[str, Callable[[Path], None]]:
    """Everything that writes into a checkpoint."""
    encoder = AutoRegEncoder.from_base(base, 3, device="cpu", dtype="float32")
    return {
        "safetensors": lambda folder: encoder.model.save_pretrained(folder),
        "tokenizers": lambda folder: encoder.tokenizer.save_pretrained(folder),
        "torch": lambda folder: torch.save(encoder.model.state_dict(), folder / "optimizer.pt"),
        "json": lambda folder: write_json(folder / "state.json", {"log": [*range(10_000)]}),
        "encoder": lambda folder: encoder.save_pretrained(folder / "encoder"),
    }


def write_on_a_full_disk(base: Path, output: Path, said: Path) -> None:
    ends = {}
    output.mkdir()
    for name, write in writers(base).items():
        doomed_runs.limit_files(4096, kill=False)
        try:
            with saving(output):
                write(output)
        except CheckpointError as error:
            ends[name] = [type(error.__cause__).__name__, str(error)]
        doomed_runs.limit_files(-1, kill=False)
    said.write_text(json.dumps(ends))


def test_every_writer_that_fails_says_the_same(tiny_base, tmp_path):
    """Each library has an exception of its own for a full disk."""
    assert doomed_runs.apart(write_on_a_full_disk, tiny_base, tmp_path / "out", tmp_path / "said") == 0
    ends = json.loads((tmp_path / "said").read_text())
    assert sorted(ends) == sorted(writers(tiny_base))
    for _, message in ends.values():
        assert "make room or mend the disk and run the same command again" in message


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no"), FloatingPointError("no"), KeyError("no")])
def test_what_is_no_failed_write_is_not_called_one(error, tmp_path):
    with pytest.raises(type(error)), saving(tmp_path):
        raise error


def test_a_json_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    file = tmp_path / "state.json"
    write_json(file, {"step": 1})
    with pytest.raises(TypeError):
        write_json(file, {"step": object()})
    assert json.loads(file.read_text()) == {"step": 1}
