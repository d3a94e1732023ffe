"""From compressed vectors to embeddings: pooling, num_tokens, instructions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoregembed_rag import AutoRegEncoder, truncate
from autoregembed_rag.config import DOCUMENT_INSTRUCTION, QUERY_INSTRUCTION
from autoregembed_rag.pooling import pool

TEXTS = ["A quick fox.", "Oranges and lemons.", "", "the river bank " * 5]


def load(folder: Path, **arguments) -> AutoRegEncoder:
    return AutoRegEncoder.from_pretrained(folder, device="cpu", dtype="float32", **arguments)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def test_flattened_rows_are_float32_unit_vectors_of_equal_blocks(encoder: AutoRegEncoder):
    vectors = encoder.encode_documents(TEXTS)
    assert vectors.dtype == np.float32
    assert vectors.shape == (4, encoder.dimension) == (4, 5 * 32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors.reshape(4, 5, 32), axis=2), 5**-0.5, atol=1e-6)


def test_an_inner_product_of_flattened_rows_is_the_mean_cosine(encoder: AutoRegEncoder):
    queries, documents = unit(encoder.compress(TEXTS, "next")), unit(encoder.compress(TEXTS, "self"))
    cosines = np.einsum("qkh,dkh->qdk", queries, documents)
    found = encoder.encode_queries(TEXTS) @ encoder.encode_documents(TEXTS).T
    np.testing.assert_allclose(found, cosines.mean(axis=2), atol=1e-6)


def test_mean_pooling_is_the_normalised_mean(encoder: AutoRegEncoder, tiny_checkpoint: Path):
    mean = load(tiny_checkpoint, pooling="mean")
    assert mean.dimension == 32
    expected = unit(encoder.compress(TEXTS, "next").astype(np.float64).mean(axis=1))
    np.testing.assert_allclose(mean.encode_queries(TEXTS), expected, atol=1e-6)


@pytest.mark.parametrize("j", [1, 2, 4, 5])
def test_num_tokens_is_the_first_blocks_of_the_full_embedding_renormalised(
    encoder: AutoRegEncoder, tiny_checkpoint: Path, j
):
    truncated = load(tiny_checkpoint, num_tokens=j)
    vectors = truncated.encode_documents(TEXTS)
    assert vectors.shape == (4, truncated.dimension) == (4, j * 32)
    full = encoder.encode_documents(TEXTS)[:, : j * 32]
    np.testing.assert_allclose(vectors, full * np.sqrt(5 / j), atol=1e-6)
    np.testing.assert_allclose(vectors, unit(full), atol=1e-6)
    assert truncated.compress(TEXTS).shape == (4, 5, 32), "the decoder reads all k"


@pytest.mark.parametrize("j", [1, 2, 3, 4, 5])
def test_truncating_is_encoding_with_fewer_tokens(encoder: AutoRegEncoder, tiny_checkpoint: Path, j):
    short = load(tiny_checkpoint, num_tokens=j)
    for full, fewer in (
        (encoder.encode_documents(TEXTS), short.encode_documents(TEXTS)),
        (encoder.encode_queries([])[:0], short.encode_queries([])),
    ):
        cut = truncate(full, 5, j)
        assert cut.dtype == np.float32
        np.testing.assert_array_equal(cut, fewer)
        assert not np.shares_memory(cut, full)
    one = encoder.encode_queries(TEXTS[:1])[0]
    np.testing.assert_array_equal(truncate(one.tolist(), 5, j), short.encode_queries(TEXTS[:1])[0])


@given(
    tokens=st.integers(1, 6),
    width=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    data=st.data(),
)
def test_truncated_rows_are_unit_vectors_and_truncating_twice_is_truncating_once(
    tokens, width, seed, dtype, data
):
    compressed = torch.from_numpy(np.random.default_rng(seed).normal(size=(3, tokens, width)))
    full = pool(compressed, "flatten").numpy().astype(dtype)
    few = data.draw(st.integers(1, tokens))
    cut = truncate(full, tokens, few)
    assert cut.shape == (3, few * width)
    np.testing.assert_allclose(np.linalg.norm(cut, axis=1), 1, atol=5e-3 if dtype == np.float16 else 1e-6)
    np.testing.assert_allclose(cut, pool(compressed[:, :few], "flatten").numpy(), atol=2e-3)
    fewer = data.draw(st.integers(1, few))
    np.testing.assert_allclose(truncate(cut, few, fewer), truncate(full, tokens, fewer), atol=1e-6)


@pytest.mark.parametrize(
    ("tokens", "num_tokens", "message"),
    [
        (5, 0, "num_tokens must be between 1 and 5, not 0"),
        (5, 6, "num_tokens must be between 1 and 5, not 6"),
        (0, 1, "num_tokens must be between 1 and 0, not 1"),
        (3, 2, r"dimension 160 is not made of 3 tokens.*pooling=\"flatten\""),
        (4, 2, r"not unit vectors of 4 tokens of equal length.*number of tokens of that encoder"),
    ],
)
def test_what_cannot_be_truncated_is_refused(encoder: AutoRegEncoder, tokens, num_tokens, message):
    with pytest.raises(ValueError, match=message):
        truncate(encoder.encode_documents(TEXTS), tokens, num_tokens)


def test_a_mean_cannot_be_truncated_after_pooling(tiny_checkpoint: Path):
    mean = load(tiny_checkpoint, pooling="mean").encode_documents(TEXTS)
    for tokens, why in ((5, "dimension 32 is not made of 5"), (4, "not unit vectors of 4 tokens")):
        with pytest.raises(ValueError, match=rf"{why}.*pooling=\"flatten\""):
            truncate(mean, tokens, 2)


@pytest.mark.parametrize("j", [0, -1, 6])
def test_num_tokens_out_of_range_is_refused(tiny_checkpoint: Path, j):
    with pytest.raises(ValueError, match=f"num_tokens must be between 1 and 5, not {j}"):
        load(tiny_checkpoint, num_tokens=j)


@pytest.mark.parametrize("j", [2.5, "2", True])
def test_num_tokens_that_is_no_integer_is_refused(encoder: AutoRegEncoder, tiny_checkpoint: Path, j):
    with pytest.raises(TypeError, match=f"num_tokens must be an integer between 1 and 5, not {j!r}"):
        load(tiny_checkpoint, num_tokens=j)
    with pytest.raises(TypeError, match=f"num_tokens must be an integer between 1 and 5, not {j!r}"):
        truncate(encoder.encode_documents(TEXTS), 5, j)


def test_a_mean_cannot_be_truncated(tiny_checkpoint: Path):
    with pytest.raises(ValueError, match=r'num_tokens=2 cannot truncate pooling="mean".*"flatten"'):
        load(tiny_checkpoint, num_tokens=2, pooling="mean")
    assert load(tiny_checkpoint, num_tokens=5, pooling="mean").dimension == 32


def test_the_shorthands_are_encode_under_their_instruction(encoder: AutoRegEncoder):
    queries, documents = encoder.encode_queries(TEXTS), encoder.encode_documents(TEXTS)
    np.testing.assert_array_equal(queries, encoder.encode(TEXTS, "next"))
    np.testing.assert_array_equal(queries, encoder.encode(TEXTS, QUERY_INSTRUCTION))
    np.testing.assert_array_equal(documents, encoder.encode(TEXTS, "self"))
    np.testing.assert_array_equal(documents, encoder.encode(TEXTS, DOCUMENT_INSTRUCTION))


def test_a_query_and_a_document_of_the_same_text_differ(encoder: AutoRegEncoder):
    other = encoder.encode(TEXTS, "Name the topic.")
    vectors = [encoder.encode_queries(TEXTS), encoder.encode_documents(TEXTS), other]
    for i, first in enumerate(vectors):
        for second in vectors[:i]:
            assert (np.abs(first - second).max(axis=1) > 1e-3).all()


def test_instructions_can_be_changed_at_loading(encoder: AutoRegEncoder, tiny_checkpoint: Path):
    changed = load(tiny_checkpoint, query_instruction="Name the topic.", document_instruction="Say it.")
    np.testing.assert_array_equal(changed.encode_queries(TEXTS), encoder.encode(TEXTS, "Name the topic."))
    np.testing.assert_array_equal(changed.encode_documents(TEXTS), encoder.encode(TEXTS, "Say it."))


def test_no_texts_give_no_rows(encoder: AutoRegEncoder):
    assert encoder.encode_queries([]).shape == (0, 160)
    assert encoder.encode_documents([]).dtype == np.float32
    assert encoder.compress([]).shape == (0, 5, 32)
    assert encoder.count_tokens([]) == []


ODD = [
    "",
    " ",
    "\n\t ",
    "🙂👩‍👩‍👧‍👦",
    "\ud800",
    "a\udfffb",
    "nul\0byte",
    "\0",
    "\ufffd",
    "\ufeff",
    "\u202e",
    "e\u0301",
]


def test_odd_texts_embed_as_unit_vectors_that_are_the_same_alone_and_together(encoder: AutoRegEncoder):
    vectors = encoder.encode_documents(ODD)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    alone = np.concatenate([encoder.encode_documents([text]) for text in ODD])
    np.testing.assert_allclose(vectors, alone, atol=1e-5)


def test_a_lone_surrogate_embeds_as_the_replacement_character(encoder: AutoRegEncoder):
    broken, replaced, paired, emoji = encoder.encode_documents(["a\ud800b", "a\ufffdb", "\ud83d\ude42", "🙂"])
    np.testing.assert_array_equal(broken, replaced)
    np.testing.assert_array_equal(paired, emoji)


@pytest.mark.parametrize("call", ["encode", "encode_queries", "encode_documents", "compress", "count_tokens"])
@pytest.mark.parametrize(
    ("wrong", "kind"), [(3, "int"), (None, "NoneType"), (b"x", "bytes"), (["x"], "list")]
)
def test_what_is_not_text_is_named_by_index_and_type(encoder: AutoRegEncoder, call, wrong, kind):
    with pytest.raises(TypeError, match=rf"texts\[1\] must be str, not {kind}"):
        getattr(encoder, call)(["fine", wrong])


@pytest.mark.parametrize("call", ["encode", "encode_queries", "encode_documents", "compress"])
def test_a_bare_string_is_refused(encoder: AutoRegEncoder, call):
    with pytest.raises(TypeError, match=r"not one str: pass \[text\]"):
        getattr(encoder, call)("a text")


def test_texts_may_come_from_any_iterable_once(encoder: AutoRegEncoder):
    np.testing.assert_array_equal(encoder.encode(text for text in TEXTS), encoder.encode(tuple(TEXTS)))


def test_bad_arguments_are_named(encoder: AutoRegEncoder):
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        encoder.encode(TEXTS, batch_size=0)
    with pytest.raises(TypeError, match="instruction must be 'next', 'self' or words, not NoneType"):
        encoder.encode(TEXTS, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no room for text"):
        encoder.encode(TEXTS, "word " * 200)
