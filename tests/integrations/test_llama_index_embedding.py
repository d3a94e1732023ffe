import copy
import pickle
import time

import numpy as np
import pytest
from llama_index.core import Document
from llama_index.core.ingestion import IngestionCache, IngestionPipeline
from llama_index.core.storage.kvstore import SimpleKVStore

from autoregembed_rag import AutoRegEncoder
from llama_index.embeddings.autoregembed import AutoRegEmbedding


@pytest.fixture(scope="module")
def embedding(tiny_checkpoint):
    return AutoRegEmbedding(model=tiny_checkpoint, device="cpu", dtype="float32")


def test_queries_and_documents_get_the_vectors_of_their_own_instruction(embedding, encoder):
    text = "The cat sat on the mat."
    query, document = embedding.get_query_embedding(text), embedding.get_text_embedding(text)
    np.testing.assert_allclose(query, encoder.encode_queries([text])[0], atol=1e-6)
    np.testing.assert_allclose(document, encoder.encode_documents([text])[0], atol=1e-6)
    assert not np.allclose(query, document, atol=1e-3)
    assert type(query[0]) is float


async def test_async_embeds_the_same(embedding):
    texts = ["one", "two", "three"]
    np.testing.assert_allclose(
        await embedding.aget_query_embedding("one"), embedding.get_query_embedding("one"), atol=1e-6
    )
    np.testing.assert_allclose(
        await embedding.aget_text_embedding("one"), embedding.get_text_embedding("one"), atol=1e-6
    )
    np.testing.assert_allclose(
        await embedding.aget_text_embedding_batch(texts), embedding.get_text_embedding_batch(texts), atol=1e-6
    )


def test_a_batch_goes_to_the_encoder_in_one_call(embedding, monkeypatch):
    calls = []
    original = AutoRegEncoder.encode_documents

    def count(self, texts, **options):
        calls.append(len(texts))
        return original(self, texts, **options)

    monkeypatch.setattr(AutoRegEncoder, "encode_documents", count)
    vectors = embedding.get_text_embedding_batch([f"text {i}" for i in range(40)])
    assert calls == [40]
    assert np.shape(vectors) == (40, embedding.dimension)


async def test_async_batches_run_one_after_another(encoder, monkeypatch):
    embedding = AutoRegEmbedding(model=encoder, embed_batch_size=2, num_workers=4)
    running = most = 0
    original = AutoRegEncoder.encode_documents

    def watch(self, texts, **options):
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.01)
        running -= 1
        return original(self, texts, **options)

    monkeypatch.setattr(AutoRegEncoder, "encode_documents", watch)
    texts = [f"text {i}" for i in range(9)]
    vectors = await embedding.aget_text_embedding_batch(texts)
    assert most == 1
    np.testing.assert_allclose(vectors, original(encoder, texts), atol=1e-6)


async def test_async_calls_leave_the_loop_free(embedding, beside_the_loop):
    calls = beside_the_loop(AutoRegEncoder, "encode_queries", "encode_documents")
    await embedding.aget_query_embedding("a")
    await embedding.aget_text_embedding("a")
    await embedding.aget_text_embedding_batch(["a", "b"])
    assert calls == ["encode_queries", "encode_documents", "encode_documents"]


def test_the_cache_that_would_mix_queries_and_documents_is_refused(embedding, encoder):
    with pytest.raises(ValueError, match="takes no embeddings_cache"):
        AutoRegEmbedding(model=encoder, embeddings_cache=SimpleKVStore())
    with pytest.raises(ValueError, match="frozen"):
        embedding.embeddings_cache = SimpleKVStore()
    assert AutoRegEmbedding(model=encoder, embeddings_cache=None).embeddings_cache is None


def test_options_beside_a_ready_encoder_are_refused(encoder):
    assert AutoRegEmbedding(model=encoder).encoder is encoder
    with pytest.raises(ValueError, match=r"pooling cannot .*AutoRegEncoder\.from_pretrained"):
        AutoRegEmbedding(model=encoder, pooling="flatten")
    with pytest.raises(TypeError, match="not NoneType"):
        AutoRegEmbedding(model=None)
    with pytest.raises(ValueError, match="query_instructon"):
        AutoRegEmbedding(model=encoder, query_instructon="typo")


def test_num_tokens_and_pooling_reach_the_encoder(tiny_checkpoint, encoder):
    short = AutoRegEmbedding(model=tiny_checkpoint, device="cpu", num_tokens=2)
    mean = AutoRegEmbedding(model=tiny_checkpoint, device="cpu", pooling="mean")
    assert len(short.get_query_embedding("a")) == 2 * encoder.hidden_size
    assert len(mean.get_query_embedding("a")) == encoder.hidden_size
    assert mean.fingerprint != encoder.fingerprint


@pytest.mark.parametrize(
    "clone",
    [
        lambda x: pickle.loads(pickle.dumps(x)),  # noqa: S301
        copy.deepcopy,
        lambda x: AutoRegEmbedding.from_dict(x.to_dict()),
    ],
    ids=["pickle", "deepcopy", "dict"],
)
def test_copies_embed_the_same(embedding, clone):
    twin = clone(embedding)
    assert twin.fingerprint == embedding.fingerprint
    np.testing.assert_allclose(
        twin.get_query_embedding("again"), embedding.get_query_embedding("again"), atol=1e-6
    )


def test_a_pickle_is_small_and_an_encoder_in_it_survives(embedding, encoder):
    assert len(pickle.dumps(embedding)) < 10_000
    twin = pickle.loads(pickle.dumps(AutoRegEmbedding(model=encoder)))  # noqa: S301
    assert twin.fingerprint == encoder.fingerprint


def test_an_encoder_that_cannot_be_opened_again_is_not_replaced_by_another(tiny_base):
    unsaved = AutoRegEncoder.from_base(tiny_base, device="cpu")
    with pytest.raises(TypeError, match="an encoder that was never saved cannot be pickled"):
        pickle.dumps(AutoRegEmbedding(model=unsaved))


def test_the_cache_of_a_pipeline_keeps_encoders_apart(tiny_checkpoint, make_checkpoint, tmp_path):
    other = make_checkpoint(tmp_path / "k3", 3)
    cache, document = IngestionCache(), Document(text="cached text", id_="1")

    def embed(model):
        pipeline = IngestionPipeline(
            transformations=[AutoRegEmbedding(model=model, device="cpu")], cache=cache
        )
        return pipeline.run(documents=[document.model_copy()])[0].embedding

    first = embed(tiny_checkpoint)
    assert embed(tiny_checkpoint) == first
    # The same folder name, other weights: the fingerprint tells them apart.
    swapped = tmp_path / "swapped"
    swapped.symlink_to(tiny_checkpoint)
    assert len(embed(swapped)) == len(first)
    swapped.unlink()
    swapped.symlink_to(other)
    assert len(embed(swapped)) != len(first)
