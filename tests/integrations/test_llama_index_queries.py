import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.llms import MockLLM
from llama_index.core.schema import NodeRelationship, TextNode
from llama_index.core.vector_stores.types import (
    ExactMatchFilter,
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
)
from llama_index.core.vector_stores.utils import build_metadata_filter_fn
from points import ask, equal, point, store_of_three, where

from autoregembed_indexes import DocumentIndex, IndexMismatchError
from autoregembed_rag import truncate
from llama_index.embeddings.autoregembed import AutoRegEmbedding
from llama_index.vector_stores.autoregembed import AutoRegVectorStore

SUPPORTED_MODES = ("default", "text_search", "hybrid", "mmr")


@pytest.fixture
def store():
    return store_of_three()


def test_filters_by_equality(store):
    assert ask(store, filters=equal(a=1)).ids == ["0", "90"]
    assert ask(store, k=1, filters=equal(a=1, b="x")).ids == ["90"]
    assert ask(store, filters=equal(a=3)).ids == []
    nested = MetadataFilters(filters=[equal(a=1), ExactMatchFilter(key="b", value="x")])
    assert ask(store, filters=nested).ids == ["90"]
    both = MetadataFilters(filters=[MetadataFilter(key="a", value=1), MetadataFilter(key="a", value=2)])
    assert ask(store, filters=both).ids == []
    assert [node.node_id for node in store.get_nodes(filters=equal(a=2))] == ["10"]


LIST_OPERATORS = ("in", "nin", "any", "all")
VALUES = ["", "a", "b", "ab", "aB", 0, -0.0, 1, 1.0, 1.5, 2**70, 1e300]
LISTS = [[], ["a"], ["a", "b"], ["ab", "B"], [1], [0, 1], [1.0, 1.5]]
STORED = [None, *VALUES, *LISTS, [[]], ["a", 1, None]]
KEYS = ("k", "k.l")
LEAVES = [
    MetadataFilter(key=key, operator=operator, value=value)
    for key in KEYS
    for operator in FilterOperator
    for value in ([None] if operator == "is_empty" else LISTS if operator.value in LIST_OPERATORS else VALUES)
    if isinstance(value, str) or not operator.value.startswith("text_match")
]


def simple_store_matches(filters, metadata):
    """What LlamaIndex's own in-memory filter says, group by group, since it refuses nested ones."""
    if isinstance(filters, MetadataFilter):
        try:
            return build_metadata_filter_fn(lambda _: metadata, MetadataFilters(filters=[filters]))("")
        except TypeError:
            return False  # it compared or searched a value of another type
    results = [simple_store_matches(item, metadata) for item in filters.filters]
    if filters.condition is FilterCondition.NOT:
        return not any(results)
    return any(results) if filters.condition is FilterCondition.OR else all(results)


def check_filters(metadatas, *filters):
    store = AutoRegVectorStore()
    store.add([point(10, name=str(i), metadata=metadata) for i, metadata in enumerate(metadatas)])
    for item in filters:
        group = item if isinstance(item, MetadataFilters) else MetadataFilters(filters=[item])
        found = [node.node_id for node in store.get_nodes(filters=group)]
        assert found == [str(i) for i, m in enumerate(metadatas) if simple_store_matches(group, m)], item


@pytest.mark.parametrize("operator", list(FilterOperator))
def test_operators_mean_what_they_mean_for_llama_index(operator):
    metadatas = [{}, *({key: value} for key in KEYS for value in STORED)]
    check_filters(metadatas, *(leaf for leaf in LEAVES if leaf.operator is operator))


def groups(members):
    return st.builds(
        MetadataFilters,
        filters=st.lists(members, min_size=1, max_size=3),
        condition=st.sampled_from([*FilterCondition, None]),
    )


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    metadatas=st.lists(st.dictionaries(st.sampled_from(KEYS), st.sampled_from(STORED)), min_size=1),
    filters=groups(st.recursive(st.sampled_from(LEAVES), groups, max_leaves=6)),
)
def test_nested_filters_mean_what_they_mean_for_llama_index(metadatas, filters):
    check_filters(metadatas, filters)


@pytest.mark.parametrize("condition", [*FilterCondition, None])
def test_a_group_without_filters_matches_everything(store, condition):
    empty = MetadataFilters(filters=[], condition=condition)
    nested = MetadataFilters(filters=[empty, MetadataFilter(key="a", value=2)])
    assert ask(store, filters=empty).ids == ["0", "10", "90"]
    assert ask(store, filters=nested).ids == ["10"]
    with pytest.raises(ValueError, match=r"clear\(\)"):
        store.delete_nodes(filters=empty)


def test_where_filters_differ_from_the_simple_store():
    rows = {
        "true": {"v": True},
        "one": {"v": 1.0},
        "null": {"v": None},
        "none": {},
        "street": {"v": "Straße"},
    }
    store = AutoRegVectorStore()
    store.add([point(10, name=name, metadata=metadata) for name, metadata in rows.items()])
    store.add([point(10, name="nested", metadata={"o": {"v": 7}})])

    def found(*filter_):
        return {node.node_id for node in store.get_nodes(filters=where(*filter_))}

    assert found("v", "==", 1) == {"one"}
    assert found("v", ">=", 1) == {"one"}
    assert found("v", "==", None) == {"null"}
    assert found("v", "!=", None) == {"true", "one", "none", "street", "nested"}
    assert found("o.v", "==", 7) == {"nested"}
    assert found("v", "text_match_insensitive", "STRASSE") == {"street"}


@pytest.mark.parametrize("operator", LIST_OPERATORS)
@pytest.mark.parametrize("value", ["abc", 1, None])
def test_an_operator_that_needs_a_list_says_so(store, operator, value):
    with pytest.raises(TypeError, match=rf"'a': '{operator}' takes a list, got {type(value).__name__}"):
        ask(store, filters=where("a", operator, value))


@pytest.mark.parametrize("operator", ["==", "!=", ">", "contains", "text_match"])
def test_an_operator_that_takes_one_value_says_so(store, operator):
    with pytest.raises(TypeError, match=rf"'a': '{operator}' takes one value; .*'in', 'any' or 'all'"):
        ask(store, filters=where("a", operator, ["x"]))


def test_a_long_list_is_one_filter(store):
    many = [f"v{i}" for i in range(2000)]
    assert ask(store, filters=where("b", "in", [*many, "x"])).ids == ["90"]
    assert ask(store, filters=where("b", "any", [*many, "x"])).ids == ["90"]
    assert ask(store, filters=where("b", "nin", many)).ids == ["0", "10", "90"]


@pytest.mark.parametrize("mode", [m for m in VectorStoreQueryMode if m.value not in SUPPORTED_MODES])
def test_a_mode_that_is_not_supported_is_named(store, mode):
    with pytest.raises(ValueError, match=f"mode '{mode.value}'.*'default', 'text_search', 'hybrid', 'mmr'"):
        ask(store, mode=mode)


@pytest.mark.parametrize(
    ("mode", "given", "missing"),
    [
        ("default", {"query_str": "x"}, "query_embedding"),
        ("mmr", {"query_str": "x"}, "query_embedding"),
        ("hybrid", {"query_str": "x"}, "query_embedding"),
        ("hybrid", {"query_embedding": [1.0, 0.0]}, "query_str"),
        ("text_search", {"query_embedding": [1.0, 0.0]}, "query_str"),
    ],
)
def test_a_query_without_what_its_mode_needs_is_an_error(store, mode, given, missing):
    with pytest.raises(ValueError, match=f"'{mode}' needs {missing}"):
        store.query(VectorStoreQuery(mode=VectorStoreQueryMode(mode), **given))


def test_what_a_query_cannot_have_is_named(store):
    with pytest.raises(TypeError, match=r"\['fuzzy'\] in query mode 'default'"):
        store.query(VectorStoreQuery(query_embedding=[1.0, 0.0]), fuzzy=1)
    with pytest.raises(TypeError, match=r"\['mmr_threshold'\] in query mode 'default'"):
        store.query(VectorStoreQuery(query_embedding=[1.0, 0.0]), mmr_threshold=1)
    with pytest.raises(ValueError, match="embedding_field 'summary'"):
        ask(store, embedding_field="summary")
    assert ask(store, output_fields=["text"]).ids == ask(store).ids


@pytest.fixture
def library():
    """Texts whose words and whose directions rank them in different orders."""
    store = AutoRegVectorStore()
    texts = {"whale": "whale whale", "sea": "a whale in the sea", "bee": "bees", "ant": "ants and bees"}
    nodes = [point(20 * i, name=name, metadata={"n": i}) for i, name in enumerate(texts)]
    for node in nodes:
        node.set_content(texts[node.node_id])
    store.add(nodes)
    return store


def test_text_search_ranks_by_words(library):
    result = ask(library, query_str="the whales?", mode="text_search")
    assert result.ids == ["sea", "whale"]
    assert result.similarities == sorted(result.similarities, reverse=True)
    assert [node.get_content() for node in result.nodes] == ["a whale in the sea", "whale whale"]
    assert ask(library, query_str="whale", mode="text_search").ids == ["whale", "sea"]
    assert ask(library, query_str="whale", mode="text_search", sparse_top_k=1).ids == ["whale"]
    assert ask(library, query_str="whale", mode="text_search", filters=equal(n=1)).ids == ["sea"]
    assert ask(library, query_str="whale", mode="text_search", node_ids=["sea", "bee"]).ids == ["sea"]
    assert ask(library, query_str="", mode="text_search").ids == []


def test_alpha_is_the_weight_of_the_vectors(library):
    def fused(**options):
        return ask(library, 0, query_str="bees", mode="hybrid", **options)

    assert fused(alpha=1).ids == ask(library, 0).ids == ["whale", "sea", "bee", "ant"]
    assert fused(alpha=0).ids == ["bee", "ant"]
    assert fused().ids == fused(alpha=0.5).ids == ["bee", "ant", "whale", "sea"]
    # Third of the vectors and first of the words, fused as reciprocal ranks.
    assert fused(alpha=0.25).similarities[0] == pytest.approx(0.25 / 63 + 0.75 / 61)
    assert fused(hybrid_top_k=1).ids == ["bee"]
    assert fused(k=2, hybrid_top_k=3).ids == ["bee", "ant", "whale"]
    assert fused(filters=where("n", "<", 3)).ids == ["bee", "whale", "sea"]
    with pytest.raises(ValueError, match=r"alpha must be between 0 and 1, got 1\.5"):
        fused(alpha=1.5)


def test_fused_rankings_are_as_deep_as_asked():
    store = AutoRegVectorStore()
    nodes = [point(i, name=f"n{i}") for i in range(90)]
    nodes[60].set_content("needle")
    nodes[0].set_content("needle " + "and some other words " * 20)
    store.add(nodes)

    def fused(**options):
        return ask(store, k=1, query_str="needle", mode="hybrid", **options).ids

    assert fused() == ["n0"]  # 50 deep, so that n60 is found by its words alone
    assert fused(hybrid_top_k=1, sparse_top_k=90, alpha=0.01) == ["n60"]


def test_mmr_prefers_what_is_unlike_what_was_chosen():
    store = AutoRegVectorStore()
    store.add([point(degrees) for degrees in (0, 2, 4, 60, 90)])

    def chosen(query_threshold=None, k=2, **options):
        query = VectorStoreQuery(
            query_embedding=[1.0, 0.0],
            similarity_top_k=k,
            mode=VectorStoreQueryMode.MMR,
            mmr_threshold=query_threshold,
        )
        return store.query(query, **options)

    assert chosen(mmr_threshold=1).ids == ["0", "2"]
    assert chosen(mmr_threshold=0).ids == ["0", "90"]
    assert chosen(query_threshold=1, mmr_threshold=0).ids == ["0", "2"]
    assert chosen(mmr_threshold=0, mmr_prefetch_k=3).ids == ["0", "4"]
    assert chosen(mmr_threshold=0, mmr_prefetch_factor=1.4).ids == ["0", "4"]
    with pytest.raises(ValueError, match="pass one of them"):
        chosen(mmr_prefetch_factor=2, mmr_prefetch_k=3)
    with pytest.raises(ValueError, match="mmr_threshold must be between 0 and 1, got -1"):
        chosen(mmr_threshold=-1)


@pytest.mark.parametrize("threshold", [None, 0.0, 0.3, 0.7, 1.0])
def test_mmr_weighs_a_node_against_every_node_chosen_before_it(threshold):
    rows = np.random.default_rng(0).normal(size=(15, 8))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    store = AutoRegVectorStore()
    store.add([TextNode(id_=str(i), text="x", embedding=row.tolist()) for i, row in enumerate(rows)])
    weight, near, chosen = threshold if threshold is not None else 0.5, rows @ np.full(8, 8**-0.5), []
    while len(chosen) < 6:
        gains = {
            i: weight * near[i] - (1 - weight) * max((rows[i] @ rows[j] for j in chosen), default=0)
            for i in range(15)
            if i not in chosen
        }
        first = not chosen and weight == 0  # nothing is unlike nothing: the nearest
        chosen.append(int(near.argmax()) if first else max(gains, key=gains.get))
    query = VectorStoreQuery(
        query_embedding=[1.0] * 8,
        similarity_top_k=6,
        mode=VectorStoreQueryMode.MMR,
        mmr_threshold=threshold,
    )
    result = store.query(query)
    assert result.ids == [str(i) for i in chosen]
    assert result.similarities == pytest.approx(near[chosen], abs=1e-3)


async def test_every_mode_works_through_a_retriever(encoder, monkeypatch):
    embedding = AutoRegEmbedding(model=encoder)
    store = AutoRegVectorStore()
    index = VectorStoreIndex.from_vector_store(store, embed_model=embedding)
    for name in ("whale", "bee", "ant"):
        index.insert(Document(text=f"about the {name}", id_=name, metadata={"name": name}))

    def retriever(mode, **options):
        return index.as_retriever(vector_store_query_mode=mode, similarity_top_k=2, **options)

    for options in (
        {"mode": "default"},
        {"mode": "hybrid", "alpha": 0.1, "sparse_top_k": 3},
        {"mode": "mmr", "vector_store_kwargs": {"mmr_threshold": 0.2}},
    ):
        found = retriever(**options).retrieve("bee")
        assert len(found) == 2
        assert [n.node_id for n in await retriever(**options).aretrieve("bee")] == [n.node_id for n in found]
    assert retriever("hybrid", alpha=0.1).retrieve("bee")[0].node.ref_doc_id == "bee"
    monkeypatch.delattr(type(embedding), "_get_query_embedding")  # words need no embedding
    assert [n.node.ref_doc_id for n in retriever("text_search").retrieve("bee")] == ["bee"]
    assert retriever("text_search", doc_ids=["ant"]).retrieve("bee") == []


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


@pytest.fixture
def of_two_tokens(tmp_path):
    """Nodes of two tokens, an angle each."""
    DocumentIndex.create(tmp_path / "index", tokens=2).close()
    store = AutoRegVectorStore(tmp_path / "index")
    store.add(
        [
            TextNode(id_=name, text=name, embedding=(np.array(two_tokens(*map(int, name.split())))).tolist())
            for name in ("1 170", "5 85", "2 100", "90 90")
        ]
    )
    yield store
    store.close()


def two_tokens(*angles):
    turned = np.radians(angles)
    return (np.stack([np.cos(turned), np.sin(turned)], axis=1).ravel() / np.sqrt(2)).tolist()


@pytest.mark.parametrize(
    ("mode", "options", "expected"),
    [
        ("default", {"num_tokens": 1, "fetch_k": 1}, "1 170"),
        ("default", {"num_tokens": 1, "fetch_k": 2}, "2 100"),
        ("default", {"num_tokens": 1}, "5 85"),
        ("default", {"num_tokens": 2}, "5 85"),
        ("mmr", {"num_tokens": 1, "mmr_threshold": 1}, "5 85"),
        ("hybrid", {"num_tokens": 1}, "5 85"),
    ],
)
async def test_the_first_tokens_find_nodes_that_all_tokens_rank(of_two_tokens, mode, options, expected):
    query = VectorStoreQuery(
        query_embedding=two_tokens(0, 90), query_str="?", similarity_top_k=1, mode=VectorStoreQueryMode(mode)
    )
    found = of_two_tokens.query(query, **options)
    assert found.ids == [expected]
    assert (await of_two_tokens.aquery(query, **options)).ids == [expected]
    if mode == "default":
        angles = np.radians(np.array(expected.split(), dtype=float) - [0, 90])
        assert found.similarities == pytest.approx([np.cos(angles).mean()], abs=1e-3)


def test_options_that_a_mode_does_not_have_and_numbers_that_are_not_there_are_refused(of_two_tokens, store):
    query = VectorStoreQuery(query_embedding=two_tokens(0, 90), query_str="?", similarity_top_k=1)
    for wrong in (0, 3):
        with pytest.raises(ValueError, match=f"num_tokens must be between 1 and 2.* got {wrong}"):
            of_two_tokens.query(query, num_tokens=wrong)
    with pytest.raises(IndexMismatchError, match="num_tokens=1 needs an index that knows"):
        store.query(VectorStoreQuery(query_embedding=[1.0, 0.0]), num_tokens=1)
    query.mode = VectorStoreQueryMode.TEXT_SEARCH
    with pytest.raises(TypeError, match=r"\['num_tokens'\] in query mode 'text_search'"):
        of_two_tokens.query(query, num_tokens=1)


def test_an_engine_searches_by_fewer_tokens_and_an_embedding_of_fewer_searches_a_whole_index(
    tiny_checkpoint, tmp_path
):
    whole = AutoRegEmbedding(model=tiny_checkpoint, device="cpu", dtype="float32")
    store = AutoRegVectorStore(tmp_path / "index", encoder=whole.encoder)
    index = VectorStoreIndex.from_vector_store(store, embed_model=whole)
    names = [f"{animal} {i}" for i in range(20) for animal in ("whale", "bee", "ant")]
    index.insert_nodes([TextNode(text=name, id_=name) for name in names])

    def best(first, k, fetch):
        documents, query = whole.encoder.encode_documents(names), whole.encoder.encode_queries(["red bee"])
        rough = (truncate(documents, 5, first) @ truncate(query, 5, first).T)[:, 0]
        candidates = np.argsort(-rough)[:fetch]
        exact = rough if fetch == k else (documents @ query.T)[:, 0]
        return [names[i] for i in candidates[np.argsort(-exact[candidates])[:k]]]

    options = {"similarity_top_k": 4, "vector_store_kwargs": {"num_tokens": 2, "fetch_k": 15}}
    found = index.as_retriever(**options).retrieve("red bee")
    assert [node.node_id for node in found] == best(2, 4, 15)
    engine = index.as_query_engine(llm=MockLLM(), **options)
    assert [node.node_id for node in engine.query("red bee").source_nodes] == best(2, 4, 15)

    short = AutoRegEmbedding(model=tiny_checkpoint, device="cpu", dtype="float32", num_tokens=2)
    narrow = VectorStoreIndex.from_vector_store(store, embed_model=short)
    found = narrow.as_retriever(similarity_top_k=4).retrieve("red bee")
    assert [node.node_id for node in found] == best(2, 4, 4)
    store.close()
