"""Searching by the first few tokens and ranking by all: what is found, with which scores, and what stays on disk."""

import logging
import pickle

import numpy as np
import pytest

from autoregembed_indexes import DocumentIndex, IndexMismatchError
from autoregembed_indexes.snapshot import read_snapshot
from autoregembed_indexes.store import DocumentStore

TOKENS, WIDTH = 4, 8
KINDS = ["Flat", "SQfp16", "IVF16,SQ8", "IVF16,RaBitQ"]


def flattened(count, seed):
    """Unit rows of four tokens of equal length, which have something, not all, in common."""
    chance = np.random.default_rng(seed)
    tokens = chance.normal(size=(count, 1, WIDTH)) + 0.7 * chance.normal(size=(count, TOKENS, WIDTH))
    tokens /= np.linalg.norm(tokens, axis=2, keepdims=True) * np.sqrt(TOKENS)
    return tokens.reshape(count, TOKENS * WIDTH).astype(np.float32)


VECTORS, QUERIES = flattened(1500, 0), flattened(8, 1)


def fill(index, numbers, text="text"):
    """Add some of the vectors under their numbers."""
    names = [str(number) for number in numbers]
    index.add(VECTORS[list(numbers)], [f"{text} {i}" for i in names], names, [{"i": i} for i in numbers])


def cosines(vectors, num_tokens):
    """Of the queries with the vectors as they are stored, by the first so many tokens."""
    cut = WIDTH * num_tokens
    stored = vectors.astype(np.float16)[:, :cut].astype(np.float64)
    queries = QUERIES[:, :cut].astype(np.float64)
    stored /= np.linalg.norm(stored, axis=1, keepdims=True)
    return queries / np.linalg.norm(queries, axis=1, keepdims=True) @ stored.T


def expected(numbers, num_tokens, k, fetch):
    """The best k by all tokens of the `fetch` best by the first few, for each query: (number, cosine)."""
    numbers = np.array(list(numbers), dtype=int)
    coarse, whole = (cosines(VECTORS[numbers], j) for j in (num_tokens, TOKENS))
    found = []
    for rough, exact in zip(coarse, whole, strict=True):
        candidates = np.argsort(-rough)[:fetch]
        best = candidates[np.argsort(-exact[candidates])[:k]]
        found.append([(str(numbers[i]), exact[i]) for i in best])
    return found


def agrees(hits, wanted):
    """Whether lists of hits are those of `expected`, scores within 1e-6."""
    same = [[hit.id for hit in line] for line in hits] == [[name for name, _ in line] for line in wanted]
    scores, cosine = ([pair[1] for line in lines for pair in line] for lines in (hits, wanted))
    return same and np.allclose(scores, cosine, atol=1e-6, rtol=0)


@pytest.fixture(params=["folder", "memory"])
def path(request, tmp_path):
    return tmp_path / "index" if request.param == "folder" else None


@pytest.mark.parametrize("factory", ["Flat", "SQfp16"])
@pytest.mark.parametrize(("num_tokens", "fetch_k", "fetch"), [(1, None, 100), (2, 30, 30), (3, 4, 10)])
def test_the_first_tokens_find_candidates_and_all_tokens_rank_them(path, factory, num_tokens, fetch_k, fetch):
    with DocumentIndex.create(path, tokens=TOKENS, factory=factory) as index:
        fill(index, range(1500))
        hits = index.search(QUERIES, 10, num_tokens=num_tokens, fetch_k=fetch_k)
        assert agrees(hits, expected(range(1500), num_tokens, 10, fetch))
        whole = index.search(QUERIES, 1500)
        assert [[hit.id for hit in line] for line in hits] != [
            [hit.id for hit in line[:10]] for line in whole
        ]
        for line, every in zip(hits, whole, strict=True):
            scores = {hit.id: hit.score for hit in every}
            assert [hit.score for hit in line] == [scores[hit.id] for hit in line]


def test_the_default_finds_a_hundred_candidates_or_ten_for_each_hit():
    with DocumentIndex.create(tokens=TOKENS) as index:
        fill(index, range(1500))
        for k, fetch in ((1, 100), (10, 100), (25, 250)):
            assert agrees(index.search(QUERIES, k, num_tokens=1), expected(range(1500), 1, k, fetch))


def test_all_tokens_are_a_plain_search_and_a_query_of_fewer_is_ranked_by_those_it_has():
    with DocumentIndex.create(tokens=TOKENS) as index:
        fill(index, range(400))
        plain = index.search(QUERIES, 7)
        assert index.search(QUERIES, 7, num_tokens=TOKENS) == plain
        assert index.search(QUERIES, 7, num_tokens=TOKENS, fetch_k=7) == plain
        short = QUERIES[:, : 2 * WIDTH]
        assert index.search(short, 7, num_tokens=2) == index.search(short, 7)
        assert index.search(short, 7, num_tokens=1, fetch_k=400) == index.search(short, 7)


@pytest.mark.parametrize("factory", ["IVF16,SQ8", "IVF16,RaBitQ"])
def test_approximate_kinds_find_nearly_what_exact_ones_do_with_exact_scores(tmp_path, factory):
    with DocumentIndex.create(tmp_path / "index", tokens=TOKENS, factory=factory) as index:
        fill(index, range(1500))
        index.snapshot(num_tokens=2)
        assert str(read_snapshot(tmp_path / "index" / "vectors-16.faiss").kind) == factory
        shares = []
        hits = index.search(QUERIES, 10, num_tokens=2)
        for line, wanted, exact in zip(
            hits, expected(range(1500), 2, 10, 100), cosines(VECTORS, TOKENS), strict=True
        ):
            assert [hit.score for hit in line] == pytest.approx(
                [exact[int(hit.id)] for hit in line], abs=1e-6
            )
            shares.append(len({hit.id for hit in line} & {name for name, _ in wanted}) / 10)
        assert np.mean(shares) > 0.8


@pytest.mark.parametrize("factory", KINDS)
@pytest.mark.parametrize("limit", [0, 3, 40, 700])
def test_filters_are_exact_and_fewer_come_back_only_where_fewer_match(factory, limit, monkeypatch):
    monkeypatch.setattr("autoregembed_indexes.copies.EXACT_LIMIT", 200)
    with DocumentIndex.create(tokens=TOKENS, factory=factory) as index:
        fill(index, range(1500))
        for k in (5, 50):
            hits = index.search(QUERIES, k, {"i": {"$lt": limit}}, num_tokens=1, fetch_k=k)
            assert all(hit.metadata["i"] < limit for line in hits for hit in line)
            assert {len(line) for line in hits} == {min(k, limit)}
            if factory in ("Flat", "SQfp16"):
                assert agrees(hits, expected(range(limit), 1, k, k))
        named = index.search(QUERIES, 9, {"i": {"$gte": 5}}, ids=["4", "5", "6"], num_tokens=1)
        assert [{hit.id for hit in line} for line in named] == [{"5", "6"}] * len(QUERIES)


def test_min_score_is_that_of_all_tokens():
    with DocumentIndex.create(tokens=TOKENS) as index:
        fill(index, range(400))
        found = index.search(QUERIES, 20, num_tokens=1)
        bound = float(np.median([hit.score for line in found for hit in line]))
        left = [[hit for hit in line if hit.score >= bound] for line in found]
        assert index.search(QUERIES, 20, num_tokens=1, min_score=bound) == left


def test_equal_scores_come_in_the_order_of_their_rows_however_many_there_are():
    with DocumentIndex.create(tokens=TOKENS) as index:
        index.add(np.tile(VECTORS[:1], (500, 1)), ["same"] * 500, [str(i) for i in range(500)])
        (hits,) = index.search(VECTORS[:1], 20, num_tokens=1)
        assert [hit.id for hit in hits] == [str(i) for i in range(20)]


@pytest.mark.parametrize("factory", ["Flat", "SQfp16"])
def test_changes_after_the_copy_is_made_are_found_at_once(path, factory):
    with DocumentIndex.create(path, tokens=TOKENS, factory=factory) as index:
        fill(index, range(1300))
        index.search(QUERIES, num_tokens=2)
        index.delete([str(number) for number in range(100, 200)])
        fill(index, range(1300, 1400))
        index.add(-VECTORS[200:220], ["moved"] * 20, [str(number) for number in range(200, 220)])
        left = [*range(100), *range(220, 1400)]
        moved = {str(number) for number in range(200, 220)}
        hits = index.search(QUERIES, 10, {"i": {"$exists": True}}, num_tokens=2)
        assert agrees(hits, expected(left, 2, 10, 100))
        assert moved & {hit.id for hit in index.search(-VECTORS[200:220], 1, num_tokens=2)[5]}
        index.clear()
        assert index.search(QUERIES, num_tokens=2) == [[]] * len(QUERIES)
        fill(index, range(50))
        assert agrees(index.search(QUERIES, 5, num_tokens=2, fetch_k=5), expected(range(50), 2, 5, 5))


@pytest.fixture
def vectors_read(monkeypatch):
    """A list that gets the number of vectors that each read of the database brings."""
    read, vectors = [], DocumentStore.vectors

    def counting(self, dimension, width, among=None):
        for rows, unit in vectors(self, dimension, width, among):
            read.append(len(rows))
            yield rows, unit

    monkeypatch.setattr(DocumentStore, "vectors", counting)
    return read


@pytest.mark.parametrize("factory", KINDS)
@pytest.mark.parametrize("read_only", [False, True])
def test_a_copy_of_the_first_tokens_stays_on_disk_and_opening_maps_it(
    tmp_path, factory, read_only, vectors_read
):
    path = tmp_path / "index"
    with DocumentIndex.create(path, tokens=TOKENS, factory=factory) as index:
        fill(index, range(1500))
        before = index.search(QUERIES, 10, num_tokens=2)
        assert (path / "vectors-16.faiss").exists(), "not only when it is closed"
    vectors_read.clear()
    with DocumentIndex.open(path, read_only=read_only) as index:
        assert vectors_read == []
        assert index.search(QUERIES, 10, num_tokens=2) == before
        assert sum(vectors_read) < 1500


def test_a_writer_keeps_the_copies_that_are_on_disk_up_without_searching_them(tmp_path, vectors_read):
    path = tmp_path / "index"
    with DocumentIndex.create(path, tokens=TOKENS) as index:
        fill(index, range(10))
        index.snapshot(num_tokens=1)
        assert sorted(file.name for file in path.glob("*.faiss")) == ["vectors-32.faiss", "vectors-8.faiss"]
    vectors_read.clear()
    with DocumentIndex.open(path) as index:
        fill(index, range(10, 1500))
        assert vectors_read == [], "what was just stored is not read back"
    vectors_read.clear()
    with DocumentIndex.open(path, read_only=True) as index:
        hits = index.search(QUERIES, 10, num_tokens=1)
        assert sum(vectors_read) < 1500
        assert agrees(hits, expected(range(1500), 1, 10, 100))
    assert read_snapshot(path / "vectors-8.faiss").count == 1500


def test_a_reader_makes_its_own_copy_and_writes_nothing(tmp_path):
    path = tmp_path / "index"
    with DocumentIndex.create(path, tokens=TOKENS) as index:
        fill(index, range(1500))
    files = sorted(file.name for file in path.glob("*.faiss"))
    with DocumentIndex.open(path, read_only=True) as reader:
        assert agrees(reader.search(QUERIES, 10, num_tokens=2), expected(range(1500), 2, 10, 100))
        twin = pickle.loads(pickle.dumps(reader))  # noqa: S301
        assert twin.search(QUERIES, 10, num_tokens=2) == reader.search(QUERIES, 10, num_tokens=2)
        twin.close()
    assert sorted(file.name for file in path.glob("*.faiss")) == files


def test_a_reader_follows_a_writer(tmp_path):
    path = tmp_path / "index"
    with DocumentIndex.create(path, tokens=TOKENS) as writer:
        fill(writer, range(700))
        writer.snapshot(num_tokens=2)
        with DocumentIndex.open(path, read_only=True) as reader:
            for numbers in (range(700, 800), range(800, 1500)):
                reader.search(QUERIES, num_tokens=2)
                fill(writer, numbers)
                found = reader.search(QUERIES, 10, num_tokens=2)
                assert agrees(found, expected(range(numbers[-1] + 1), 2, 10, 100))
            writer.compact()
            assert reader.search(QUERIES, 10, num_tokens=2) == found


def test_the_whole_vectors_are_not_looked_at_while_candidates_are_found_by_fewer(tmp_path, caplog):
    path = tmp_path / "index"
    with DocumentIndex.create(path, tokens=TOKENS) as index:
        fill(index, range(1500))
        index.snapshot(num_tokens=2)
    with (path / "vectors-32.faiss").open("r+b") as file:
        file.seek(2000)
        file.write(b"damaged")
    with DocumentIndex.open(path, read_only=True) as index:
        assert agrees(index.search(QUERIES, 10, num_tokens=2), expected(range(1500), 2, 10, 100))
        assert not caplog.records
        index.search(QUERIES, 10)
        assert "vectors-32.faiss: its vectors do not have their checksum" in caplog.text


def test_a_damaged_copy_is_named_and_made_again(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    path = tmp_path / "index"
    with DocumentIndex.create(path, tokens=TOKENS) as index:
        fill(index, range(1500))
        before = index.search(QUERIES, 10, num_tokens=2)
    with (path / "vectors-16.faiss").open("r+b") as file:
        file.seek(2000)
        file.write(b"damaged")
    with DocumentIndex.open(path, read_only=True) as index:
        assert index.verify() == [f"{path / 'vectors-16.faiss'}: its vectors do not have their checksum"]
        assert index.search(QUERIES, 10, num_tokens=2) == before
    assert "loaded from the database" in caplog.text
    with DocumentIndex.open(path) as index:
        assert index.search(QUERIES, 10, num_tokens=2) == before
        index.snapshot()
        assert index.verify() == []


@pytest.mark.parametrize("factory", KINDS)
def test_vectors_whose_first_tokens_are_zeros_are_sound(tmp_path, factory):
    with DocumentIndex.create(tmp_path / "index", tokens=TOKENS, factory=factory) as index:
        fill(index, range(1500))
        silent = VECTORS[:60].copy()
        silent[:, : 2 * WIDTH] = 0
        index.add(silent, ["silent"] * 60, [f"silent {i}" for i in range(60)])
        for number in (1, 2, 3):
            index.snapshot(num_tokens=number)
        assert index.verify() == []


def test_hybrid_and_mmr_take_their_nearest_from_such_a_search():
    with DocumentIndex.create(tokens=TOKENS) as index:
        fill(index, range(1500))
        texts = [f"text {i}" for i in range(len(QUERIES))]
        near = index.search(QUERIES, 60, num_tokens=1, fetch_k=150)
        vectors_alone = index.search_hybrid(QUERIES, texts, 15, weights=(1, 0), num_tokens=1)
        assert [[hit.id for hit in line] for line in vectors_alone] == [
            [hit.id for hit in line[:15]] for line in near
        ]
        assert vectors_alone != index.search_hybrid(QUERIES, texts, 15, weights=(1, 0))
        fused = index.search_hybrid(QUERIES, texts, 15, num_tokens=1)
        ranks = {hit.id: rank for rank, hit in enumerate(near[3], 1)}
        assert "3" in [hit.id for hit in fused[3]]
        assert all(hit.id in ranks or hit.text.startswith("text") for hit in fused[3])
        nearest = index.search_mmr(QUERIES, 15, lambda_mult=1, num_tokens=1)
        assert nearest == [line[:15] for line in near]
        assert nearest != index.search_mmr(QUERIES, 15, lambda_mult=1)


@pytest.mark.parametrize("documents", [0, 20])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_tokens": 0}, ValueError, "num_tokens must be between 1 and 4.*got 0"),
        ({"num_tokens": -1}, ValueError, "num_tokens must be between 1 and 4.*got -1"),
        ({"num_tokens": 5}, ValueError, "num_tokens must be between 1 and 4.*got 5"),
        ({"num_tokens": "2"}, TypeError, "integer"),
        ({"num_tokens": 2.0}, TypeError, "integer"),
        ({"num_tokens": 2, "fetch_k": 0}, ValueError, "fetch_k must be at least 1, got 0"),
        ({"fetch_k": 20}, ValueError, "fetch_k=20 .* give num_tokens"),
    ],
)
def test_bad_options_are_refused_by_name(documents, options, error, message):
    with DocumentIndex.create(tokens=TOKENS) as index:
        fill(index, range(documents))
        with pytest.raises(error, match=message):
            index.search(QUERIES, 10, **options)
        assert index.search(QUERIES[:0], 10, num_tokens=2) == []


def test_tokens_that_the_query_or_the_index_does_not_have_are_refused():
    with DocumentIndex.create(tokens=TOKENS) as index:
        fill(index, range(20))
        with pytest.raises(ValueError, match=r"num_tokens must be between 1 and 2, .* got 3"):
            index.search(QUERIES[:, : 2 * WIDTH], num_tokens=3)
        with pytest.raises(ValueError, match=r"num_tokens must be between 1 and 4, .* got 6"):
            index.snapshot(num_tokens=6)
    with DocumentIndex.create() as index:
        fill(index, range(200))
        with pytest.raises(IndexMismatchError, match=r"num_tokens=2 .*create\(tokens=\.\.\.\)"):
            index.search(QUERIES, num_tokens=2)
        with pytest.raises(IndexMismatchError, match=r"dimension 16.*needs 32.*create\(tokens=\.\.\.\)"):
            index.search(QUERIES[:, : 2 * WIDTH])


def test_a_query_without_direction_in_its_first_tokens_is_refused():
    with DocumentIndex.create(tokens=TOKENS) as index:
        fill(index, range(200))
        silent = QUERIES.copy()
        silent[1, :WIDTH] = 0
        with pytest.raises(ValueError, match=r"query vectors\[1\]\[:8\] is all zeros"):
            index.search(silent, num_tokens=1)
