"""Numbers that an index keeps for texts."""

import sqlite3

import numpy as np
import pytest

pytest.importorskip("faiss")

from autoregembed_indexes import DocumentIndex, DocumentIndexError

TEXTS = ["a", "Ünïcode\0 🙂", ""]
NUMBERS = np.array([0.1, -2.5, 1e30], dtype=np.float32)


@pytest.fixture
def folder(tmp_path):
    with DocumentIndex.create(tmp_path / "index") as index:
        index.cache("prior", TEXTS, NUMBERS)
    return tmp_path / "index"


def test_numbers_come_back_equal_by_name_and_text(folder):
    with DocumentIndex.open(folder, read_only=True) as index:
        found = index.cached("prior", [*TEXTS[::-1], "b", "a"])
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, [*NUMBERS[::-1], np.nan, NUMBERS[0]])
        assert np.isnan(index.cached("another", TEXTS)).all()
        assert index.cached("prior", []).shape == (0,)


def test_a_later_number_replaces_and_clear_forgets(folder):
    with DocumentIndex.open(folder) as index:
        index.cache("prior", ["a"], [7])
        assert index.cached("prior", ["a"]) == 7
        index.clear()
        assert np.isnan(index.cached("prior", TEXTS)).all()


def test_a_negative_zero_is_kept(folder):
    with DocumentIndex.open(folder) as index:
        index.cache("prior", ["a"], [-0.0])
        assert index.cached("prior", ["a"]) == 0


def test_a_damaged_number_is_none(folder):
    with sqlite3.connect(folder / "documents.sqlite") as database:
        database.execute("UPDATE cached SET number = number + 1 WHERE number < 0")
    with DocumentIndex.open(folder) as index:
        np.testing.assert_array_equal(np.isnan(index.cached("prior", TEXTS)), [False, True, False])


def test_what_cannot_be_kept_is_refused(folder):
    with DocumentIndex.open(folder) as index:
        for wrong in ([1.0], [1.0, np.nan, 2.0], [1.0, np.inf, 2.0], [1.0, 1e300, 2.0], [[1.0, 2.0, 3.0]]):
            with pytest.raises(ValueError, match="3 finite float32 numbers, one for each text"):
                index.cache("prior", TEXTS, wrong)
        with pytest.raises(TypeError, match="texts must be a list of texts, got str"):
            index.cache("prior", "a", [1.0])
        with pytest.raises(TypeError, match=r"texts\[1\] must be str, got int"):
            index.cached("prior", ["a", 1])
        np.testing.assert_array_equal(index.cached("prior", TEXTS), NUMBERS)
    with DocumentIndex.open(folder, read_only=True) as index:
        assert index.read_only
        with pytest.raises(DocumentIndexError, match="read_only"):
            index.cache("prior", ["a"], [1.0])
