"""nDCG@10 on held-out queries, and when one model may be called better than another."""

import math
import re
import sys

import numpy as np
import pytest

from autoregembed_rag.finetuning import evaluation as module
from autoregembed_rag.finetuning.evaluation import Comparison, Evaluation, Scores, compare, retrieval_score

pytest.importorskip("ir_measures")


class Lettered:
    """An encoder of one dimension for each letter; texts that share letters are alike."""

    def __init__(self) -> None:
        self.encoded: list[int] = []

    def encode_queries(self, texts, *, batch_size=None):
        counts = np.array(
            [[text.count(letter) for letter in "abcdefghijklmnop"] for text in texts], np.float32
        )
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)

    def encode_documents(self, texts, *, batch_size=None):
        self.encoded.append(len(texts))
        return self.encode_queries(texts)


def ndcg(grades: list[int], judged: list[int]) -> float:
    gain = lambda values: sum(g / math.log2(i + 2) for i, g in enumerate(values[:10]))  # noqa: E731
    return gain(grades) / gain(sorted(judged, reverse=True))


EVALUATION = Evaluation(
    queries={"q1": "ab", "q2": "c"},
    corpus={"d1": "abb", "d2": "ab", "d3": "cd", "d4": "ccccd", "d5": "p"},
    qrels={"q1": {"d1": 2, "d5": 1, "d2": 0}, "q2": {"d4": 1}},
)


def test_scores_are_ndcg_of_the_exact_ranking():
    scores = retrieval_score(Lettered(), EVALUATION)
    # q1: d2 (grade 0), d1 (2), then d3, d4, d5 with cosine 0 in the order that ir-measures gives equal scores.
    assert scores.per_query["q2"] == 1.0
    tied = [ndcg([0, 2, *rest], [2, 1, 0]) for rest in ([1, 0, 0], [0, 1, 0], [0, 0, 1])]
    assert min(abs(scores.per_query["q1"] - value) for value in tied) < 1e-6
    assert scores.mean == pytest.approx((1 + scores.per_query["q1"]) / 2)


def test_the_corpus_is_encoded_in_parts_and_the_parts_do_not_show(monkeypatch):
    rng = np.random.default_rng(0)
    texts = {f"d{i}": "".join(rng.choice([*"abcdefghijklmnop"], 12)) for i in range(60)}
    queries = {f"q{i}": "".join(rng.choice([*"abcdefghijklmnop"], 6)) for i in range(8)}
    graded = lambda: zip(rng.choice([*texts], 5, replace=False), [3, 2, 1, 1, 1], strict=True)  # noqa: E731
    qrels = {query: {str(text): grade for text, grade in graded()} for query in queries}
    evaluation = Evaluation(queries, texts, qrels)
    whole = retrieval_score(Lettered(), evaluation)
    monkeypatch.setattr(module, "ENCODED_AT_ONCE", 7)
    encoder = Lettered()
    assert retrieval_score(encoder, evaluation) == whole
    assert encoder.encoded == [7] * 8 + [4]
    vectors = encoder.encode_documents([*texts.values()])
    for query, text in queries.items():
        similar = np.argsort(-(vectors @ encoder.encode_queries([text])[0]), kind="stable")
        ranked = [qrels[query].get([*texts][i], 0) for i in similar]
        assert whole.per_query[query] == pytest.approx(ndcg(ranked, [*qrels[query].values()]), abs=0.15)


def test_a_real_encoder_is_measured(encoder):
    scores = retrieval_score(encoder, EVALUATION)
    assert scores.per_query.keys() == EVALUATION.queries.keys()
    assert all(0 <= value <= 1 for value in scores.per_query.values())


def test_vectors_that_are_not_finite_are_an_error_not_a_score():
    class Diverged(Lettered):
        def encode_documents(self, texts, *, batch_size=None):
            return super().encode_documents(texts) * np.nan

    with pytest.raises(ValueError, match="not finite"):
        retrieval_score(Diverged(), EVALUATION)


def test_without_ir_measures_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ir_measures", None)
    with pytest.raises(ImportError, match=re.escape('pip install "autoregembed-rag[train]"')):
        retrieval_score(Lettered(), EVALUATION)


@pytest.mark.parametrize(
    ("queries", "qrels", "complaint"),
    [
        ({}, {}, "at least one query"),
        ({"q": "a"}, {}, "query 'q' has no relevant text"),
        ({"q": "a"}, {"q": {"d": 0}}, "query 'q' has no relevant text"),
        ({"q": "a"}, {"q": {"x": 1}}, "relevant text 'x', which is not in the corpus"),
    ],
)
def test_an_evaluation_that_cannot_be_won_is_refused(queries, qrels, complaint):
    with pytest.raises(ValueError, match=complaint):
        Evaluation(queries, {"d": "text"}, qrels)


def scores(values) -> Scores:
    return Scores({f"q{i}": float(value) for i, value in enumerate(values)})


def drawn(n: int, shift: float, seed: int) -> tuple[Scores, Scores]:
    rng = np.random.default_rng(seed)
    before = rng.uniform(0.2, 0.8, n)
    return scores(before), scores(before + rng.normal(shift, 0.1, n))


def test_a_clear_gain_is_better_and_a_clear_loss_is_worse():
    before, after = drawn(200, 0.05, 1)
    gain, loss = compare(before, after), compare(after, before)
    assert gain.better
    assert not gain.worse
    assert loss.worse
    assert not loss.better
    assert gain.low < gain.difference < gain.high
    assert gain.difference == pytest.approx(after.mean - before.mean)
    assert gain.p_value < 0.001
    assert str(gain).endswith("200 queries): better")
    assert str(loss).endswith(": worse")


def test_chance_is_called_neither_better_nor_worse_nineteen_times_in_twenty():
    called = [compare(*drawn(40, 0.0, seed)) for seed in range(100)]
    assert sum(c.better or c.worse for c in called) <= 10
    assert any(c.difference > 0 and not c.better for c in called)


def test_the_same_scores_are_no_difference():
    same = compare(scores([0.5, 0.2]), scores([0.5, 0.2]))
    assert (same.difference, same.low, same.high, same.p_value) == (0, 0, 0, 1)
    assert not same.better
    assert not same.worse
    assert "no difference" in str(same)


def test_a_few_queries_that_all_gained_prove_nothing():
    few = compare(scores([0.1, 0.2, 0.3]), scores([0.5, 0.6, 0.8]))
    assert few.low > 0
    assert not few.better


@pytest.mark.parametrize(
    ("difference", "low", "high", "p_value", "verdict"),
    [
        (0.1, 0.05, 0.15, 0.001, "better"),
        (0.1, -0.01, 0.15, 0.001, ""),
        (0.1, 0.05, 0.15, 0.06, ""),
        (-0.1, -0.15, -0.05, 0.001, "worse"),
        (-0.1, -0.15, 0.01, 0.001, ""),
        (-0.1, -0.15, -0.05, 0.06, ""),
    ],
)
def test_a_verdict_needs_both_tests(difference, low, high, p_value, verdict):
    found = Comparison(0.5, 0.5 + difference, difference, low, high, p_value, 9)
    assert (found.better, found.worse) == (verdict == "better", verdict == "worse")


def test_the_p_value_is_the_share_of_sign_patterns_as_extreme():
    differences = np.array([0.3, 0.1, 0.25, -0.05, 0.2, 0.15, -0.1, 0.4])
    signs = 1 - 2 * ((np.arange(256)[:, None] >> np.arange(8)) & 1)
    exact = (np.abs((signs * differences).mean(axis=1)) >= differences.mean() - 1e-12).mean()
    found = compare(scores(np.full(8, 0.5)), scores(0.5 + differences))
    assert found.p_value == pytest.approx(exact, abs=0.01)
    half = 1.96 * differences.std() / math.sqrt(8)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)


def test_a_comparison_is_the_same_each_time_and_however_it_is_cut(monkeypatch):
    before, after = drawn(50, 0.02, 4)
    whole = compare(before, after)
    assert compare(before, after) == whole
    assert compare(before, after, seed=1).p_value != whole.p_value
    reordered = Scores(dict(reversed(after.per_query.items())))
    assert compare(before, reordered) == whole
    monkeypatch.setattr(module, "RESAMPLED_NUMBERS_AT_ONCE", 5000)
    cut = compare(before, after)
    assert cut.p_value == pytest.approx(whole.p_value, abs=0.02)
    assert cut.difference == whole.difference


def test_other_queries_cannot_be_compared():
    with pytest.raises(ValueError, match="same queries"):
        compare(scores([0.1, 0.2]), scores([0.1]))
    with pytest.raises(ValueError, match="same queries"):
        compare(scores([]), scores([]))
