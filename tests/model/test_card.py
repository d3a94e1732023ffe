"""The model card: it says what is known, as the hub reads it, and what it shows runs as written."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from autoregembed_rag import AutoRegEncoder
from autoregembed_rag.card import is_generated, model_card


def load(folder: Path, **arguments) -> AutoRegEncoder:
    return AutoRegEncoder.from_pretrained(folder, **{"device": "cpu", "dtype": "float32", **arguments})


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "tiny"))


def headings(card: str) -> list[str]:
    return re.findall(r"^#+ .*$", re.sub(r"```.*?```", "", card, flags=re.DOTALL), flags=re.MULTILINE)


def test_a_saved_checkpoint_has_a_card_of_what_is_known_and_no_more(checkpoint: Path):
    card = (checkpoint / "README.md").read_text(encoding="utf-8")
    encoder = load(checkpoint)
    assert headings(card) == ["# tiny", "## How to load it"]
    for fact in (
        f"fingerprint `{encoder.fingerprint}`",
        "k = 5 compressed tokens, 160 dimensions",
        "128 tokens of context",
        f'I_next, for queries: "{encoder.config.query_instruction}"',
        f'I_self, for documents: "{encoder.config.document_instruction}"',
        "llama, hidden size 32, 2 layers",
        f"{sum(weight.numel() for weight in encoder.model.parameters()) / 1e3:.1f}K parameters",
        "a folder beside it, `decoder`",
    ):
        assert fact in card
    data = ModelCard(card).data.to_dict()
    assert data["library_name"] == "autoregembed-rag"
    assert data["pipeline_tag"] == "feature-extraction"
    assert {"sentence-similarity", "feature-extraction"} <= {*data["tags"]}
    assert not data.keys() & {"license", "language", "base_model", "model-index"}


def test_the_loading_snippets_run_as_written(checkpoint: Path, monkeypatch, capsys):
    pytest.importorskip("langchain_core")
    pytest.importorskip("llama_index.core")
    pytest.importorskip("sentence_transformers")
    monkeypatch.chdir(checkpoint.parent)
    card = (checkpoint / "README.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    names: dict = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)  # noqa: S102
    assert names["queries"].shape == names["documents"].shape == (1, 160)
    printed = capsys.readouterr().out
    assert printed.count("text=") + printed.count("page_content=") == 2
    shown = "\n".join(snippets)
    for name in (
        "AutoRegEncoder",
        "FrozenDecoder",
        "AutoRegEmbeddings",
        "AutoRegEmbedding(",
        "AutoRegModule",
    ):
        assert name in shown


def test_a_checkpoint_without_decoder_shows_none(checkpoint: Path, tmp_path: Path):
    record = json.loads((checkpoint / "autoregembed.json").read_text())
    (checkpoint / "autoregembed.json").write_text(json.dumps({**record, "decoder": None}))
    load(checkpoint).save_pretrained(tmp_path / "alone")
    card = (tmp_path / "alone" / "README.md").read_text()
    assert "ecoder" not in card.replace("AutoRegEncoder", "").replace("encoder", "")


def test_a_decoder_elsewhere_on_this_machine_is_not_named_to_others(tiny_base: Path, tmp_path: Path):
    AutoRegEncoder.from_base(tiny_base, device="cpu", dtype="float32").save_pretrained(tmp_path / "untrained")
    card = (tmp_path / "untrained" / "README.md").read_text()
    assert str(tiny_base) not in card
    assert "FrozenDecoder" not in card


def test_the_settings_that_count_are_the_saved_ones(checkpoint: Path, tmp_path: Path):
    other = {"query_instruction": 'Say "what" | in\nlines', "pooling": "mean", "max_length": 100}
    load(checkpoint, **other).save_pretrained(tmp_path / "other")
    card = (tmp_path / "other" / "README.md").read_text()
    assert json.dumps(other["query_instruction"]) in card
    assert "5 compressed tokens, 32 dimensions (pooling `mean`" in card
    assert "100 tokens of context" in card
    assert load(tmp_path / "other").fingerprint in card


def test_the_fingerprint_is_that_of_the_weights_in_the_folder(checkpoint: Path, tmp_path: Path):
    load(checkpoint, dtype="bfloat16").save_pretrained(tmp_path / "rounded")
    rounded = load(tmp_path / "rounded")
    assert rounded.fingerprint != load(checkpoint).fingerprint
    assert rounded.fingerprint in (tmp_path / "rounded" / "README.md").read_text()


def test_a_generated_card_is_replaced_and_a_written_or_changed_one_never(checkpoint: Path):
    card = checkpoint / "README.md"
    encoder = load(checkpoint, query_instruction="Name the topic.")
    assert is_generated(card)
    encoder.save_pretrained(checkpoint)
    assert is_generated(card)
    assert "Name the topic." in card.read_text()

    changed = card.read_text().replace("# tiny", "# My own")
    card.write_text(changed)
    assert not is_generated(card)
    load(checkpoint, query_instruction="Name it.").save_pretrained(checkpoint)
    assert card.read_text() == changed

    load(checkpoint).save_pretrained(checkpoint, card=False)
    assert card.read_text() == changed

    card.unlink()
    encoder.save_pretrained(checkpoint)
    assert card.exists()
    encoder.save_pretrained(checkpoint, card=False)
    assert not card.exists(), "it said what was there before"


RETRIEVAL = {
    "dataset": "words",
    "split": "test",
    "results": [
        {"system": "tiny", "measures": {"nDCG@10": 0.25, "Recall@100": 0.5}, "details": {"use": ""}},
        {"system": "tiny, hybrid", "measures": {"nDCG@10": 0.35}, "details": {"use": "hybrid"}},
        {"system": "another", "measures": {"nDCG@10": 0.99}, "details": {"use": "", "fingerprint": "f2"}},
        {"system": "BM25", "measures": {"nDCG@10": 0.31}, "details": {}},
    ],
}
SIMILARITY = {
    "sets": {"stsb test": 3},
    "results": [{"system": "tiny", "spearman": {"stsb test": 70.971}, "details": {"use": ""}}],
}


def of(fingerprint: str, report: dict) -> dict:
    """The report with this fingerprint wherever the tiny model was measured."""
    copy = json.loads(json.dumps(report))
    for system in copy["results"]:
        if system["system"].startswith("tiny"):
            system["details"]["fingerprint"] = fingerprint
    return copy


def test_scores_are_those_of_this_checkpoint_alone(checkpoint: Path):
    encoder = load(checkpoint)
    reports = [of(encoder.fingerprint, RETRIEVAL), of(encoder.fingerprint, SIMILARITY)]
    card = model_card(
        encoder,
        "ann/tiny",
        scores=reports,
        about="## Made of\n\nWords.",
        license="mit",
        language=["en", "de"],
    )
    assert headings(card) == ["# tiny", "## Made of", "## How to load it", "## Scores"]
    assert "| words | test |  | nDCG@10 | 0.2500 |" in card
    assert "| words | test | hybrid | nDCG@10 | 0.3500 |" in card
    assert "| stsb test |  |  | Spearman x 100 | 70.97 |" in card
    assert "0.99" not in card
    assert "BM25" not in card
    assert 'from_pretrained("ann/tiny")' in card
    data = ModelCard(card).data
    assert (data.license, data.language) == ("mit", ["en", "de"])
    results = {(r.dataset_name, r.metric_type): r.metric_value for r in data.eval_results}
    assert results == {
        ("words", "ndcg_at_10"): 0.25,
        ("words", "recall_at_100"): 0.5,
        ("stsb test", "spearman_x_100"): 70.971,
    }


def test_scores_of_others_are_refused(checkpoint: Path):
    encoder = load(checkpoint)
    with pytest.raises(ValueError, match=f"words is of the encoder with fingerprint {encoder.fingerprint}"):
        model_card(encoder, "tiny", scores=[of("f3", RETRIEVAL)])
    with pytest.raises(
        ValueError, match=r"no report of benchmarks\.retrieval or benchmarks\.sts: \{'a': 1\}"
    ):
        model_card(encoder, "tiny", scores=[{"a": 1}])


def test_an_encoder_that_is_not_as_it_was_loaded_has_no_card(checkpoint: Path):
    encoder = load(checkpoint)
    with torch.no_grad():
        encoder.trainable().norm.weight += 1
    with pytest.raises(ValueError, match=r"never saved has no card: save_pretrained\(folder\)"):
        model_card(encoder, "tiny")


def test_files_of_these_names_that_are_no_records_say_nothing(checkpoint: Path, tmp_path: Path):
    before = load(checkpoint)
    for number, content in enumerate(
        ["{", "[]", '{"verdict": "better"}', '{"weights": "of others", "run": {}}']
    ):
        for name in ("training.json", "report.json", "plan.json"):
            (checkpoint / name).write_text(content)
        load(checkpoint).save_pretrained(tmp_path / str(number))
        assert "## Training" not in (tmp_path / str(number) / "README.md").read_text()
    np.testing.assert_array_equal(before.encode(["fox"]), load(checkpoint).encode(["fox"]))
