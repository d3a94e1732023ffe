"""Never lose work: what a run leaves when it is broken off, and that it ends as if it had not been."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
from pathlib import Path
from typing import Any

import doomed_runs
import pytest
import torch
from doomed_runs import COMPRESSION, apart, broken_off, train
from tiny_models import write_base

from autoregembed_rag import AutoRegEncoder, FrozenDecoder
from autoregembed_rag.training.arguments import CompressionArguments
from autoregembed_rag.training.checkpoints import CheckpointError, newest_checkpoint
from autoregembed_rag.training.compression import train_compression
from autoregembed_rag.training.data import compression_rows
from autoregembed_rag.training.reference import Pair, ReferenceStore
from autoregembed_rag.training.stage import read_record
from autoregembed_rag.training.trainer import LengthBatches, StageTrainer

FINISHED = [
    "README.md",
    "autoregembed.json",
    "config.json",
    "config_sentence_transformers.json",
    "model.safetensors",
    "modules.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "training.json",
]


def weights(output: Path) -> bytes:
    return (output / "model.safetensors").read_bytes()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# 11 rows in batches of 4 are 3 steps an epoch, or 2 where two batches are accumulated.
@pytest.mark.parametrize(
    ("stage", "settings", "saved"),
    [
        ("compression", {"epochs": 2, "save_steps": 2}, 2),
        ("compression", {"epochs": 2, "save_steps": 3, "dropout": 0.2}, 3),
        ("compression", {"epochs": 2, "save_steps": 4, "dropout": 0.2, "gradient_checkpointing": True}, 4),
        ("compression", {"epochs": 3, "save_steps": 3, "gradient_accumulation_steps": 2}, 3),
        ("alignment", {"epochs": 2, "save_steps": 4}, 4),
        ("alignment", {"epochs": 2, "save_steps": 2, "in_batch_negatives": 2, "num_negatives": 2}, 2),
        ("alignment", {"epochs": 2, "save_steps": 4, "similarity": "js", "gradient_checkpointing": True}, 4),
        ("contrast", {"epochs": 2, "save_steps": 4, "dropout": 0.2}, 4),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
def test_an_interrupted_run_ends_bit_equal_to_an_uninterrupted_one(
    stage, settings, saved, tiny_base, tmp_path, monkeypatch
):
    run = lambda name: train(stage, tiny_base, tmp_path / name, **settings)  # noqa: E731
    run("whole")
    broken_off(monkeypatch, saved, lambda: run("broken"))
    assert newest_checkpoint(tmp_path / "broken") == tmp_path / "broken" / f"checkpoint-{saved}"
    run("broken")
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")
    losses = [read_record(tmp_path / name)["losses"] for name in ("broken", "whole")]
    assert losses[0] == losses[1], "one log of both halves"


def test_dropout_and_the_order_of_rows_matter_to_these_tests(tiny_base, tmp_path):
    """If they did not reach the weights, bit-equality would say nothing about them."""
    for name, changes in (("plain", {}), ("dropout", {"dropout": 0.2}), ("seed", {"seed": 1})):
        train("compression", tiny_base, tmp_path / name, max_steps=2, save_steps=None, **changes)
    assert len({weights(tmp_path / name) for name in ("plain", "dropout", "seed")}) == 3


# Alignment with all there is; its checkpoints are 2, 4 and 5, which ends in the middle of an epoch.
DOOMED = {
    "max_steps": 5,
    "save_steps": 2,
    "gradient_accumulation_steps": 2,
    "in_batch_negatives": 1,
    "lr_scheduler": "constant",  # at a rate of 0 a step too many would not show
    "dropout": 0.1,
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """Where a run ended that nobody killed, its base model beside it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    base = write_base(folder / "base")
    assert apart(train, "alignment", base, folder / "out", **DOOMED) == 0
    return folder / "out"


@pytest.mark.parametrize(
    ("operation", "nth", "left"),
    [
        pytest.param("sqlite3.connect reference", 8, [], id="among the reference scores"),
        pytest.param("open .saving/checkpoint-2/.complete", 1, [], id="before the first marker"),
        pytest.param(
            "os.rename .saving/checkpoint-4/.saving-", 3, ["checkpoint-2"], id="among a save's files"
        ),
        pytest.param("os.rename .saving/checkpoint-4/.complete", 1, ["checkpoint-2"], id="at the marker"),
        pytest.param("os.rename .saving/checkpoint-4", 2, ["checkpoint-2"], id="after the marker"),
        pytest.param("os.rename checkpoint-2", 1, ["checkpoint-2", "checkpoint-4"], id="before rotation"),
        pytest.param("os.remove optimizer.pt", 1, ["checkpoint-4"], id="in rotation"),
        pytest.param("open model.safetensors", 1, ["checkpoint-5"], id="in the final save"),
        pytest.param("os.rename .saving-", 3, ["checkpoint-5"], id="among the files of the final save"),
        pytest.param("os.rename .training.json", 1, ["checkpoint-5"], id="before the record"),
        pytest.param("os.rename checkpoint-5", 1, ["checkpoint-5"], id="after the record"),
        pytest.param("os.remove optimizer.pt", 3, [], id="in the clean-up"),
    ],
)
def test_a_run_killed_anywhere_ends_bit_equal(operation, nth, left, undisturbed, tmp_path):
    base, output = undisturbed.parent / "base", tmp_path / "out"
    killed = apart(doomed_runs.train_and_die, operation, nth, "alignment", base, output, **DOOMED)
    assert killed == -signal.SIGKILL
    assert [name for name in names(output) if re.fullmatch(r"checkpoint-\d+", name)] == left
    (output / "checkpoint-notes").mkdir()
    (output / "notes.txt").write_text("mine")
    assert apart(train, "alignment", base, output, **DOOMED) == 0
    assert weights(output) == weights(undisturbed)
    assert names(output) == sorted([*FINISHED, "checkpoint-notes", "notes.txt"])


def train_on_a_full_disk(sizes: list[int], said: Path, *run: Any, **settings: Any) -> None:
    """A run for each of some largest sizes of a file; writes to `said` how each ended."""
    ends = []
    for size in sizes:
        doomed_runs.limit_files(size, kill=False)
        try:
            train(*run, **settings)
            ends.append("trained")
        except CheckpointError as error:
            ends.append(str(error))
    doomed_runs.limit_files(-1, kill=False)
    said.write_text(json.dumps(ends))


def train_until_a_file_is_as_long_as(size: int, *run: Any, **settings: Any) -> None:
    doomed_runs.limit_files(size, kill=True)
    train(*run, **settings)


@pytest.fixture
def half_done(undisturbed, tmp_path, monkeypatch) -> Path:
    """An output folder with reference scores and a checkpoint after step 2."""
    output = tmp_path / "half done"
    run = lambda: train("alignment", undisturbed.parent / "base", output, **DOOMED)  # noqa: E731
    broken_off(monkeypatch, 2, run)
    return output


def test_a_full_disk_leaves_the_checkpoint_before_and_says_what_to_do(undisturbed, half_done, tmp_path):
    base, said = undisturbed.parent / "base", tmp_path / "said"
    size = {file.name: file.stat().st_size for file in (half_done / "checkpoint-2").iterdir()}
    assert size["optimizer.pt"] > size["model.safetensors"]
    sizes = [size["model.safetensors"] - 1, size["optimizer.pt"] - 1]
    arguments = (sizes, said, "alignment", base, half_done)
    assert apart(train_on_a_full_disk, *arguments, **DOOMED) == 0
    for end in json.loads(said.read_text()):
        assert "checkpoint-2 is intact: make room or mend the disk and run the same command again" in end
    assert newest_checkpoint(half_done) == half_done / "checkpoint-2"
    assert apart(train, "alignment", base, half_done, **DOOMED) == 0
    assert weights(half_done) == weights(undisturbed)
    assert names(half_done) == FINISHED


def test_a_run_killed_in_the_middle_of_a_file_ends_bit_equal(undisturbed, half_done):
    base = undisturbed.parent / "base"
    for name in ("model.safetensors", "optimizer.pt"):
        size = (half_done / "checkpoint-2" / name).stat().st_size - 1
        arguments = (size, "alignment", base, half_done)
        assert apart(train_until_a_file_is_as_long_as, *arguments, **DOOMED) == -signal.SIGXFSZ
        assert newest_checkpoint(half_done) == half_done / "checkpoint-2"
    assert apart(train, "alignment", base, half_done, **DOOMED) == 0
    assert weights(half_done) == weights(undisturbed)
    assert names(half_done) == FINISHED


def test_a_final_save_that_fails_leaves_the_last_checkpoint(tiny_base, tmp_path, monkeypatch):
    """A folder in the place of a file breaks it off as a disk error would, for every user and at once."""
    run = lambda name: train("compression", tiny_base, tmp_path / name, epochs=1, save_steps=2)  # noqa: E731
    broken_off(monkeypatch, 2, lambda: run("out"))
    (tmp_path / "out" / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="checkpoint-3 is intact: make room"):
        run("out")
    assert not (tmp_path / "out" / "training.json").exists()
    (tmp_path / "out" / "model.safetensors").rmdir()
    run("out")
    run("whole")
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_what_a_checkpoint_has_pickled_is_read_but_never_run(file, tiny_base, tmp_path, monkeypatch):
    output = tmp_path / "out"
    run = lambda: train("compression", tiny_base, output, epochs=1, save_steps=2)  # noqa: E731
    broken_off(monkeypatch, 2, run)
    trapped = output / "checkpoint-2" / file
    torch.save({"state": Trap(tmp_path / "sprung")}, trapped)
    marker = output / "checkpoint-2" / "complete.json"
    record = json.loads(marker.read_text())
    record["files"][file] = trapped.stat().st_size
    marker.write_text(json.dumps(record))
    with pytest.raises(pickle.UnpicklingError, match="mkdir"):
        run()
    assert not (tmp_path / "sprung").exists()


def test_a_row_with_a_nan_loss_is_named_and_the_last_good_checkpoint_stays(tmp_path):
    """The frozen decoder reads NaN where a target holds one letter that no other holds."""
    base = write_base(tmp_path / "base", "mistral")  # output embeddings of its own
    encoder = AutoRegEncoder.from_base(base, 3, device="cpu", dtype="float32")
    decoder = FrozenDecoder.from_pretrained(base, device="cpu", dtype="float32")
    number = [*LengthBatches(compression_rows(COMPRESSION).lengths, 4, 0)][-1]  # in the last of three batches
    rows = [dict(vars(row)) for row in COMPRESSION]
    rows[number]["output"] = rows[number]["output"][:-1] + "Ω"
    targets = decoder.target_ids([row["output"] for row in rows])
    letter = set(targets[number]) - {token for i, ids in enumerate(targets) if i != number for token in ids}
    with torch.no_grad():
        decoder.model.get_input_embeddings().weight[list(letter)] = torch.nan
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    arguments = CompressionArguments(batch_size=4, bf16=False, epochs=1, save_steps=1)
    with pytest.raises(FloatingPointError) as stopped:
        train_compression(encoder, decoder, file, tmp_path / "out", arguments)
    message = str(stopped.value)
    assert f"in step 3 for 1 of 3 rows ({file}, line {number + 1})" in message
    assert "checkpoint-2 is intact" in message
    assert newest_checkpoint(tmp_path / "out") == tmp_path / "out" / "checkpoint-2"


@pytest.mark.parametrize("save_steps", [1, None])
def test_weights_that_are_not_finite_are_never_saved(save_steps, tiny_base, tmp_path):
    """One step of an absurd length leaves them so, though its loss was fine."""
    output = tmp_path / "out"
    absurd = {"optim": "sgd", "learning_rate": 3e38, "weight_decay": 1e9, "warmup_ratio": 0.0, "max_steps": 1}
    with pytest.raises(
        FloatingPointError, match=r"not finite after step 1.*there is no checkpoint in .*out yet"
    ):
        train("compression", tiny_base, output, save_steps=save_steps, **absurd)
    assert names(output) == [".unfinished"]


def test_a_finished_run_is_not_trained_again(tiny_base, tmp_path, monkeypatch):
    run = lambda **changes: train("alignment", tiny_base, tmp_path / "out", epochs=1, **changes)  # noqa: E731
    run(save_steps=2)
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(StageTrainer, "train", None)
    run(save_steps=1, logging_steps=7, report_to="none")
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()} == before


def test_intervals_may_change_between_runs(tiny_base, tmp_path, monkeypatch):
    output = tmp_path / "out"
    run = lambda save_steps: train("compression", tiny_base, output, epochs=2, save_steps=save_steps)  # noqa: E731
    broken_off(monkeypatch, 2, lambda: run(2))
    broken_off(monkeypatch, 3, lambda: run(1))
    assert newest_checkpoint(output) == output / "checkpoint-3"
    run(None)
    train("compression", tiny_base, tmp_path / "whole", epochs=2, save_steps=None)
    assert weights(output) == weights(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rate": 1e-3}, "learning_rate 0.003 -> 0.001"),
        ({"seed": 5}, "seed 0 -> 5"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps 1 -> 2"),
    ],
)
def test_another_run_in_the_same_output_is_refused_by_name(changes, named, tiny_base, tmp_path, monkeypatch):
    output = tmp_path / "out"
    run = lambda **settings: train("compression", tiny_base, output, epochs=1, save_steps=2, **settings)  # noqa: E731
    broken_off(monkeypatch, 2, run)
    with pytest.raises(ValueError, match=f"checkpoint-2 is of another run .*{named}"):
        run(**changes)
    run()
    with pytest.raises(ValueError, match=rf"training.json is of another run \({named}\)"):
        run(**changes)
    with pytest.raises(ValueError, match="stage 'compression' -> 'contrast'"):
        train("contrast", tiny_base, output, epochs=1)
    with pytest.raises(ValueError, match=r"encoder '\w+' -> '\w+'.*rows '\w+' -> '\w+'"):
        encoder = AutoRegEncoder.from_base(tiny_base, 2, device="cpu", dtype="float32")
        decoder = FrozenDecoder.from_pretrained(tiny_base, device="cpu", dtype="float32")
        train_compression(encoder, decoder, COMPRESSION[1:], output)


def test_reference_scores_on_a_full_disk_say_what_to_do_and_stay_good(tmp_path):
    said = tmp_path / "said"
    assert apart(fill_a_reference_store, tmp_path / "reference", said) == 0
    assert "what was written stays good; make room" in said.read_text()
    store = ReferenceStore(tmp_path / "reference", "model")
    pairs = [Pair("query", str(i)) for i in range(20_000)]
    assert store.missing(pairs) == pairs[10:]
    assert store.scores(pairs[:10]).tolist() == [*range(10)]


def fill_a_reference_store(folder: Path, said: Path) -> None:
    store = ReferenceStore(folder, "model")
    pairs = [Pair("query", str(i)) for i in range(20_000)]
    scores = torch.arange(20_000.0)
    store.add(pairs[:10], scores[:10])
    doomed_runs.limit_files(2**18, kill=False)
    try:
        store.add(pairs[10:], scores[10:])
    except CheckpointError as error:
        doomed_runs.limit_files(-1, kill=False)
        said.write_text(str(error))


def test_what_another_process_has_scored_is_read_but_not_taken_as_done(tmp_path):
    """Or which pairs meet in a pass, and so their last bits, would hang on who was faster."""
    first = ReferenceStore(tmp_path, "model", process=0)
    second = ReferenceStore(tmp_path, "model", process=1)
    pair = Pair("query", "text")
    first.add([pair], torch.tensor([1.0]))
    first.add_states(["query"], torch.ones(1, 2, 4))
    assert first.missing([pair]) == []
    assert second.missing([pair]) == [pair]
    assert first.without_state(["query"]) == []
    assert second.without_state(["query"]) == ["query"]
    assert second.scores([pair]).tolist() == [1.0]
    assert second.states(["query"], 2).shape == (1, 2, 4)


def test_batches_are_of_like_length_and_in_another_order_every_epoch():
    lengths = torch.randint(1, 500, (1003,), generator=torch.Generator().manual_seed(0)).numpy()
    batches = LengthBatches(lengths, 8, 0)
    first = [*batches]
    assert sorted(first) == [*range(1003)]
    assert first == [*LengthBatches(lengths, 8, 0)]
    assert first != [*LengthBatches(lengths, 8, 1)]
    spread = [max(lengths[first[i : i + 8]]) - min(lengths[first[i : i + 8]]) for i in range(0, 1000, 8)]
    assert sum(spread) / len(spread) < 25
    batches.set_epoch(1)
    assert [*batches] != first
    assert sorted(batches) == [*range(1003)]


def test_few_rows_too_meet_others_in_every_epoch():
    batches = LengthBatches(torch.arange(1, 41).numpy(), 8, 0)
    epochs = []
    for epoch in range(3):
        batches.set_epoch(epoch)
        order = [*batches]
        epochs.append({frozenset(order[i : i + 8]) for i in range(0, 40, 8)})
    assert not epochs[0] & epochs[1]
    assert not epochs[1] & epochs[2]
