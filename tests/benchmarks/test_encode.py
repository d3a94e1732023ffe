"""The encoding benchmark: the same texts and vectors for all systems, and a run end to end."""

import json

import numpy as np
import pytest
from transformers import logging as transformers_logging
from typer.testing import CliRunner

pytest.importorskip("bm25s")
pytest.importorskip("matplotlib")
pytest.importorskip("sentence_transformers")

from autoregembed_rag import AutoRegEncoder
from benchmarks import encode
from benchmarks.encode_systems import ENCODERS, OURS, Job, fitting

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "Vitamin C is found in oranges, lemons and green peppers, 100 grams at a time. " * 20,
    "a lemon",
)


@pytest.fixture(autouse=True)
def quiet():
    verbosity = transformers_logging.get_verbosity()
    yield
    transformers_logging.set_verbosity(verbosity)
    transformers_logging.enable_progress_bar()


def test_all_systems_compute_the_same_vectors(tiny_checkpoint):
    encoder = AutoRegEncoder.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32")
    texts = fitting(encoder, TEXTS)
    vectors = {
        name: make(Job(name, tiny_checkpoint, tuple(texts), 1, "cpu", "float32", 1))(texts)
        for name, make in ENCODERS.items()
    }
    for name, found in vectors.items():
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-4)
        assert np.median((found * vectors[OURS]).sum(axis=1)) > 0.999, name


def test_texts_are_cut_to_what_the_encoder_reads(tiny_checkpoint):
    encoder = AutoRegEncoder.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32")
    whole, cut, _ = fitting(encoder, TEXTS)
    assert whole == TEXTS[0]
    assert TEXTS[1].startswith(cut)
    assert encoder.count_tokens(cut) == encoder.max_text_tokens


def test_systems_that_do_not_agree_are_an_error():
    one, other = np.eye(2, 4), np.eye(2, 4, 1)
    with pytest.raises(RuntimeError, match="does not compute the vectors of"):
        encode.agreement({system: one if system == OURS else other for system in encode.SYSTEMS}, "float32")


def test_encode_reports_every_system_and_writes_json_table_and_png(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "TEXTS", {"mixed": lambda: list(TEXTS)})
    arguments = [
        "--model",
        tiny_checkpoint,
        "--rounds",
        2,
        "--tokens",
        100,
        "--dtype",
        "float32",
        "--out",
        tmp_path,
    ]
    result = CliRunner().invoke(encode.app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    found = record["texts"]["mixed"]
    assert all(found["tokens/s"][system] > 0 for system in encode.SYSTEMS)
    assert len(found["times as fast"][encode.LIBRARY]) == 2
    assert "of matmul peak" in (tmp_path / "table.md").read_text(encoding="utf-8")
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_unknown_names_are_refused(tmp_path):
    for option, value in (("--shape", "9b"), ("--texts", "tall")):
        result = CliRunner().invoke(encode.app, [option, value, "--out", str(tmp_path)])
        assert result.exit_code == 2
        assert value in result.stderr
