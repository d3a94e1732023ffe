"""Reading embeddings back: words kept and lost, vectors of an index, and the command that shows it."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("faiss")

from autoregembed_indexes import DocumentIndex
from autoregembed_rag import AutoRegEncoder
from autoregembed_rag.cli import app
from autoregembed_rag.reading import Reading, content_words, read_back, states_of_vectors

TEXTS = ["Vitamin C is found in oranges.", "the quick brown fox"]


def said(decoder, compressed, tokens):
    return decoder.generate(compressed, max_new_tokens=tokens, no_repeat_ngram_size=2)


def run(*arguments):
    return CliRunner().invoke(app, ["explain", *map(str, arguments)])


@pytest.fixture
def index(tmp_path, encoder: AutoRegEncoder):
    folder = tmp_path / "index"
    with DocumentIndex.create(folder, tokens=5, encoder=encoder.fingerprint) as made:
        made.add(encoder.encode_documents(TEXTS), TEXTS, ids=["orange", "fox"])
    return folder


def test_content_words_are_distinct_and_hold_no_glue():
    assert content_words("The fox and the FOX; a 2nd Füchsin, in x!") == ["fox", "2nd", "füchsin"]


def test_a_reading_says_what_was_kept_and_what_was_lost(encoder, decoder, monkeypatch):
    pieces = [[(" The", 0.5), (" Fox", 0.25), ("es", 1.0)], [("quick", 0.5), (" fox.", 0.5)]]
    monkeypatch.setattr(decoder, "generate_tokens", lambda *_, **__: pieces)
    plural, right = read_back(decoder, encoder.compress(TEXTS[1:] * 2), TEXTS[1:] * 2)
    assert plural == Reading(pieces[0], [], ["quick", "brown", "fox"], [])
    assert (right.text, right.recovered, right.lost) == ("quick fox.", ["quick", "fox"], ["brown"])
    assert (plural.share, right.share) == (0, pytest.approx(2 / 3))
    assert Reading([], [], [], []).share == 1


def test_words_that_come_too_late_to_be_written_are_not_lost(encoder, decoder, monkeypatch):
    monkeypatch.setattr(decoder, "generate_tokens", lambda *_, **__: [[("brown river", 0.5)]])
    text = "the quick brown fox found oranges, a quick lemon and a river"
    most = len(decoder.target_ids(["the quick brown fox"])[0]) - 1
    (reading,) = read_back(decoder, encoder.compress([text]), [text], max_new_tokens=most)
    assert (reading.recovered, reading.lost) == (["brown", "river"], ["quick", "fox"])
    assert reading.beyond == ["found", "oranges", "lemon"]
    assert reading.share == 1 / 2
    (whole,) = read_back(decoder, encoder.compress([text]), [text], max_new_tokens=100)
    assert (whole.lost, whole.beyond) == (["quick", "fox", "found", "oranges", "lemon"], [])


def test_vectors_and_originals_that_do_not_pair_are_refused_before_anything_is_written(
    encoder, decoder, monkeypatch
):
    monkeypatch.setattr(decoder, "generate_tokens", None)  # whoever calls it fails
    with pytest.raises(ValueError, match="2 compressed texts and 1 originals: give as many of each"):
        read_back(decoder, encoder.compress(TEXTS), TEXTS[:1])
    with pytest.raises(TypeError, match="originals must be a sequence of texts"):
        read_back(decoder, encoder.compress(TEXTS), "ab")


def test_stored_vectors_are_read_as_the_text_itself(encoder, decoder, index):
    with DocumentIndex.open(index, read_only=True) as opened:
        vectors = opened.vectors(["orange", "fox"])
    compressed = encoder.compress(TEXTS)
    states = states_of_vectors(vectors, compressed)
    np.testing.assert_allclose(states, compressed, atol=2e-2, err_msg="half precision is all that is lost")
    assert [reading.text for reading in read_back(decoder, states, TEXTS, max_new_tokens=4)] == (
        said(decoder, compressed, 4)
    )
    assert states_of_vectors(vectors[:, :64], compressed).shape == (2, 2, 32)
    for width in (31, 192):
        with pytest.raises(ValueError, match=f"dimension {width} are not up to 5 compressed vectors of 32"):
            states_of_vectors(np.ones((2, width), dtype=np.float32), compressed)


def test_explain_reads_a_text_under_both_instructions(tiny_checkpoint, encoder, decoder):
    result = run(TEXTS[0], "--model", tiny_checkpoint, "--max-new-tokens", 4, "--json")
    assert result.exit_code == 0, result.output
    own, following = json.loads(result.stdout)
    for record, instruction in ((own, "self"), (following, "next")):
        assert record["text"] == said(decoder, encoder.compress(TEXTS[:1], instruction), 4)[0]
        words = {*record["recovered"], *record["lost"], *record["beyond"]}
        assert words == {"vitamin", "found", "oranges"}
        assert "".join(piece for piece, _ in record["tokens"]) == record["text"]


def test_explain_prints_confidence_and_words(tiny_checkpoint):
    short = run(TEXTS[0], "--model", tiny_checkpoint, "--max-new-tokens", 1)
    assert "; 3 more lie beyond the first 1 tokens, the most that is written" in " ".join(
        short.output.split()
    )
    result = run(TEXTS[0], "--model", tiny_checkpoint, "--max-new-tokens", 30)
    assert result.exit_code == 0, result.output
    assert "beyond" not in result.output
    assert "as a document (I_self): " in result.output
    assert "as a query (I_next): " in result.output
    assert "%" in result.output
    assert "content words: " in result.output
    assert "lost: " in result.output


def test_explain_reads_the_vector_of_an_indexed_document(tiny_checkpoint, encoder, decoder, index):
    result = run("--index", index, "--id", "fox", "--model", tiny_checkpoint, "--max-new-tokens", 4, "--json")
    assert result.exit_code == 0, result.output
    (record,) = json.loads(result.stdout)
    assert record["what"] == "the stored vector"
    assert record["text"] == said(decoder, encoder.compress(TEXTS[1:]), 4)[0]


def test_explain_takes_the_decoder_that_a_checkpoint_does_not_name(tiny_base, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    model = tmp_path / "model"
    AutoRegEncoder.from_base(base, device="cpu").save_pretrained(model)
    base.rename(tmp_path / "elsewhere")
    gone = run("fox", "--model", model, "--max-new-tokens", 2)
    assert gone.exit_code == 2
    assert "names the decoder" in gone.stderr
    assert "or give --decoder" in gone.stderr
    record = json.loads((model / "autoregembed.json").read_text(encoding="utf-8"))
    (model / "autoregembed.json").write_text(json.dumps(record | {"decoder": None}), encoding="utf-8")
    unnamed = run("fox", "--model", model, "--max-new-tokens", 2)
    assert unnamed.exit_code == 2
    assert "does not name its decoder: give --decoder" in unnamed.stderr
    named = run("fox", "--model", model, "--decoder", tmp_path / "elsewhere", "--max-new-tokens", 2)
    assert named.exit_code == 0, named.output
    assert "as a query (I_next): " in named.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a TEXT, or both --index DIR and --id ID"),
        (["a", "--index", "i", "--id", "b"], "give a TEXT, or both"),
        (["--index", "i"], "give a TEXT, or both"),
        (["a", "--id", "b"], "give a TEXT, or both"),
        (["--index", "{index}", "--id", "cat"], "has no document with the id 'cat'"),
        (["--index", "nowhere", "--id", "cat"], "no index at"),
    ],
)
def test_explain_says_what_is_wrong_in_a_line(tiny_checkpoint, index, arguments, message):
    arguments = [argument.format(index=index) for argument in arguments]
    result = run(*arguments, "--model", tiny_checkpoint)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr


def test_explain_refuses_vectors_of_another_encoder(make_checkpoint, tmp_path, tiny_checkpoint, encoder):
    folder = tmp_path / "index"
    with DocumentIndex.create(folder, encoder="another") as made:
        made.add(encoder.encode_documents(TEXTS), TEXTS, ids=["a", "b"])
    result = run("--index", folder, "--id", "a", "--model", tiny_checkpoint)
    assert result.exit_code == 2
    assert "holds vectors of encoder another" in result.stderr
