"""The recipe at its smallest size, on a corpus of a few hundred made-up rows."""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaModel

from autoregembed_rag import AutoRegEncoder, FrozenDecoder
from autoregembed_rag.config import AutoRegConfig
from autoregembed_rag.loading import add_embed_tokens
from autoregembed_rag.training.data import AlignmentRow
from recipes.mini import bag, base_lm
from recipes.mini.__main__ import main
from recipes.mini.base_lm import llama
from recipes.mini.sizes import SIZES
from recipes.mini.tokenizer import train_tokenizer

SUBJECTS = [
    "fox",
    "dog",
    "river",
    "bank",
    "vector",
    "answer",
    "question",
    "lemon",
    "passage",
    "reader",
    "model",
    "book",
    "city",
    "law",
    "star",
    "cell",
]
VERBS = ["finds", "sees", "explains", "contains", "follows", "improves", "reaches", "describes"]


def sentences(seed: int, n: int) -> list[str]:
    rng = random.Random(seed)
    return [
        f"The {rng.choice(SUBJECTS)} {rng.choice(VERBS)} the {rng.choice(SUBJECTS)} near the {rng.choice(SUBJECTS)}."
        for _ in range(n)
    ]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write = lambda name, rows: (folder / name).write_text("\n".join(map(json.dumps, rows)))  # noqa: E731
    write("pretrain-000.jsonl", [{"source": "s", "text": " ".join(sentences(i, 40))} for i in range(60)])
    rows = list(itertools.product(SUBJECTS, VERBS))
    write(
        "compress.jsonl",
        [
            {"context": f"{a} {v}", "instruction": "Repeat.", "output": f"{a} {v}", "source": "s"}
            for a, v in rows
        ],
    )
    asked = {"s": "what {v} {a}?", "t": "who is it that {v} {a}?"}
    write(
        "pairs.jsonl",
        [
            {"query": question.format(v=v, a=a), "pos": f"{a} {v} it.", "source": source}
            for source, question in asked.items()
            for a, v in rows
        ],
    )
    return folder


def test_the_tiny_recipe_makes_a_checkpoint_that_loads_scores_and_is_not_made_twice(corpus, tmp_path):
    work, output = tmp_path / "work", tmp_path / "mini"
    main(corpus=corpus, work=work, size="tiny", output=output, seed=0)
    encoder = AutoRegEncoder.from_pretrained(output)
    decoder = FrozenDecoder.from_pretrained(output)
    texts = ["The fox finds the river.", "A law explains the city."]
    vectors = encoder.encode_documents(texts)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert np.isfinite(decoder.log_prob(encoder.compress(texts), texts)).all()
    card = (output / "README.md").read_text()
    assert encoder.fingerprint in card
    assert "{" not in card.replace("```", "")

    # Stages can be made one by one: the start is a checkpoint of its own.
    partial = tmp_path / "partial"
    main(corpus=corpus, work=partial, size="tiny", output=tmp_path / "none", seed=0, until="start")
    assert {file.stem for file in partial.glob("*.seconds")} == {"tokenizer", "bag.safetensors", "start"}
    assert AutoRegEncoder.from_pretrained(partial / "start").encode_documents(texts).shape == vectors.shape
    assert not (tmp_path / "none").exists()

    # A second run goes on where the first stopped: here after the last stage but one.
    (work / "aligned.seconds").unlink()
    before = {file: file.stat().st_mtime_ns for file in work.glob("*.seconds")}
    main(corpus=corpus, work=work, size="tiny", output=output, seed=0)
    assert all(file.stat().st_mtime_ns == stamp for file, stamp in before.items())
    assert AutoRegEncoder.from_pretrained(output).fingerprint == encoder.fingerprint


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(sentences(0, 200), 320, 512, folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def bag_and_encoder(tokenizer, tmp_path_factory: pytest.TempPathFactory):
    """A bag of random vectors of many lengths, and the encoder that is to compute it."""
    hidden = 320
    torch.manual_seed(0)
    vectors = torch.randn(len(tokenizer), hidden - bag.RESERVED) * torch.rand(len(tokenizer), 1).mul(2).exp()
    file = tmp_path_factory.mktemp("bag") / "bag.safetensors"
    bag.save_file({"vectors": vectors}, file)
    tokenizer = copy.deepcopy(tokenizer)
    add_embed_tokens(tokenizer, 5)
    size = replace(SIZES["tiny"], hidden_size=hidden, num_heads=5)
    encoder = AutoRegEncoder(LlamaModel(llama(tokenizer, size, hidden)).eval(), tokenizer, AutoRegConfig())
    bag.write_bag(encoder, file)
    return torch.nn.EmbeddingBag.from_pretrained(vectors, mode="sum"), encoder


TEXTS = ["The fox finds the river.", "law", " ".join(sentences(1, 6)), " ".join(sentences(2, 40))]


@pytest.mark.parametrize("instruction", ["next", "self"])
def test_the_start_computes_the_bag_at_every_compressed_token(bag_and_encoder, instruction):
    table, encoder = bag_and_encoder
    expected = bag.embed(table, bag.tokens_of(encoder.tokenizer, TEXTS, limit=480)).numpy()
    for vectors in encoder.compress(TEXTS, instruction).swapaxes(0, 1):
        found = vectors[:, : -bag.RESERVED]
        found /= np.linalg.norm(found, axis=1, keepdims=True)
        assert ((found * expected).sum(axis=1) > 0.985).all()


def test_the_bag_is_the_weighted_sum_of_the_token_vectors(bag_and_encoder):
    table, encoder = bag_and_encoder
    for text, found in zip(
        TEXTS, bag.embed(table, bag.tokens_of(encoder.tokenizer, TEXTS, 480)), strict=True
    ):
        ids = encoder.tokenizer(text, add_special_tokens=False)["input_ids"][:480]
        expected = torch.zeros(table.weight.shape[1])
        for position, token in enumerate(ids):
            expected += math.exp(-5 * position / (300 + position)) * table.weight[token]
        np.testing.assert_allclose(found, expected / expected.norm(), atol=1e-5)


def test_a_bag_of_another_width_is_refused(bag_and_encoder, tmp_path):
    _, encoder = bag_and_encoder
    bag.save_file({"vectors": torch.ones(10, 62)}, tmp_path / "bag.safetensors")
    with pytest.raises(ValueError, match="needs 318"):
        bag.write_bag(encoder, tmp_path / "bag.safetensors")


def test_batches_hold_pairs_of_one_source_or_passages_with_the_beginning_of_their_document(tokenizer):
    sources = {
        name: [AlignmentRow(f"{name} {i}", f"answer {i}", ()) for i in range(40)] for name in ("law", "star")
    }
    documents = [" ".join(sentences(seed, 40)) for seed in range(40)]
    ids = {name: bag.tokens_of(tokenizer, [row.query for row in rows]) for name, rows in sources.items()}
    known = {tuple(query): name for name, of_source in ids.items() for query in of_source}
    starts = {tuple(tokens[:20]) for tokens in bag.tokens_of(tokenizer, documents)}
    kinds = []
    for batch in itertools.islice(bag.batches(sources, documents, tokenizer, 16, seed=1), 400):
        assert len(batch) == 16
        found = {known.get(tuple(query)) for query, _ in batch}
        if found == {None}:
            assert all(tuple(positive[:20]) in starts for _, positive in batch)
            assert all(6 <= len(query) <= 40 for query, _ in batch)
        kinds.append("documents" if found == {None} else "mixed" if len(found) == 2 else "one")
    shares = {kind: kinds.count(kind) / len(kinds) for kind in kinds}
    assert shares["documents"] == pytest.approx(bag.DOCUMENTS, abs=0.1)
    assert shares["one"] == pytest.approx((1 - bag.DOCUMENTS) * bag.ONE_SOURCE, abs=0.1)


def test_the_default_instructions_are_one_token_each_and_silent_in_the_start(bag_and_encoder):
    _, encoder = bag_and_encoder
    short = {
        name: encoder.prompts.build(["fox"], encoder._instruction(name)).ids[0] for name in ("next", "self")
    }
    words = encoder.prompts.build(["fox"], "Name the animal.").ids[0]
    assert len(short["next"]) == len(short["self"]) < len(words)
    vectors = [encoder.encode(["The fox finds the river."], name)[0] for name in ("next", "self")]
    assert float(vectors[0] @ vectors[1]) > 0.99


def test_the_loss_of_writing_from_vectors_is_the_decoders_log_probability_per_token(tiny_base):
    decoder = FrozenDecoder.from_pretrained(tiny_base, device="cpu", dtype="float32")
    vectors = torch.randn(3, 5, decoder.hidden_size, generator=torch.Generator().manual_seed(0))
    targets = decoder.target_ids(["The fox.", "A law explains the city near the river.", "law"])
    window = torch.arange(8)
    batch = base_lm.collate([(window, vectors[:2], targets[:2]), (window, vectors[2:], targets[2:])])
    expected = -decoder.target_log_probs(vectors, targets).sum() / sum(map(len, targets))
    with torch.no_grad():
        found = base_lm.writing_loss(decoder.model, batch)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    assert batch["input_ids"].tolist() == [window.tolist()] * 2


def test_every_row_is_read_once_with_its_own_target(bag_and_encoder, tmp_path):
    _, encoder = bag_and_encoder
    rows = [AlignmentRow(f"what sees {subject}?", f"the {subject} finds it.", ()) for subject in SUBJECTS]
    base_lm.write_reading(encoder, rows, 64, tmp_path / "reading.safetensors")
    np.save(tmp_path / "packed.npy", np.arange(320, dtype=np.uint16))
    text = base_lm.Text(tmp_path / "packed.npy", tmp_path / "reading.safetensors", 40)
    expected = {}
    half = len(rows) // 2
    for row, read, instruction in [
        *((row, row.query, "next") for row in rows[:half]),
        *((row, row.pos, "self") for row in rows[half:]),
    ]:
        target = encoder.tokenizer(row.pos, add_special_tokens=False)["input_ids"]
        expected[(*target, encoder.tokenizer.eos_token_id)] = encoder.compress([read], instruction)[0]
    items = [text[index] for index in range(len(text))]
    found = [pair for _, vectors, targets in items for pair in zip(vectors, targets, strict=True)]
    assert len(found) == len(rows)
    for vectors, target in found:
        np.testing.assert_allclose(vectors, expected[tuple(target)], atol=1e-2)
    assert torch.cat([window for window, _, _ in items]).tolist() == list(range(320))
