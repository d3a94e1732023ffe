import copy
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from langchain_core.embeddings import Embeddings
from langchain_tests.integration_tests import EmbeddingsIntegrationTests
from langchain_tests.unit_tests import EmbeddingsUnitTests

from langchain_autoregembed import AutoRegEmbeddings


class _Standard:
    @pytest.fixture(autouse=True)
    def _checkpoint(self, tiny_checkpoint: Path) -> None:
        self.checkpoint = tiny_checkpoint

    @property
    def embeddings_class(self) -> type[Embeddings]:
        return AutoRegEmbeddings

    @property
    def embedding_model_params(self) -> dict:
        return {"model": self.checkpoint, "device": "cpu"}


class TestStandardUnit(_Standard, EmbeddingsUnitTests):
    pass


class TestStandardIntegration(_Standard, EmbeddingsIntegrationTests):
    pass


@pytest.fixture(scope="module")
def embeddings(tiny_checkpoint: Path) -> AutoRegEmbeddings:
    return AutoRegEmbeddings(model=tiny_checkpoint, device="cpu", dtype="float32")


def test_queries_and_documents_get_the_vectors_of_their_own_instruction(embeddings, encoder):
    text = "The cat sat on the mat."
    np.testing.assert_allclose(embeddings.embed_query(text), encoder.encode_queries([text])[0], atol=1e-6)
    np.testing.assert_allclose(
        embeddings.embed_documents([text]), encoder.encode_documents([text]), atol=1e-6
    )
    assert not np.allclose(embeddings.embed_query(text), embeddings.embed_documents([text])[0], atol=1e-3)


def test_vectors_are_plain_floats_of_the_announced_dimension(embeddings):
    query = embeddings.embed_query("")
    assert len(query) == embeddings.dimension
    assert type(query[0]) is float
    assert embeddings.embed_documents([]) == []


def test_a_ready_encoder_is_taken_as_it_is(encoder):
    embeddings = AutoRegEmbeddings(model=encoder)
    assert embeddings.encoder is encoder
    assert embeddings.fingerprint == encoder.fingerprint


def test_options_beside_a_ready_encoder_are_refused(encoder):
    with pytest.raises(ValueError, match=r"num_tokens, pooling cannot .*AutoRegEncoder\.from_pretrained"):
        AutoRegEmbeddings(model=encoder, num_tokens=1, pooling="flatten")


def test_something_that_is_no_model_is_a_type_error():
    with pytest.raises(TypeError, match="not int"):
        AutoRegEmbeddings(model=3)


def test_an_unknown_option_is_an_error(encoder):
    with pytest.raises(ValueError, match="query_instructon"):
        AutoRegEmbeddings(model=encoder, query_instructon="typo")


def test_the_callers_instructions_reach_the_prompt(tiny_checkpoint, embeddings):
    other = AutoRegEmbeddings(
        model=tiny_checkpoint, device="cpu", dtype="float32", query_instruction="Name the place."
    )
    assert other.fingerprint != embeddings.fingerprint
    assert not np.allclose(other.embed_query("Paris"), embeddings.embed_query("Paris"), atol=1e-3)
    np.testing.assert_allclose(
        other.embed_documents(["Paris"]), embeddings.embed_documents(["Paris"]), atol=1e-6
    )


def test_num_tokens_shortens_the_vectors(tiny_checkpoint, embeddings):
    short = AutoRegEmbeddings(model=tiny_checkpoint, device="cpu", num_tokens=1)
    assert short.dimension == embeddings.encoder.hidden_size
    assert len(short.embed_query("a")) == short.dimension


def test_settings_cannot_change_after_loading(embeddings):
    with pytest.raises(ValueError, match="frozen"):
        embeddings.pooling = "mean"


def test_a_text_that_is_no_string_is_named(embeddings):
    with pytest.raises(TypeError, match="int"):
        embeddings.embed_documents(["fine", 7])


@pytest.mark.parametrize(
    "clone",
    [
        lambda x: pickle.loads(pickle.dumps(x)),  # noqa: S301
        copy.copy,
        copy.deepcopy,
    ],
)
def test_pickles_and_copies_embed_the_same(embeddings, clone):
    twin = clone(embeddings)
    np.testing.assert_allclose(twin.embed_query("again"), embeddings.embed_query("again"), atol=1e-6)


async def test_async_embeds_the_same_and_leaves_the_loop_free(embeddings, encoder, beside_the_loop):
    query, documents = embeddings.embed_query("a"), embeddings.embed_documents(["a", "b"])
    calls = beside_the_loop(type(encoder), "encode_queries", "encode_documents")
    assert await embeddings.aembed_query("a") == query
    assert await embeddings.aembed_documents(["a", "b"]) == documents
    assert calls == ["encode_queries", "encode_documents"]


@pytest.mark.parametrize(
    "module",
    [
        "langchain_autoregembed",
        "llama_index.embeddings.autoregembed",
        "llama_index.vector_stores.autoregembed",
    ],
)
def test_importing_does_not_load_pytorch_or_faiss(module):
    heavy = "{'torch', 'transformers', 'faiss'}"
    check = f"import sys, {module}; print(*({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)  # noqa: S603
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    ("module", "framework", "extra"),
    [
        ("langchain_autoregembed", "langchain_core", "langchain"),
        ("llama_index.embeddings.autoregembed", "llama_index.core", "llama-index"),
        ("llama_index.vector_stores.autoregembed", "llama_index.core", "llama-index"),
    ],
)
def test_a_missing_framework_is_an_error_that_names_the_extra(module, framework, extra):
    check = f"import sys; sys.modules[{framework!r}] = None; import {module}"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)  # noqa: S603
    assert f'pip install "autoregembed-rag[{extra}]"' in done.stderr
