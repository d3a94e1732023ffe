import json
import math
import pickle

import fsspec
import numpy as np
import pytest
from llama_index.core import (
    Document,
    MockEmbedding,
    StorageContext,
    VectorStoreIndex,
    load_index_from_storage,
)
from llama_index.core.llms import MockLLM
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import ImageNode, IndexNode, MediaResource, Node, NodeRelationship, TextNode
from llama_index.core.vector_stores.types import (
    VectorStoreQuery,
    VectorStoreQueryMode,
)
from points import ask, equal, point, store_of_three

from autoregembed_indexes import DocumentIndex, DocumentIndexError, IndexMismatchError
from llama_index.embeddings.autoregembed import AutoRegEmbedding
from llama_index.vector_stores.autoregembed import AutoRegVectorStore
from llama_index.vector_stores.autoregembed.nodes import REF_DOC_KEY

LLM = MockLLM()


@pytest.fixture(scope="module")
def embedding(encoder):
    return AutoRegEmbedding(model=encoder)


@pytest.fixture
def store():
    return store_of_three()


def test_a_query_engine_reads_from_the_store_alone(embedding, tmp_path):
    documents = [
        Document(text="Whales are blue.", metadata={"topic": "sea"}, id_="whales"),
        Document(text="Bees are yellow.", metadata={"topic": "air"}, id_="bees"),
    ]
    writer = AutoRegVectorStore(tmp_path / "index")
    VectorStoreIndex.from_documents(
        documents,
        storage_context=StorageContext.from_defaults(vector_store=writer),
        embed_model=embedding,
        transformations=[SentenceSplitter(chunk_size=64, chunk_overlap=0)],
    )
    writer.close()

    index = VectorStoreIndex.from_vector_store(
        AutoRegVectorStore(tmp_path / "index", read_only=True), embed_model=embedding
    )
    response = index.as_query_engine(llm=LLM, similarity_top_k=1, filters=equal(topic="sea")).query("whales?")
    assert [node.node.ref_doc_id for node in response.source_nodes] == ["whales"]
    assert "Whales are blue." in str(response)
    assert "Bees" not in str(response)


async def test_documents_are_inserted_and_deleted_through_an_index(embedding):
    store = AutoRegVectorStore()
    index = VectorStoreIndex.from_vector_store(store, embed_model=embedding)
    index.insert(Document(text="first", id_="1"))
    await index.ainsert(Document(text="second", id_="2"))
    index.delete_ref_doc("1")
    assert [node.node.ref_doc_id for node in await index.as_retriever().aretrieve("x")] == ["2"]
    await index.adelete_ref_doc("2")
    assert index.as_retriever().retrieve("x") == []


def test_cosines_best_first(store):
    result = ask(store, k=2)
    assert result.ids == ["0", "10"]
    assert result.similarities == pytest.approx([1, math.cos(math.radians(10))], abs=1e-3)
    assert [node.get_content() for node in result.nodes] == ["at 0", "at 10"]


def test_an_empty_store_finds_nothing():
    result = ask(AutoRegVectorStore())
    assert (result.nodes, result.similarities, result.ids) == ([], [], [])


@pytest.mark.parametrize(
    "node",
    [
        TextNode(
            text="text\0🙂",
            metadata={"nested": {"a": [1, None, True]}, "secret": 1},
            excluded_embed_metadata_keys=["secret"],
            excluded_llm_metadata_keys=["secret"],
            start_char_idx=3,
            end_char_idx=9,
            text_template="{content} // {metadata_str}",
        ),
        IndexNode(text="a summary", index_id="the-index", metadata={"k": "v"}),
        ImageNode(text="a caption", image_path="whale.png", metadata={"k": "v"}),
        Node(
            text_resource=MediaResource(text="resource"), image_resource=MediaResource(url="http://x/y.png")
        ),
    ],
    ids=lambda node: type(node).__name__,
)
def test_nodes_come_back_as_they_were(node, tmp_path):
    parent = Document(text="whole", id_="parent", metadata={"file": "f.txt"})
    node.relationships = {
        NodeRelationship.SOURCE: parent.as_related_node_info(),
        NodeRelationship.NEXT: TextNode(id_="next").as_related_node_info(),
        NodeRelationship.CHILD: [TextNode(id_="child").as_related_node_info()],
    }
    given = node.model_copy(update={"embedding": [1.0, 0.0]}, deep=True)
    before = given.model_dump()
    store = AutoRegVectorStore(tmp_path / "index")
    assert store.add([given]) == [node.node_id]
    assert given.model_dump() == before
    for found in (store.get_nodes([node.node_id])[0], ask(store).nodes[0]):
        assert type(found) is type(node)
        assert found.model_dump() == node.model_dump()
        assert found.hash == node.hash
    store.close()


def test_the_same_id_replaces(store):
    store.add([point(180, name="0", metadata={"a": 9})])
    assert [node.metadata for node in store.get_nodes(["0"])] == [{"a": 9}]
    assert ask(store, 180, k=1).ids == ["0"]
    assert len(store.client) == 3


def test_deleting_by_node_filter_and_document(store):
    store.delete_nodes(["10", "gone"])
    assert ask(store).ids == ["0", "90"]
    store.delete_nodes(["0", "90"], filters=equal(b="x"))
    assert ask(store).ids == ["0"]
    with pytest.raises(ValueError, match=r"clear\(\)"):
        store.delete_nodes()
    store.delete_nodes([])
    store.delete("no such document")
    assert ask(store).ids == ["0"]
    store.clear()
    assert store.get_nodes() == []


def test_a_failed_add_stores_nothing(store):
    with pytest.raises(ValueError, match=r"'bare' has no embedding"):
        store.add([point(5), TextNode(id_="bare")])
    with pytest.raises(ValueError, match=r"'bad' has metadata _llama_index_x"):
        store.add([point(5), point(6, name="bad", metadata={"_llama_index_x": 1})])
    with pytest.raises(ValueError, match=r"key 'n' of id 'bad'"):
        store.add([point(5), point(6, name="bad", metadata={"n": math.inf})])
    assert len(store.client) == 3


def test_another_dimension_is_an_error_that_names_both(store):
    with pytest.raises(IndexMismatchError, match=r"3.*2"):
        store.add([TextNode(embedding=[1.0, 0.0, 0.0])])
    with pytest.raises(IndexMismatchError, match=r"3.*2"):
        store.query(VectorStoreQuery(query_embedding=[1.0, 0.0, 0.0]))


def test_another_encoder_is_refused_by_name_where_both_are_known(tmp_path, encoder):
    AutoRegVectorStore(tmp_path / "index", encoder=encoder).close()
    AutoRegVectorStore(tmp_path / "index").close()
    AutoRegVectorStore(tmp_path / "index", encoder=encoder.fingerprint).close()
    with pytest.raises(
        IndexMismatchError, match=rf"{encoder.fingerprint}.*other|other.*{encoder.fingerprint}"
    ):
        AutoRegVectorStore(tmp_path / "index", encoder="other")


def test_an_index_of_a_stored_folder_is_loaded_from_storage(tmp_path, embedding):
    writer = AutoRegVectorStore(tmp_path / "index")
    context = StorageContext.from_defaults(vector_store=writer)
    index = VectorStoreIndex.from_documents([Document(text="x", id_="1")], context, embed_model=embedding)
    index.storage_context.persist(tmp_path / "storage")
    index.insert(Document(text="y", id_="2"))
    writer.close()

    reader = AutoRegVectorStore(tmp_path / "index", read_only=True)
    context = StorageContext.from_defaults(persist_dir=str(tmp_path / "storage"), vector_store=reader)
    found = (
        load_index_from_storage(context, embed_model=embedding).as_retriever(similarity_top_k=5).retrieve("x")
    )
    assert {node.node.ref_doc_id for node in found} == {"1", "2"}
    with pytest.raises(FileNotFoundError, match=r"AutoRegVectorStore\(path\)"):
        AutoRegVectorStore.from_persist_dir(str(tmp_path / "storage"))


def test_a_store_in_memory_goes_into_storage_and_comes_back(tmp_path, embedding):
    storage = str(tmp_path / "storage")
    memory = AutoRegVectorStore(encoder="e", factory="SQfp16", tokenizer="trigram", memory_budget=2**20)
    context = StorageContext.from_defaults(vector_store=memory)
    documents = [Document(text=f"text {i}", id_=str(i), metadata={"n": [i]}) for i in range(3)]
    index = VectorStoreIndex.from_documents(documents, context, embed_model=embedding)
    index.storage_context.persist(storage)

    reader = AutoRegVectorStore.from_persist_dir(storage, read_only=True)
    context = StorageContext.from_defaults(persist_dir=storage, vector_store=reader)
    loaded = load_index_from_storage(context, embed_model=embedding)
    for mode in ("default", "text_search", "hybrid", "mmr"):
        here, there = (
            i.as_retriever(vector_store_query_mode=mode, similarity_top_k=2).retrieve("text 1")
            for i in (index, loaded)
        )
        assert there == here
    assert [node.model_dump() for node in reader.get_nodes()] == [n.model_dump() for n in memory.get_nodes()]
    ids = memory.client.ids()
    np.testing.assert_array_equal(reader.client.vectors(ids), memory.client.vectors(ids))
    kept = ("factory", "encoder", "tokenizer", "memory_budget", "metadata_indexes", "dimension")
    assert [reader.client.info()[key] for key in kept] == [memory.client.info()[key] for key in kept]


def test_persisting_again_replaces_what_was_there(tmp_path, store):
    folder = str(tmp_path / "deep" / "index")
    store.persist(folder)
    store.delete_nodes(["0"])
    store.add([point(180, name="10", metadata={"a": 9}), point(45)])
    store.persist(folder, fs=fsspec.filesystem("file"))
    with AutoRegVectorStore.from_persist_path(folder).client as copy:
        assert sorted(copy.ids()) == ["10", "45", "90"]
        assert copy.get(["10"])[0].metadata["a"] == 9
        np.testing.assert_allclose(copy.vectors(["10"]), [[-1, 0]], atol=1e-3)
    store.clear()
    store.persist(folder)
    assert AutoRegVectorStore.from_persist_path(folder, read_only=True).get_nodes() == []
    empty = str(tmp_path / "empty")
    AutoRegVectorStore().persist(empty)
    assert AutoRegVectorStore.from_persist_path(empty, read_only=True).get_nodes() == []


def test_persist_overwrites_nothing_else(tmp_path, store):
    simple = tmp_path / "simple.json"
    simple.write_text("{}")
    with pytest.raises(FileExistsError, match=r"simple\.json is a file"):
        store.persist(str(simple))
    other = AutoRegVectorStore(tmp_path / "other")
    other.add([TextNode(id_="x", embedding=[1.0, 0.0, 0.0])])
    other.close()
    with pytest.raises(IndexMismatchError, match=r"3.*2"):
        store.persist(str(tmp_path / "other"))
    assert AutoRegVectorStore(tmp_path / "other", read_only=True).client.ids() == ["x"]


def test_only_a_local_file_system_can_hold_an_index(tmp_path, store):
    remote = fsspec.filesystem("memory")
    with pytest.raises(ValueError, match="MemoryFileSystem is not supported"):
        store.persist("somewhere", fs=remote)
    with pytest.raises(ValueError, match="MemoryFileSystem is not supported"):
        AutoRegVectorStore.from_persist_dir("somewhere", fs=remote)
    folder = AutoRegVectorStore(tmp_path / "index")
    folder.persist("somewhere", fs=remote)  # it stays where it is
    folder.close()


def test_deleting_a_document_looks_its_nodes_up(tmp_path):
    for path in (None, tmp_path / "index"):
        store = AutoRegVectorStore(path)
        assert store.client.metadata_indexes == [REF_DOC_KEY]
        store.close()
    DocumentIndex.create(tmp_path / "plain").close()
    store = AutoRegVectorStore(tmp_path / "plain")
    assert store.client.metadata_indexes == [REF_DOC_KEY]
    store.close()


def test_what_a_new_index_is_made_with(tmp_path):
    options = {"factory": "IVF4,SQ8", "tokenizer": "trigram", "memory_budget": 12345}
    store = AutoRegVectorStore(tmp_path / "index", **options)
    assert {key: store.client.info()[key] for key in options} == options
    given = json.loads(store.to_json())
    assert {key: given[key] for key in options} == options
    store.close()
    again = AutoRegVectorStore.from_dict(given)
    assert {key: again.client.info()[key] for key in options} == options
    again.close()
    with pytest.raises(ValueError, match="tokenizer 'klingon'"):
        AutoRegVectorStore(tokenizer="klingon")
    for path in (None, tmp_path / "index"):
        with pytest.raises(ValueError, match="abacus"):
            AutoRegVectorStore(path, device="abacus")


def test_a_pickled_store_reads_the_same_folder(tmp_path, store):
    folder = AutoRegVectorStore(tmp_path / "index", device="cpu")
    folder.add([point(0)])
    twin = pickle.loads(pickle.dumps(folder))  # noqa: S301
    assert ask(twin).ids == ["0"]
    assert (twin.device, twin.read_only) == ("cpu", True)
    with pytest.raises(DocumentIndexError, match="read_only"):
        twin.clear()
    folder.close()
    with pytest.raises(TypeError, match="memory cannot be pickled"):
        pickle.dumps(store)


async def test_async_does_the_same_and_leaves_the_loop_free(beside_the_loop):
    calls = beside_the_loop(DocumentIndex, "add", "search", "search_text", "delete", "get", "clear")
    store = AutoRegVectorStore()
    await store.async_add([point(0), point(90)])
    await store.aquery(VectorStoreQuery(query_embedding=[1.0, 0.0]))
    await store.aquery(VectorStoreQuery(query_str="at", mode=VectorStoreQueryMode.TEXT_SEARCH))
    [node] = await store.aget_nodes(["0"])
    assert node.node_id == "0"
    await store.adelete_nodes(["0"])
    assert [node.node_id for node in await store.aget_nodes()] == ["90"]
    await store.adelete("no such document")
    await store.aclear()
    assert await store.aget_nodes() == []
    assert set(calls) == {"add", "search", "search_text", "delete", "get", "clear"}


def test_any_embedding_model_will_do(tmp_path):
    store = AutoRegVectorStore(tmp_path / "index")
    index = VectorStoreIndex.from_vector_store(store, embed_model=MockEmbedding(embed_dim=7))
    index.insert(Document(text="x"))
    assert store.client.dimension == 7
    store.close()
