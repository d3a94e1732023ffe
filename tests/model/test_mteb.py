"""mteb runs checkpoints: directly, and as models of sentence-transformers."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("mteb")

import mteb
from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
from mteb_tasks import DOCUMENTS, PAIRS, QUERIES, Finding, Likeness
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer

from autoregembed_rag import AutoRegEncoder
from autoregembed_rag.mteb import AutoRegMteb


def evaluate(model, task) -> float:
    """The main score; nothing is kept on disk."""
    (result,) = mteb.evaluate(model, task(), cache=None, co2_tracker=False).task_results
    return result.scores["test"][0]["main_score"]


def watched(kind: type) -> type:
    """A model that keeps what it encoded: (texts, vectors) of each call."""

    class Watched(kind):
        def encode(self, inputs, **arguments):
            vectors = super().encode(inputs, **arguments)
            self.__dict__.setdefault("seen", []).append(
                ([text for batch in inputs for text in batch["text"]], np.asarray(vectors))
            )
            return vectors

    return Watched


@pytest.fixture(scope="module")
def library(tiny_checkpoint) -> SentenceTransformer:
    arguments = {"device": "cpu", "model_kwargs": {"dtype": "float32"}}
    return SentenceTransformer(str(tiny_checkpoint), trust_remote_code=True, **arguments)


@pytest.fixture(params=["direct", "sentence-transformers"])
def model(request, tiny_checkpoint, library):
    if request.param == "direct":
        return watched(AutoRegMteb)(tiny_checkpoint, device="cpu", dtype="float32")
    return watched(SentenceTransformerEncoderWrapper)(library)


def assert_same(vectors: np.ndarray, expected: np.ndarray) -> None:
    assert vectors.shape == expected.shape
    assert ((vectors * expected).sum(axis=1) > 0.9999).all()


def test_retrieval_asks_with_queries_and_finds_documents(model, encoder):
    score = evaluate(model, Finding)
    by_kind = {len(texts): (texts, vectors) for texts, vectors in model.seen}
    (asked, queries), (found, documents) = by_kind[len(QUERIES)], by_kind[len(DOCUMENTS)]
    assert sorted(asked) == sorted(QUERIES.values())
    assert_same(queries, encoder.encode_queries(asked))
    assert_same(documents, encoder.encode_documents(found))
    best = (queries @ documents.T).argmax(axis=1)
    right = [found[i].strip() == DOCUMENTS["d" + _key(text)[1:]] for text, i in zip(asked, best, strict=True)]
    assert score == pytest.approx(np.mean(right), abs=1e-4)


def _key(text: str) -> str:
    return next(key for key, query in QUERIES.items() if query == text)


def test_similarity_of_sentences_is_symmetric(model, encoder):
    score = evaluate(model, Likeness)
    one, two, scores = zip(*PAIRS, strict=True)
    expected = [encoder.encode_documents(side) for side in (one, two)]
    for (texts, vectors), side, own in zip(model.seen, (one, two), expected, strict=True):
        assert tuple(texts) == side
        assert_same(vectors, own)
    cosines = (expected[0] * expected[1]).sum(axis=1)
    assert score == pytest.approx(spearmanr(scores, cosines).statistic, abs=1e-4)


def test_a_model_of_the_library_scores_the_same_as_it_is(library, tiny_checkpoint):
    direct = AutoRegMteb(tiny_checkpoint, device="cpu", dtype="float32")
    for task in (Finding, Likeness):
        assert evaluate(library, task) == pytest.approx(evaluate(direct, task), abs=1e-6)


def test_results_are_kept_under_the_fingerprint(tiny_checkpoint, encoder):
    meta = AutoRegMteb(tiny_checkpoint, device="cpu").mteb_model_meta
    assert (meta.name, meta.revision) == ("autoregembed/tiny", encoder.fingerprint)
    assert meta.similarity_fn_name.value == "cosine"
    assert meta.embed_dim == 160
    short = AutoRegMteb(tiny_checkpoint, encoder.fingerprint + "-2", device="cpu", num_tokens=2)
    assert short.mteb_model_meta.embed_dim == 64
    with pytest.raises(ValueError, match=f"is revision {encoder.fingerprint}, not main"):
        AutoRegMteb(tiny_checkpoint, "main", device="cpu")


def test_results_of_another_precision_are_kept_apart(tiny_checkpoint, encoder):
    def revision(**settings) -> str:
        return AutoRegMteb(tiny_checkpoint, device="cpu", **settings).mteb_model_meta.revision

    assert revision(dtype="bfloat16") == f"{encoder.fingerprint}-bfloat16"
    assert revision(dtype=torch.float32, num_tokens=2) == f"{encoder.fingerprint}-2-float32"
    settings = {"load_arguments": {"quantize": "int8"}}
    eighth = AutoRegEncoder(encoder.model, encoder.tokenizer, encoder.config, **settings)
    assert AutoRegMteb(eighth).mteb_model_meta.revision.endswith("-int8")


def test_the_folder_one_is_in_has_a_name_too(tiny_checkpoint, monkeypatch):
    monkeypatch.chdir(tiny_checkpoint)
    assert AutoRegMteb(".", device="cpu").mteb_model_meta.name == "autoregembed/tiny"
    monkeypatch.chdir("decoder")
    assert AutoRegMteb("..", device="cpu").mteb_model_meta.name == "autoregembed/tiny"


def test_a_ready_encoder_is_taken_as_it_is(encoder):
    assert AutoRegMteb(encoder).model is encoder
    with pytest.raises(ValueError, match="already loaded takes no settings"):
        AutoRegMteb(encoder, pooling="mean")


def test_another_precision_is_refused(encoder):
    with pytest.raises(ValueError, match="embeddings are float32, not 'int8'"):
        AutoRegMteb(encoder).encode([], task_metadata=None, hf_split="", hf_subset="", precision="int8")


def test_a_missing_library_is_an_error_that_names_the_extra():
    check = "import sys; sys.modules['mteb'] = None; import autoregembed_rag.mteb"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)  # noqa: S603
    assert 'pip install "autoregembed-rag[bench]"' in done.stderr
