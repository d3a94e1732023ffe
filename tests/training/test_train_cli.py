"""`autoregembed train`: both stages, what it says of runs that go on or have ended, and what becomes of an adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from doomed_runs import ALIGNMENT, COMPRESSION, broken_off
from typer.testing import CliRunner

from autoregembed_rag import AutoRegEncoder
from autoregembed_rag.cli import app

COMMON = ["--batch-size", "4", "--max-steps", "2", "--device", "cpu"]


@pytest.fixture
def data(tmp_path: Path) -> dict[str, str]:
    """A file of rows for each stage."""
    rows = {
        "compress": [vars(row) for row in COMPRESSION],
        "align": [{**vars(row), "neg": list(row.neg)} for row in ALIGNMENT],
    }
    rows["contrast"] = rows["align"]
    for name, records in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    return {name: str(tmp_path / f"{name}.jsonl") for name in rows}


def run(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["train", *map(str, words)])
    assert result.exit_code == code, result.output
    return result.output


def test_the_command_line_trains_both_stages(data, tiny_base, tmp_path):
    first, second = tmp_path / "compressed", tmp_path / "aligned"
    run("compress", "--base", tiny_base, "--data", data["compress"], "--output", first, *COMMON)
    run("align", "--model", first, "--data", data["align"], "--output", second, *COMMON)
    compressed = AutoRegEncoder.from_pretrained(first)
    aligned = AutoRegEncoder.from_pretrained(second)
    assert compressed.fingerprint != aligned.fingerprint
    assert compressed.config == aligned.config
    for words in (("compress",), ("align",)):
        assert "Example: autoregembed train" in run(*words, "--help")
    said = run("align", "--model", first, "--data", data["compress"], "--output", second, *COMMON, code=2)
    assert "line 1: the fields context, instruction, output" in said


def test_it_says_where_a_run_goes_on_and_that_one_has_ended(data, tiny_checkpoint, tmp_path, monkeypatch):
    output = tmp_path / "out"
    words = ["contrast", "--model", tiny_checkpoint, "--data", data["contrast"], "--output", output, *COMMON]
    words += ["--save-steps", 1]

    def stopped() -> None:
        run(*words, code=130)
        raise KeyboardInterrupt

    broken_off(monkeypatch, 1, stopped)
    assert f"going on from {output}/checkpoint-1\n" in run(*words)
    said = run(*words)
    assert f"{output} holds the result of this very run already\n" in said
    assert "going on" not in said


def test_an_adapter_is_kept_or_merged_and_neither_becomes_the_other(data, tiny_base, tmp_path):
    words = ["compress", "--base", tiny_base, "--data", data["compress"], *COMMON]
    assert "give --lora RANK" in run(*words, "--output", tmp_path / "x", "--keep-adapter", code=2)
    words += ["--lora", 2]
    kept, merged = [*words, "--output", tmp_path / "kept"], [*words, "--output", tmp_path / "merged"]
    run(*kept, "--keep-adapter")
    run(*merged)
    for folder, weights in (("kept", "adapter_model.safetensors"), ("merged", "model.safetensors")):
        assert [file.name for file in (tmp_path / folder).glob("*.safetensors")] == [weights]
    before = (tmp_path / "merged" / "model.safetensors").stat().st_mtime_ns
    run(*merged)
    assert (tmp_path / "merged" / "model.safetensors").stat().st_mtime_ns == before, "it is not merged again"
    assert "merge_adapter False -> True" in run(*kept, code=2)
    assert "merge_adapter True -> False" in run(*merged, "--keep-adapter", code=2)
    assert (tmp_path / "kept" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("stage", ["align", "contrast"])
def test_a_kept_adapter_can_be_trained_whole(stage, data, tiny_base, tmp_path):
    adapter = tmp_path / "adapter"
    words = ["--data", data["compress"], "--output", adapter, "--lora", 2, "--keep-adapter", *COMMON]
    run("compress", "--base", tiny_base, *words)
    run(stage, "--model", adapter, "--data", data[stage], "--output", tmp_path / "whole", *COMMON)
    before, after = (
        AutoRegEncoder.from_pretrained(folder, dtype="float32").model.state_dict()
        for folder in (adapter, tmp_path / "whole")
    )
    assert not [name for name in after if torch.equal(after[name], before[name])]
