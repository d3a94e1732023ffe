"""The same promises for Llama, Mistral, Qwen2, Qwen3 and GPT-2, and for tokenizers of every habit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoregembed_rag import AutoRegEncoder

TEXTS = ["", "A quick fox.", "Vitamin C is found in oranges, lemons and green peppers. " * 2, "🙂 é\n", "   "]


def test_an_encoder_survives_saving_and_loading(kin, tmp_path):
    kin.encoder.save_pretrained(tmp_path)
    loaded = AutoRegEncoder.from_pretrained(tmp_path, device="cpu", dtype="float32")
    assert loaded.fingerprint == kin.encoder.fingerprint
    assert loaded.config == kin.encoder.config
    np.testing.assert_array_equal(loaded.encode_queries(TEXTS), kin.encoder.encode_queries(TEXTS))
    np.testing.assert_array_equal(loaded.compress(TEXTS, "next"), kin.encoder.compress(TEXTS, "next"))


def test_new_tokens_have_rows_of_their_own_and_old_ones_keep_theirs(kin):
    base = kin.decoder.model.get_input_embeddings().weight
    table = kin.encoder.model.get_input_embeddings().weight
    ids = kin.encoder.tokenizer.convert_tokens_to_ids(["<EMBED0>", "<EMBED1>", "<EMBED2>"])
    known = min(ids)
    assert torch.equal(table[:known], base[:known])
    assert len({tuple(row) for row in table[ids].tolist()}) == 3
    # GPT-2's table has rows to spare, so it does not grow.
    assert len(table) == max(len(base), max(ids) + 1)


def test_vectors_are_the_last_hidden_states_of_a_plain_forward_pass(kin):
    for text, found in zip(TEXTS, kin.encoder.compress(TEXTS, "next", batch_size=2), strict=True):
        ids = torch.tensor(kin.encoder.prompts.build([text], kin.encoder.config.query_instruction).ids)
        with torch.no_grad():
            states = kin.encoder.model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        np.testing.assert_allclose(found, states[0, -3:].numpy(), atol=2e-5)


def test_a_text_beyond_the_sliding_window_keeps_its_embedding_in_a_batch(kin):
    long = "the lazy dog near the river bank " * 8
    batch = ["", long, "fox", long + "!"]
    alone = np.concatenate([kin.encoder.encode_documents([text]) for text in batch])
    np.testing.assert_allclose(kin.encoder.encode_documents(batch), alone, atol=1e-5)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    texts=st.lists(st.text(max_size=60), min_size=1, max_size=7),
    batch_size=st.integers(1, 8),
    order=st.randoms(use_true_random=False),
)
def test_padding_composition_order_and_batch_size_change_no_embedding(kin, texts, batch_size, order):
    alone = np.concatenate([kin.encoder.encode_queries([text]) for text in texts])
    places = list(range(len(texts)))
    order.shuffle(places)
    shuffled = kin.encoder.encode_queries([texts[i] for i in places], batch_size=batch_size)
    np.testing.assert_allclose(shuffled, alone[places], atol=1e-5)


@pytest.mark.parametrize("shift", [1, 2])
def test_the_first_vectors_do_not_depend_on_later_ones(kin, shift):
    """A checkpoint of fewer tokens, with the same weights, gives the same first vectors."""
    fewer = AutoRegEncoder(
        kin.encoder.model,
        kin.encoder.tokenizer,
        type(kin.encoder.config)(num_compressed_tokens=3 - shift, max_length=128),
    )
    np.testing.assert_allclose(
        fewer.compress(TEXTS, "self"), kin.encoder.compress(TEXTS, "self")[:, : 3 - shift], atol=2e-5
    )
