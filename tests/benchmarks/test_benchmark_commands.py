"""The commands, end to end on tiny data with a tiny model."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("bm25s")
pytest.importorskip("faiss")
pytest.importorskip("ir_measures")
pytest.importorskip("langchain_core")
pytest.importorskip("matplotlib")

from benchmarks import demo, retrieval, sts
from benchmarks.models import MeanPooledModel, load_encoders
from benchmarks.pydoc import standard_library_documents

WORDS = [
    "orange",
    "lemon",
    "river",
    "water",
    "fox",
    "dog",
    "bank",
    "quick",
    "lazy",
    "vitamin",
    "pepper",
    "answer",
]


@pytest.fixture
def beir_folder(tmp_path: Path) -> Path:
    root = tmp_path / "words"
    (root / "qrels").mkdir(parents=True)
    documents = [
        {"_id": f"d{i}", "title": word, "text": f"All about {word}."} for i, word in enumerate(WORDS)
    ]
    queries = [{"_id": f"q{i}", "text": word} for i, word in enumerate(WORDS)]
    qrels = "".join(f"q{i}\td{i}\t1\n" for i in range(len(WORDS)))
    (root / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents), encoding="utf-8")
    (root / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries), encoding="utf-8")
    (root / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + qrels, encoding="utf-8")
    return root


def run(app, *arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_retrieval_reports_model_base_and_bm25_and_writes_json_and_png(
    beir_folder, tiny_checkpoint, tmp_path
):
    out = tmp_path / "out"
    result = run(
        retrieval.app,
        "--data-dir",
        beir_folder,
        "--model",
        tiny_checkpoint,
        "--base",
        tiny_checkpoint,
        "--out",
        out,
    )
    assert result.exit_code == 0, result.output
    assert "nDCG@10" in result.output
    record = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert (record["dataset"], record["split"], record["documents"], record["queries"]) == (
        "words",
        "test",
        12,
        12,
    )
    model, base, bm25 = record["results"]
    assert (model["details"]["dimension"], base["details"]["dimension"]) == (160, 32)
    assert len(model["details"]["fingerprint"]) >= 8
    assert bm25["measures"] == {"nDCG@10": 1, "Recall@100": 1, "MRR@10": 1}
    # A dense index returns all 12 documents, so Recall@100 is 1 whatever the model is worth.
    assert model["measures"]["Recall@100"] == base["measures"]["Recall@100"] == 1
    assert all(
        entry[key] > 0 for entry in record["results"] for key in ("documents_per_second", "ms_per_query")
    )
    assert model["index_bytes"] > 12 * 160 * 2
    assert record["cpu"]
    assert record["versions"]["torch"]
    assert (out / "results.png").read_bytes().startswith(b"\x89PNG")


def test_fewer_tokens_and_mean_pooling_change_the_dimension(beir_folder, tiny_checkpoint, tmp_path):
    for options, dimension in ((("--num-tokens", 2), 64), (("--pooling", "mean"), 32)):
        arguments = (
            "--data-dir",
            beir_folder,
            "--model",
            tiny_checkpoint,
            "--out",
            tmp_path,
            "--limit",
            5,
            *options,
        )
        result = run(retrieval.app, *arguments)
        assert result.exit_code == 0, result.output
        record = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
        assert record["results"][0]["details"]["dimension"] == dimension
        assert (record["limit"], record["documents"], record["queries"]) == (5, 5, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data-dir", "nowhere"], "does not exist"),
        (["--data-dir", "nowhere", "--dataset", "scifact"], "give one of them"),
        (["--split", "dev"], "split test only"),
        (["--data-dir", "FOLDER", "--model", "no-such-model"], "What works"),
    ],
)
def test_wrong_arguments_exit_2_with_one_kind_line(beir_folder, arguments, message):
    result = run(
        retrieval.app, *(beir_folder if argument == "FOLDER" else argument for argument in arguments)
    )
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("error:") == 1


def test_the_base_embedding_is_the_mean_of_the_real_tokens_states(tiny_base):
    import torch
    from transformers import AutoModel, AutoTokenizer

    texts = ["A fox.", "The quick brown fox jumps over the lazy dog near the river bank.", ""]
    model, tokenizer = AutoModel.from_pretrained(tiny_base), AutoTokenizer.from_pretrained(tiny_base)
    expected = []
    for text in texts:
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            mean = model(torch.tensor([ids])).last_hidden_state[0].mean(0).double().numpy()
        expected.append(mean / np.linalg.norm(mean))
    vectors = MeanPooledModel(str(tiny_base), dtype="float32").encode_documents(texts, batch_size=2)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_two_models_whose_folders_share_a_name_stay_two(tiny_checkpoint, tmp_path):
    names = []
    for run_name in ("one", "two"):
        shutil.copytree(tiny_checkpoint, tmp_path / run_name / "final")
        names.append(str(tmp_path / run_name / "final"))
    assert list(load_encoders(names, None)) == names
    assert list(load_encoders(names[:1], None)) == ["final"]


def test_a_checkpoint_stands_for_its_own_base_model(tiny_checkpoint, tiny_base):
    own = MeanPooledModel(str(tiny_checkpoint))
    assert own.fingerprint == MeanPooledModel(str(tiny_base)).fingerprint


def test_the_demo_answers_each_question_with_three_objects_and_their_summaries(tiny_checkpoint):
    result = run(demo.app, "--model", tiny_checkpoint, "--limit", 40)
    assert result.exit_code == 0, result.output
    assert all(question in result.output for question in demo.QUESTIONS)
    documents = {document.id: document.text for document in standard_library_documents()[:40]}
    hits = [line.split(maxsplit=2) for line in result.output.splitlines() if line.startswith("  ")]
    assert len(hits) == 3 * len(demo.QUESTIONS)
    assert all(
        documents[name].startswith(summary) and -1 <= float(score) <= 1 for score, name, summary in hits
    )


def test_sts_reports_the_rank_correlation_and_writes_it(tiny_checkpoint, tmp_path):
    file = tmp_path / "set" / "dev.tsv"
    file.parent.mkdir()
    rows = [
        ("5.0", "A fox.", "A fox."),
        ("2.5", "A fox runs.", "A dog runs far."),
        ("0", "Water.", "Lemons are yellow"),
    ]
    text = "score\tsentence1\tsentence2\n" + "".join("\t".join(row) + "\n" for row in rows)
    file.write_text(text, encoding="utf-8")
    result = run(
        sts.app, file, "--model", tiny_checkpoint, "--base", tiny_checkpoint, "--out", tmp_path / "out"
    )
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "set-dev" / "results.json").read_text(encoding="utf-8"))
    assert record["pairs"] == 3
    assert len(record["results"]) == 2
    # Equal sentences have cosine 1, the highest score: whatever the model, the first rank is right.
    assert {round(entry["spearman"]) for entry in record["results"]} <= {50, 100}


def test_sts_correlates_the_cosines_of_the_pairs_in_their_order():
    class Angles:
        """Embeds "30" as the unit vector at 30 degrees."""

        def encode_documents(self, texts, show_progress=False):
            radians = np.radians([float(text) for text in texts])
            return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)

    scores = np.array([5.0, 3.0, 4.0, 1.0])
    zeros = ["0"] * 4
    assert sts.evaluate_pairs(Angles(), scores, zeros, ["5", "60", "30", "90"]) == pytest.approx(100)
    assert sts.evaluate_pairs(Angles(), scores, zeros, ["90", "30", "60", "5"]) == pytest.approx(-100)
    # Ranks 4, 2, 3, 1 against 3, 2, 4, 1: 1 - 6 * (1 + 0 + 1 + 0) / (4 * 15).
    assert sts.evaluate_pairs(Angles(), scores, zeros, ["30", "60", "5", "90"]) == pytest.approx(80)


def test_sts_names_the_line_that_is_not_a_pair(tmp_path):
    file = tmp_path / "bad.tsv"
    file.write_text("score\tsentence1\tsentence2\n1.0\tonly one\n", encoding="utf-8")
    result = run(sts.app, file)
    assert result.exit_code == 2
    assert "bad.tsv, line 2" in result.stderr
