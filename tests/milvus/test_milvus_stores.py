"""Both frameworks' stores on a server: the standard suites, and what is theirs."""

import json
import math
import pickle
from typing import Any, ClassVar

import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.vectorstores import VectorStore
from langchain_tests.integration_tests import RetrieversIntegrationTests, VectorStoreIntegrationTests
from llama_index.core import Document as Source
from llama_index.core import MockEmbedding, StorageContext, VectorStoreIndex
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import NodeRelationship, TextNode
from llama_index.core.vector_stores.types import (
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
)
from pydantic import SecretStr

from autoregembed_indexes import DocumentIndexError, IndexMismatchError, MilvusDocumentIndex
from langchain_autoregembed import AutoRegEmbeddings, AutoRegRetriever
from langchain_autoregembed import AutoRegVectorStore as LangChainStore
from llama_index.vector_stores.autoregembed import AutoRegVectorStore as LlamaIndexStore

SIZE = 6
FAKE = DeterministicFakeEmbedding(size=SIZE)
TEXTS = ["red apples", "green pears", "blue whales", "yellow bees"]


@pytest.fixture(scope="session")
def place(uri, collections):
    """Where an index of vectors of SIZE entries is."""
    return {"uri": uri, "collection_name": collections(uri, dimension=SIZE).collection_name}


@pytest.fixture
def emptied(place, collections):
    collections(place["uri"], dimension=SIZE)
    return place


class TestStandard(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self, emptied: dict[str, str]) -> VectorStore:
        return LangChainStore(self.get_embeddings(), **emptied)


class RetrieverSuite(RetrieversIntegrationTests):
    search_type: str
    search_kwargs: ClassVar[dict[str, Any]] = {}
    retriever_constructor = AutoRegRetriever
    retriever_query_example = "green apples"

    @pytest.fixture(autouse=True)
    def fill(self, emptied: dict[str, str]) -> None:
        self.store = LangChainStore.from_texts(TEXTS, FAKE, **emptied)

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {
            "vectorstore": self.store,
            "search_type": self.search_type,
            "search_kwargs": self.search_kwargs,
        }


class TestSimilarityRetriever(RetrieverSuite):
    search_type = "similarity"


class TestThresholdRetriever(RetrieverSuite):
    search_type = "similarity_score_threshold"
    search_kwargs: ClassVar[dict[str, Any]] = {"score_threshold": 0.0}


class TestDiverseRetriever(RetrieverSuite):
    search_type = "mmr"


class TestHybridRetriever(RetrieverSuite):
    search_type = "hybrid"

    @pytest.fixture
    def uri(self, lite: str) -> str:
        return lite

    @pytest.fixture
    def place(self, uri: str, collections: Any) -> dict[str, str]:
        return {"uri": uri, "collection_name": collections(uri, dimension=SIZE).collection_name}


def test_a_store_makes_its_collection_at_the_first_add_and_is_opened_again(server, encoder, new_name):
    embeddings = AutoRegEmbeddings(model=encoder)
    options = {"uri": server, "collection_name": new_name}
    with pytest.raises(FileNotFoundError, match="it has no collection"):
        LangChainStore(embeddings, **options, read_only=True)
    store = LangChainStore(embeddings, **options)
    store.add_texts(TEXTS, [{"n": number} for number in range(4)], ids=["a", "b", "c", "d"])
    assert store.index.encoder == encoder.fingerprint and store.index.tokens == encoder.num_compressed_tokens
    again = LangChainStore(embeddings, **options, read_only=True)
    assert again.get_by_ids(["c"]) == [Document(id="c", page_content="blue whales", metadata={"n": 2})]
    for found in (again.similarity_search("whales", 4), again.similarity_search("whales", 4, num_tokens=1)):
        assert [d.id for d in found] == [d.id for d in store.similarity_search("whales", 4)]
    with pytest.raises(IndexMismatchError, match="vectors of encoder"):
        LangChainStore(FAKE, **options, encoder="another")
    with pytest.raises(DocumentIndexError, match=r"cannot search by words.*Milvus 2\.5"):
        store.hybrid_search("whales")


def test_filters_and_documents_are_those_of_a_folder(emptied, tmp_path):
    metadatas = [
        {"kind": "fruit", "n": 1},
        {"kind": "fruit", "n": 2},
        {"kind": "animal"},
        {"kind": "animal", "n": 4},
    ]
    server = LangChainStore.from_texts(TEXTS, FAKE, metadatas, ids=TEXTS, **emptied)
    folder = LangChainStore.from_texts(TEXTS, FAKE, metadatas, ids=TEXTS, path=tmp_path / "index")
    for where in (
        {"kind": "fruit"},
        {"n": {"$gte": 2}},
        {"n": {"$exists": False}},
        lambda metadata: "n" in metadata,
    ):
        for search in ("similarity_search", "max_marginal_relevance_search"):
            found, expected = (
                getattr(store, search)("red bees", 3, filter=where) for store in (server, folder)
            )
            assert found == expected and found
    assert server.more_like("red apples", 2) == folder.more_like("red apples", 2)


@pytest.fixture
def nodes():
    sources = [
        Source(text="Whales are blue. " * 20, metadata={"topic": "sea", "year": 1851}, id_="whales"),
        Source(text="Bees are yellow.", metadata={"topic": "air", "tags": ["small", "loud"]}, id_="bees"),
    ]
    made = SentenceSplitter(chunk_size=32, chunk_overlap=0).get_nodes_from_documents(sources)
    for number, node in enumerate(made):
        node.embedding = [math.cos(number), math.sin(number), 0, 0, 0, 0]
    assert len(made) > 3
    return made


def test_nodes_come_back_as_they_were(emptied, nodes):
    LlamaIndexStore(**emptied).add(nodes)
    store = LlamaIndexStore(**emptied, read_only=True)
    whole = {node.node_id: node for node in nodes}
    found = store.query(VectorStoreQuery(query_embedding=nodes[1].embedding, similarity_top_k=20))
    assert len(found.nodes) == len(nodes) and found.ids[0] == nodes[1].node_id
    assert found.similarities[0] == pytest.approx(1)
    for node in [*found.nodes, *store.get_nodes(list(whole))]:
        expected = whole[node.node_id].model_copy(update={"embedding": None})
        assert node == expected and type(node) is TextNode
        assert node.metadata.keys() == expected.metadata.keys()
        assert node.relationships[NodeRelationship.SOURCE].node_id in ("whales", "bees")


def test_nodes_are_found_and_deleted_by_filter_and_document(emptied, nodes):
    store = LlamaIndexStore(**emptied)
    store.add(nodes)

    def ids(key, operator, value):
        filters = MetadataFilters(filters=[MetadataFilter(key=key, operator=operator, value=value)])
        query = VectorStoreQuery(query_embedding=nodes[0].embedding, similarity_top_k=50, filters=filters)
        found = store.query(query).nodes
        assert {node.node_id for node in store.get_nodes(filters=filters)} == {node.node_id for node in found}
        return {node.ref_doc_id for node in found}

    assert ids("topic", FilterOperator.EQ, "sea") == {"whales"}
    assert ids("topic", FilterOperator.NE, "sea") == {"bees"}
    assert ids("year", FilterOperator.LT, 1900) == {"whales"}
    assert ids("tags", FilterOperator.CONTAINS, "loud") == {"bees"}
    assert ids("tags", FilterOperator.ANY, ["loud", "quiet"]) == {"bees"}
    assert ids("topic", FilterOperator.IN, ["sea", "air"]) == {"whales", "bees"}
    restricted = VectorStoreQuery(query_embedding=nodes[0].embedding, similarity_top_k=50, doc_ids=["bees"])
    assert {node.ref_doc_id for node in store.query(restricted).nodes} == {"bees"}
    store.delete("whales")
    assert {node.ref_doc_id for node in store.get_nodes()} == {"bees"}
    store.delete_nodes([store.get_nodes()[0].node_id])
    assert store.get_nodes() == []


async def test_an_index_is_built_asked_and_changed(emptied):
    storage = StorageContext.from_defaults(vector_store=LlamaIndexStore(**emptied))
    embedding = MockEmbedding(embed_dim=SIZE)
    index = VectorStoreIndex.from_documents(
        [Source(text="first", id_="1")], storage_context=storage, embed_model=embedding
    )
    await index.ainsert(Source(text="second", id_="2"))
    index.delete_ref_doc("1")
    again = VectorStoreIndex.from_vector_store(
        LlamaIndexStore(**emptied, read_only=True), embed_model=embedding
    )
    assert [node.node.ref_doc_id for node in await again.as_retriever().aretrieve("x")] == ["2"]
    await index.adelete_ref_doc("2")
    assert index.as_retriever().retrieve("x") == []


@pytest.mark.parametrize("mode", [VectorStoreQueryMode.HYBRID, VectorStoreQueryMode.TEXT_SEARCH])
def test_modes_with_words_work_where_the_server_has_words(emptied, nodes, mode, lite):
    store = LlamaIndexStore(**emptied)
    store.add(nodes)
    query = VectorStoreQuery(query_embedding=nodes[0].embedding, query_str="yellow bees", mode=mode)
    if emptied["uri"] == lite:
        assert "bees" in [node.ref_doc_id for node in store.query(query).nodes]
    else:
        with pytest.raises(DocumentIndexError, match="cannot search by words"):
            store.query(query)


def test_a_store_that_is_strong_sees_what_others_write_at_once(emptied, nodes):
    writer = LlamaIndexStore(**emptied)
    readers = (
        LlamaIndexStore(**emptied, read_only=True, strong=True),
        LangChainStore(FAKE, **emptied, strong=True),
    )
    for number in range(1, 4):
        writer.add(nodes[number - 1 : number])
        assert len(readers[0].get_nodes()) == len(readers[1].similarity_search("x", 10)) == number


def test_one_collection_serves_both_frameworks_and_nothing_leaks_into_metadata(emptied, nodes):
    LlamaIndexStore(**emptied).add(nodes[:1])
    chain = LangChainStore(FAKE, **emptied)
    chain.add_texts(["red apples"], [{"n": 1}], ids=["a"])
    by_id = {document.id: document for document in chain.similarity_search("apples", 10)}
    assert by_id["a"].metadata == {"n": 1} and by_id[nodes[0].node_id].metadata == nodes[0].metadata
    read = {node.node_id: node for node in LlamaIndexStore(**emptied, read_only=True).get_nodes()}
    assert read["a"].metadata == {"n": 1} and read[nodes[0].node_id].metadata == nodes[0].metadata


@pytest.mark.parametrize("token_type", [str, SecretStr])
def test_a_token_is_used_and_told_to_nobody(server, collections, token, token_type, monkeypatch):
    place = {"uri": server, "collection_name": collections(server, dimension=SIZE).collection_name}
    monkeypatch.delenv("MILVUS_TOKEN")
    chain = LangChainStore(FAKE, **place, token=token_type(token))
    index = LlamaIndexStore(**place, token=token_type(token))
    told = [
        repr(chain),
        repr(vars(chain)),
        repr(index),
        str(index),
        json.dumps(index.to_dict()),
        index.to_json(),
    ]
    told += [index.model_dump_json(), repr(index.model_dump()), repr(index.client), str(index.client.info())]
    told += [repr(pickle.dumps(store)) for store in (chain.index, index)]
    assert all(token not in text for text in told)
    with pytest.raises(DocumentIndexError, match="refuses the token"):
        LlamaIndexStore.from_dict(index.to_dict())
    monkeypatch.setenv("MILVUS_TOKEN", token)
    assert LlamaIndexStore.from_dict(index.to_dict()).client.collection_name == place["collection_name"]
    copy = pickle.loads(pickle.dumps(index))  # noqa: S301
    assert copy.read_only and copy.uri == server and isinstance(copy.client, MilvusDocumentIndex)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"path": "folder", "uri": "http://localhost:1"},
            ValueError,
            "path='folder' and uri='http://localhost:1'",
        ),
        ({"collection_name": "a"}, ValueError, "collection_name belong to a server: give its uri"),
        ({"token": "a:b"}, ValueError, "token belong to a server"),
        ({"strong": True}, (TypeError, ValueError), "strong"),
        ({"uri": "http://localhost:1", "device": "cuda"}, (TypeError, ValueError), "device"),
        ({"uri": "http://localhost:1", "tokenizer": "trigram"}, (TypeError, ValueError), "tokenizer"),
    ],
)
def test_options_of_a_folder_and_of_a_server_do_not_mix(options, error, message):
    for make in (lambda: LangChainStore(FAKE, **options), lambda: LlamaIndexStore(**options)):
        with pytest.raises(error, match=message):
            make()
