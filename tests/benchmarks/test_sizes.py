"""The benchmark of sizes, end to end: real indexes in processes of their own, compared with what was foretold."""

import json

import pytest
from typer.testing import CliRunner

pytest.importorskip("faiss")
pytest.importorskip("matplotlib")
pytest.importorskip("pyarrow")

from benchmarks import sizes


def test_sizes_reports_real_indexes_beside_what_was_foretold(tmp_path):
    words = ["--documents", "700", "--dimension", "64", "--factory", "IVF,SQ8", "--out", str(tmp_path)]
    result = CliRunner().invoke(sizes.app, words)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    (found,) = record["indexes"]
    assert (found["kind"], found["documents"]) == ("IVF16,SQ8", 700)
    assert found["disk"] == pytest.approx(found["foretold_disk"], rel=0.15)  # so few leave pages empty
    assert found["filled"] > 0
    assert 0.2 < record["words"] < 0.8
    (shard,) = record["shards"]
    assert shard["snappy"] < shard["none"]
    assert record["tokenising"]["tokens/s"] > 0
    page = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| 64 | IVF,SQ8 | IVF16,SQ8 | 700 |" in page
    assert record["command"] in page


def test_a_folder_without_documents_is_an_error_of_one_line(tmp_path):
    result = CliRunner().invoke(sizes.app, ["--data-dir", str(tmp_path)])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
