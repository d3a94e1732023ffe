"""Fine-tuning as LlamaIndex asks for it: nodes or questions in, an embedding out."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from llama_index.core import Document

from autoregembed_rag import AutoRegEncoder
from autoregembed_rag.finetuning.run import FinetuneArguments
from autoregembed_rag.training.arguments import ContrastArguments
from llama_index.embeddings.autoregembed import AutoRegEmbedding, AutoRegFinetuneEngine

THINGS = ["fox", "dog", "river", "bank", "lemon", "pepper", "vector", "reader"]
TEXTS = {
    thing: f"Nobody has yet seen a {thing} like this one. Sometimes people find a {thing} near the house."
    for thing in THINGS
}
SHORT = FinetuneArguments(
    compression=None,
    alignment=None,
    contrast=ContrastArguments(batch_size=4, bf16=False, max_steps=2),
    held_out=0.3,
)


def engine(dataset, output, model) -> AutoRegFinetuneEngine:
    return AutoRegFinetuneEngine(dataset, output, model, SHORT, device="cpu", announce=lambda _: None)


def test_documents_become_a_fine_tuned_embedding(tiny_checkpoint, tmp_path, caplog):
    nodes = [
        Document(text=text, metadata={"title": f"All about every {thing}", "page": 3})
        for thing, text in TEXTS.items()
    ]
    tuning = engine(nodes, tmp_path / "out", tiny_checkpoint)
    with pytest.raises(RuntimeError, match="call finetune"):
        tuning.get_finetuned_model()
    tuning.finetune()
    assert tuning.report is not None
    assert tuning.report.plan.counts["documents"] == len(THINGS)
    assert tuning.report.plan.counts["title pairs"] > 0
    assert ("not better" in caplog.text) == (not tuning.report.better)
    embedding = tuning.get_finetuned_model(num_tokens=2)
    assert isinstance(embedding, AutoRegEmbedding)
    start = AutoRegEncoder.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32", num_tokens=2)
    trained = embedding.get_query_embedding("a fox")
    assert np.shape(trained) == (start.dimension,)
    assert np.abs(np.array(trained) - start.encode_queries(["a fox"])[0]).max() > 1e-6


def test_questions_with_their_answers_are_trained_on(tiny_checkpoint, tmp_path):
    questions = SimpleNamespace(
        queries={thing: f"Where can one find the {thing}?" for thing in THINGS},
        corpus=TEXTS,
        relevant_docs={thing: [thing] for thing in THINGS},
    )
    tuning = engine(questions, tmp_path / "out", tiny_checkpoint)
    tuning.finetune()
    assert tuning.report is not None
    counts = tuning.report.plan.counts
    assert counts["queries"] + counts["queries held out"] == len(THINGS)


def test_what_cannot_be_trained_on_is_refused_at_once(tiny_checkpoint, tmp_path):
    for dataset in (3, ["a text"], {"text": "a"}):
        with pytest.raises(TypeError, match="dataset must be"):
            engine(dataset, tmp_path / "out", tiny_checkpoint)
    with pytest.raises(TypeError, match="epochs"):
        engine(tmp_path, tmp_path / "out", tiny_checkpoint).finetune(epochs=3)


def test_the_embedding_alone_imports_nothing_of_training():
    code = (
        "import sys; from llama_index.embeddings.autoregembed import AutoRegEmbedding;"
        "print('accelerate' in sys.modules, any('training' in m for m in sys.modules if 'autoregembed' in m))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603
    assert shown.stdout.split()[1] == "False"
