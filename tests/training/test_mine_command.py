"""`autoregembed mine`: rows from a file, documents from a corpus or an index, errors in one line."""

import json

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

pytest.importorskip("faiss")

from autoregembed_indexes import DocumentIndex
from autoregembed_rag import AutoRegEncoder
from autoregembed_rag.cli_mine import mine

app = typer.Typer()
app.command()(mine)


PAIRS = [
    {"query": "What jumps?", "pos": "A quick fox jumps over a dog."},
    {"query": "What is found in lemons?", "pos": "Vitamin C is found in lemons."},
    {"query": "What jumps?", "pos": "A brown dog jumps over the bank."},
    {"query": "Where is the bank?", "pos": "The bank is near the river."},
    {"query": "Where is a bank?", "pos": "The bank is  near the river."},
]


@pytest.fixture
def command(tiny_checkpoint, tmp_path):
    """Runs `mine` with the tiny checkpoint on PAIRS; gives the result and the rows that were written."""
    data, output = tmp_path / "pairs.jsonl", tmp_path / "mined.jsonl"
    data.write_text("\n".join(map(json.dumps, PAIRS)))

    def call(*options):
        fixed = ["--model", tiny_checkpoint, "--device", "cpu", "--data", data, "--output", output]
        result = CliRunner().invoke(app, [str(word) for word in (*fixed, *options)])
        return result, [
            json.loads(line) for line in output.read_text().splitlines()
        ] if output.exists() else None

    return call


def error_line(result):
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if line and not line.startswith("Loading weights")]
    assert line.startswith("error: ")
    return line


def test_the_command_mines_the_positives_themselves(command, tmp_path):
    pytest.importorskip("matplotlib")
    result, mined = command("--max-share", "1", "--num-negatives", "2", "--report", tmp_path / "report")
    assert result.exit_code == 0, result.output
    assert [{name: row[name] for name in ("query", "pos")} for row in mined] == PAIRS
    texts = {row["pos"] for row in PAIRS[:4]}
    assert any(row["neg"] for row in mined)
    assert all(set(row["neg"]) <= texts - {row["pos"]} for row in mined)
    assert not {row["pos"] for row in PAIRS[:3:2]} & {*mined[0]["neg"], *mined[2]["neg"]}
    saved = json.loads((tmp_path / "report" / "report.json").read_text())
    assert saved["settings"]["documents"] == 4  # one positive is there twice
    assert f"{saved['negatives']} negatives for 5 rows" in result.stdout


def test_the_command_takes_a_corpus_with_titles_or_an_index(command, tmp_path, tiny_checkpoint):
    encoder = AutoRegEncoder.from_pretrained(tiny_checkpoint, device="cpu")  # in the command's dtype
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(
        '{"_id": "1", "title": "Bank", "text": "A river bank."}\n{"text": "Peppers."}\n{"text": " "}\n'
    )
    contents = ["Bank\nA river bank.", "Peppers."]
    result, from_corpus = command("--corpus", corpus, "--max-share", "1")
    assert result.exit_code == 0, result.output
    with DocumentIndex.create(tmp_path / "index", encoder=encoder.fingerprint) as index:
        index.add(encoder.encode_documents(contents), contents)
    result, from_index = command("--index", tmp_path / "index", "--max-share", "1")
    assert result.exit_code == 0, result.output
    assert from_index == from_corpus
    assert {text for row in from_index for text in row["neg"]} <= set(contents)
    assert any(row["neg"] for row in from_index)


def test_the_command_says_in_one_line_what_is_wrong(command, tmp_path, encoder):
    with DocumentIndex.create(tmp_path / "other", encoder="another") as index:
        index.add(np.eye(160)[:2], ["a", "b"])
    result, written = command("--index", tmp_path / "other")
    assert "encoder another, but" in error_line(result)
    assert f"is encoder {encoder.fingerprint}" in error_line(result)
    assert written is None
    assert "no index at" in error_line(command("--index", tmp_path / "none")[0])
    assert "not both" in error_line(command("--index", tmp_path / "other", "--corpus", "x.jsonl")[0])
    assert "raise top_k" in error_line(command("--num-negatives", "9", "--top-k", "5")[0])
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"title": "no text"}\n')
    assert "bad.jsonl, line 2" in error_line(command("--corpus", tmp_path / "bad.jsonl")[0])


def test_the_command_refuses_outputs_that_take_the_place_of_what_is_read_before_it_embeds(
    command, tmp_path, monkeypatch
):
    monkeypatch.setattr(AutoRegEncoder, "from_pretrained", lambda *_, **__: pytest.fail("embeds"))
    pairs, mined, corpus = (tmp_path / name for name in ("pairs.jsonl", "mined.jsonl", "corpus.jsonl"))
    corpus.write_text('{"text": "Peppers."}\n')
    (tmp_path / "linked").symlink_to(tmp_path)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text('{"text": "Peppers."}\n')
    before = pairs.read_text()
    for options, complaint in [
        (["--output", pairs], "pairs.jsonl would take the place of"),
        (["--corpus", corpus, "--output", tmp_path / "linked" / "corpus.jsonl"], "would take the place of"),
        (["--corpus", corpus, "--report", corpus], "the report is a folder, not a file"),
        (
            ["--corpus", tmp_path / "report" / "report.json", "--report", tmp_path / "report"],
            "report.json would take the place of",
        ),
        (["--report", mined], "cannot be both the output and the folder of the report"),
        (["--output", tmp_path / "mined.jsonl.gz"], "name the output"),
        (["--output", tmp_path / "report"], "name the output"),
    ]:
        assert complaint in error_line(command(*options)[0])
    assert not mined.exists()
    assert pairs.read_text() == before


def test_help_shows_an_example():
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert "autoregembed mine --data pairs.jsonl" in result.output
