"""The rerankers of LangChain and LlamaIndex: order, scores, limits, and real use in a retriever and a query engine."""

import asyncio
import copy
import json
import pickle

import numpy as np
import pytest

pytest.importorskip("langchain_core")
pytest.importorskip("llama_index.core")
pytest.importorskip("faiss")

from langchain_core.documents import Document
from langchain_core.load import dumps
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle, TextNode

from autoregembed_indexes import DocumentIndex
from autoregembed_rag import AutoRegEncoder, GenerativeReranker
from langchain_autoregembed import AutoRegEmbeddings, AutoRegReranker, AutoRegVectorStore
from llama_index.postprocessor.autoregembed_rerank import AutoRegRerank

QUERY = "what protects sailors?"
TEXTS = ["the quick brown fox", "Vitamin C is found in oranges.", "", "A reader writes the answer."]


@pytest.fixture
def expected(encoder, decoder):
    """(place, score), best first."""
    return GenerativeReranker(encoder, decoder).rank(QUERY, TEXTS)


@pytest.fixture
def documents():
    return [Document(page_content=text, id=str(i), metadata={"n": i}) for i, text in enumerate(TEXTS)]


@pytest.fixture
def nodes():
    return [NodeWithScore(node=TextNode(text=text, id_=str(i)), score=0.5) for i, text in enumerate(TEXTS)]


def test_langchain_gives_the_best_first_with_their_scores(encoder, decoder, documents, expected):
    reranker = AutoRegReranker(model=encoder, decoder=decoder, top_n=None)
    found = reranker.compress_documents(documents, QUERY)
    assert [document.id for document in found] == [str(place) for place, _ in expected]
    assert [document.metadata["relevance_score"] for document in found] == [score for _, score in expected]
    assert [document.metadata["n"] for document in found] == [place for place, _ in expected]
    assert all("relevance_score" not in document.metadata for document in documents)
    assert asyncio.run(reranker.acompress_documents(documents, QUERY)) == found


def test_llama_index_gives_the_best_first_with_their_scores(encoder, decoder, nodes, expected):
    reranker = AutoRegRerank(model=encoder, decoder=decoder, top_n=None, keep_retrieval_score=True)
    assert isinstance(reranker, BaseNodePostprocessor)
    found = reranker.postprocess_nodes(nodes, query_str=QUERY)
    assert [(int(node.node.node_id), node.score) for node in found] == expected
    assert [node.node.metadata["retrieval_score"] for node in found] == [0.5] * 4
    assert [node.score for node in nodes] == [0.5] * 4
    assert all(node.node.metadata == {} for node in nodes)
    assert "retrieval_score" not in found[0].node.get_content(MetadataMode.LLM)


def test_llama_index_scores_nodes_as_they_would_be_embedded(encoder, decoder):
    nodes = [NodeWithScore(node=TextNode(text="fox", metadata={"title": "animals"}), score=1.0)]
    reranker = AutoRegRerank(model=encoder, decoder=decoder, weight=None)
    (found,) = reranker.postprocess_nodes(nodes, QueryBundle(QUERY))
    whole = GenerativeReranker(encoder, decoder).scores(QUERY, ["title: animals\n\nfox"])
    assert found.score == pytest.approx(whole[0], abs=1e-5)


def test_top_n_and_threshold_limit_what_comes_back(encoder, decoder, documents, nodes):
    options = {"model": encoder, "decoder": decoder}
    best = GenerativeReranker(encoder, decoder).scores(QUERY, TEXTS).max()
    for limits, count in (({"top_n": 2}, 2), ({"score_threshold": float(best)}, 1), ({}, 3)):
        assert len(AutoRegReranker(**options, **limits).compress_documents(documents, QUERY)) == count
        assert len(AutoRegRerank(**options, **limits).postprocess_nodes(nodes, query_str=QUERY)) == count


def test_nothing_and_one_document(encoder, decoder, documents, nodes):
    langchain = AutoRegReranker(model=encoder, decoder=decoder)
    llama_index = AutoRegRerank(model=encoder, decoder=decoder)
    assert langchain.compress_documents([], QUERY) == []
    assert llama_index.postprocess_nodes([], query_str=QUERY) == []
    assert [document.id for document in langchain.compress_documents(documents[:1], QUERY)] == ["0"]
    assert [node.node.node_id for node in llama_index.postprocess_nodes(nodes[:1], query_str=QUERY)] == ["0"]


def test_a_node_needs_a_query(encoder, decoder, nodes):
    with pytest.raises(ValueError, match="give query_bundle or query_str"):
        AutoRegRerank(model=encoder, decoder=decoder).postprocess_nodes(nodes)


def test_options_that_do_not_exist_are_refused(encoder, decoder):
    for kind in (AutoRegReranker, AutoRegRerank):
        with pytest.raises(ValueError, match="top"):
            kind(model=encoder, decoder=decoder, top=3)
        with pytest.raises(ValueError, match="prior must be one of"):
            kind(model=encoder, decoder=decoder, prior="self")
        with pytest.raises(ValueError, match="top_n"):
            kind(model=encoder, decoder=decoder, top_n=0)
        with pytest.raises(ValueError, match="frozen"):
            kind(model=encoder, decoder=decoder).weight = 1


@pytest.mark.parametrize("kind", [AutoRegReranker, AutoRegRerank])
@pytest.mark.parametrize("wrong", [{"prior": "self"}, {"weight": -1}, {"index": "folder"}, {"model": 3}])
def test_a_wrong_value_is_an_error_before_a_model_is_loaded(kind, wrong, monkeypatch):
    monkeypatch.setattr(AutoRegEncoder, "from_pretrained", None)  # whoever calls it fails
    with pytest.raises(ValueError, match=next(iter(wrong)) if "index" not in wrong else "DocumentIndex"):
        kind(**wrong)


def ranks(reranker):
    texts = [*TEXTS[:2], *TEXTS[3:]]
    if isinstance(reranker, AutoRegReranker):
        found = reranker.compress_documents([Document(page_content=text) for text in texts], QUERY)
        return [(document.page_content, document.metadata["relevance_score"]) for document in found]
    found = reranker.postprocess_nodes(
        [NodeWithScore(node=TextNode(text=text)) for text in texts], None, QUERY
    )
    return [(node.node.get_content(), node.score) for node in found]


@pytest.mark.parametrize("kind", [AutoRegReranker, AutoRegRerank])
def test_dumps_and_pickles_hold_arguments_and_rank_the_same(kind, tiny_checkpoint, tmp_path):
    with DocumentIndex.create(tmp_path / "index") as index:
        options = {"device": "cpu", "dtype": "float32", "prior": "document", "weight": 2.5, "top_n": 2}
        reranker = kind(model=tiny_checkpoint, index=index, **options)
        expected = ranks(reranker)
        for dumped in (reranker.model_dump(), json.loads(reranker.model_dump_json())):
            assert {name: dumped[name] for name in options} == options
            assert (dumped["model"], dumped["decoder"]) == (str(tiny_checkpoint), None)
            assert "index" not in dumped
            assert ranks(kind(**{name: dumped[name] for name in ("model", *options)})) == expected
        pickled = pickle.dumps(reranker)
        assert len(pickled) < 2_000
        assert copy.deepcopy(reranker).top_n == copy.copy(reranker).top_n == 2
    twin = pickle.loads(pickled)  # noqa: S301
    assert ranks(twin) == expected
    assert twin.index.path == index.path
    assert twin.index.read_only


def test_each_framework_writes_its_reranker_in_its_own_way(tiny_checkpoint):
    options = {"model": tiny_checkpoint, "device": "cpu", "dtype": "float32", "top_n": 1}
    reranker = AutoRegRerank(**options)
    for twin in (
        AutoRegRerank.from_dict(reranker.to_dict()),
        AutoRegRerank.from_json(reranker.to_json()),
    ):
        assert ranks(twin) == ranks(reranker)
    written = json.loads(dumps(AutoRegReranker(**options)))
    assert written["id"] == ["langchain_autoregembed", "rerankers", "AutoRegReranker"]


@pytest.mark.parametrize("kind", [AutoRegReranker, AutoRegRerank])
def test_ready_models_are_opened_again_by_path_or_named_in_an_error(kind, encoder, decoder, tiny_base):
    reranker = kind(model=encoder, decoder=decoder)
    pickled = pickle.dumps(reranker)
    assert len(pickled) < 3_000
    assert ranks(pickle.loads(pickled)) == ranks(reranker)  # noqa: S301
    for dump in (kind.model_dump, kind.model_dump_json):
        with pytest.raises(
            ValueError, match="a ready AutoRegEncoder cannot be written down: give the model by name"
        ):
            dump(reranker)
    unsaved = AutoRegEncoder.from_base(tiny_base, device="cpu", dtype="float32")
    with pytest.raises(TypeError, match="an encoder that was never saved cannot be pickled"):
        pickle.dumps(kind(model=unsaved, decoder=decoder))


def test_the_index_keeps_priors_for_both_frameworks(
    encoder, decoder, documents, nodes, tmp_path, monkeypatch
):
    store = AutoRegVectorStore.from_texts(TEXTS, AutoRegEmbeddings(model=encoder), path=tmp_path / "index")
    options = {"model": encoder, "decoder": decoder, "index": store.index, "top_n": None}
    before = AutoRegReranker(**options).compress_documents(documents, QUERY)
    monkeypatch.setattr(GenerativeReranker, "_compute_priors", None)  # whoever calls it fails
    assert AutoRegReranker(**options).compress_documents(documents, QUERY) == before
    found = AutoRegRerank(**options).postprocess_nodes(nodes, query_str=QUERY)
    np.testing.assert_allclose(
        [node.score for node in found], [document.metadata["relevance_score"] for document in before]
    )
    store.close()


def test_a_contextual_compression_retriever_returns_the_best_of_what_was_retrieved(encoder, decoder):
    retrievers = pytest.importorskip("langchain_classic.retrievers")
    store = AutoRegVectorStore.from_texts(TEXTS, AutoRegEmbeddings(model=encoder))
    retriever = retrievers.ContextualCompressionRetriever(
        base_compressor=AutoRegReranker(model=encoder, decoder=decoder, top_n=2),
        base_retriever=store.as_retriever(search_kwargs={"k": 4}),
    )
    found = retriever.invoke(QUERY)
    searched = [document.page_content for document in store.similarity_search(QUERY, 4)]
    best = GenerativeReranker(encoder, decoder).rank(QUERY, searched, top_n=2)
    assert [document.page_content for document in found] == [searched[place] for place, _ in best]


def test_a_retriever_query_engine_ranks_what_was_retrieved(encoder, decoder):
    from llama_index.core import VectorStoreIndex
    from llama_index.core.llms.mock import MockLLM
    from llama_index.core.schema import TextNode

    from llama_index.embeddings.autoregembed import AutoRegEmbedding

    index = VectorStoreIndex(
        [TextNode(text=text) for text in TEXTS if text], embed_model=AutoRegEmbedding(model=encoder)
    )
    engine = index.as_query_engine(
        llm=MockLLM(),
        similarity_top_k=3,
        node_postprocessors=[AutoRegRerank(model=encoder, decoder=decoder, top_n=2)],
    )
    found = [node.node.get_content() for node in engine.query(QUERY).source_nodes]
    searched = [node.node.get_content() for node in index.as_retriever(similarity_top_k=3).retrieve(QUERY)]
    ranked = GenerativeReranker(encoder, decoder).rank(QUERY, searched, top_n=2)
    assert found == [searched[place] for place, _ in ranked]
