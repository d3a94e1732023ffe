"""Index kinds: each finds what it should, through upserts, deletes, filters and reopening."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoregembed_indexes import DocumentIndex, copies
from autoregembed_indexes.kinds import plan

EXACT = ["Flat", "SQfp16"]
APPROXIMATE = ["IVF16,Flat", "IVF,SQ8", "IVF16,SQfp16", "IVF16,RaBitQ", "IVF16,RaBitQ4"]
COUNT, DIMENSION = 2_000, 32


def clustered(count, seed):
    """Vectors around 40 centres, as texts are around topics."""
    centres = np.random.default_rng(99).normal(size=(40, DIMENSION))
    noise = np.random.default_rng(seed)
    return (centres[noise.integers(0, 40, count)] + 0.7 * noise.normal(size=(count, DIMENSION))).astype(
        np.float32
    )


VECTORS, NEW, QUERIES = clustered(COUNT, 1), clustered(300, 2), clustered(30, 3)


class Reference:
    """The same documents in a dict, searched by brute force."""

    def __init__(self):
        self.vectors, self.groups = {}, {}

    def add(self, index, vectors, names, group):
        index.add(
            vectors, [f"text {name}" for name in names], names, [{"group": group(name)} for name in names]
        )
        self.vectors |= dict(zip(names, index.vectors(names), strict=True))
        self.groups |= {name: group(name) for name in names}

    def delete(self, index, names):
        assert index.delete(names) == len(names)
        for name in names:
            del self.vectors[name], self.groups[name]

    def best(self, queries, k, group=None):
        names = [name for name in self.vectors if group is None or self.groups[name] == group]
        unit = queries / np.linalg.norm(queries, axis=1, keepdims=True)
        scores = unit @ np.array([self.vectors[name] for name in names]).T
        return [[names[i] for i in np.argsort(-line, kind="stable")[:k]] for line in scores]

    def recall(self, index, k=10, group=None, **options):
        where = None if group is None else {"group": group}
        found = index.search(QUERIES, k, where, **options)
        members = sum(1 for value in self.groups.values() if group in (None, value))
        assert all(len(hits) == min(k, members) for hits in found)
        assert all(group in (None, hit.metadata["group"]) for hits in found for hit in hits)
        unit = QUERIES / np.linalg.norm(QUERIES, axis=1, keepdims=True)
        for query, hits in zip(unit, found, strict=True):
            scores = [hit.score for hit in hits]
            assert scores == sorted(scores, reverse=True)
            np.testing.assert_allclose(scores, [self.vectors[hit.id] @ query for hit in hits], atol=1e-6)
        pairs = zip(found, self.best(QUERIES, k, group), strict=True)
        return np.mean([len({hit.id for hit in hits} & set(best)) / len(best) for hits, best in pairs])


def names(numbers):
    return [str(number) for number in numbers]


@pytest.mark.parametrize("where", ["folder", "memory"])
@pytest.mark.parametrize("factory", EXACT + APPROXIMATE)
def test_every_kind_survives_upserts_deletes_filters_and_reopening(factory, where, tmp_path, monkeypatch):
    monkeypatch.setattr(copies, "EXACT_LIMIT", 150)  # so that a tenth of the documents is above it
    least = 1.0 if factory in EXACT else 0.9
    path = tmp_path / "index" if where == "folder" else None
    index, reference = DocumentIndex.create(path, factory=factory), Reference()

    def check():
        assert reference.recall(index) >= least
        assert reference.recall(index, k=1) >= least
        assert reference.recall(index, group="0") >= least  # about 200 documents, with a selector
        assert reference.recall(index, group="rare") == 1.0  # scored exactly by every kind
        assert len(index.search(QUERIES[:2], k=5_000)[0]) == len(index)

    reference.add(
        index, VECTORS, names(range(COUNT)), lambda name: "rare" if name.endswith("77") else name[-1]
    )
    check()
    reference.delete(index, names(range(0, 600, 3)))
    reference.add(index, NEW, names(range(500, 800)), lambda name: name[-2])  # some there, some deleted
    check()
    index.snapshot()
    check()
    reference.add(index, NEW[:50], names(range(5_000, 5_050)), lambda name: "rare")
    reference.delete(index, names(range(900, 1_000)))
    check()
    if path:
        index.close()
        index = DocumentIndex.open(path)
        check()
    assert index.verify() == []
    reference.delete(index, names(range(1_000, 2_000)))
    reference.add(index, NEW, names(range(9_000, 9_300)), lambda name: name[-1])
    index.compact()
    check()
    index.clear()
    assert index.search(QUERIES, k=3) == [[]] * len(QUERIES)
    index.close()


@pytest.mark.parametrize("factory", APPROXIMATE)
def test_a_filter_costs_an_approximate_kind_no_recall(factory, monkeypatch):
    monkeypatch.setattr(copies, "EXACT_LIMIT", 0)
    with DocumentIndex.create(factory=factory) as index:
        reference = Reference()
        reference.add(index, VECTORS, names(range(COUNT)), lambda name: name[-2:])
        assert index.info()["kind"].startswith("IVF")
        unfiltered = reference.recall(index)
        for group in ("00", "17", "55"):  # 1 % each
            assert reference.recall(index, group=group) >= unfiltered - 0.02


@pytest.fixture(scope="module", params=EXACT + APPROXIMATE)
def small(request):
    """An index of each kind, trained; its metadata is a number and a list of letters."""
    rng = np.random.default_rng(5)
    vectors = rng.normal(size=(700, 8)).astype(np.float32)
    vectors[600:] = vectors[:100]  # equal vectors rank in the order of their rows
    metadatas = [{"n": int(n), "deep": {"letter": "abcd"[n % 4]}} for n in rng.integers(0, 30, 700)]
    with DocumentIndex.create(factory=request.param) as index:
        ids = index.add(vectors, ["text"] * 700, names(range(700)), metadatas)
        yield index, index.vectors(ids).astype(np.float64), metadatas


@given(
    low=st.integers(-1, 30), high=st.integers(-1, 31), letters=st.lists(st.sampled_from("abcde")), k=st.integers(1, 40),
    seed=st.integers(0, 50), negated=st.booleans(),
)  # fmt: skip
@settings(derandomize=True, deadline=None, max_examples=30)
def test_filtered_search_is_exact_below_the_limit_on_every_kind(small, low, high, letters, k, seed, negated):
    index, vectors, metadatas = small
    inside = {"$and": [{"n": {"$gte": low, "$lt": high}}, {"deep.letter": {"$in": letters}}]}
    where = {"$not": inside} if negated else inside
    matches = [
        number
        for number, metadata in enumerate(metadatas)
        if (low <= metadata["n"] < high and metadata["deep"]["letter"] in letters) != negated
    ]
    queries = np.random.default_rng(seed).normal(size=(2, 8)).astype(np.float32)
    unit = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    for query, hits in zip(unit.astype(np.float64), index.search(queries, k, where), strict=True):
        ranked = sorted(matches, key=lambda number: (-np.float32(vectors[number] @ query), number))
        assert [hit.id for hit in hits] == names(ranked[:k])


def test_auto_is_exact_while_that_fits_the_budget_and_then_smaller_and_smaller():
    bytes_per_vector = 2 * 1280 + 8
    counts = (0, 1, 100_000, 100_001, 150_000, 190_000, 300_000, 5_000_000)
    assert [str(plan("auto", count, 1280, 100_000 * bytes_per_vector)) for count in counts] == [
        "SQfp16", "SQfp16", "SQfp16", "IVF512,SQ8", "IVF512,SQ8", "IVF512,SQ8", "IVF1024,RaBitQ", "IVF1024,RaBitQ",
    ]  # fmt: skip


@pytest.mark.parametrize(("factory", "count", "kind"), [
    ("IVF,SQ8", 600, "SQfp16"), ("IVF,SQ8", 700, "IVF16,SQ8"), ("IVF,SQ8", 50_000, "IVF256,SQ8"),
    ("IVF100,Flat", 3_899, "SQfp16"), ("IVF100,Flat", 3_900, "IVF100,Flat"), ("SQfp16", 0, "SQfp16"),
])  # fmt: skip
def test_lists_wait_until_there_are_vectors_to_train_them(factory, count, kind):
    assert str(plan(factory, count, 1280, 1)) == kind


def test_an_index_grows_from_flat_into_its_kind_and_retrains(tmp_path):
    with DocumentIndex.create(tmp_path / "index", factory="IVF,SQ8") as index:
        kinds = []
        for start in range(0, COUNT, 250):
            index.add(VECTORS[start : start + 250], ["text"] * 250)
            kinds.append(index.info()["kind"])
    assert kinds == [
        "SQfp16",
        "SQfp16",
        "IVF16,SQ8",
        "IVF16,SQ8",
        "IVF32,SQ8",
        "IVF32,SQ8",
        "IVF32,SQ8",
        "IVF32,SQ8",
    ]


@pytest.mark.parametrize(
    ("given", "kept"),
    [("flat", "Flat"), ("AUTO", "auto"), ("ivf64, sq8", "IVF64,SQ8"), ("IVF,rabitq2", "IVF,RaBitQ2")],
)
def test_factories_are_read_in_any_case(given, kept):
    with DocumentIndex.create(factory=given) as index:
        assert index.info()["factory"] == kept


@pytest.mark.parametrize(
    "factory",
    ["HNSW32", "PQ16", "IVF64,PQ16", "Flat,Refine(Flat)", "SQ8", "RaBitQ", "IVF0,Flat", "", "IVF64"],
)
def test_a_kind_that_an_index_cannot_keep_is_refused_by_name(factory):
    with pytest.raises(ValueError, match="use "):
        DocumentIndex.create(factory=factory)


def test_equal_vectors_rank_in_the_order_of_their_rows():
    with DocumentIndex.create(factory="Flat") as index:
        index.add(np.ones((900, 4)), ["text"] * 900, names(range(900)))
        index.add(np.ones((2, 4)), ["new"] * 2, ["7", "3"])
        assert [hit.id for hit in index.search(np.ones((1, 4)), k=10)[0]] == names(range(10))


def test_float16_is_exact_in_a_crowd_that_rounding_cannot_tell_apart():
    noise = np.random.default_rng(0)
    centre = noise.normal(size=64)
    with DocumentIndex.create(factory="SQfp16") as index:
        ids = index.add(centre + 0.01 * noise.normal(size=(3_000, 64)), ["text"] * 3_000)
        queries = centre + 0.01 * noise.normal(size=(10, 64))
        unit = queries / np.linalg.norm(queries, axis=1, keepdims=True)
        best = -np.sort(-(unit @ index.vectors(ids).T.astype(np.float64)), axis=1)[:, :10]
        np.testing.assert_allclose(
            [[hit.score for hit in hits] for hits in index.search(queries)], best, atol=1e-6
        )
