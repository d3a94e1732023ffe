"""Ids that repeat are found, whatever file of hashes they fall into, and hashes that only look alike are not."""

import pytest

from autoregembed_rag.sharding import repeats
from autoregembed_rag.sharding.repeats import Repeats, hashes_of


@pytest.mark.parametrize("total", [10, 3 * repeats.ROWS])  # one file, several
@pytest.mark.parametrize("places", [(0, 0), (1, 4)])
def test_a_repeated_id_is_found_with_its_places(total, places):
    held = {place: [f"{place}-{number}" for number in range(500)] for place in range(5)}
    for place in places:
        held[place].append("Ünïcode")
    with Repeats(total) as found:
        for place, ids in held.items():
            found.add(place, hashes_of(ids))
        assert found.find(lambda place: held[place]) == ("Ünïcode", *places)


def test_a_hash_that_two_ids_share_is_no_repeat(monkeypatch):
    monkeypatch.setattr(repeats, "_hash", lambda one: one[:1].encode().ljust(8))
    held = [["a1", "b1"], ["a2", "c1"], ["a3", "c1"]]
    with Repeats(10) as found:
        for place, ids in enumerate(held):
            found.add(place, hashes_of(ids))
        assert found.find(lambda place: held[place]) == ("c1", 1, 2)
