import copy
import math
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding, Embeddings
from langchain_core.indexing import InMemoryRecordManager, index
from langchain_core.language_models import FakeListChatModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langchain_core.vectorstores import VectorStore
from langchain_tests.integration_tests import VectorStoreIntegrationTests

from autoregembed_indexes import DocumentIndex, DocumentIndexError, IndexLockedError, IndexMismatchError
from langchain_autoregembed import AutoRegEmbeddings, AutoRegVectorStore

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


class Compass(Embeddings):
    """Four directions in the plane, so that every cosine is known."""

    def embed_query(self, text: str) -> list[float]:
        angle = math.radians(DEGREES[text])
        return [math.cos(angle), math.sin(angle)]

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]


@pytest.fixture(scope="module")
def embeddings(tiny_checkpoint: Path) -> AutoRegEmbeddings:
    return AutoRegEmbeddings(model=tiny_checkpoint, device="cpu", dtype="float32")


@pytest.fixture
def compass() -> AutoRegVectorStore:
    return AutoRegVectorStore.from_texts(list(DEGREES), Compass(), ids=list(DEGREES))


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
    assert AutoRegVectorStore(Compass()).max_marginal_relevance_search("east") == []
    assert len(compass.as_retriever(search_type="mmr", search_kwargs={"k": 3}).invoke("north")) == 3


def test_max_marginal_relevance_obeys_the_filter():
    store = AutoRegVectorStore.from_texts(
        ["east", "north"], Compass(), metadatas=[{"hot": False}, {"hot": True}]
    )
    found = store.max_marginal_relevance_search("east", filter={"hot": True})
    assert [document.page_content for document in found] == ["north"]


def test_searching_by_vector_finds_the_same(compass):
    vector = Compass().embed_query("north")
    assert compass.similarity_search_by_vector(vector, k=2) == compass.similarity_search("north", k=2)
    assert compass.similarity_search_with_score_by_vector(vector, k=1)[0][1] == pytest.approx(1, abs=1e-3)


def test_a_filter_ranks_only_what_matches(embeddings):
    store = AutoRegVectorStore(embeddings)
    numbers = range(50)
    store.add_texts([f"text {n}" for n in numbers], metadatas=[{"n": n, "odd": n % 2 == 1} for n in numbers])
    odd = store.similarity_search("x", k=50, filter={"odd": True})
    assert sorted(document.metadata["n"] for document in odd) == list(range(1, 50, 2))
    assert [d.metadata["n"] for d in store.similarity_search("x", filter={"n": 7, "odd": True})] == [7]
    assert store.similarity_search("x", filter={"n": 7, "odd": False}) == []


def test_unknown_search_options_are_named_not_ignored(compass):
    with pytest.raises(TypeError, match="filters"):
        compass.similarity_search("east", filters={"a": 1})


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


async def test_async_calls_leave_the_loop_free(embeddings, monkeypatch, slowly, ticks_while):
    store = AutoRegVectorStore.from_texts(TEXTS, embeddings)
    monkeypatch.setattr(DocumentIndex, "add", slowly(DocumentIndex.add))
    monkeypatch.setattr(DocumentIndex, "search", slowly(DocumentIndex.search))
    assert await ticks_while(store.aadd_texts(["more"])) >= 5
    assert await ticks_while(store.asimilarity_search("fruit")) >= 5
    assert await ticks_while(store.as_retriever().ainvoke("fruit")) >= 5
    assert await ticks_while(store.amax_marginal_relevance_search("fruit")) >= 5
