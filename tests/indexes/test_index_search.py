"""Search by words, by words and vectors, for diversity and by example: what it finds, in which order."""

import math
import re
import unicodedata
from collections import Counter
from contextlib import ExitStack

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoregembed_indexes import DocumentIndex, DocumentIndexError

DIMENSION = 12
METHODS = ["search", "search_text", "search_hybrid", "search_mmr", "search_similar"]
TEXTS = [
    "the quick brown fox",
    "the lazy dog and the quick, quick fox",
    "a brown bear: not a dog",
    "the river bank",
    "the bank by the river, near the other bank",
    "fox or bear",
    "",
    "the quick brown fox",
    "the the the the the the the the the",
    '"(*) ___ \u2026: text and table 5!',
]


def random_vectors(count, dimension=DIMENSION, seed=0):
    return np.random.default_rng(seed).normal(size=(count, dimension)).astype(np.float32)


@pytest.fixture(scope="module", params=["folder", "memory"])
def make(request, tmp_path_factory):
    """A function that makes an index of texts with the ids "0", "1", ... and metadata {"i": 0}, ..."""
    with ExitStack() as opened:

        def create(texts=(), vectors=None, **options):
            path = tmp_path_factory.mktemp("made") if request.param == "folder" else None
            index = opened.enter_context(DocumentIndex.create(path, **options))
            ids, metadatas = [str(i) for i in range(len(texts))], [{"i": i} for i in range(len(texts))]
            index.add(random_vectors(len(texts)) if vectors is None else vectors, texts, ids, metadatas)
            return index

        yield create


@pytest.fixture(scope="module")
def shelf(make):
    """`TEXTS`, with no stemming; for tests that change nothing."""
    return make(TEXTS, tokenizer="unicode61")


@pytest.fixture(scope="module")
def library(make):
    """80 documents of two to five of ten words, with vectors of three tokens; for tests that change nothing."""
    chance = np.random.default_rng(1)
    words = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen", "ibis", "jay"]
    return make([" ".join(chance.choice(words, chance.integers(2, 6))) for _ in range(80)], tokens=3)


def call(index, method, count, *args, **options):
    """Call a search method with `count` queries."""
    vectors, texts = random_vectors(count, seed=5), ["fox bee", "quick gnu", "river bank elk"][:count]
    ids = [str(i) for i in range(count)]
    queries = {"search_text": [texts], "search_hybrid": [vectors, texts], "search_similar": [ids]}
    return getattr(index, method)(*queries.get(method, [vectors]), *args, **options)


def ids_of(hits):
    return [hit.id for hit in hits]


def same_scores(found, expected):
    """Whether lists of hits have the same documents, and scores within 1e-6."""
    scores, wanted = ([hit.score for hits in lines for hit in hits] for lines in (found, expected))
    same = [ids_of(hits) for hits in found] == [ids_of(hits) for hits in expected]
    return same and scores == pytest.approx(wanted, abs=1e-6)


def words_of(text):
    return re.findall("[a-z0-9]+", text.lower())


def bm25(texts, query):
    """(position, score) of each text with a word of the query, best first, by the formula that FTS5 documents."""
    k1, b = 1.2, 0.75
    mean = sum(len(words_of(text)) for text in texts) / len(texts)
    scores = Counter()
    for word in dict.fromkeys(words_of(query)):
        holders = sum(word in words_of(text) for text in texts)
        idf = math.log((len(texts) - holders + 0.5) / (holders + 0.5))
        for position, text in enumerate(texts):
            if count := words_of(text).count(word):
                saturation = count + k1 * (1 - b + b * len(words_of(text)) / mean)
                scores[position] += max(idf, 1e-6) * count * (k1 + 1) / saturation
    return sorted(scores.items(), key=lambda item: (-item[1], item[0]))


def agrees_with_bm25(hits, texts, query):
    expected = bm25(texts, query)
    scores = pytest.approx([score for _, score in expected], rel=1e-9)
    return [hit.text for hit in hits] == [texts[i] for i, _ in expected] and [h.score for h in hits] == scores


@pytest.mark.parametrize(
    "query", ["quick", "the", "Brown fox", "the lazy dog", "bank river bank BANK", "or not", "x"]
)
def test_search_text_ranks_by_bm25(shelf, query):
    hits = shelf.search_text(query)
    assert agrees_with_bm25(hits, TEXTS, query)
    assert [(hit.id, hit.metadata) for hit in hits] == [(str(i), {"i": i}) for i, _ in bm25(TEXTS, query)]
    assert shelf.search_text(query, 2) == hits[:2]


def test_a_filter_and_ids_limit_a_search_by_text_and_leave_scores_alone(shelf):
    every = shelf.search_text("the quick fox")
    where = {"i": {"$gte": 1, "$lt": 7}}
    assert shelf.search_text("the quick fox", 10, where) == [hit for hit in every if 1 <= int(hit.id) < 7]
    limited = shelf.search_text("the quick fox", filter=lambda data: data["i"] < 5, ids=["7", "4", "1", "x"])
    assert limited == [hit for hit in every if hit.id in ("1", "4")]
    assert ids_of(shelf.search_text("the quick fox", 1, {"i": 8})) == ["8"]
    assert shelf.search_text("fox", ids=[]) == shelf.search_text("fox", filter={"i": 99}) == []


def test_changes_are_seen_at_once_and_change_the_ranking(make):
    index = make(TEXTS, tokenizer="unicode61")
    texts = [*TEXTS[:2], "a brown bank", *TEXTS[4:], "new: brown bear"]
    index.add(random_vectors(2), [texts[2], texts[-1]], ids=["2", "new"])
    index.delete(["3"])
    assert agrees_with_bm25(index.search_text("brown bear bank"), texts, "brown bear bank")
    index.clear()
    assert index.search_text("brown bear bank") == []
    index.add(random_vectors(1), ["brown"])
    assert [hit.text for hit in index.search_text("brown bear bank")] == ["brown"]
    assert index.verify() == []


def test_a_text_gives_a_list_and_texts_a_list_of_lists(shelf):
    fox, bank = shelf.search_text("fox"), shelf.search_text("bank")
    assert shelf.search_text(["fox", "", "bank"]) == [fox, [], bank]
    assert shelf.search_text(("fox",)) == [fox] and shelf.search_text([]) == []
    for query in (["fox", None], [b"fox"], b"fox"):
        with pytest.raises(TypeError, match=r"queries\[\d\] must be str"):
            shelf.search_text(query)


def test_porter_finds_a_word_in_other_forms(make):
    texts = ["She runs.", "Running is fun", "a runner", "connected", "CONNECTION"]
    assert set(ids_of(make(texts).search_text("run"))) == {"0", "1"}
    assert set(ids_of(make(texts).search_text("connecting"))) == {"3", "4"}
    assert make(texts, tokenizer="unicode61").search_text("run connecting") == []


def test_trigram_finds_what_has_no_spaces_around_it(make):
    index = make(["東京都庁は新宿区にある", "大阪の道頓堀", "ABCdef", "東京 都"], tokenizer="trigram")
    assert ids_of(index.search_text("新宿区")) == ids_of(index.search_text("東京都の地図")) == ["0"]
    assert set(ids_of(index.search_text("道頓堀? cde"))) == {"1", "2"}
    assert index.search_text("京都府") == index.search_text("東京") == []
    exact = make(["ABCdef", "abcdef"], tokenizer="trigram case_sensitive 1")
    assert ids_of(exact.search_text("zABC")) == ["0"]


@pytest.mark.parametrize(("tokenizer", "found"), [("unicode61 tokenchars '-_'", "0"), ("unicode61", "01")])
def test_a_query_is_split_as_the_tokenizer_splits_texts(make, tokenizer, found):
    index = make(["max_length state-of-the-art", "length of art"], tokenizer=tokenizer)
    assert set(ids_of(index.search_text("max_length"))) == set(found)
    assert set(ids_of(index.search_text("state-of-the-art?"))) == set(found)


def test_accents_do_not_matter_however_they_are_written(make):
    index = make(["Two r\u00e9sum\u00e9s", "one re\u0301sume\u0301", "re sume", "\u0130stanbul"])
    for query in ("re\u0301sume\u0301s", "r\u00e9sum\u00e9", "RE\u0301SUME\u0301", "resume"):
        assert set(ids_of(index.search_text(query))) == {"0", "1"}
    assert ids_of(index.search_text("\u0130STANBUL")) == ids_of(index.search_text("istanbul")) == ["3"]


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("fox AND lazy NOT dog OR bank", "fox and lazy not dog or bank"),
        ("NEAR(fox bear, 5)", "near fox bear 5"),
        ('"quick brown fox" + "bear"', "quick brown fox bear"),
        ("{text id}: ^fox - text:dog*", "text id fox text dog"),
        ("what's new in (the river", "what s new in the river"),
        ("'; DROP TABLE words; --riv* fox_bear", "drop table words riv fox bear"),
        ("fox\0bear\ud800dog", "fox bear dog"),
        ("\U0001f98a fox \U0001f1e9\U0001f1ea \u0301", "fox"),
        ("fox " + " ".join(f"word{i}" for i in range(10_000)) + " bear", "fox"),
        ("x" * 1_000_000 + " fox" * 10_000, "fox"),
    ],
    ids=lambda text: ascii(text[:12]),
)
def test_nothing_in_a_query_is_an_operator(shelf, query, words):
    assert agrees_with_bm25(shelf.search_text(query), TEXTS, words)


@pytest.mark.parametrize(
    "query", ["", " \t\n\u2003", "\0", "\ud800", "___", '""', "(*", "\u0301", "\U0001f98a"]
)
def test_a_query_without_words_finds_nothing(shelf, query):
    assert shelf.search_text(query) == []
    assert shelf.search_text([query, "fox"]) == [[], shelf.search_text("fox")]


NOISE = st.text(st.characters(categories=["P", "S", "Z", "Cc", "Cf", "Cs"]), min_size=1, max_size=4)
WORDS = st.sampled_from(["fox", "Dog", "AND", "or", "NOT", "NEAR", "bank", "text"])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(parts=st.lists(st.tuples(WORDS, NOISE), max_size=5), start=st.just("") | NOISE)
def test_only_the_words_of_a_query_count(shelf, parts, start):
    query = start + "".join(word + noise for word, noise in parts)
    assert shelf.search_text(query) == shelf.search_text(" ".join(word for word, _ in parts))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(text=st.text(st.characters(max_codepoint=0x331), max_size=8))
def test_a_latin_text_with_a_letter_or_digit_is_found_by_itself(text):
    with DocumentIndex.create() as index:
        index.add([[1.0]], [text], ["latin"])
        has_words = any(unicodedata.category(letter)[0] in "LN" for letter in text)
        assert ids_of(index.search_text(text)) == ["latin"] * has_words


@pytest.mark.parametrize("tokenizer", ["nonsense", "porter nonsense", "unicode61 colour 1", "ascii', x='"])
def test_an_unknown_tokenizer_is_refused_by_name(tmp_path, tokenizer):
    for path in (None, tmp_path / "index"):
        with pytest.raises(ValueError, match="not one that SQLite's FTS5 knows") as caught:
            DocumentIndex.create(path, tokenizer=tokenizer)
        assert repr(tokenizer) in str(caught.value)
    DocumentIndex.create(tmp_path / "index").close()  # nothing that was left behind is in the way


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 0.7), (2, 0.5)])
@pytest.mark.parametrize(("k", "fetch_k", "depth"), [(5, None, 50), (15, None, 60), (5, 6, 6), (70, 3, 70)])
def test_hybrid_is_the_reciprocal_rank_fusion_of_both_searches(library, weights, k, fetch_k, depth):
    vectors, texts = random_vectors(3, seed=2), ["fox bee", "nothing here", "jay ant elk"]
    found = library.search_hybrid(vectors, texts, k, weights=weights, fetch_k=fetch_k)
    rankings = zip(library.search(vectors, depth), library.search_text(texts, depth), strict=True)
    for both, hits in zip(rankings, found, strict=True):
        scores = Counter()
        for ranking, weight in zip(both, weights, strict=True):
            scores.update({hit.id: weight / (60 + rank) for rank, hit in enumerate(ranking, 1)})
        best = sorted(scores, key=lambda doc_id: (-scores[doc_id], int(doc_id)))[:k]
        assert ids_of(hits) == best
        assert [hit.score for hit in hits] == pytest.approx([scores[doc_id] for doc_id in best], rel=1e-12)
        assert [hit[2:] for hit in hits] == [document[1:] for document in library.get(best)]


def test_a_weight_of_zero_leaves_one_search_out(library):
    vector, text = random_vectors(1, seed=2), "fox gnu"
    [by_vector] = library.search_hybrid(vector, [text], 20, weights=(1, 0))
    assert ids_of(by_vector) == ids_of(library.search(vector, 20)[0])
    [by_words] = library.search_hybrid(vector, [text], 80, weights=(0, 1))
    assert ids_of(by_words) == ids_of(library.search_text(text, 80)) and len(by_words) < 80


def test_hybrid_ranks_within_a_filter_and_ids(library):
    vector, kept = random_vectors(1, seed=2), [str(i) for i in range(0, 40, 3)]
    ids = [str(i) for i in range(0, 80, 3)]
    [hits] = library.search_hybrid(vector, ["fox"], 80, {"i": {"$lt": 40}}, ids=ids)
    near = [hit.id for hit in library.search(vector, 80)[0] if hit.id in kept]
    worded = [hit.id for hit in library.search_text("fox", 80) if hit.id in kept]
    ranks = {i: [ranking.index(i) + 1 for ranking in (near, worded) if i in ranking] for i in kept}
    expected = {doc_id: sum(1 / (60 + rank) for rank in both) for doc_id, both in ranks.items()}
    assert {hit.id: hit.score for hit in hits} == pytest.approx(expected)


def test_bad_arguments_are_refused(library):
    vector = random_vectors(1)
    for weights in ((1, -1), (1,), (1, 1, 1), (math.nan, 1), (1, math.inf)):
        with pytest.raises(ValueError, match="weights must be two numbers"):
            library.search_hybrid(vector, ["fox"], weights=weights)
    with pytest.raises(ValueError, match="1 query vectors but 2 query texts"):
        library.search_hybrid(vector, ["fox", "bee"])
    for lambda_mult in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="lambda_mult must be between 0 and 1"):
            library.search_mmr(vector, lambda_mult=lambda_mult)


def marginal_relevance(index, query, k, depth, lambda_mult):
    """Maximal marginal relevance in plain Python; a shorter query counts with the same part of each vector."""
    pool = ids_of(index.search([query], depth)[0])
    rows = index.vectors(pool)[:, : len(query)].astype(float)
    units = {doc_id: row / np.linalg.norm(row) for doc_id, row in zip(pool, rows, strict=True)}
    query = query.astype(float) / np.linalg.norm(query.astype(float))
    chosen = []

    def gain(doc_id):
        redundancy = max((units[doc_id] @ units[other] for other in chosen), default=0.0)
        return lambda_mult * (units[doc_id] @ query) - (1 - lambda_mult) * redundancy

    for _ in range(min(k, len(pool))):
        chosen.append(max((doc_id for doc_id in pool if doc_id not in chosen), key=gain))
    return chosen, [units[doc_id] @ query for doc_id in chosen]


@pytest.mark.parametrize("lambda_mult", [0, 0.3, 0.5, 0.9, 1])
@pytest.mark.parametrize(("k", "fetch_k", "depth"), [(4, None, 20), (10, None, 40), (5, 60, 60), (25, 2, 25)])
@pytest.mark.parametrize("width", [DIMENSION, DIMENSION // 3])
def test_mmr_agrees_with_a_plain_computation(library, lambda_mult, k, fetch_k, depth, width):
    queries = random_vectors(2, width, seed=4)
    found = library.search_mmr(queries, k, fetch_k=fetch_k, lambda_mult=lambda_mult)
    for query, hits in zip(queries, found, strict=True):
        chosen, cosines = marginal_relevance(library, query, k, depth, lambda_mult)
        assert ids_of(hits) == chosen
        assert [hit.score for hit in hits] == pytest.approx(cosines, abs=1e-6)


def test_mmr_with_lambda_one_is_search_even_among_equal_vectors():
    vectors = random_vectors(7, 128)[np.random.default_rng(0).integers(0, 7, 39)]
    queries = random_vectors(20, 128, seed=1)
    with DocumentIndex.create() as index:
        index.add(vectors, [""] * 39)
        assert index.search_mmr(queries, 39, lambda_mult=1) == index.search(queries, 39)


def test_mmr_takes_one_of_each_kind_first(make):
    centres = np.eye(3, DIMENSION) + 0.5
    index = make(["text"] * 15, np.repeat(centres, 5, axis=0) + 0.01 * random_vectors(15))
    for lambda_mult in (0, 0.5):
        [hits] = index.search_mmr(centres[:1], 3, lambda_mult=lambda_mult)
        assert hits[0] == index.search(centres[:1], 1)[0][0]
        assert {int(hit.id) // 5 for hit in hits} == {0, 1, 2}
    [filtered] = index.search_mmr(centres[:1], 4, {"i": {"$gte": 5}}, ids=["0", "6", "7", "12", "x"])
    assert set(ids_of(filtered)) == {"6", "7", "12"}


def test_similar_documents_are_the_nearest_others(make, library):
    wanted = ["7", "3", "7", "79"]
    for where in (None, {"i": {"$lt": 50}}):
        every = zip(wanted, library.search(library.vectors(wanted), 80, where), strict=True)
        expected = [[hit for hit in hits if hit.id != own][:5] for own, hits in every]
        assert same_scores(library.search_similar(wanted, 5, where), expected)
    with pytest.raises(KeyError, match="'x'"):
        library.search_similar(["0", "x"])
    equals = make(["text"] * 5, np.ones((5, DIMENSION)))
    assert [ids_of(hits) for hits in equals.search_similar(["4", "0"], 2)] == [["0", "1"], ["1", "2"]]


def test_min_score_leaves_out_lower_cosines(library):
    queries = random_vectors(3, seed=2)
    every = library.search(queries, 80)
    for least in (-1.0, every[0][2].score, 0.0, 0.5, 1.01):
        expected = [[hit for hit in hits if hit.score >= least] for hits in every]
        assert library.search(queries, 80, min_score=least) == expected
        assert library.search(queries, 2, min_score=least) == [hits[:2] for hits in expected]


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_finds_what_its_queries_find_alone(library, method):
    [first, second, third] = call(library, method, 3)
    assert call(library, method, 1) == [first] and call(library, method, 2) == [first, second]
    assert len(third) == 10 and call(library, method, 0) == []


@pytest.mark.parametrize("method", ["search", "search_hybrid", "search_mmr"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, list])
def test_queries_of_any_float_type(library, method, dtype):
    vectors = random_vectors(3, seed=2).astype(np.float16)
    given = vectors.tolist() if dtype is list else vectors.astype(dtype)
    texts = [["fox"] * 3] if method == "search_hybrid" else []
    expected = getattr(library, method)(vectors.astype(np.float64), *texts)
    assert same_scores(getattr(library, method)(given, *texts), expected)


@pytest.mark.parametrize("method", METHODS)
def test_k_may_be_more_than_there_are_but_not_less_than_one(make, method):
    index = make(["fox quick bank"] * 4)
    least = 3 if method == "search_similar" else 4
    for k in (5, 2**63, 10**30):
        assert [len(hits) for hits in call(index, method, 2, k)] == [least, least]
    for k, error in ((0, ValueError), (-1, ValueError), (2.5, TypeError)):
        with pytest.raises(error, match=r"k must be at least 1|integer"):
            call(index, method, 1, k)


@pytest.mark.parametrize("dimension", [DIMENSION, None])
def test_an_empty_index_finds_nothing(make, dimension):
    index = make(dimension=dimension)
    for method in METHODS[:-1]:
        assert call(index, method, 2) == call(index, method, 2, filter={"i": 1}) == [[], []]
    assert [call(index, method, 0) for method in METHODS] == [[]] * 5
    with pytest.raises(KeyError, match="'0'"):
        call(index, "search_similar", 1)


def test_a_closed_index_says_so_to_every_search(make):
    index = make(TEXTS)
    index.close()
    for method in METHODS:
        with pytest.raises(DocumentIndexError, match="closed"):
            call(index, method, 1)
