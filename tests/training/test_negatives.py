"""Negatives: a row's own first, then borrowed ones, then its batch's; never an answer, always the same for a seed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoregembed_rag.training import negatives as module
from autoregembed_rag.training.arguments import AlignmentArguments
from autoregembed_rag.training.data import AlignmentRow
from autoregembed_rag.training.negatives import Negatives

ROWS = [AlignmentRow(f"query {i}", f"positive {i}", (f"own {i} a", f"own {i} b")) for i in range(40)]
BATCH = list(enumerate(ROWS[:8]))


def arguments(n: int = 1, m: int = 0, seed: int = 0) -> AlignmentArguments:
    return AlignmentArguments(num_negatives=n, in_batch_negatives=m, seed=seed)


def bare(rows: list[AlignmentRow]) -> list[AlignmentRow]:
    return [AlignmentRow(row.query, row.pos) for row in rows]


def test_a_rows_own_come_first_and_no_more_than_are_wanted():
    assert Negatives(ROWS, arguments(1)).own(BATCH) == [[row.neg[0]] for _, row in BATCH]
    assert Negatives(ROWS, arguments(2)).own(BATCH) == [[*row.neg] for _, row in BATCH]
    four = Negatives(ROWS, arguments(4)).own(BATCH)
    positives = {row.pos for row in ROWS}
    for texts, (_, row) in zip(four, BATCH, strict=True):
        assert texts[:2] == [*row.neg]
        assert len(texts) == 4
        assert positives.issuperset(texts[2:]), "the rest are positives of other rows"
    assert Negatives(ROWS, arguments(0, 1)).own(BATCH) == [[]] * 8


def test_borrowed_ones_depend_on_seed_and_row_alone():
    """So reference scores computed beforehand are those that every epoch asks for, in whatever batch."""
    rows = bare(ROWS)
    numbered = list(enumerate(rows))
    borrowed = Negatives(rows, arguments(2, seed=1)).own(numbered)
    again = Negatives(rows, arguments(2, seed=1))
    assert list(reversed(again.own(numbered[::-1]))) == borrowed
    assert [again.own([row])[0] for row in numbered] == borrowed
    assert Negatives(rows, arguments(2, seed=2)).own(numbered) != borrowed
    assert len({tuple(texts) for texts in borrowed}) > 30, "rows differ in what they borrow"


def test_in_batch_negatives_are_other_rows_positives_of_the_same_batch():
    chosen = Negatives(ROWS, arguments(1, 3)).in_batch(BATCH)
    positives = {row.pos for _, row in BATCH}
    for texts, (_, row) in zip(chosen, BATCH, strict=True):
        assert len(texts) == len(set(texts)) == 3
        assert positives.issuperset(texts)
        assert row.pos not in texts
    assert Negatives(ROWS, arguments(1, 3)).in_batch(BATCH) == chosen
    assert Negatives(ROWS, arguments(1, 3, seed=1)).in_batch(BATCH) != chosen
    assert Negatives(ROWS, arguments(1, 0)).in_batch(BATCH) == [[]] * 8
    # At random: over many batches every other row is drawn.
    drawn = {
        text
        for shift in range(20)
        for text in Negatives(ROWS, arguments(1, 3)).in_batch([*BATCH, (shift + 8, ROWS[0])])[0]
    }
    assert drawn == positives - {ROWS[0].pos}


def test_a_batch_with_too_few_others_takes_positives_from_anywhere():
    chosen = Negatives(ROWS, arguments(1, 5)).in_batch(BATCH[:3])
    everywhere = {row.pos for row in ROWS}
    for texts, (_, row) in zip(chosen, BATCH[:3], strict=True):
        assert len(texts) == 5
        assert {other.pos for _, other in BATCH[:3] if other != row} == set(texts[:2]), "the batch's first"
        assert everywhere.issuperset(texts)
        assert row.pos not in texts


TEXT = st.sampled_from("abcdefg")
ROW = st.builds(AlignmentRow, TEXT, TEXT, st.lists(TEXT, max_size=3, unique=True).map(tuple)).filter(
    lambda row: row.query != row.pos and row.pos not in row.neg
)


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(ROW, min_size=2, max_size=10), n=st.integers(0, 4), m=st.integers(0, 3))
def test_no_drawn_text_is_an_answer_or_a_negative_already(rows, n, m):
    if n + m == 0:
        return
    chosen = Negatives(rows, arguments(n, m))
    for number, row in enumerate(rows):
        lenders = {
            other.pos
            for other in rows
            if other.query != row.query and other.pos not in (row.pos, row.query, *row.neg)
        }
        wanted = len(row.neg) < n or m > 0
        if wanted and not lenders:
            with pytest.raises(ValueError, match=r"too few negatives.*add negatives"):
                chosen.check(row)
            continue
        chosen.check(row)
        (own,) = chosen.own([(number, row)])
        assert len(own) == n
        assert own[: len(row.neg)] == [*row.neg[:n]]
        assert lenders.issuperset(own[len(row.neg) :])
        (drawn,) = chosen.in_batch([(number, row)])
        assert len(drawn) == m
        assert lenders.issuperset(drawn)


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(ROW, min_size=4, max_size=10), m=st.integers(1, 3))
def test_no_positive_of_the_same_query_in_the_batch_is_drawn_from_it(rows, m):
    # Someone everybody may borrow from, outside the batch.
    chosen = Negatives([*rows, AlignmentRow("another", "its answer")], arguments(1, m))
    batch = list(enumerate(rows))
    for texts, row in zip(chosen.in_batch(batch), rows, strict=True):
        answers = {other.pos for other in rows if other.query == row.query}
        candidates = {other.pos for other in rows} - answers - {row.query, *row.neg}
        from_batch = texts[: min(m, len(candidates))]
        assert len(set(from_batch)) == len(from_batch)
        assert candidates.issuperset(from_batch)
        assert row.pos not in texts
        assert not {row.query, *row.neg}.intersection(texts)


def test_the_only_row_that_can_lend_is_found_however_many_cannot(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "TRIES", 3)
    rows = [AlignmentRow(f"query {i}", "the same answer") for i in range(500)]
    rows[321] = AlignmentRow("another query", "another answer")
    chosen = Negatives(rows, arguments(2))
    chosen.check(rows[0])
    assert chosen.own([(0, rows[0])]) == [["another answer"] * 2]
    alone = Negatives([row for row in rows if row.pos == "the same answer"], arguments(1))
    with pytest.raises(ValueError, match=r"the query 'query 7' has too few negatives, and no other query"):
        alone.check(rows[7])
    Negatives(rows[:2], arguments(1)).check(AlignmentRow("q", "the same answer", ("its own",)))
