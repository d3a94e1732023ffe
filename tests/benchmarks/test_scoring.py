"""Measures against values worked out by hand."""

from math import log2

import numpy as np
import pytest

pytest.importorskip("ir_measures")

from benchmarks.scoring import score_run, spearman


def test_one_graded_query_scores_as_computed_by_hand():
    qrels = {"q": {"a": 2, "b": 1, "c": 1}}
    run = {"q": {"x": 0.9, "a": 0.8, "y": 0.7, "b": 0.6}}
    scores = score_run(qrels, run)
    gained = 2 / log2(3) + 1 / log2(5)
    best = 2 / log2(2) + 1 / log2(3) + 1 / log2(4)
    assert scores["nDCG@10"] == pytest.approx(gained / best)
    assert scores["Recall@100"] == pytest.approx(2 / 3)
    assert scores["MRR@10"] == pytest.approx(1 / 2)


def test_cutoffs_are_ten_and_a_hundred():
    run = {"q": {f"d{i}": 1 - i / 1000 for i in range(150)}}
    at_eleven = score_run({"q": {"d10": 1}}, run)
    assert (at_eleven["nDCG@10"], at_eleven["MRR@10"], at_eleven["Recall@100"]) == (0, 0, 1)
    assert score_run({"q": {"d100": 1}}, run)["Recall@100"] == 0


def test_a_query_without_hits_counts_as_zero():
    qrels = {"found": {"a": 1}, "lost": {"a": 1}}
    assert score_run(qrels, {"found": {"a": 1.0}, "lost": {}})["MRR@10"] == pytest.approx(0.5)
    assert score_run(qrels, {"found": {}, "lost": {}})["MRR@10"] == 0


def test_spearman_gives_ties_their_mean_rank():
    # Ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5.
    assert spearman(np.array([1, 2, 2, 3]), np.array([1, 2, 3, 4])) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)


def test_spearman_sees_order_only():
    values = np.array([0.1, 5.0, -3.0, 2.0])
    assert spearman(values, np.exp(values)) == pytest.approx(1)
    assert spearman(values, -values) == pytest.approx(-1)


def test_spearman_of_a_constant_is_an_error():
    with pytest.raises(ValueError, match="all values"):
        spearman(np.ones(3), np.arange(3))
