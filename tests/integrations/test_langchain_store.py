import copy
import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding, Embeddings
from langchain_core.indexing import InMemoryRecordManager, index
from langchain_core.language_models import FakeListChatModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import ConfigurableField, RunnablePassthrough
from langchain_core.vectorstores import VectorStore
from langchain_tests.integration_tests import RetrieversIntegrationTests, VectorStoreIntegrationTests

from autoregembed_indexes import DocumentIndex, DocumentIndexError, IndexLockedError, IndexMismatchError
from langchain_autoregembed import AutoRegEmbeddings, AutoRegRetriever, AutoRegVectorStore

DEGREES = {"east": 0, "near east": 10, "north": 90, "west": 180}
TEXTS = ["red apples", "green pears", "blue whales", "yellow bees"]


class TestStandardInMemory(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self) -> Iterator[VectorStore]:
        store = AutoRegVectorStore(self.get_embeddings())
        yield store
        store.close()


class TestStandardInAFolder(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self, tmp_path: Path) -> Iterator[VectorStore]:
        store = AutoRegVectorStore(self.get_embeddings(), tmp_path / "index")
        yield store
        store.close()


class TestStandardWithArrays(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self, embeddings: AutoRegEmbeddings, tmp_path: Path) -> Iterator[VectorStore]:
        # The suite asks for the text itself, so that query and document have to share an instruction.
        instruction = embeddings.encoder.config.document_instruction
        same = AutoRegEmbeddings(
            model=embeddings.model, device="cpu", dtype="float32", query_instruction=instruction
        )
        store = AutoRegVectorStore(same, tmp_path / "index")
        yield store
        store.close()


class TestStandardWithAnApproximateFactory(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self, tmp_path: Path) -> Iterator[VectorStore]:
        store = AutoRegVectorStore(self.get_embeddings(), tmp_path / "index", factory="IVF,SQ8")
        yield store
        store.close()


class RetrieverSuite(RetrieversIntegrationTests):
    search_type: str
    search_kwargs: ClassVar[dict[str, Any]] = {}
    retriever_constructor = AutoRegRetriever
    retriever_query_example = "green apples"

    @pytest.fixture(autouse=True)
    def fill(self, embeddings: AutoRegEmbeddings, tmp_path: Path) -> Iterator[None]:
        self.store = AutoRegVectorStore.from_texts(TEXTS, embeddings, path=tmp_path / "index")
        yield
        self.store.close()

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


class Compass(Embeddings):
    """Four directions in the plane, so that every cosine is known; what follows a comma only names things."""

    def embed_query(self, text: str) -> list[float]:
        angle = math.radians(DEGREES[text.split(",")[0]])
        return [math.cos(angle), math.sin(angle)]

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]


@pytest.fixture(scope="module")
def embeddings(tiny_checkpoint: Path) -> AutoRegEmbeddings:
    return AutoRegEmbeddings(model=tiny_checkpoint, device="cpu", dtype="float32")


@pytest.fixture
def compass() -> AutoRegVectorStore:
    return AutoRegVectorStore.from_texts(list(DEGREES), Compass(), ids=list(DEGREES))


@pytest.fixture
def harbours() -> AutoRegVectorStore:
    """To a query for "east, tea", vectors rank a b c d; words rank d before b and leave out the rest."""
    return AutoRegVectorStore.from_texts(
        [
            "east, some silk",
            "near east, tea and silk and paper and salt",
            "north, fish",
            "west, tea and tea",
        ],
        Compass(),
        [{"year": year} for year in (1600, 1700, 1800, 1900)],
        ids=list("abcd"),
    )


QUERY = "east, tea"
SEARCHES: dict[str, Callable[..., list[Document]]] = {
    "similarity": lambda store, **options: store.similarity_search(QUERY, **options),
    "score": lambda store, **options: [d for d, _ in store.similarity_search_with_score(QUERY, **options)],
    "relevance": lambda store, **options: [
        d for d, _ in store.similarity_search_with_relevance_scores(QUERY, **options)
    ],
    "vector": lambda store, **options: store.similarity_search_by_vector([1.0, 0.0], **options),
    "mmr": lambda store, **options: store.max_marginal_relevance_search(QUERY, **options),
    "mmr by vector": lambda store, **options: store.max_marginal_relevance_search_by_vector(
        [1.0, 0.0], **options
    ),
    "text": lambda store, **options: store.text_search("tea silk fish", **options),
    "hybrid": lambda store, **options: store.hybrid_search(QUERY, **options),
    "like": lambda store, **options: store.more_like("a", **options),
    "retriever": lambda store, **options: store.as_retriever(
        search_type="hybrid", search_kwargs=options
    ).invoke(QUERY),
}


def test_a_chain_answers_from_the_retrieved_documents(embeddings):
    store = AutoRegVectorStore.from_texts(TEXTS, embeddings, [{"kind": text.split()[1]} for text in TEXTS])
    retriever = store.as_retriever(search_kwargs={"k": 1, "filter": {"kind": "whales"}})
    seen = []

    def join(documents: list[Document]) -> str:
        seen.extend(documents)
        return "\n".join(document.page_content for document in documents)

    prompt = ChatPromptTemplate.from_template("{context}\n\nQuestion: {question}")
    chain = (
        {"context": retriever | join, "question": RunnablePassthrough()}
        | prompt
        | FakeListChatModel(responses=["Blue."])
        | StrOutputParser()
    )
    assert chain.invoke("What colour are whales?") == "Blue."
    assert [document.page_content for document in seen] == ["blue whales"]


async def test_a_chain_runs_async(embeddings):
    store = await AutoRegVectorStore.afrom_texts(TEXTS, embeddings)
    chain = store.as_retriever(search_kwargs={"k": 2}) | (lambda documents: len(documents))
    assert await chain.ainvoke("fruit") == 2


def test_scores_are_cosines_and_relevance_is_never_negative(compass):
    found = compass.similarity_search_with_score("east", k=4)
    assert [document.page_content for document, _ in found] == ["east", "near east", "north", "west"]
    np.testing.assert_allclose(
        [score for _, score in found], [1, math.cos(math.radians(10)), 0, -1], atol=1e-3
    )
    relevance = [score for _, score in compass.similarity_search_with_relevance_scores("east", k=4)]
    np.testing.assert_allclose(relevance, [1, math.cos(math.radians(10)), 0, 0], atol=1e-3)


def test_relevance_is_1_for_a_perfect_match_and_never_outside_0_to_1():
    texts = [f"text {number}" for number in range(40)]
    store = AutoRegVectorStore.from_texts(texts, DeterministicFakeEmbedding(size=6))
    for text in texts:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # LangChain warns of relevance outside [0, 1]
            found = store.similarity_search_with_relevance_scores(text, k=40)
        assert found[0][0].page_content == text
        assert found[0][1] == pytest.approx(1, abs=1e-3)


def test_score_threshold_keeps_the_relevant(compass):
    retriever = compass.as_retriever(
        search_type="similarity_score_threshold", search_kwargs={"score_threshold": 0.5}
    )
    assert [document.page_content for document in retriever.invoke("east")] == ["east", "near east"]


def test_max_marginal_relevance_prefers_what_differs(compass):
    similar = compass.max_marginal_relevance_search("east", k=2, lambda_mult=1)
    diverse = compass.max_marginal_relevance_search("east", k=2, lambda_mult=0.1)
    assert [document.page_content for document in similar] == ["east", "near east"]
    assert [document.page_content for document in diverse] == ["east", "west"]
    assert len(compass.as_retriever(search_type="mmr", search_kwargs={"k": 3}).invoke("north")) == 3


def test_searching_by_vector_finds_the_same(compass):
    vector = Compass().embed_query("north")
    assert compass.similarity_search_by_vector(vector, k=2) == compass.similarity_search("north", k=2)
    assert compass.max_marginal_relevance_search_by_vector(vector, k=3, lambda_mult=0.3) == (
        compass.max_marginal_relevance_search("north", k=3, lambda_mult=0.3)
    )
    assert compass.similarity_search_with_score_by_vector(vector, k=1)[0][1] == pytest.approx(1, abs=1e-3)


def test_a_filter_ranks_only_what_matches(embeddings):
    store = AutoRegVectorStore(embeddings)
    numbers = range(50)
    store.add_texts([f"text {n}" for n in numbers], metadatas=[{"n": n, "odd": n % 2 == 1} for n in numbers])
    odd = store.similarity_search("x", k=50, filter={"odd": True})
    assert sorted(document.metadata["n"] for document in odd) == list(range(1, 50, 2))
    assert [d.metadata["n"] for d in store.similarity_search("x", filter={"n": 7, "odd": True})] == [7]
    assert store.similarity_search("x", filter={"n": 7, "odd": False}) == []


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_every_search_obeys_operators_and_functions(harbours, search):
    years = {d.metadata["year"] for d in search(harbours, k=9, filter={"year": {"$gt": 1650, "$ne": 1800}})}
    assert years == {1700, 1900}
    judged = search(harbours, k=9, filter=lambda metadata: metadata["year"] in (1700, 1900))
    assert {d.metadata["year"] for d in judged} == years
    assert search(harbours, filter={"$or": [{"year": 2000}, {"year": {"$in": [2001]}}]}) == []
    with pytest.raises(ValueError, match=r"\$near"):
        search(harbours, filter={"year": {"$near": 1700}})


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_every_search_returns_k_documents_with_their_ids(harbours, search):
    found = search(harbours, k=2)
    assert len(found) == 2
    assert harbours.get_by_ids([document.id for document in found]) == found


@pytest.mark.parametrize("name", sorted(SEARCHES.keys() - {"like"}))
def test_an_empty_store_finds_nothing(name):
    assert SEARCHES[name](AutoRegVectorStore(Compass())) == []


def test_a_filter_function_judges_the_users_metadata_alone(harbours):
    harbours.index.add([[1.0, 0.0]], ["a node"], ids=["n"], metadatas=[{"year": 5, "_llama_index_node": "x"}])
    seen = []
    found = harbours.similarity_search("east", k=9, filter=lambda metadata: seen.append(metadata) or True)
    assert len(found) == 5
    assert {"year": 5} in seen
    assert {key for metadata in seen for key in metadata} == {"year"}


def test_a_filter_function_that_fails_is_heard_and_leaves_the_store_usable(harbours):
    with pytest.raises(KeyError, match="colour"):
        harbours.similarity_search("east", filter=lambda metadata: metadata["colour"] == "red")
    harbours.add_texts(["north, ice"])
    assert len(harbours.similarity_search("east", k=9)) == 5


def test_text_search_ranks_by_words(harbours):
    found = harbours.text_search_with_score("Tea?", k=4)
    assert [document.id for document, _ in found] == ["d", "b"]
    assert found[0][1] > found[1][1]
    assert harbours.text_search("Tea?") == [document for document, _ in found]
    assert harbours.text_search("coffee") == []


def test_hybrid_search_fuses_similarity_and_words_by_rank(harbours):
    found = harbours.hybrid_search_with_score(QUERY, k=4)
    # "east" is a word of a and b, "tea" of b and d.
    words = [document.id for document in harbours.text_search(QUERY)]
    expected = {id_: 1 / (60 + rank) for rank, id_ in enumerate("abcd", 1)}
    for rank, id_ in enumerate(words, 1):
        expected[id_] += 1 / (60 + rank)
    assert {document.id: score for document, score in found} == pytest.approx(expected)
    assert [score for _, score in found] == sorted(expected.values(), reverse=True)
    assert harbours.hybrid_search(QUERY, k=4) == [document for document, _ in found]


def test_hybrid_weights_choose_between_similarity_and_words(harbours):
    by_words = harbours.hybrid_search("east, tea tea", k=1, weights=(0, 1))
    assert by_words == harbours.text_search("east, tea tea", k=1)
    by_similarity = harbours.hybrid_search(QUERY, k=3, weights=(1, 0), fetch_k=3)
    assert by_similarity == harbours.similarity_search(QUERY, k=3)
    with pytest.raises(ValueError, match="weights"):
        harbours.hybrid_search(QUERY, weights=(1, -1))


def test_more_like_leaves_the_document_itself_out(compass):
    assert [d.id for d in compass.more_like("east", k=2)] == ["near east", "north"]
    with pytest.raises(KeyError, match="south"):
        compass.more_like("south")


def test_a_retriever_searches_as_the_store_does(harbours):
    for search_type, search in {
        "similarity": harbours.similarity_search,
        "mmr": harbours.max_marginal_relevance_search,
        "hybrid": harbours.hybrid_search,
    }.items():
        options = {"k": 3, "filter": {"year": {"$lt": 1850}}}
        retriever = harbours.as_retriever(search_type=search_type, search_kwargs=options)
        assert isinstance(retriever, AutoRegRetriever)
        assert retriever.invoke(QUERY) == search(QUERY, **options)
        assert harbours.search(QUERY, search_type, **options) == search(QUERY, **options)
        assert retriever.invoke(QUERY, k=1) == search(QUERY, k=1, filter=options["filter"])


async def test_a_retriever_finds_the_same_async(harbours):
    for search_type in ("similarity", "mmr", "hybrid"):
        retriever = harbours.as_retriever(search_type=search_type, search_kwargs={"k": 3})
        assert await retriever.ainvoke(QUERY) == retriever.invoke(QUERY)
        assert await harbours.asearch(QUERY, search_type, k=3) == retriever.invoke(QUERY)
        assert await retriever.ainvoke(QUERY, k=1) == retriever.invoke(QUERY, k=1)


async def test_an_unknown_search_type_is_told_which_exist(compass):
    every = r"bm25.*'similarity', 'similarity_score_threshold', 'mmr', 'hybrid'"
    with pytest.raises(ValueError, match=every):
        compass.as_retriever(search_type="bm25")
    with pytest.raises(ValueError, match=every):
        compass.search("east", "bm25")
    with pytest.raises(ValueError, match=every):
        await compass.asearch("east", "bm25")


def test_a_threshold_retriever_needs_its_threshold(compass):
    for search_kwargs in ({}, {"score_threshold": "0.5"}):
        with pytest.raises(ValueError, match="score_threshold"):
            compass.as_retriever(search_type="similarity_score_threshold", search_kwargs=search_kwargs)


def test_a_retriever_takes_k_by_itself_and_refuses_what_it_would_ignore(compass):
    assert len(compass.as_retriever(k=2).invoke("east")) == 2
    assert len(compass.as_retriever(k=2).invoke("east", k=3)) == 3
    with pytest.raises(ValueError, match=r"\['filter'\].*search_kwargs"):
        compass.as_retriever(filter={"a": 1})
    with pytest.raises(ValueError, match="k is given twice"):
        compass.as_retriever(k=2, search_kwargs={"k": 3})
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        compass.as_retriever(k=0)


def test_a_retrievers_search_may_be_chosen_when_a_chain_runs(harbours):
    chain = harbours.as_retriever(k=1).configurable_fields(
        search_type=ConfigurableField(id="how"), search_kwargs=ConfigurableField(id="with")
    )
    assert [d.id for d in chain.invoke(QUERY)] == ["a"]
    chosen = {"how": "hybrid", "with": {"weights": (0, 1), "filter": {"year": 1900}}}
    assert [d.id for d in chain.invoke(QUERY, {"configurable": chosen})] == ["d"]


def test_unknown_search_options_are_named_not_ignored(compass):
    for search_type in ("similarity", "mmr", "hybrid"):
        with pytest.raises(TypeError, match="filters"):
            compass.search("east", search_type, filters={"a": 1})


def test_ids_may_be_missing_per_item_and_the_keyword_wins(embeddings):
    store = AutoRegVectorStore(embeddings)
    ids = store.add_texts(["a", "b"], ids=["x", None])
    assert ids[0] == "x"
    assert [d.page_content for d in store.get_by_ids(ids)] == ["a", "b"]
    assert store.add_documents([Document(id="own", page_content="c")], ids=["given"]) == ["given"]
    assert store.get_by_ids(["own"]) == []


def test_of_one_id_twice_in_a_call_the_last_text_stays(embeddings):
    store = AutoRegVectorStore(embeddings)
    assert store.add_texts(["old", "other", "new"], ids=["x", "y", "x"]) == ["x", "y", "x"]
    assert {d.id: d.page_content for d in store.similarity_search("new", k=5)} == {"x": "new", "y": "other"}


def test_texts_may_come_from_a_generator_and_lengths_must_agree(embeddings):
    store = AutoRegVectorStore(embeddings)
    assert len(store.add_texts(text for text in TEXTS)) == 4
    assert store.add_texts([]) == []
    with pytest.raises(ValueError, match="2 texts, 1 metadatas and 2 ids"):
        store.add_texts(["a", "b"], metadatas=[{}])
    with pytest.raises(ValueError, match="2 texts, 2 metadatas and 1 ids"):
        store.add_texts(["a", "b"], ids=["x"])


def test_delete_without_ids_deletes_everything_and_with_none_nothing(embeddings):
    store = AutoRegVectorStore.from_texts(TEXTS, embeddings)
    assert store.delete([]) is True
    assert len(store.similarity_search("x", k=9)) == 4
    assert store.delete() is True
    assert store.similarity_search("x", k=9) == []


def test_metadata_comes_back_equal_and_inputs_are_not_changed(embeddings):
    metadata = {"nested": {"list": [1, 2.5, None, True]}, "emoji": "🙂", "nul": "a\0b", "": "empty key"}
    document = Document(page_content="text\0🙂", metadata=copy.deepcopy(metadata))
    store = AutoRegVectorStore.from_documents([document], embeddings)
    assert document == Document(page_content="text\0🙂", metadata=metadata)
    found = store.similarity_search("text", k=1)[0]
    assert (found.page_content, found.metadata) == ("text\0🙂", metadata)


def test_a_failed_add_stores_nothing(embeddings):
    store = AutoRegVectorStore(embeddings)
    with pytest.raises(ValueError, match=r"key 'b' of id 'two'"):
        store.add_texts(["a", "b"], metadatas=[{"a": 1}, {"b": math.nan}], ids=["one", "two"])
    with pytest.raises(ValueError, match=r"'_llama_index_node' of id 'two'"):
        store.add_texts(["a", "b"], metadatas=[{}, {"_llama_index_node": 1}], ids=["one", "two"])
    assert store.similarity_search("a") == []


def test_a_folder_opened_again_holds_the_same(embeddings, tmp_path):
    first = AutoRegVectorStore.from_texts(TEXTS, embeddings, path=tmp_path / "index")
    before = first.similarity_search_with_score("fruit", k=4)
    first.close()
    second = AutoRegVectorStore(embeddings, tmp_path / "index")
    assert second.similarity_search_with_score("fruit", k=4) == before
    second.close()


def test_a_second_writer_is_refused_and_a_reader_is_not(embeddings, tmp_path):
    writer = AutoRegVectorStore(embeddings, tmp_path / "index")
    with pytest.raises(IndexLockedError, match="read_only=True"):
        AutoRegVectorStore(embeddings, tmp_path / "index")
    reader = AutoRegVectorStore(embeddings, tmp_path / "index", read_only=True)
    writer.add_texts(["seen at once"])
    assert [d.page_content for d in reader.similarity_search("x")] == ["seen at once"]
    with pytest.raises(DocumentIndexError, match="read_only"):
        reader.add_texts(["no"])
    writer.close()


def test_a_missing_folder_is_not_made_by_a_reader(embeddings, tmp_path):
    with pytest.raises(FileNotFoundError, match="no index at"):
        AutoRegVectorStore(embeddings, tmp_path / "index", read_only=True)
    assert not (tmp_path / "index").exists()


def test_the_encoder_is_recorded_and_another_is_refused_by_name(
    embeddings, make_checkpoint, tiny_checkpoint, tmp_path
):
    AutoRegVectorStore(embeddings, tmp_path / "index").close()
    other = AutoRegEmbeddings(model=make_checkpoint(tmp_path / "k3", 3), device="cpu", dtype="float32")
    with pytest.raises(IndexMismatchError) as raised:
        AutoRegVectorStore(other, tmp_path / "index")
    assert embeddings.fingerprint in str(raised.value)
    assert other.fingerprint in str(raised.value)


def test_foreign_embeddings_may_be_named_and_others_are_refused(tmp_path):
    AutoRegVectorStore(Compass(), tmp_path / "index", encoder="compass").close()
    AutoRegVectorStore(Compass(), tmp_path / "index", encoder="compass").close()
    with pytest.raises(IndexMismatchError, match=r"compass.*sextant"):
        AutoRegVectorStore(Compass(), tmp_path / "index", encoder="sextant")


def test_a_new_index_is_made_with_the_options_given_and_keeps_them(embeddings, tmp_path):
    options = {"factory": "IVF,SQ8", "tokenizer": "trigram", "memory_budget": 2**20}
    for given in (options, {}, {"factory": "Flat"}):
        store = AutoRegVectorStore(embeddings, tmp_path / "index", **given)
        assert options.items() <= store.index.info().items()
        store.close()
    assert AutoRegVectorStore.from_texts(TEXTS, embeddings, tokenizer="trigram").text_search("hale")


def test_unknown_index_options_are_named_not_ignored(embeddings, tmp_path):
    AutoRegVectorStore(embeddings, tmp_path / "there").close()
    for folder in ("new", "there"):
        with pytest.raises(TypeError, match=r"\['factroy'\].*'factory'"):
            AutoRegVectorStore(embeddings, tmp_path / folder, factroy="Flat")
        with pytest.raises(TypeError, match=r"\['encoder'\]"):
            AutoRegVectorStore(embeddings, tmp_path / folder, encoder="mine")
    assert not (tmp_path / "new").exists()


def test_foreign_embeddings_of_another_dimension_are_refused(tmp_path):
    AutoRegVectorStore.from_texts(["a"], DeterministicFakeEmbedding(size=6), path=tmp_path / "index").close()
    store = AutoRegVectorStore(DeterministicFakeEmbedding(size=7), tmp_path / "index")
    with pytest.raises(IndexMismatchError, match=r"7.*6"):
        store.add_texts(["b"])
    with pytest.raises(IndexMismatchError, match=r"7.*6"):
        store.similarity_search("b")
    store.close()


def test_a_shortened_query_searches_a_whole_index(embeddings, tmp_path):
    AutoRegVectorStore.from_texts(TEXTS, embeddings, path=tmp_path / "index").close()
    short = AutoRegEmbeddings(model=embeddings.model, device="cpu", dtype="float32", num_tokens=2)
    store = AutoRegVectorStore(short, tmp_path / "index", read_only=True)
    cosines = np.array(short.embed_documents(TEXTS)) @ short.embed_query("fruit")
    expected = [TEXTS[i] for i in np.argsort(-cosines)]
    found = store.similarity_search_with_score("fruit", k=4)
    assert [document.page_content for document, _ in found] == expected
    np.testing.assert_allclose([score for _, score in found], sorted(cosines, reverse=True), atol=2e-3)
    assert len(store.max_marginal_relevance_search("fruit", k=3)) == 3


def test_the_first_tokens_find_documents_that_all_tokens_rank(embeddings):
    texts = [f"{animal} number {i}" for i in range(60) for animal in ("whale", "bee", "ant")]
    store = AutoRegVectorStore.from_texts(texts, embeddings)
    few = AutoRegEmbeddings(model=embeddings.model, device="cpu", dtype="float32", num_tokens=1)
    first, whole = (
        np.array(made.embed_documents(texts)) @ made.embed_query("red bee") for made in (few, embeddings)
    )
    candidates = np.argsort(-first)[:30]
    best = candidates[np.argsort(-whole[candidates])[:5]]
    found = store.similarity_search_with_score("red bee", k=5, num_tokens=1, fetch_k=30)
    assert [document.page_content for document, _ in found] == [texts[i] for i in best]
    np.testing.assert_allclose([score for _, score in found], whole[best], atol=1e-3)


class TwoTokens(Embeddings):
    """Two tokens, an angle each: to "0 90", "1 170" is nearest by the first, and "5 85" by both."""

    def embed_query(self, text: str) -> list[float]:
        angles = [math.radians(int(angle)) for angle in text.split()[:2]]
        return [part / math.sqrt(2) for angle in angles for part in (math.cos(angle), math.sin(angle))]

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]


@pytest.fixture
def of_two_tokens() -> AutoRegVectorStore:
    return AutoRegVectorStore.from_texts(["1 170", "5 85", "2 100", "90 90"], TwoTokens(), tokens=2)


SEARCHES_BY_FEWER_TOKENS = [
    ("similarity", {"k": 1, "num_tokens": 1, "fetch_k": 1}, ["1 170"]),
    ("similarity", {"k": 1, "num_tokens": 1, "fetch_k": 2}, ["2 100"]),
    ("similarity", {"k": 1, "num_tokens": 1}, ["5 85"]),
    ("similarity", {"k": 1, "num_tokens": 2}, ["5 85"]),
    (
        "similarity_score_threshold",
        {"k": 1, "num_tokens": 1, "fetch_k": 1, "score_threshold": 0.5},
        ["1 170"],
    ),
    ("similarity_score_threshold", {"k": 1, "num_tokens": 1, "fetch_k": 1, "score_threshold": 0.9}, []),
    ("mmr", {"k": 1, "num_tokens": 1}, ["5 85"]),
    ("hybrid", {"k": 1, "num_tokens": 1, "weights": (1, 0)}, ["5 85"]),
]


@pytest.mark.parametrize(("search_type", "options", "expected"), SEARCHES_BY_FEWER_TOKENS)
@pytest.mark.filterwarnings("ignore:No relevant docs")
async def test_retrievers_search_by_fewer_tokens(of_two_tokens, search_type, options, expected):
    retriever = of_two_tokens.as_retriever(search_type=search_type, search_kwargs=options)
    assert [document.page_content for document in retriever.invoke("0 90")] == expected
    assert [document.page_content for document in await retriever.ainvoke("0 90")] == expected


async def test_searches_by_vector_take_fewer_tokens_too(of_two_tokens):
    vector, options = TwoTokens().embed_query("0 90"), {"num_tokens": 1, "fetch_k": 1}
    for found in (
        of_two_tokens.similarity_search_by_vector(vector, 1, **options),
        await of_two_tokens.asimilarity_search_by_vector(vector, 1, **options),
        await of_two_tokens.asimilarity_search("0 90", 1, **options),
        await of_two_tokens.amax_marginal_relevance_search("0 90", 1, 1, num_tokens=1, filter={}),
    ):
        assert len(found) == 1
    assert found[0].page_content == "5 85", "a hundred candidates at least"


def test_bad_numbers_of_tokens_are_refused_by_name(of_two_tokens, compass):
    for wrong in (0, 3):
        with pytest.raises(ValueError, match=f"num_tokens must be between 1 and 2.* got {wrong}"):
            of_two_tokens.similarity_search("0 90", num_tokens=wrong)
    with pytest.raises(ValueError, match="give num_tokens"):
        of_two_tokens.similarity_search("0 90", fetch_k=20)
    with pytest.raises(IndexMismatchError, match="num_tokens=1 needs an index that knows"):
        compass.similarity_search("east", num_tokens=1)
    with pytest.raises(TypeError, match=r"\['token'\]"):
        of_two_tokens.similarity_search("0 90", token=1)


def test_vectors_go_to_the_index_as_arrays(embeddings, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("vectors became Python lists")

    monkeypatch.setattr(AutoRegEmbeddings, "embed_documents", refuse)
    monkeypatch.setattr(AutoRegEmbeddings, "embed_query", refuse)
    store = AutoRegVectorStore.from_texts(TEXTS, embeddings)
    assert len(store.similarity_search("fruit", k=2)) == 2


def test_a_pickled_store_reads_the_same_folder(embeddings, tmp_path):
    store = AutoRegVectorStore.from_texts(TEXTS, embeddings, path=tmp_path / "index")
    twin = pickle.loads(pickle.dumps(store))  # noqa: S301
    assert twin.similarity_search("fruit", k=4) == store.similarity_search("fruit", k=4)
    with pytest.raises(DocumentIndexError, match="read_only"):
        twin.delete(["x"])
    store.close()
    with pytest.raises(TypeError, match="memory cannot be pickled"):
        pickle.dumps(AutoRegVectorStore(embeddings))


def test_from_texts_that_fails_leaves_the_folder_free(embeddings, tmp_path):
    with pytest.raises(TypeError) as raised:
        AutoRegVectorStore.from_texts([3], embeddings, path=tmp_path / "index")
    AutoRegVectorStore(embeddings, tmp_path / "index").close()
    del raised  # its traceback has kept the store that failed alive until here


def test_langchains_indexing_updates_and_cleans_up(embeddings):
    store, manager = AutoRegVectorStore(embeddings), InMemoryRecordManager("test")
    manager.create_schema()
    old = [Document(page_content=text, metadata={"source": text}) for text in ("a", "b")]
    new = [Document(page_content=text, metadata={"source": text}) for text in ("b", "c")]

    def run(documents: list[Document]) -> dict:
        return index(documents, manager, store, cleanup="full", source_id_key="source", key_encoder="sha256")

    assert run(old)["num_added"] == 2
    result = run(new)
    assert (result["num_added"], result["num_skipped"], result["num_deleted"]) == (1, 1, 1)
    assert {document.page_content for document in store.similarity_search("x", k=9)} == {"b", "c"}


async def test_async_calls_leave_the_loop_free(embeddings, beside_the_loop):
    store = AutoRegVectorStore.from_texts(TEXTS, embeddings)
    [id_] = store.add_texts(["more"])
    vector = embeddings.embed_query("fruit")
    methods = ("add", "search", "search_text", "search_hybrid", "search_mmr", "search_similar", "get")
    calls = beside_the_loop(DocumentIndex, *methods)
    for call, method in (
        (store.aadd_texts(["more"]), "add"),
        (store.aget_by_ids([id_]), "get"),
        (store.asimilarity_search("fruit"), "search"),
        (store.asimilarity_search_with_score_by_vector(vector), "search"),
        (store.amax_marginal_relevance_search("fruit"), "search_mmr"),
        (store.atext_search("bees"), "search_text"),
        (store.atext_search_with_score("bees"), "search_text"),
        (store.ahybrid_search("fruit", weights=(1, 2)), "search_hybrid"),
        (store.ahybrid_search_with_score("fruit"), "search_hybrid"),
        (store.amore_like(id_), "search_similar"),
        (store.as_retriever().ainvoke("fruit"), "search"),
        (store.as_retriever(search_type="hybrid").ainvoke("fruit"), "search_hybrid"),
    ):
        calls.clear()
        assert await call
        assert method in calls
