"""The search benchmark, end to end on little data, and the data and ratios that it stands on."""

import json
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("faiss")
pytest.importorskip("matplotlib")

from benchmarks import search, stores
from benchmarks.measures import Measures, markdown, table
from benchmarks.synthetic import conditions, isotropic, recall, structured


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny searches on a busy machine spend their time waiting for the second thread."""
    threads = stores.faiss.omp_get_max_threads()
    stores.faiss.omp_set_num_threads(1)
    yield
    stores.faiss.omp_set_num_threads(threads)


def run(*arguments):
    return CliRunner().invoke(search.app, [str(argument) for argument in arguments])


def record_of(out):
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def test_a_small_run_measures_each_kind_beside_faiss_and_writes_json_table_and_png(tmp_path):
    result = run("--small", "--rounds", 1, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    record = record_of(tmp_path)
    assert record["cpu"]
    assert {"faiss-cpu", "numpy"} & set(record["versions"])
    flat, lists = record["settings"]
    assert (flat["documents"], flat["dimension"], flat["kind"]) == (2000, 128, "Flat")
    assert lists["kind"].startswith("IVF")
    for setting in (flat, lists):
        measures = setting["measures"]
        for name in ("add", "open and first search", "search, one query", "upsert 1 %, on disk", "disk"):
            own, faiss = (measures[name]["medians"][system] for system in ("DocumentIndex", "FAISS"))
            ratio = own / faiss if name == "add" else faiss / own
            assert measures[name]["ratios"]["FAISS"] == pytest.approx(ratio)
        # Promised: a filter leaves out no match, with or without an index on its key.
        for share, k in (("0.1 %", 2), ("1 %", 10), ("10 %", 10), ("50 %", 10)):
            assert measures[f"filter {share}: found of {k}"]["medians"]["DocumentIndex"] == k
            for state in ("key indexed", "key not indexed"):
                assert measures[f"filter {share}, {state}"]["medians"]["FAISS"] > 0
        assert measures["search_text, one query"]["medians"].keys() == {"DocumentIndex"}
    assert set(flat["measures"]["recall@10"]["medians"].values()) == {1}
    if stores.CommunityStore.installed():
        medians = {name: found["medians"].get("community FAISS") for name, found in flat["measures"].items()}
        assert all(medians[name] > 0 for name in ("add", "array to lists", "delete 1 %, on disk", "disk"))
        # Its filter comes after the search, so that at its default depth most of few matches are missed.
        assert medians["filter 1 %: found of 10"] > 9 > medians["filter 1 %: found of 10, fetch_k 20"]
    assert 0 < lists["measures"]["recall@10, vectors without structure"]["medians"]["DocumentIndex"] <= 1
    assert lists["measures"]["FAISS file / float32 vectors"]["medians"]["DocumentIndex"] < 0.5
    written = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert written.count("| search, one query |") == 2
    assert record["command"] in written
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_options_make_one_setting_and_community_faiss_is_left_out_with_a_hint_where_it_is_missing(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "langchain_community", None)
    result = run("--n", 300, "--dimension", 16, "--rounds", 2, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "pip install langchain-community" in result.output
    (setting,) = record_of(tmp_path)["settings"]
    assert (setting["documents"], setting["dimension"], setting["factory"]) == (300, 16, "auto")
    added = setting["measures"]["add"]
    assert added["medians"].keys() == {"DocumentIndex", "FAISS"}
    assert [len(rounds) for rounds in added["rounds"].values()] == [2, 2]


def test_a_factory_that_does_not_exist_is_refused_in_one_line(tmp_path):
    result = run("--n", 300, "--factory", "HNSW32", "--out", tmp_path)
    assert result.exit_code == 2
    assert "HNSW32" in result.stderr
    assert result.stderr.count("error:") == 1


def test_structured_data_are_the_same_for_a_seed_and_look_like_flattened_embeddings():
    data, again, other = (structured(500, 43, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(data.vectors, again.vectors)
    assert data.texts == again.texts
    assert data.texts != other.texts
    np.testing.assert_allclose(np.linalg.norm(data.vectors, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(data.queries, axis=1), 1, rtol=1e-5)
    for token in np.array_split(data.vectors, 5, axis=1):
        np.testing.assert_allclose(np.linalg.norm(token, axis=1), 5**-0.5, rtol=1e-5)
    # A part common to all makes any two alike; a query is much closer to its own document.
    cosines = data.queries @ data.vectors.T
    assert 0.1 < np.median(cosines) < 0.6
    assert np.median(cosines.max(axis=1)) > 0.75
    assert 50 < np.mean([len(text.split()) for text in data.texts]) < 70
    assert {len(text.split()) for text in data.query_texts} == {8}
    worst = isotropic(data, 0)
    assert abs(np.median(worst.queries @ worst.vectors.T)) < 0.05
    assert worst.texts == data.texts


def test_filters_select_the_shares_that_they_are_named_for():
    data = structured(3000, 10, 0)
    found = conditions(data, 10)
    assert {share: int(where.matches.sum()) for share, where in found.items()} == {
        "0.1 %": 3,
        "1 %": 30,
        "10 %": 300,
        "50 %": 1500,
    }
    for where in found.values():
        chosen = [metadata[where.key] == where.filter[where.key] for metadata in data.metadatas]
        assert chosen == where.matches.tolist()
        assert where.fetch_k <= 3000


def test_recall_counts_the_best_and_those_that_rounding_cannot_tell_apart():
    scores = np.array([[0.9, 0.8, 0.5, 0.79999], [0.1, 0.2, 0.3, 0.4]], dtype=np.float32)
    assert recall([[0, 1], [3, 2]], scores, 2) == 1
    assert recall([[0, 3], [3, 2]], scores, 2) == 1
    assert recall([[0, 2], [0, 1]], scores, 2) == 0.25
    assert recall([[], [3]], scores, 2) == 0.25


def test_ratios_say_how_many_times_better_the_first_system_did():
    measures = Measures()
    for own, other in ((1.0, 4.0), (2.0, 6.0), (9.0, 5.0)):
        measures.put("time", "s", "own", own)
        measures.put("time", "s", "other", other)
    for system, rate in (("own", 30.0), ("other", 10.0)):
        measures.put("rate", "documents/s", system, rate)
    measures.put("found", "", "other", 3.0)
    found = measures.record("own")
    assert found["time"]["medians"] == {"own": 2.0, "other": 5.0}
    assert found["time"]["ratios"] == {"other": 2.5}
    assert found["rate"]["ratios"] == {"other": 3.0}
    assert found["found"]["ratios"] == {}
    header, rows = table("title", found, ["own", "other"])
    assert header == ["title", "own", "other", "vs other"]
    assert rows == [
        ["time", "2 s", "5 s", "2.50x"],
        ["rate", "30/s", "10/s", "3.00x"],
        ["found", "-", "3", ""],
    ]
    assert markdown(header, rows).splitlines()[1] == "| :-- | --: | --: | --: |"
