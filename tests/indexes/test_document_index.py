"""What a DocumentIndex does when it is used as it should be, and when it is not."""

import sys
import threading

import numpy as np
import pytest

from autoregembed_indexes import Document, DocumentIndex, DocumentIndexError, Hit, IndexMismatchError


def random_vectors(count, dimension=6, seed=0):
    return np.random.default_rng(seed).normal(size=(count, dimension)).astype(np.float32)


def cosines(queries, vectors):
    """Cosines of queries with vectors as they are stored: normalised, then rounded to float16."""
    unit = vectors.astype(np.float64) / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    rounded = unit.astype(np.float32).astype(np.float16).astype(np.float64)
    queries = queries.astype(np.float64) / np.linalg.norm(queries.astype(np.float64), axis=1, keepdims=True)
    return queries @ (rounded / np.linalg.norm(rounded, axis=1, keepdims=True)).T


@pytest.fixture
def index(tmp_path):
    with DocumentIndex.create(tmp_path / "index", dimension=6) as made:
        yield made


@pytest.fixture(params=["folder", "memory"])
def either(request, tmp_path):
    with DocumentIndex.create(tmp_path / "index" if request.param == "folder" else None, dimension=6) as made:
        yield made


def contents(index):
    ids = index.ids()
    return index.get(ids), index.vectors(ids).tolist()


def test_search_agrees_with_a_plain_computation(either):
    vectors, queries = random_vectors(200), random_vectors(30, seed=1) * 50
    ids = either.add(vectors, [f"text {i}" for i in range(200)], metadatas=[{"i": i} for i in range(200)])
    expected = cosines(queries, vectors)
    for row, hits in zip(expected, either.search(queries, k=7), strict=True):
        best = np.argsort(-row)[:7]
        assert [hit.id for hit in hits] == [ids[i] for i in best]
        assert [hit.score for hit in hits] == pytest.approx(row[best], abs=1e-6)
        assert [(hit.text, hit.metadata) for hit in hits] == [(f"text {i}", {"i": i}) for i in best]


@pytest.mark.parametrize("dimension", [1, 2, 6, 1280])
def test_scores_are_cosines_within_minus_one_and_one(dimension):
    vectors = random_vectors(100, dimension)
    with DocumentIndex.create(dimension=dimension) as index:
        ids = index.add(vectors, [""] * 100)
        for doc_id, hits in zip(ids, index.search(vectors, k=100), strict=True):
            assert all(-1 <= hit.score <= 1 for hit in hits)
            assert {hit.id: hit.score for hit in hits}[doc_id] == pytest.approx(1, abs=1e-3)
        assert min(hit.score for hit in index.search(-vectors[:1], k=100)[0]) == pytest.approx(-1, abs=1e-3)


def test_a_reopened_index_returns_the_same_ids_and_scores(index):
    vectors = random_vectors(300)
    vectors[100:200] = vectors[:100]  # equal scores must come in the same order too
    ids = index.add(vectors, ["old"] * 300, ids=[str(i) for i in range(300)])
    index.search(vectors[:1])
    index.delete(ids[40:60])
    index.add(vectors[90:110], ["new"] * 20, ids=ids[90:110])
    index.add(vectors[40:45], ["back"] * 5, ids=ids[40:45])
    queries = np.concatenate([vectors[:50], random_vectors(10, seed=2)])
    before = index.search(queries, k=25)
    index.close()
    with DocumentIndex.open(index.path) as reopened:
        after = reopened.search(queries, k=25)
    assert [[hit._replace(score=0) for hit in hits] for hits in after] == [
        [hit._replace(score=0) for hit in hits] for hits in before
    ]
    assert [hit.score for hits in after for hit in hits] == pytest.approx(
        [hit.score for hits in before for hit in hits], abs=1e-6
    )


def test_equal_scores_come_in_the_order_of_insertion(either):
    either.add(np.ones((20, 6)), [""] * 20, ids=[str(i) for i in range(20)])
    assert [hit.id for hit in either.search(np.ones((1, 6)), k=20)[0]] == [str(i) for i in range(20)]


def test_add_replaces_a_document_whole(either):
    vectors = random_vectors(3)
    either.add(vectors[:2], ["one", "two"], ids=["a", "b"], metadatas=[{"x": 1}, {"y": 2}])
    either.search(vectors)
    assert either.add(vectors[2:], ["three"], ids=["a"]) == ["a"]
    assert len(either) == 2
    assert either.get(["a", "b"]) == [Document("a", "three", {}), Document("b", "two", {"y": 2})]
    [best] = either.search(vectors[2:], k=1)[0]
    assert best == Hit("a", pytest.approx(1, abs=1e-3), "three", {})


def test_ids_that_are_none_become_new_ones(either):
    given = either.add(random_vectors(3), ["", "", ""], ids=["mine", None, None])
    assert given[0] == "mine" and len(set(given)) == 3
    assert either.ids() == given
    assert len(set(either.add(random_vectors(2), ["", ""])) | set(given)) == 5


def test_delete_counts_what_was_there(either):
    vectors = random_vectors(5)
    ids = either.add(vectors, list("abcde"))
    either.search(vectors)
    assert either.delete([ids[1], "unknown", ids[3], ids[3]]) == 2
    assert either.ids() == [ids[0], ids[2], ids[4]]
    assert {hit.text for hit in either.search(vectors[1:2], k=5)[0]} == {"a", "c", "e"}
    assert either.delete([]) == 0 and either.delete(["unknown"]) == 0
    assert either.clear() == 3 and len(either) == 0
    assert either.search(vectors[:2]) == [[], []]
    either.add(vectors[:1], ["again"])
    assert [hit.text for hit in either.search(vectors[:1])[0]] == ["again"]


def test_get_keeps_the_order_and_skips_what_is_missing(either):
    ids = either.add(random_vectors(1200), [str(i) for i in range(1200)])
    wanted = ["missing", *reversed(ids), ids[0]]
    assert [document.text for document in either.get(wanted)] == [
        *(str(i) for i in reversed(range(1200))),
        "0",
    ]


def test_vectors_come_back_as_unit_rows(either):
    vectors = random_vectors(4)
    ids = either.add(vectors, [""] * 4)
    found = either.vectors(list(reversed(ids)))
    assert found.dtype == np.float32 and found.shape == (4, 6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(
        found[::-1], vectors / np.linalg.norm(vectors, axis=1, keepdims=True), atol=1e-3
    )
    assert either.vectors([]).shape == (0, 6)
    with pytest.raises(KeyError, match="unknown"):
        either.vectors([ids[0], "unknown"])


def test_an_empty_index_and_empty_calls(either):
    assert either.search(random_vectors(2)) == [[], []]
    assert either.search(np.empty((0, 6))) == [] and either.search([]) == []
    assert either.add([], []) == [] and either.get([]) == []
    assert len(either) == 0 and either.ids() == []


def test_fewer_than_k_documents(either):
    either.add(random_vectors(3), [""] * 3)
    assert [len(hits) for hits in either.search(random_vectors(2), k=10**6)] == [3, 3]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, list])
def test_vectors_of_any_float_type(either, dtype):
    vectors = random_vectors(5)
    given = vectors.tolist() if dtype is list else vectors.astype(dtype)
    ids = either.add(given, [""] * 5)
    assert [hits[0].id for hits in either.search(given, k=1)] == ids


def test_vectors_of_extreme_length_keep_their_direction(either):
    vectors = random_vectors(4).astype(np.float64) * np.array([[1e-300], [1e-40], [1e40], [1e300]])
    ids = either.add(vectors, [""] * 4)
    hits = either.search(vectors, k=1)
    assert [hit[0].id for hit in hits] == ids
    assert [hit[0].score for hit in hits] == pytest.approx([1] * 4, abs=1e-3)


def test_the_dimension_may_come_from_the_first_add(tmp_path):
    with DocumentIndex.create(tmp_path / "index") as index:
        assert index.dimension is None and index.search(random_vectors(2)) == [[], []]
        index.add(random_vectors(2, 8), ["", ""])
        assert index.dimension == 8
        with pytest.raises(IndexMismatchError, match=r"dimension 6.*dimension 8"):
            index.add(random_vectors(1, 6), [""])
    with DocumentIndex.open(tmp_path / "index", dimension=8) as index:
        assert index.dimension == 8


def test_queries_of_fewer_tokens_are_compared_with_the_same_part():
    vectors, query = random_vectors(50, 12), random_vectors(1, 8, seed=3)
    with DocumentIndex.create(dimension=12, tokens=3) as index:
        ids = index.add(vectors, [""] * 50)
        index.search(query)
        index.delete(ids[:10])
        expected = cosines(query, vectors[:, :8])[0, 10:]
        hits = index.search(query, k=40)[0]
        assert [hit.id for hit in hits] == [ids[10 + i] for i in np.argsort(-expected)]
        assert [hit.score for hit in hits] == pytest.approx(np.sort(expected)[::-1], abs=1e-3)
        with pytest.raises(IndexMismatchError, match=r"dimension 6.*needs 12.*multiple of 4"):
            index.search(query[:, :6])
    with DocumentIndex.create(dimension=12) as index:
        index.add(vectors, [""] * 50)
        with pytest.raises(IndexMismatchError, match=r"dimension 8.*needs 12"):
            index.search(query)


NAN, INFINITE, ZERO = [[1.0] * 5 + [np.nan]], [[1.0] * 5 + [-np.inf]], [[0.0] * 6]
GOOD = [[1.0] * 6]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((NAN, ["x"], ["a"]), ValueError, r"vectors\[0\] \(id 'a'\) holds NaN"),
        ((INFINITE, ["x"]), ValueError, "infinity"),
        ((GOOD + ZERO, ["x", "y"], ["a", "b"]), ValueError, r"vectors\[1\] \(id 'b'\) is all zeros"),
        (([[1.0] * 5], ["x"]), IndexMismatchError, "dimension 5.*dimension 6"),
        (([1.0] * 6, ["x"]), ValueError, r"shape \[n, dimension\], got \[6\]"),
        (([["a"] * 6], ["x"]), TypeError, "dtype"),
        ((np.ones((1, 6), complex), ["x"]), TypeError, "complex"),
        ((GOOD * 2, ["x"]), ValueError, "2 vectors but 1 texts"),
        ((GOOD, "x"), TypeError, "got str"),
        ((GOOD, [7]), TypeError, r"texts\[0\] must be str, got int"),
        ((GOOD, ["\ud800"], ["a"]), ValueError, "text of id 'a'.*surrogate"),
        ((GOOD * 2, ["x", "y"], ["a", "a"]), ValueError, "'a' occurs twice"),
        ((GOOD * 2, ["x", "y"], ["a"]), ValueError, "2 vectors but 1 ids"),
        ((GOOD, ["x"], "a"), TypeError, "ids must be a list"),
        ((GOOD, ["x"], [3]), TypeError, r"ids\[0\] must be str, got int"),
        ((GOOD, ["x"], ["\udfff"]), ValueError, r"ids\[0\].*surrogate"),
        ((GOOD, ["x"], ["a"], {"k": 1}), TypeError, "metadatas must be a list"),
        ((GOOD, ["x"], ["a"], [[1]]), TypeError, "metadata of id 'a' must be a dict, got list"),
        ((GOOD, ["x"], ["a"], [{"k": {"n": np.nan}}]), ValueError, "'k.n' of id 'a'.*nan"),
        ((GOOD, ["x"], ["a"], [{"k": [0, np.inf]}]), ValueError, r"'k.1' of id 'a'.*inf"),
        ((GOOD, ["x"], ["a"], [{"k": {1: 2}}]), ValueError, r"key k.1 of id 'a'.*a key must be str.*got int"),
        ((GOOD, ["x"], ["a"], [{"k": "\ud800"}]), ValueError, "'k' of id 'a'.*surrogate"),
        ((GOOD, ["x"], ["a"], [{"\ud800": 1}]), ValueError, "of id 'a'.*surrogate"),
        ((GOOD, ["x"], ["a"], [{"k": {1, 2}}]), TypeError, "'k' of id 'a'.*set is not JSON"),
        ((GOOD, ["x"], ["a"], [{"k": np.float32(1)}]), TypeError, "'k' of id 'a'.*float32 is not JSON"),
        ((GOOD, ["x"], ["a"], [{"k": 10**5000}]), ValueError, "'k' of id 'a'.*bits"),
    ],
)
def test_a_failed_add_names_its_reason_and_changes_nothing(either, arguments, error, message):
    either.add(random_vectors(3), ["1", "2", "3"], ids=["a", "b", "c"], metadatas=[{"kept": True}] * 3)
    before = contents(either)
    with pytest.raises(error, match=message):
        either.add(*arguments)
    assert contents(either) == before
    assert len(either.search(GOOD, k=5)[0]) == 3


def test_metadata_nested_without_end_is_refused(either):
    endless = {}
    endless["again"] = [endless]
    with pytest.raises(ValueError, match=r"again.0.again.*of id 'a'.*nested"):
        either.add(GOOD, ["x"], ["a"], [endless])
    assert len(either) == 0


@pytest.mark.parametrize("k", [0, -1])
def test_k_below_one_is_refused(either, k):
    with pytest.raises(ValueError, match=f"k must be at least 1, got {k}"):
        either.search(GOOD, k=k)


@pytest.mark.parametrize(
    ("query", "error", "message"),
    [
        (NAN, ValueError, r"query vectors\[0\] holds NaN"),
        (ZERO, ValueError, "all zeros"),
        ([[1.0] * 3], IndexMismatchError, "dimension 3.*needs 6"),
        ([1.0] * 6, ValueError, "shape"),
    ],
)
def test_a_bad_query_is_refused(either, query, error, message):
    with pytest.raises(error, match=message):
        either.search(query)


@pytest.mark.parametrize("call", ["get", "delete", "vectors"])
def test_ids_are_a_list_of_text(either, call):
    with pytest.raises(TypeError, match="list of ids"):
        getattr(either, call)("abc")
    with pytest.raises(TypeError, match=r"ids\[1\] must be str, got int"):
        getattr(either, call)(["a", 1])


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"factory": "HNSW32"}, ValueError, "'HNSW32' is not supported.*use one of 'auto', 'Flat'"),
        ({"dimension": 0}, ValueError, "dimension must be at least 1"),
        ({"dimension": 7, "tokens": 2}, ValueError, "dimension 7 .* 2 tokens"),
        ({"encoder": 5}, TypeError, "fingerprint"),
    ],
)
def test_settings_are_checked(tmp_path, settings, error, message):
    with pytest.raises(error, match=message):
        DocumentIndex.create(tmp_path / "index", **settings)
    assert not (tmp_path / "index").exists()


def test_tokens_are_checked_at_the_first_add():
    with DocumentIndex.create(tokens=4) as index, pytest.raises(ValueError, match=r"dimension 6 .* 4 tokens"):
        index.add(GOOD, ["x"])


def test_another_encoder_or_dimension_is_refused(tmp_path):
    DocumentIndex.create(tmp_path / "index", dimension=6, encoder="first").close()
    with pytest.raises(IndexMismatchError, match=r"encoder first, not of encoder second"):
        DocumentIndex.open(tmp_path / "index", encoder="second")
    with pytest.raises(IndexMismatchError, match=r"dimension 6, not 7"):
        DocumentIndex.open(tmp_path / "index", dimension=7)
    for encoder in ("first", None):  # and the refused attempts left it unlocked
        with DocumentIndex.open(tmp_path / "index", encoder=encoder, dimension=6) as index:
            assert index.encoder == "first"


def test_an_index_without_a_fingerprint_accepts_any_encoder(tmp_path):
    DocumentIndex.create(tmp_path / "index", dimension=6).close()
    DocumentIndex.open(tmp_path / "index", encoder="any").close()


def test_a_closed_index_says_so(either):
    either.close()
    either.close()
    with pytest.raises(DocumentIndexError, match="closed"):
        len(either)


def test_threads_can_share_an_index(index):
    vectors = random_vectors(400)
    failures = []

    def work(part):
        try:
            for i in range(part, 400, 4):
                index.add(vectors[i : i + 1], [str(i)], ids=[str(i)])
                assert index.search(vectors[i : i + 1], k=1)[0][0].id == str(i)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and len(index) == 400


def test_missing_faiss_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r'pip install "autoregembed-rag\[faiss\]"'):
        DocumentIndex.create(dimension=6)
