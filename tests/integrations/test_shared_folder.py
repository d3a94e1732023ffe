"""One folder, two frameworks: what either writes, the other reads, with the user's metadata and no more."""

from pathlib import Path

import numpy as np
import pytest
from langchain_core.documents import Document
from llama_index.core import Document as LlamaDocument
from llama_index.core import StorageContext, VectorStoreIndex
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.vector_stores.types import FilterCondition, MetadataFilter, MetadataFilters

from langchain_autoregembed import AutoRegEmbeddings, AutoRegVectorStore, documents
from llama_index.embeddings.autoregembed import AutoRegEmbedding
from llama_index.vector_stores.autoregembed import AutoRegVectorStore as LlamaStore
from llama_index.vector_stores.autoregembed import nodes

TEXTS = {"w": "Whales are blue.", "b": "Bees are yellow.", "f": "Frogs are green."}
METADATA = {"w": {"sea": True, "legs": 0}, "b": {"sea": False, "legs": 6}, "f": {"sea": False, "legs": 4}}
LEGS_6 = MetadataFilters(filters=[MetadataFilter(key="legs", value=6)])


@pytest.fixture(scope="module")
def langchain(encoder) -> AutoRegEmbeddings:
    return AutoRegEmbeddings(model=encoder)


@pytest.fixture(scope="module")
def llama(encoder) -> AutoRegEmbedding:
    return AutoRegEmbedding(model=encoder)


@pytest.fixture
def by_llama_index(tmp_path: Path, llama: AutoRegEmbedding) -> Path:
    """A folder that LlamaIndex wrote from three documents."""
    folder = tmp_path / "index"
    store = LlamaStore(folder)
    documents = [
        LlamaDocument(
            text=text,
            id_=id_,
            metadata=METADATA[id_],
            # Only then are both frameworks' vectors of the same text: LlamaIndex embeds metadata with it.
            excluded_embed_metadata_keys=["sea", "legs"],
        )
        for id_, text in TEXTS.items()
    ]
    VectorStoreIndex.from_documents(
        documents,
        storage_context=StorageContext.from_defaults(vector_store=store),
        embed_model=llama,
        transformations=[SentenceSplitter(chunk_size=128, chunk_overlap=0)],
    )
    store.close()
    return folder


@pytest.fixture
def by_langchain(tmp_path: Path, langchain: AutoRegEmbeddings) -> Path:
    """A folder that LangChain wrote from the same three."""
    folder = tmp_path / "index"
    store = AutoRegVectorStore.from_texts(
        list(TEXTS.values()), langchain, list(METADATA.values()), ids=list(TEXTS), path=folder
    )
    store.close()
    return folder


def test_langchain_reads_what_llama_index_wrote(by_llama_index, langchain):
    store = AutoRegVectorStore(langchain, by_llama_index, read_only=True)
    found = store.similarity_search("colour", k=9)
    assert sorted((d.page_content, sorted(d.metadata.items())) for d in found) == sorted(
        (TEXTS[id_], sorted(METADATA[id_].items())) for id_ in TEXTS
    )
    assert store.get_by_ids([found[0].id]) == [found[0]]
    assert [d.page_content for d in store.similarity_search("x", filter={"legs": 6})] == [TEXTS["b"]]
    assert [d.page_content for d in store.max_marginal_relevance_search("x", filter={"sea": True})] == [
        TEXTS["w"]
    ]


def test_llama_index_reads_what_langchain_wrote(by_langchain, llama):
    store = LlamaStore(by_langchain, read_only=True)
    assert [(n.node_id, n.get_content(), n.metadata) for n in store.get_nodes(list(TEXTS))] == [
        (id_, TEXTS[id_], METADATA[id_]) for id_ in TEXTS
    ]
    index = VectorStoreIndex.from_vector_store(store, embed_model=llama)
    found = index.as_retriever(similarity_top_k=2, filters=LEGS_6).retrieve("colour")
    assert [n.get_content() for n in found] == [TEXTS["b"]]
    assert store.get_nodes(["b"])[0].ref_doc_id is None


def test_both_rank_and_score_alike(by_langchain, langchain, llama):
    documents = AutoRegVectorStore(langchain, by_langchain, read_only=True).similarity_search_with_score(
        "What is green?", k=3
    )
    index = VectorStoreIndex.from_vector_store(LlamaStore(by_langchain, read_only=True), embed_model=llama)
    found = index.as_retriever(similarity_top_k=3).retrieve("What is green?")
    assert [d.id for d, _ in documents] == [n.node_id for n in found]
    np.testing.assert_allclose([score for _, score in documents], [n.score for n in found], atol=1e-6)


def test_both_search_words_and_fuse_alike(by_llama_index, langchain, llama):
    documents = AutoRegVectorStore(langchain, by_llama_index, read_only=True)
    index = VectorStoreIndex.from_vector_store(LlamaStore(by_llama_index, read_only=True), embed_model=llama)

    def nodes_found(**options):
        found = index.as_retriever(similarity_top_k=3, **options).retrieve("Are bees green?")
        return [(n.get_content(), pytest.approx(n.score)) for n in found]

    def documents_found(scored):
        return [(document.page_content, score) for document, score in scored]

    worded = documents_found(documents.text_search_with_score("Are bees green?", k=3))
    assert worded[0][0] == TEXTS["b"]
    assert worded == nodes_found(vector_store_query_mode="text_search")
    fused = documents.hybrid_search_with_score("Are bees green?", k=3, weights=(0.3, 0.7))
    assert documents_found(fused) == nodes_found(vector_store_query_mode="hybrid", alpha=0.3)


def test_both_filter_alike(by_llama_index, langchain):
    filters = MetadataFilters(
        filters=[MetadataFilter(key="legs", operator=">", value=5), MetadataFilter(key="legs", value=0)],
        condition=FilterCondition.OR,
    )
    found = LlamaStore(by_llama_index, read_only=True).get_nodes(filters=filters)
    documents = AutoRegVectorStore(langchain, by_llama_index, read_only=True).similarity_search(
        "x", k=9, filter={"$or": [{"legs": {"$gt": 5}}, {"legs": 0}]}
    )
    assert {n.get_content() for n in found} == {d.page_content for d in documents} == {TEXTS["w"], TEXTS["b"]}


def test_both_frameworks_vectors_of_a_text_are_the_same(by_llama_index, langchain):
    store = AutoRegVectorStore(langchain, by_llama_index)
    store.add_texts([TEXTS["w"]], ids=["again"])
    twin = next(
        d for d in store.similarity_search("x", k=9) if d.page_content == TEXTS["w"] and d.id != "again"
    )
    first, second = store.index.vectors([twin.id, "again"])
    np.testing.assert_allclose(first, second, atol=1e-3)
    store.close()


def test_a_document_written_over_a_node_is_a_plain_node(by_llama_index, langchain):
    writer = AutoRegVectorStore(langchain, by_llama_index)
    node = writer.similarity_search("x", k=1)[0]
    writer.add_documents([Document(id=node.id, page_content="new", metadata={"new": 1})])
    writer.close()
    [found] = LlamaStore(by_llama_index, read_only=True).get_nodes([node.id])
    assert (found.get_content(), found.metadata, found.relationships) == ("new", {"new": 1}, {})


def test_the_encoder_langchain_recorded_is_checked_by_llama_index(by_langchain, encoder):
    LlamaStore(by_langchain, encoder=encoder).close()
    with pytest.raises(ValueError, match=encoder.fingerprint):
        LlamaStore(by_langchain, encoder="another encoder")


def test_both_packages_reserve_the_same_keys():
    assert nodes.RESERVED_PREFIX == documents.RESERVED_PREFIX
