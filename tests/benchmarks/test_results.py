"""The page of results: what stands in it is what the reports say."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("bm25s")
pytest.importorskip("ir_measures")
pytest.importorskip("matplotlib")

from autoregembed_rag import AutoRegEncoder
from benchmarks import results


def entry(model: str, use: str, dimension: int | None, value: float, fingerprint: str | None = "f1") -> dict:
    return {
        "system": f"{model}, {use}" if use else model,
        "measures": {"nDCG@10": value, "MRR@10": 0.9},
        "documents_per_second": 1234.5,
        "details": {}
        if fingerprint is None
        else {
            "model": model,
            "use": use,
            "fingerprint": fingerprint,
            "dimension": dimension,
            "parameters": 7_300_000,
        },
    }


def retrieval(
    *entries: dict, dataset: str = "words", command: str = "python -m benchmarks.retrieval"
) -> dict:
    return {
        "dataset": dataset,
        "split": "test",
        "results": list(entries),
        "command": command,
        "cpu": "A processor",
        "cpu_count": 2,
    }


def similarity(value: float, fingerprint: str = "f1") -> dict:
    details = {
        "model": "mini",
        "use": "",
        "fingerprint": fingerprint,
        "dimension": 160,
        "parameters": 7_300_000,
    }
    return {
        "sets": {"stsb test": 10},
        "results": [{"system": "mini", "spearman": {"stsb test": value}, "details": details}],
        "command": "python -m benchmarks.sts stsb/test.tsv",
        "cpu": "A processor",
        "cpu_count": 2,
    }


def page(tmp_path: Path, *reports: dict, card: Path | None = None):
    files = []
    for number, report in enumerate(reports):
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps(report), encoding="utf-8")
    options = [] if card is None else ["--card", card]
    arguments = [*files, "--output", tmp_path / "RESULTS.md", *options]
    return CliRunner().invoke(results.app, [str(argument) for argument in arguments])


FULL = retrieval(
    entry("mini", "", 160, 0.25),
    entry("mini", "hybrid", 160, 0.35),
    entry("mini", "2 of 5 tokens", 64, 0.24),
    entry("mini", "1 of 5 tokens", 32, 0.2),
    entry("mini", "mean pooling", 32, 0.22),
    entry("BM25", "", None, 0.31, fingerprint=None),
)


def test_the_page_has_a_row_for_every_system_with_what_all_reports_say_of_it(tmp_path):
    result = page(tmp_path, FULL, similarity(74.126))
    assert result.exit_code == 0, result.output
    text = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    first, second = text.split("## Fewer tokens")
    assert "|  | size | words test | stsb test | documents/s (words test) |" in first
    assert "| mini | 7.3M | 0.2500 | 74.13 | 1,234 |" in first
    assert "| mini, hybrid | 7.3M | 0.3500 |  | 1,234 |" in first
    assert "| BM25 |  | 0.3100 |  | 1,234 |" in first
    assert "of 5 tokens" not in first
    assert "| mini, 1 of 5 tokens | 32 | 0.2000 |  | 1,234 |" in second
    assert "| mini, mean pooling | 32 | 0.2200 |" in second
    assert "hybrid" not in second
    assert "python -m benchmarks.retrieval\npython -m benchmarks.sts stsb/test.tsv\n" in second
    for picture in ("size", "tokens"):
        assert (tmp_path / "RESULTS" / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
        assert f"RESULTS/{picture}.png" in text


def test_the_page_has_the_time_and_recall_of_searches_by_fewer_tokens(tmp_path):
    row = {"search": {"p50": 17.49}, "from text": {"p50": 20.66, "p95": 23.2}, "recall": 1.0, "bytes": 320e6}
    kinds = {"SQfp16": row | {"nDCG@10": 0.25}, "SQfp16, 2 of 5 tokens, refined": row | {"nDCG@10": 0.2497}}
    counts = {"dataset": "passages", "documents": 100_000, "questions": 200, "model": "mini"}
    timed = counts | {
        "kinds": kinds,
        "command": "python -m benchmarks.latency",
        "cpu": "A processor",
        "cpu_count": 2,
    }
    assert page(tmp_path, FULL, timed).exit_code == 0
    text = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    assert "passages (100,000 documents, 200 questions), mini:" in text
    assert "| SQfp16, 2 of 5 tokens, refined | 17.5 | 20.7 | 23.2 | 1.000 | 0.2497 | 320.0 MB |" in text
    assert "python -m benchmarks.latency\n" in text
    assert page(tmp_path, FULL).exit_code == 0
    assert "refined" not in (tmp_path / "RESULTS.md").read_text(encoding="utf-8")


def test_the_page_has_the_gain_and_cost_of_ranking_anew(tmp_path):
    plain = entry("mini", "", 160, 0.25) | {"ms_per_query": 12.0}
    anew = entry("mini", "", 160, 0.2601) | {"system": "mini, 50 reranked", "ms_per_query": 1503.4}
    anew["details"] = anew["details"] | {"reranked": 50}
    assert page(tmp_path, FULL, retrieval(plain, anew, dataset="sets")).exit_code == 0
    text = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    assert "| sets test, mini | 0.2500 | 0.9000 | 12 |" in text
    assert "| sets test, mini, 50 reranked | 0.2601 | 0.9000 | 1,503 |" in text
    assert page(tmp_path, FULL).exit_code == 0
    assert "reranked" not in (tmp_path / "RESULTS.md").read_text(encoding="utf-8")


def test_reports_of_different_weights_under_one_name_are_refused(tmp_path):
    result = page(tmp_path, FULL, similarity(74.1, fingerprint="f2"))
    assert result.exit_code == 2
    assert "different weights" in result.stderr
    assert not (tmp_path / "RESULTS.md").exists()


def test_the_card_carries_the_scores_of_its_own_checkpoint_and_no_others(tiny_checkpoint, tmp_path):
    import shutil

    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, checkpoint)
    fingerprint = AutoRegEncoder.from_pretrained(checkpoint, device="cpu").fingerprint
    card = checkpoint / "README.md"
    card.write_text("# tiny\n\n## Scores\n\nold\n", encoding="utf-8")
    other = page(tmp_path, FULL, card=card)
    assert other.exit_code == 2
    assert "measure it again" in other.stderr
    assert "old" in card.read_text(encoding="utf-8")

    own = retrieval(
        entry("tiny", "", 160, 0.25, fingerprint),
        entry("another", "", 160, 0.99, "f2"),
        entry("BM25", "", None, 0.31, None),
    )
    assert page(tmp_path, own, card=card).exit_code == 0
    text = card.read_text(encoding="utf-8")
    assert "| tiny | 7.3M | 0.2500 | 1,234 |" in text
    assert "| BM25 |" in text
    assert "another" not in text
    assert "old" not in text
