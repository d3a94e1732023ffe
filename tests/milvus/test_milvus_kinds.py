"""Approximate kinds miss nothing for a filter's sake, once the server has built their indexes."""

import time

import numpy as np
import pytest

from autoregembed_indexes.milvus.kinds import MilvusKind

COUNT, DIMENSION = 3_000, 16
RANDOM = np.random.default_rng(11)
# In bunches, so that a few lists hold the neighbours of a query and others the documents that match.
CENTRES = RANDOM.normal(size=(40, DIMENSION))
VECTORS = CENTRES[np.arange(COUNT) % 40] + 0.2 * RANDOM.normal(size=(COUNT, DIMENSION))
UNIT = VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def index(server, collections):
    made = collections(server, dimension=DIMENSION, factory="IVF256,Flat")
    ids = [str(row) for row in range(COUNT)]
    made.add(VECTORS, ids, ids, [{"bunch": row % 40, "rare": row % 300, "row": row} for row in range(COUNT)])
    # What a server has just got it searches whole: here it builds the index that it would build in time, and takes it.
    client, name = made._opened().server.client, made.collection_name
    client.flush(name)
    deadline = time.monotonic() + 60
    while client.describe_index(name, "vector")["pending_index_rows"] and time.monotonic() < deadline:
        time.sleep(0.1)
    client.release_collection(name)
    client.load_collection(name)
    return made


@pytest.mark.parametrize(
    ("factory", "index_type", "parameters"),
    [
        ("auto", "AUTOINDEX", {}),
        ("flat", "FLAT", {}),
        ("SQfp16", "FLAT", {}),
        ("IVF, SQ8", "IVF_SQ8", {"nlist": 1024}),
        ("IVF64,Flat", "IVF_FLAT", {"nlist": 64}),
        ("HNSW32", "HNSW", {"M": 32, "efConstruction": 200}),
    ],
)
def test_a_factory_is_one_of_the_servers_index_types(factory, index_type, parameters):
    kind = MilvusKind.of(factory)
    assert (kind.index_type, kind.build_parameters, kind.exact) == (
        index_type,
        parameters,
        index_type == "FLAT",
    )


@pytest.mark.parametrize(
    ("where", "matches"),
    [
        (None, COUNT),
        ({"rare": 7}, 10),
        ({"bunch": {"$in": [3, 8]}}, 150),
        ({"row": {"$ne": 5}}, COUNT - 1),
        (lambda metadata: metadata["rare"] == 7, 10),
        ({"row": -1}, 0),
    ],
)
def test_fewer_than_k_come_back_only_where_fewer_match(index, where, matches):
    queries = UNIT[[0, 17, 33]]
    for k in (1, 20, 400):
        for line in index.search(queries, k, where):
            assert len(line) == min(k, matches) == len({hit.id for hit in line})
            scores = [hit.score for hit in line]
            assert scores == sorted(scores, reverse=True)
    few = index.search(queries, matches or 1, where if matches < 200 else {"rare": 7})
    for query, line in zip(queries, few, strict=True):
        found = [int(hit.id) for hit in line]
        np.testing.assert_allclose([hit.score for hit in line], UNIT[found] @ query, atol=2e-3)


def test_most_of_the_best_are_found(index):
    queries = UNIT[:50]
    expected = np.argsort(-(queries @ UNIT.T), axis=1)[:, :10]
    found = [{int(hit.id) for hit in line} for line in index.search(queries, 10)]
    recall = np.mean(
        [len(line & set(best)) / 10 for line, best in zip(found, expected.tolist(), strict=True)]
    )
    assert recall > 0.9
