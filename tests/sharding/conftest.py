"""A corpus, and a way to encode it."""

import pytest
from shard_files import make_documents, write_lines

from autoregembed_rag.sharding import encode_shards


@pytest.fixture(scope="session")
def run(tiny_checkpoint):
    """Encode with the tiny model: source, folder -> the manifest."""

    def encode(source, output, **settings):
        return encode_shards(source, output, **{"model": tiny_checkpoint, "dtype": "float32", **settings})

    return encode


@pytest.fixture(scope="session")
def documents():
    return make_documents(200)


@pytest.fixture(scope="session")
def corpus(documents, tmp_path_factory):
    """200 documents as JSONL, about 40 kB."""
    return write_lines(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", documents)
