"""Hard negative mining, against what plain numpy says and against vectors made by hand."""

import json
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("faiss")

from autoregembed_indexes import DocumentIndex
from autoregembed_rag.training import mining
from autoregembed_rag.training.data import AlignmentRow
from autoregembed_rag.training.mining import MiningArguments, mine_negatives, share_of


class Given:
    """An encoder whose vectors are given; what it has encoded as documents is kept in `encoded`."""

    fingerprint = "given"
    num_tokens = 1

    def __init__(self, queries, documents):
        self.queries = {text: unit(vector) for text, vector in queries.items()}
        self.documents = {text: unit(vector) for text, vector in documents.items()}
        self.dimension = self.hidden_size = len(next(iter(self.documents.values())))
        self.encoded = []

    def encode_queries(self, texts, *, batch_size=None):
        return self._stack(self.queries, texts)

    def encode_documents(self, texts, *, batch_size=None):
        self.encoded += texts
        return self._stack(self.documents, texts)

    def _stack(self, vectors, texts):
        return np.array([vectors[text] for text in texts], np.float32).reshape(-1, self.dimension)

    def index(self, texts=None, **settings):
        texts = list(self.documents) if texts is None else texts
        index = DocumentIndex.create(encoder=self.fingerprint, factory="Flat", **settings)
        index.add(self._stack(self.documents, texts), texts)
        return index


def unit(vector):
    return np.asarray(vector, np.float32) / np.linalg.norm(vector)


def at(cosine, turn=0.0):
    """A vector of 4 entries with this cosine to (1, 0, 0, 0); `turn` sets vectors of one cosine apart."""
    side = np.sqrt(1 - cosine**2)
    return [cosine, side * np.cos(turn), side * np.sin(turn), 0.0]


def spread(cosines):
    """Documents named by their cosine with the query, no two of them alike."""
    return {f"doc {cosine}": at(cosine, turn) for turn, cosine in enumerate(cosines)}


QUERY = {"q": [1.0, 0.0, 0.0, 0.0]}


def run(encoder, rows, output, index=None, **arguments):
    """The report and the written rows."""
    report = mine_negatives(
        encoder, encoder.index() if index is None else index, rows, output, MiningArguments(**arguments)
    )
    return report, [json.loads(line) for line in output.read_text().split("\n")[:-1]]


@pytest.fixture
def output(tmp_path):
    return tmp_path / "mined.jsonl"


def nearest_allowed(queries, documents, positives, top_k, num_negatives, max_share, duplicate_cosine):
    """What mining promises, over all pairs at once."""
    chosen = []
    for query, positive in zip(queries, positives, strict=True):
        scores = documents @ query
        ranked = np.argsort(-scores)[:top_k]
        taken = []
        for place in ranked:
            alike = [documents[place] @ documents[other] for other in (positive, *taken)]
            answer = place == positive or max(alike) > duplicate_cosine
            if not answer and scores[place] <= max_share * scores[positive] and len(taken) < num_negatives:
                taken.append(int(place))
        chosen.append(taken)
    return chosen


def test_negatives_are_the_nearest_that_brute_force_allows(output):
    rng = np.random.default_rng(0)
    documents = rng.normal(size=(80, 8))
    documents[60:] = documents[:20] + 0.05 * rng.normal(size=(20, 8))  # near-duplicates, of positives too
    positives = list(range(30))
    queries = documents[positives] + rng.normal(size=(30, 8)) * 1.2
    encoder = Given(
        {f"q{i}": vector for i, vector in enumerate(queries)},
        {f"d{i}": vector for i, vector in enumerate(documents)},
    )
    rows = [AlignmentRow(f"q{i}", f"d{i}") for i in positives]
    report, mined = run(encoder, rows, output, top_k=8, num_negatives=3, duplicate_cosine=0.95)

    stored = [unit(unit(vector).astype(np.float16)) for vector in documents]  # as the index rounds them
    units = [np.array([unit(vector) for vector in queries]), np.array(stored)]
    expected = nearest_allowed(*units, positives, 8, 3, 0.95, 0.95)
    assert [row["neg"] for row in mined] == [[f"d{place}" for place in row] for row in expected]
    lengths = [len(row) for row in expected]
    assert min(lengths) < 3 == max(lengths)  # the data has rows of both kinds
    assert report.negatives == sum(lengths)
    assert report.short_rows == sum(length < 3 for length in lengths)
    assert report.empty_rows == lengths.count(0)
    assert report.near_duplicates > 0 < report.false_negatives
    for row, query in zip(mined, units[0], strict=True):
        cosines = [unit(encoder.documents[text]) @ query for text in (row["pos"], *row["neg"])]
        np.testing.assert_allclose([row["pos_score"], *row["neg_scores"]], cosines, atol=1e-3)


def test_what_scores_above_the_share_of_the_positive_is_no_negative(output):
    encoder = Given(QUERY, spread([0.9, 0.8, 0.7, 0.6]))
    rows = [AlignmentRow("q", "doc 0.8")]
    report, mined = run(encoder, rows, output, max_share=0.9)
    assert mined[0]["neg"] == ["doc 0.7"]
    assert report.false_negatives == 1
    report, mined = run(encoder, rows, output, max_share=0.8)
    assert mined[0]["neg"] == ["doc 0.6"]
    assert report.false_negatives == 2


@pytest.mark.parametrize(("score", "allowed"), [(-0.5, "doc -0.6"), (0.0, "doc -0.4")])
def test_below_zero_the_margin_still_lies_under_the_positive(output, score, allowed):
    """A plain share would allow up to -0.4 where the positive has -0.5."""
    encoder = Given(QUERY, spread([score, 0.1, -0.4, -0.52, -0.6]))
    report, mined = run(encoder, [AlignmentRow("q", f"doc {score}")], output, max_share=0.8)
    assert mined[0]["neg"] == [allowed]
    assert report.negatives == 1


def test_positives_of_the_query_in_other_rows_and_the_query_itself_are_no_negatives(output):
    documents = {**spread([0.9, 0.6, 0.5, 0.4]), "q": at(0.7, 9), "doc  0.6\n": at(0.55, 8)}
    encoder = Given(QUERY | {" q": QUERY["q"]}, documents)
    rows = [AlignmentRow("q", "doc 0.9"), AlignmentRow(" q", "doc 0.6")]
    report, mined = run(encoder, rows, output)
    assert mined[0]["neg"] == ["doc 0.5"]
    assert report.positives == 2 * 4
    assert report.false_negatives == report.near_duplicates == 0


def test_near_duplicates_of_the_positive_and_of_another_negative_are_left_out(output):
    documents = {
        "pos": at(0.9, 0),
        "like pos": at(0.85, 0.1),
        "very like pos": at(0.899, 0.01),
        "first": at(0.6, 1),
        "like first": at(0.59, 1.1),
        "second": at(0.5, 3),
    }
    encoder = Given(QUERY, documents)
    report, mined = run(encoder, [AlignmentRow("q", "pos")], output, num_negatives=2)
    assert mined[0]["neg"] == ["first", "second"]
    assert report.near_duplicates == 3
    assert report.false_negatives == 0  # each candidate is counted once


def test_own_negatives_come_first_and_nothing_like_them_is_added(output):
    documents = {
        "pos": at(0.9, 0),
        "own": at(0.8, 1),
        " own": at(0.3, 1.5),
        "like own": at(0.79, 1.05),
        "new": at(0.5, 3),
    }
    encoder = Given(QUERY, documents)
    rows = [AlignmentRow("q", "pos", ("own",)), AlignmentRow("q", "pos", ("own", "new", "like own"))]
    report, mined = run(encoder, rows, output, num_negatives=2)
    assert mined[0]["neg"] == ["own", "new"]
    assert mined[0]["neg_scores"] == pytest.approx([0.8, 0.5], abs=5e-4)
    assert mined[1]["neg"] == ["own", "new", "like own"]
    assert (report.negatives, report.own_negatives, report.short_rows) == (1, 4, 0)
    _, mined = run(encoder, rows[:1], output, num_negatives=3, duplicate_cosine=1.0)
    assert mined[0]["neg"] == ["own", "like own", "new"]  # " own" is the same text, whatever its vector


def test_a_positive_that_the_index_lacks_is_encoded_and_one_that_it_has_is_not(output):
    encoder = Given(QUERY | {"r": QUERY["q"]}, spread([0.9, 0.8, 0.7, 0.3]))
    index = encoder.index(["doc 0.8", "doc 0.7", "doc 0.3"])
    rows = [AlignmentRow("q", "doc 0.9"), AlignmentRow("r", "doc 0.8")]
    report, mined = run(encoder, rows, output, index, max_share=0.8)
    assert encoder.encoded == ["doc 0.9"]
    assert report.positives_found == 1
    assert [row["pos_score"] for row in mined] == pytest.approx([0.9, 0.8], abs=5e-4)
    assert [row["neg"] for row in mined] == [["doc 0.7"], ["doc 0.3"]]


def test_the_top_can_be_skipped(output):
    encoder = Given(QUERY, spread([0.9, 0.8, 0.7, 0.6]))
    _, mined = run(encoder, [AlignmentRow("q", "doc 0.9")], output, skip_top=2)
    assert mined[0]["neg"] == ["doc 0.6"]


def test_random_negatives_depend_on_the_seed_and_the_row_and_not_on_the_parts(output, monkeypatch):
    encoder = Given(
        QUERY | {f"q{i}": QUERY["q"] for i in range(20)}, spread([0.9, *np.linspace(0.1, 0.8, 12)])
    )
    rows = [AlignmentRow(f"q{i}", "doc 0.9") for i in range(20)]
    _, first = run(encoder, rows, output, strategy="random", num_negatives=2, max_share=0.6)
    monkeypatch.setattr(mining, "ROWS_AT_ONCE", 3)
    assert run(encoder, rows, output, strategy="random", num_negatives=2, max_share=0.6)[1] == first
    other = run(encoder, rows, output, strategy="random", num_negatives=2, max_share=0.6, seed=1)[1]
    assert other != first
    assert len({tuple(row["neg"]) for row in first}) > 5
    assert all(len(set(row["neg"])) == 2 and max(row["neg_scores"]) <= 0.54 for row in first)


def test_fewer_candidates_leave_rows_short_and_the_report_says_so(output, caplog):
    encoder = Given(QUERY, spread([0.9, 0.8, 0.7]))
    report, mined = run(encoder, [AlignmentRow("q", "doc 0.7")], output, num_negatives=2)
    assert mined[0]["neg"] == []
    assert (report.short_rows, report.empty_rows, report.false_negatives) == (1, 1, 2)
    assert "1 of 1 rows have fewer than 2 negatives" in caplog.text


def test_an_index_of_the_first_vectors_only_is_searched_and_compared_by_them(encoder, output):
    texts = ["A fox jumps.", "A dog barks at the river bank.", "Vitamin C is in lemons.", "It is read back."]
    with DocumentIndex.create(encoder=encoder.fingerprint, tokens=2, factory="Flat") as index:
        index.add(encoder.encode_documents(texts)[:, :64], texts)
        rows = [AlignmentRow("Who jumps?", "A fox jumps."), AlignmentRow("Who sleeps?", "Nobody.")]
        _, mined = run(encoder, rows, output, index, max_share=1.0)
    query = encoder.compress(["Who sleeps?"], "next")[0, :2]
    positive = encoder.compress(["Nobody."], "self")[0, :2]
    cosines = [unit(a) @ unit(b) for a, b in zip(query, positive, strict=True)]
    assert mined[1]["pos_score"] == pytest.approx(np.mean(cosines), abs=1e-3)


def test_mined_rows_are_alignment_rows_again_whatever_their_texts(output):
    documents = {"pos\u2028 Ü": at(0.9), "neg \ud800 \x00": at(0.5)}
    encoder = Given(QUERY, documents)
    rows = [AlignmentRow("q", "pos\u2028 Ü", ("neg \ud800 \x00",))]
    run(encoder, rows, output, encoder.index(["pos\u2028 Ü"]))
    assert list(mining.alignment_rows(output)) == rows


@pytest.mark.parametrize("before", [None, "what was there before\n"])
def test_an_interrupted_run_leaves_the_output_as_it_was(output, monkeypatch, before):
    monkeypatch.setattr(mining, "ROWS_AT_ONCE", 1)
    encoder = Given(QUERY, spread([0.9, 0.5]))
    rows = [AlignmentRow("q", "doc 0.9"), AlignmentRow("unknown", "doc 0.9")]
    if before is not None:
        output.write_text(before)
    with pytest.raises(KeyError):
        run(encoder, rows, output)
    assert [file.read_text() for file in output.parent.iterdir()] == ([] if before is None else [before])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_negatives": 51}, "more than the top_k=50"),
        ({"skip_top": 50}, "more than the top_k=50"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"num_negatives": 0}, "num_negatives must be at least 1"),
        ({"max_share": 0}, "max_share must be above 0"),
        ({"max_share": float("nan")}, "max_share must be above 0"),
        ({"duplicate_cosine": 1.1}, "duplicate_cosine must be above 0 and at most 1"),
        ({"strategy": "best"}, "strategy must be one of top, random"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        replace(MiningArguments(), **change)


def test_an_index_that_does_not_fit_is_refused_before_there_is_an_output(output):
    encoder = Given(QUERY, spread([0.9, 0.5]))
    rows = [AlignmentRow("q", "doc 0.9")]
    with pytest.raises(ValueError, match="is empty"):
        run(encoder, rows, output, DocumentIndex.create())
    other = DocumentIndex.create(encoder="another")
    other.add(np.eye(4), ["a", "b", "c", "d"])
    with pytest.raises(ValueError, match=r"encoder another, but .* is encoder given"):
        run(encoder, rows, output, other)
    wide = DocumentIndex.create()
    wide.add(np.eye(6), list("abcdef"))
    with pytest.raises(ValueError, match=r"dimension 6, but .* makes 4"):
        run(encoder, rows, output, wide)
    flattened = DocumentIndex.create(tokens=2)
    flattened.add(np.eye(6), list("abcdef"))
    with pytest.raises(ValueError, match="2 vectors of 3 dimensions"):
        run(encoder, rows, output, flattened)
    assert not output.exists()


def test_a_query_equal_to_its_positive_and_an_output_of_another_name_or_over_the_rows_are_refused(output):
    encoder = Given(QUERY, spread([0.9, 0.5]))
    with pytest.raises(ValueError, match="row 2: field 'pos' is the same text as 'query'"):
        run(encoder, [AlignmentRow("q", "doc 0.9"), AlignmentRow("q", "q ")], output)
    with pytest.raises(ValueError, match=r"name the output .*mined\.jsonl"):
        run(encoder, [AlignmentRow("q", "doc 0.9")], output.with_suffix(".csv"))
    with pytest.raises(ValueError, match=r"name the output .*mined\.jsonl$"):
        run(encoder, [AlignmentRow("q", "doc 0.9")], output.with_suffix(".jsonl.gz"))
    output.write_text('{"query": "q", "pos": "doc 0.9"}\n')
    with pytest.raises(
        ValueError, match=r"mined\.jsonl would take the place of .*mined\.jsonl, which is read"
    ):
        run(encoder, output, output)


def test_quantiles_are_those_of_all_scores(output):
    cosines = np.linspace(0.99, 0.02, 98).round(3)
    encoder = Given({f"q{i}": QUERY["q"] for i in range(40)}, spread(cosines))
    rows = [AlignmentRow(f"q{i}", f"doc {cosines[i]}") for i in range(40)]
    report, mined = run(encoder, rows, output, num_negatives=2, top_k=98)
    for field, scores in {
        "positive_quantiles": [row["pos_score"] for row in mined],
        "negative_quantiles": [score for row in mined for score in row["neg_scores"]],
    }.items():
        for share, value in report.facts[field].items():
            assert value == pytest.approx(
                np.quantile(scores, float(share), method="inverted_cdf"), abs=2e-3
            ), (field, share)


def test_a_share_grows_with_the_score_whatever_the_sign_of_the_positive():
    scores = np.array([-0.8, 0.0, 0.4, 0.8])
    np.testing.assert_allclose(share_of(scores, 0.8), scores / 0.8)
    assert (np.diff(share_of(scores, -0.4)) > 0).all()
    assert share_of(np.array([-0.4]), -0.4) == [1.0]


def test_the_report_is_saved_as_json_and_picture(output, tmp_path):
    pytest.importorskip("matplotlib")
    encoder = Given(QUERY, spread([0.9, 0.5]))
    report, _ = run(encoder, [AlignmentRow("q", "doc 0.9")], output)
    report.save(tmp_path / "new" / "report")
    saved = json.loads((tmp_path / "new" / "report" / "report.json").read_text())
    assert saved == report.facts
    assert (saved["rows"], saved["negatives"], saved["positives"]) == (1, 1, 1)
    assert saved["settings"]["max_share"] == 0.95
    assert saved["settings"]["encoder"] == "given"
    assert (tmp_path / "new" / "report" / "histogram.png").read_bytes().startswith(b"\x89PNG")
