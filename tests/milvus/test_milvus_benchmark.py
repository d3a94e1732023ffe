"""The retrieval benchmark on a server gives what it gives in a folder."""

import json

import pytest
from typer.testing import CliRunner

pytest.importorskip("bm25s")
pytest.importorskip("faiss")
pytest.importorskip("ir_measures")
pytest.importorskip("matplotlib")

from benchmarks import retrieval

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


def test_the_same_measures_come_through_a_server(server, token, tiny_checkpoint, tmp_path):
    from pymilvus import MilvusClient

    folder = tmp_path / "words"
    (folder / "qrels").mkdir(parents=True)
    rows = [{"_id": f"{number}", "text": f"All about {word}."} for number, word in enumerate(WORDS * 5)]
    queries = [{"_id": f"q{number}", "text": word} for number, word in enumerate(WORDS)]
    for name, lines in (("corpus", rows), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    judged = "".join(f"q{number}\t{number}\t1\n" for number in range(len(WORDS)))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    options = {
        "--data-dir": folder,
        "--model": tiny_checkpoint,
        "--milvus": server,
        "--out": tmp_path / "out",
    }
    done = CliRunner().invoke(retrieval.app, [str(part) for option in options.items() for part in option])
    assert done.exit_code == 0, done.output
    here, there, bm25 = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert there["system"] == f"{here['system']}, Milvus" and bm25["system"] == "BM25"
    assert there["measures"]["MRR@10"] == pytest.approx(here["measures"]["MRR@10"], abs=0.05)
    assert there["measures"]["Recall@100"] == 1 and there["details"]["kind"] == "FLAT"
    left = MilvusClient(server, token=token).list_collections()
    assert not [name for name in left if name.startswith("benchmark")]


def test_a_server_that_is_not_there_ends_it_with_one_line(tiny_checkpoint, tmp_path):
    done = CliRunner().invoke(
        retrieval.app,
        [
            "--model",
            str(tiny_checkpoint),
            "--limit",
            "20",
            "--milvus",
            "http://127.0.0.1:1",
            "--out",
            str(tmp_path),
        ],
    )
    assert done.exit_code == 2 and "http://127.0.0.1:1: cannot connect, no server answers" in done.output
