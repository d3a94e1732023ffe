"""The last layer computes what is read of it, and nothing else changes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModel

from autoregembed_rag import AutoRegEncoder
from autoregembed_rag.last_layer import last_layer_at
from autoregembed_rag.passes import compressed_states
from autoregembed_rag.prompt import pad_right
from autoregembed_rag.training.stage import recompute_activations

K = 5
TEXTS = [
    "fox",
    "the quick brown fox jumps over the lazy dog and the river bank",
    "a lemon near the pepper",
    "",
]


@pytest.fixture
def encoder(tiny_checkpoint) -> AutoRegEncoder:
    return AutoRegEncoder.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32")


@pytest.fixture
def untouched(tiny_checkpoint) -> torch.nn.Module:
    """The same body without an encoder around it."""
    return AutoModel.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()


def padded(encoder: AutoRegEncoder) -> tuple[torch.Tensor, torch.Tensor]:
    return pad_right(encoder.prompts.build(TEXTS, "what does it say?").ids)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_states_and_gradients_are_those_of_a_whole_last_layer(encoder, untouched, checkpointing):
    ids, lengths = padded(encoder)
    body = encoder.trainable()
    if checkpointing:
        recompute_activations(body)
        body.train()
    found = compressed_states(body, ids, lengths, K)
    columns = lengths[:, None] - K + torch.arange(K)
    whole = untouched(input_ids=ids).last_hidden_state[torch.arange(len(ids))[:, None], columns]
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)
    towards = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
    (found * towards).sum().backward()
    (whole * towards).sum().backward()
    others = dict(untouched.named_parameters())
    for name, weight in body.named_parameters():
        expected = others[name].grad
        rounding = 1e-6 * float(expected.abs().max())
        torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=rounding, msg=name)


def test_the_last_feed_forward_network_sees_the_compressed_tokens_alone(encoder):
    seen = []
    for layer in encoder.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[:2]))
    ids, lengths = padded(encoder)
    compressed_states(encoder.model, ids, lengths, K)
    assert seen == [*[ids.shape] * (len(encoder.model.layers) - 1), (len(ids), K)]


def test_two_encoders_may_share_a_body(encoder, untouched):
    another = AutoRegEncoder(encoder.model, encoder.tokenizer, encoder.config)
    assert (another.encode_queries(TEXTS) == encoder.encode_queries(TEXTS)).all()
    test_states_and_gradients_are_those_of_a_whole_last_layer(another, untouched, checkpointing=False)


def test_a_body_with_an_encoder_around_it_still_computes_all_its_states(encoder, untouched):
    ids, lengths = padded(encoder)
    whole = untouched(input_ids=ids).last_hidden_state
    assert torch.equal(encoder.model(input_ids=ids).last_hidden_state, whole)
    with last_layer_at(lengths[:, None] - 1, ids.shape[1]), ThreadPoolExecutor(1) as another_thread:
        found = another_thread.submit(lambda: encoder.model(input_ids=ids).last_hidden_state).result()
    assert torch.equal(found, whole)
