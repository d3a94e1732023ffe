"""Reading BEIR folders, and what the errors say when something is wrong with one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("bm25s")
pytest.importorskip("ir_measures")

from benchmarks.beir import BenchmarkDataError, Document, limit_documents, load_folder, load_hub
from benchmarks.scoring import DEPTH, score_run
from benchmarks.systems import BM25

CHECKOUT = Path(__file__).parents[2]
SHARED = CHECKOUT.parent / "shared" / "data" / "beir"

CORPUS = [
    {"_id": "d1", "title": "Citrus", "text": "Oranges and lemons hold vitamin C."},
    {"_id": "d2", "title": "", "text": "Rivers carry water to the sea."},
    {"_id": "d3", "title": "Foxes", "text": "A fox jumps over a dog."},
]
QUERIES = [
    {"_id": "q1", "text": "vitamins in lemons"},
    {"_id": "q2", "text": "water"},
    {"_id": "q3", "text": "idle"},
]
QRELS = "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td3\t0\nq2\td2\t1\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "tiny"
    (root / "qrels").mkdir(parents=True)
    (root / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CORPUS), encoding="utf-8")
    (root / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUERIES), encoding="utf-8")
    (root / "qrels" / "test.tsv").write_text(QRELS, encoding="utf-8")
    return root


def test_a_folder_gives_documents_judged_queries_and_grades(folder):
    data = load_folder(folder)
    assert (data.name, data.split) == ("tiny", "test")
    assert [document.id for document in data.documents] == ["d1", "d2", "d3"]
    assert data.queries == {"q1": "vitamins in lemons", "q2": "water"}
    assert data.qrels == {"q1": {"d1": 2, "d3": 0}, "q2": {"d2": 1}}


def test_a_title_comes_before_the_text_and_an_empty_one_leaves_nothing(folder):
    first, second, _ = load_folder(folder).documents
    assert first.content == "Citrus\nOranges and lemons hold vitamin C."
    assert second.content == "Rivers carry water to the sea."


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("corpus.jsonl", '{"_id": "d1", "text": "fine"}\n{"_id": "d2"\n', r"corpus\.jsonl, line 2: not JSON"),
        ("corpus.jsonl", '{"_id": "d1"}\n', r"corpus\.jsonl, line 1: field 'text' is missing"),
        (
            "corpus.jsonl",
            '{"_id": 7, "text": "x"}\n',
            r"corpus\.jsonl, line 1: field '_id' is int, not a string",
        ),
        ("corpus.jsonl", '{"_id": "d1", "text": "x"}\n' * 2, "a document _id occurs twice"),
        ("queries.jsonl", '["q1"]\n', r"queries\.jsonl, line 1: a JSON object is needed, not list"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td1\n", r"test\.tsv, line 2: expected query-id"),
        (
            "qrels/test.tsv",
            "q1\td1\t1\nq1\td2\thigh\n",
            r"test\.tsv, line 2: expected query-id.*'q1\\td2\\thigh'",
        ),
        ("qrels/test.tsv", "q9\td1\t1\n", "judge query 'q9', which the queries do not have"),
        ("qrels/test.tsv", "q1\td1\t0\n", "0 queries with a relevant one"),
    ],
)
def test_what_is_malformed_is_named_with_file_and_line(folder, file, content, message):
    (folder / file).write_text(content, encoding="utf-8")
    with pytest.raises(BenchmarkDataError, match=message):
        load_folder(folder)


def test_a_missing_split_lists_those_that_exist(folder):
    with pytest.raises(BenchmarkDataError, match=r"dev\.tsv does not exist; the splits there are: test"):
        load_folder(folder, "dev")


def test_a_folder_of_another_kind_says_what_is_needed(tmp_path):
    with pytest.raises(BenchmarkDataError, match=r"a BEIR folder holds corpus\.jsonl"):
        load_folder(tmp_path)


def test_a_limit_keeps_only_queries_that_can_still_be_answered(folder):
    data = limit_documents(load_folder(folder), 1)
    assert [document.id for document in data.documents] == ["d1"]
    assert data.qrels == {"q1": {"d1": 2}}
    assert list(data.queries) == ["q1"]


def test_the_hub_loader_reads_msmarcos_dev_split_and_makes_ids_text(monkeypatch):
    tables = {
        ("BeIR/msmarco", "corpus", "corpus"): [{"_id": "7", "title": "", "text": "A passage."}],
        ("BeIR/msmarco", "queries", "queries"): [
            {"_id": "3", "text": "what"},
            {"_id": "4", "text": "unjudged"},
        ],
        ("BeIR/msmarco-qrels", None, "validation"): [{"query-id": 3, "corpus-id": 7, "score": 1}],
    }
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, part=None, split=None: tables[name, part, split]
    )
    data = load_hub("msmarco")
    assert (data.name, data.split) == ("msmarco", "validation")
    assert list(data.documents) == [Document("7", "", "A passage.")]
    assert data.queries == {"3": "what"}
    assert data.qrels == {"3": {"7": 1}}


def test_offline_the_hub_loader_exits_with_one_line_that_names_the_way_out(tmp_path):
    # A process of its own: the offline switches are read when the libraries are first imported.
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.retrieval", "--dataset", "scifact"],
        cwd=CHECKOUT, env={**os.environ, **offline}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "scifact" in errors[0]
    assert "--data-dir" in errors[0]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the BEIR folders are not beside this checkout")
@pytest.mark.parametrize(
    ("name", "ndcg", "recall"), [("nfcorpus", 0.3177, 0.2457), ("cranfield", 0.4041, 0.7384)]
)
def test_bm25_reproduces_its_known_figures(name, ndcg, recall):
    data = load_folder(SHARED / name)
    bm25 = BM25()
    bm25.index(data.documents)
    rankings = bm25.search(list(data.queries.values()), DEPTH)
    scores = score_run(data.qrels, {q: dict(hits) for q, hits in zip(data.queries, rankings, strict=True)})
    assert scores["nDCG@10"] == pytest.approx(ndcg, abs=5e-5)
    assert scores["Recall@100"] == pytest.approx(recall, abs=5e-5)
