"""What is foretold of an index' bytes is what a real one takes."""

import numpy as np
import pytest

pytest.importorskip("faiss")

from autoregembed_indexes import DocumentIndex
from autoregembed_indexes.database import DATABASE_NAME
from autoregembed_indexes.sizes import (
    FACTORIES,
    MILVUS_KINDS,
    Documents,
    database_bytes,
    document_index_size,
    milvus_size,
)
from autoregembed_indexes.snapshot import read_snapshot, snapshot_path
from benchmarks.pydoc import standard_library_documents

PAGE = 16_384
DIMENSION = 160


@pytest.fixture(scope="module")
def texts():
    """Real ones, since words are distributed as no generator has them."""
    return [document.content for document in standard_library_documents()]


def build(folder, texts, dimension, factory):
    """A real index, and what it holds."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((len(texts), dimension), dtype=np.float32)
    ids = [f"{rng.integers(2**62):032x}" for _ in texts]
    metadatas = [{"number": place % 10} for place in range(len(texts))]
    with DocumentIndex.create(folder, dimension=dimension, factory=factory, device="cpu") as index:
        index.add(vectors, texts, ids=ids, metadatas=metadatas)
        index.snapshot()
    mean = sum(len(text.encode()) for text in texts) / len(texts)
    return Documents(len(texts), dimension, mean, len('{"number": 1}'), 32)


@pytest.mark.parametrize("factory", [*FACTORIES, "auto", "IVF,Flat"])
def test_disk_and_memory_of_every_kind_are_foretold_within_4_percent(tmp_path, texts, factory):
    documents = build(tmp_path / "index", texts, DIMENSION, factory)
    foretold = document_index_size(documents, factory)
    with DocumentIndex.open(tmp_path / "index", device="cpu") as index:
        assert index.info()["kind"] == foretold.kind
    copy = read_snapshot(snapshot_path(tmp_path / "index", DIMENSION))
    assert copy.vectors.length + copy.rows.length == pytest.approx(foretold.memory, rel=0.04)
    disk = sum(file.stat().st_size for file in (tmp_path / "index").iterdir())
    assert disk == pytest.approx(foretold.disk, rel=0.04)


@pytest.mark.parametrize("dimension", [32, 320, 1600, 4096, 8192, 20_480])
def test_vectors_of_any_width_are_foretold_to_a_few_pages(tmp_path, dimension):
    documents = build(tmp_path / "index", [""] * 300, dimension, "Flat")
    found = (tmp_path / "index" / DATABASE_NAME).stat().st_size
    assert abs(found - sum(database_bytes(documents).values())) < 5 * PAGE


@pytest.mark.parametrize("length", [300, 3000, 30_000])
def test_texts_of_any_length_are_foretold_within_4_percent(tmp_path, length):
    rng = np.random.default_rng(0)
    # Without words, whose index is foretold as that of English.
    dots = ["." * rng.integers(length // 2, length * 3 // 2) for _ in range(600)]
    parts = database_bytes(build(tmp_path / "index", dots, 8, "Flat"))
    found = (tmp_path / "index" / DATABASE_NAME).stat().st_size
    assert found == pytest.approx(sum(parts.values()) - parts["words"], rel=0.04, abs=5 * PAGE)


def test_a_query_reads_all_of_a_flat_index_and_a_quarter_of_many_lists():
    documents = Documents(10**7, 320, 300)
    flat, lists = (document_index_size(documents, factory) for factory in ("SQfp16", "IVF,SQ8"))
    assert flat.read == pytest.approx(flat.memory, rel=0.01)
    assert lists.kind == "IVF4096,SQ8"
    assert lists.read == pytest.approx(lists.memory / 4, rel=0.01)


def test_milvus_holds_float32_vectors_and_every_field():
    documents = Documents(1000, 1600, text=300, metadata=64, id=36)
    flat, small, graph = (milvus_size(documents, kind) for kind in MILVUS_KINDS)
    assert flat.memory == 1000 * (4 * 1600 + 300 + 64 + 36 + 16)
    assert small.memory < flat.memory / 3
    assert graph.memory > flat.memory
    assert flat.disk == flat.memory
    assert (small.disk, graph.disk) == (
        flat.disk + 1000 * (1600 + 8),
        flat.disk + graph.memory - flat.memory + 6_400_000,
    )


def test_what_cannot_be_is_refused_by_name():
    with pytest.raises(ValueError, match="count must be at least 1"):
        document_index_size(Documents(0, 8, 10))
    with pytest.raises(ValueError, match="dimension must be at least 1"):
        database_bytes(Documents(1, 0, 10))
    with pytest.raises(ValueError, match="factory 'PQ8' is not supported"):
        document_index_size(Documents(1, 8, 10), "PQ8")
    with pytest.raises(ValueError, match=r"32,768 dimensions at most, not 32,769.*num_tokens.*mean pooling"):
        milvus_size(Documents(1, 32_769, 10), "FLAT")
    with pytest.raises(ValueError, match="kind must be one of FLAT, IVF_SQ8, HNSW, not 'PQ'"):
        milvus_size(Documents(1, 8, 10), "PQ")
