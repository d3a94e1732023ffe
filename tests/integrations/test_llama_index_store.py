import math
import pickle

import pytest
from llama_index.core import Document, MockEmbedding, StorageContext, VectorStoreIndex
from llama_index.core.llms import MockLLM
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import ImageNode, IndexNode, MediaResource, Node, NodeRelationship, TextNode
from llama_index.core.vector_stores.types import (
    ExactMatchFilter,
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
)

from autoregembed_indexes import DocumentIndex, DocumentIndexError, IndexMismatchError
from llama_index.embeddings.autoregembed import AutoRegEmbedding
from llama_index.vector_stores.autoregembed import AutoRegVectorStore

LLM = MockLLM()


def point(degrees, name=None, **fields):
    angle = math.radians(degrees)
    return TextNode(
        id_=name or str(degrees),
        text=f"at {degrees}",
        embedding=[math.cos(angle), math.sin(angle)],
        **fields,
    )


def equal(**pairs):
    return MetadataFilters(filters=[MetadataFilter(key=key, value=value) for key, value in pairs.items()])


def ask(store, degrees=0, k=10, **options):
    angle = math.radians(degrees)
    query = VectorStoreQuery(
        query_embedding=[math.cos(angle), math.sin(angle)], similarity_top_k=k, **options
    )
    return store.query(query)


@pytest.fixture(scope="module")
def embedding(encoder):
    return AutoRegEmbedding(model=encoder)


@pytest.fixture
def store():
    store = AutoRegVectorStore()
    store.add(
        [point(0, metadata={"a": 1}), point(10, metadata={"a": 2}), point(90, metadata={"a": 1, "b": "x"})]
    )
    return store


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


def test_filters_by_equality(store):
    assert ask(store, filters=equal(a=1)).ids == ["0", "90"]
    assert ask(store, k=1, filters=equal(a=1, b="x")).ids == ["90"]
    assert ask(store, filters=equal(a=3)).ids == []
    nested = MetadataFilters(filters=[equal(a=1), ExactMatchFilter(key="b", value="x")])
    assert ask(store, filters=nested).ids == ["90"]
    assert [node.node_id for node in store.get_nodes(filters=equal(a=2))] == ["10"]


@pytest.mark.parametrize("condition", [FilterCondition.OR, FilterCondition.NOT])
def test_a_condition_that_is_not_supported_is_named(store, condition):
    filters = MetadataFilters(filters=[MetadataFilter(key="a", value=1)], condition=condition)
    with pytest.raises(ValueError, match=f"'{condition.value}' is not supported"):
        ask(store, filters=filters)


@pytest.mark.parametrize("operator", [o for o in FilterOperator if o is not FilterOperator.EQ])
def test_an_operator_that_is_not_supported_is_named(store, operator):
    filters = MetadataFilters(filters=[MetadataFilter(key="a", value=1, operator=operator)])
    with pytest.raises(ValueError, match=rf"'{operator.value}' \(on 'a'\) is not supported"):
        ask(store, filters=filters)


def test_two_values_for_one_key_are_an_error(store):
    filters = MetadataFilters(filters=[MetadataFilter(key="a", value=1), MetadataFilter(key="a", value=2)])
    with pytest.raises(ValueError, match="1 and 2"):
        ask(store, filters=filters)


@pytest.mark.parametrize("mode", [m for m in VectorStoreQueryMode if m is not VectorStoreQueryMode.DEFAULT])
def test_a_mode_that_is_not_supported_is_named(store, mode):
    with pytest.raises(ValueError, match=f"mode '{mode.value}' is not supported"):
        ask(store, mode=mode)


def test_a_query_without_an_embedding_is_an_error(store):
    with pytest.raises(ValueError, match="no embedding"):
        store.query(VectorStoreQuery(query_str="only text"))


def test_a_search_can_be_restricted_to_nodes_and_documents():
    store = AutoRegVectorStore()
    nodes = [point(10 * i, name=f"n{i}", metadata={"even": 1 - i % 2}) for i in range(20)]
    for i, node in enumerate(nodes):
        node.relationships[NodeRelationship.SOURCE] = Document(id_=f"d{i % 4}").as_related_node_info()
    store.add(nodes)
    whole = ask(store, 37, k=20)
    everything = dict(zip(whole.ids, whole.similarities, strict=True))

    def check(expected, **options):
        result = ask(store, 37, k=20, **options)
        assert result.ids == [id_ for id_ in everything if id_ in expected]
        assert result.similarities == pytest.approx([everything[id_] for id_ in result.ids], abs=1e-6)

    check({"n3", "n19"}, node_ids=["n19", "n3", "gone"])
    check({f"n{i}" for i in range(20) if i % 4 in (1, 2)}, doc_ids=["d1", "d2"])
    check({"n5"}, node_ids=["n5", "n6"], doc_ids=["d1"])
    check({"n6"}, node_ids=["n5", "n6"], filters=equal(even=1))
    check(set(everything), node_ids=[], doc_ids=[])
    assert len(ask(store, 37, k=3, doc_ids=["d1", "d2"]).ids) == 3
    with pytest.raises(IndexMismatchError, match=r"3.*2"):
        store.query(VectorStoreQuery(query_embedding=[1.0, 0.0, 0.0], node_ids=["n1"]))


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


def test_persist_is_for_folders(tmp_path, store):
    folder = AutoRegVectorStore(tmp_path / "index")
    StorageContext.from_defaults(vector_store=folder).persist(tmp_path / "storage")
    folder.close()
    with pytest.raises(ValueError, match="make it with a path"):
        store.persist("anywhere")


def test_a_pickled_store_reads_the_same_folder(tmp_path, store):
    folder = AutoRegVectorStore(tmp_path / "index")
    folder.add([point(0)])
    twin = pickle.loads(pickle.dumps(folder))  # noqa: S301
    assert ask(twin).ids == ["0"]
    with pytest.raises(DocumentIndexError, match="read_only"):
        twin.clear()
    folder.close()
    with pytest.raises(TypeError, match="memory cannot be pickled"):
        pickle.dumps(store)


async def test_async_does_the_same_and_leaves_the_loop_free(monkeypatch, slowly, ticks_while):
    for name in ("add", "search", "delete", "get", "clear"):
        monkeypatch.setattr(DocumentIndex, name, slowly(getattr(DocumentIndex, name)))
    store = AutoRegVectorStore()
    assert await ticks_while(store.async_add([point(0), point(90)])) >= 5
    assert await ticks_while(store.aquery(VectorStoreQuery(query_embedding=[1.0, 0.0]))) >= 5
    assert await ticks_while(store.aget_nodes(["0"])) >= 5
    assert await ticks_while(store.adelete_nodes(["0"])) >= 5
    assert [node.node_id for node in await store.aget_nodes()] == ["90"]
    assert await ticks_while(store.adelete("no such document")) >= 5
    assert await ticks_while(store.aclear()) >= 5
    assert await store.aget_nodes() == []


def test_any_embedding_model_will_do(tmp_path):
    store = AutoRegVectorStore(tmp_path / "index")
    index = VectorStoreIndex.from_vector_store(store, embed_model=MockEmbedding(embed_dim=7))
    index.insert(Document(text="x"))
    assert store.client.dimension == 7
    store.close()
