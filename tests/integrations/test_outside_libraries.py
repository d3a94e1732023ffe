"""Other projects' classes for sentence-transformers models, given a checkpoint's folder, embed as the encoder does."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sentence_transformers")

PAGE = Path(__file__).parents[2] / "docs" / "sentence-transformers.md"
TEXTS = ["A quick fox.", "Oranges and lemons.", "Who writes the answer?", "</s> is no special token here"]
# As FAISS and friends compare them.
SAME = 0.9999


def cosines(one, two) -> np.ndarray:
    one, two = np.asarray(one), np.asarray(two)
    return (one * two).sum(axis=1) / np.linalg.norm(one, axis=1) / np.linalg.norm(two, axis=1)


@pytest.fixture(scope="module")
def langchain_huggingface():
    return pytest.importorskip("langchain_huggingface", reason="langchain-huggingface is not installed")


@pytest.fixture(scope="module")
def llama_index_huggingface():
    return pytest.importorskip(
        "llama_index.embeddings.huggingface", reason="llama-index-embeddings-huggingface is not installed"
    )


MODEL_KWARGS = {"trust_remote_code": True, "device": "cpu", "model_kwargs": {"dtype": "float32"}}


def test_langchain_huggingface_told_the_prompts_name(langchain_huggingface, tiny_checkpoint: Path, encoder):
    embeddings = langchain_huggingface.HuggingFaceEmbeddings(
        model_name=str(tiny_checkpoint),
        model_kwargs=MODEL_KWARGS,
        query_encode_kwargs={"prompt_name": "query"},
    )
    queries = [embeddings.embed_query(text) for text in TEXTS]
    assert (cosines(queries, encoder.encode_queries(TEXTS)) > SAME).all()
    documents = embeddings.embed_documents(TEXTS)
    assert (cosines(documents, encoder.encode_documents(TEXTS)) > SAME).all()


def test_langchain_huggingface_left_alone_takes_queries_for_documents(
    langchain_huggingface, tiny_checkpoint: Path, encoder
):
    """It calls `encode`, which knows no queries: what docs/sentence-transformers.md warns of."""
    embeddings = langchain_huggingface.HuggingFaceEmbeddings(
        model_name=str(tiny_checkpoint), model_kwargs=MODEL_KWARGS
    )
    queries = [embeddings.embed_query(text) for text in TEXTS]
    assert (cosines(queries, encoder.encode_documents(TEXTS)) > SAME).all()
    assert (cosines(queries, encoder.encode_queries(TEXTS)) < 0.99).all()


def test_llama_index_huggingface_needs_no_prompts(llama_index_huggingface, tiny_checkpoint: Path, encoder):
    embedding = llama_index_huggingface.HuggingFaceEmbedding(
        str(tiny_checkpoint), trust_remote_code=True, device="cpu", model_kwargs={"dtype": "float32"}
    )
    assert embedding.max_length == encoder.config.max_length
    queries = [embedding.get_query_embedding(text) for text in TEXTS]
    assert (cosines(queries, encoder.encode_queries(TEXTS)) > SAME).all()
    for documents in (
        embedding.get_text_embedding_batch(TEXTS),
        [embedding.get_text_embedding(t) for t in TEXTS],
    ):
        assert (cosines(documents, encoder.encode_documents(TEXTS)) > SAME).all()


def test_llama_index_huggingface_takes_other_instructions(
    llama_index_huggingface, tiny_checkpoint: Path, encoder
):
    embedding = llama_index_huggingface.HuggingFaceEmbedding(
        str(tiny_checkpoint),
        query_instruction="Name the topic.",
        text_instruction="Name the place.",
        trust_remote_code=True,
        device="cpu",
        model_kwargs={"dtype": "float32"},
    )
    queries = [embedding.get_query_embedding(text) for text in TEXTS]
    assert (cosines(queries, encoder.encode(TEXTS, "Name the topic.")) > SAME).all()
    documents = embedding.get_text_embedding_batch(TEXTS)
    assert (cosines(documents, encoder.encode(TEXTS, "Name the place.")) > SAME).all()


def test_the_page_about_them_runs_as_written(
    langchain_huggingface, llama_index_huggingface, tmp_path, monkeypatch
):
    mteb = pytest.importorskip("mteb", reason="mteb is not installed")
    from mteb_tasks import Likeness

    monkeypatch.chdir(tmp_path)
    cache = mteb.cache.ResultCache(tmp_path / "results")  # not the user's
    monkeypatch.setattr(mteb, "evaluate", partial(mteb.evaluate, cache=cache))
    snippets = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(snippets) == 5
    names: dict = {"tasks": [Likeness()]}
    asked = []
    for snippet in snippets:
        exec(compile(snippet, PAGE.name, "exec"), names)  # noqa: S102
        asked.append(names.get("vector"))
    encoder = names["encoder"]
    expected = encoder.encode_queries(["How do I copy a folder?"])
    for queries in (
        names["queries"],
        [asked[2]],
        [asked[3]],
        names["model"].encode_query(["How do I copy a folder?"]),
    ):
        assert (cosines(queries, expected) > SAME).all()
    assert names["results"].model_revision == encoder.fingerprint
