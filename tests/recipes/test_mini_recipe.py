"""The recipe at its smallest size, on a corpus of a few hundred made-up rows."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaModel

from autoregembed_rag import AutoRegEncoder, FrozenDecoder
from recipes.mini import bag
from recipes.mini.__main__ import main
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
    write("pairs.jsonl", [{"query": f"what {v} {a}?", "pos": f"{a} {v} it.", "source": "s"} for a, v in rows])
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

    # A second run goes on where the first stopped: here after the last stage but one.
    (work / "contrasted.seconds").unlink()
    before = {file: file.stat().st_mtime_ns for file in work.glob("*.seconds")}
    main(corpus=corpus, work=work, size="tiny", output=output, seed=0)
    assert all(file.stat().st_mtime_ns == stamp for file, stamp in before.items())
    assert AutoRegEncoder.from_pretrained(output).fingerprint == encoder.fingerprint


def test_the_warm_start_writes_the_bag_into_the_first_layer(tmp_path):
    """The vector at the last position points where the sum of the token vectors points."""
    train_tokenizer(sentences(0, 200), 320, 64, tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    torch.manual_seed(0)
    dimension = 64 - bag.RESERVED
    vectors = torch.randn(len(tokenizer), dimension) * torch.rand(len(tokenizer), 1).mul(2).exp()
    bag.save_file({"vectors": vectors}, tmp_path / "bag.safetensors")
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 1,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=64,
    )
    model = LlamaModel(config).eval()
    bag.warm_start(model, tmp_path / "bag.safetensors", silence_later_layers=True)
    with torch.no_grad():
        silent = model.get_input_embeddings().weight[-1]
        silent.zero_()
        silent[-2:] = torch.tensor([-8.0, 1.0]) * bag.LENGTH_SCALE
    for text in sentences(1, 5):
        ids = bag._token_ids(tokenizer, [text])[0]
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([[*ids, len(tokenizer)]])).last_hidden_state[0, -1]
        summed = vectors[ids].sum(0)
        assert torch.cosine_similarity(hidden[:dimension], summed, dim=0) > 0.97
