"""Corpora, and folders of shards as rows."""

import json

import numpy as np

from autoregembed_rag.sharding import read_shards

SENTENCE = "the quick brown fox jumps over a lazy dog near the river bank and finds vitamin in green peppers"
WORDS = SENTENCE.split()


def make_documents(count, longest=24):
    rng = np.random.default_rng(0)
    return [
        {
            "_id": f"doc-{number}",
            "title": f"Ünïcode {number}" if number % 3 else "",
            "text": " ".join(rng.choice(WORDS, rng.integers(3, longest))),
            "metadata": {"number": number, "tags": ["a", None], "nested": {"ja": True}},
        }
        for number in range(count)
    ]


def write_lines(file, documents):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in documents), encoding="utf-8"
    )
    return file


def rows_of(folder):
    """Every document of a folder of shards: (id, text, metadata, vector's bytes)."""
    return [
        (*document, vector.tobytes())
        for batch in read_shards(folder)
        for *document, vector in zip(*batch, strict=True)
    ]
