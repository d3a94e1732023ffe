"""LoRA: one copy of the base for encoder and decoder, which get in each other's way in nothing."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from lora_models import BASES, TEXTS, K, adapter_weights, disturb, pair
from tiny_models import write_base
from torch import Tensor

from autoregembed_rag import AutoRegEncoder, FrozenDecoder
from autoregembed_rag.loading import embedding_table
from autoregembed_rag.passes import compressed_states
from autoregembed_rag.prompt import pad_right
from autoregembed_rag.training.lora import LoraArguments, base_alone
from autoregembed_rag.training.stage import recompute_activations

pytest.importorskip("peft")


class Kin(NamedTuple):
    base: Path
    encoder: AutoRegEncoder
    decoder: FrozenDecoder


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {family: write_base(folder / family, family) for family in BASES}


@pytest.fixture(params=BASES)
def kin(request: pytest.FixtureRequest, bases: dict[str, Path]) -> Kin:
    base = bases[request.param]
    return Kin(base, *pair(base))


def test_a_fresh_encoder_is_the_one_that_from_base_makes(kin: Kin):
    expected = AutoRegEncoder.from_base(kin.base, K, device="cpu", dtype="float32")
    np.testing.assert_allclose(kin.encoder.compress(TEXTS), expected.compress(TEXTS), atol=1e-6)
    assert kin.encoder.prompts.build(TEXTS, "x").ids == expected.prompts.build(TEXTS, "x").ids
    assert kin.encoder.config == expected.config
    assert kin.encoder.has_adapter
    assert not expected.has_adapter


def storages(model: torch.nn.Module) -> dict[int, int]:
    """Bytes of each piece of memory that the parameters live in."""
    memory = [weight.untyped_storage() for weight in model.parameters()]
    return {piece.data_ptr(): piece.nbytes() for piece in memory}


def test_the_base_is_in_memory_once(kin: Kin):
    assert kin.decoder.model.base_model is kin.encoder.model.get_base_model()
    tables = [embedding_table(one.model).data_ptr() for one in (kin.encoder, kin.decoder)]
    assert tables[0] == tables[1], "a look at the table makes no copy"
    alone = FrozenDecoder.from_pretrained(kin.base, device="cpu", dtype="float32")
    adapter = sum(weight.nbytes for weight in adapter_weights(kin.encoder).values())
    both = storages(kin.encoder.model) | storages(kin.decoder.model)
    spare = 0 if "gpt2" in kin.base.name else K * kin.encoder.hidden_size * 4  # rows by which the table grew
    assert sum(both.values()) == sum(storages(alone.model).values()) + adapter + spare


def test_what_trains_is_the_adapter_and_the_rows_of_the_compressed_tokens(kin: Kin):
    names = [*adapter_weights(kin.encoder)]
    assert sum("trainable_tokens_delta" in name for name in names) == 1
    assert all("lora_" in name or "trainable_tokens_delta" in name for name in names)
    assert sum(weight.requires_grad for weight in kin.decoder.model.parameters()) == len(names), (
        "nor the head"
    )
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in names if "lora_" in name} >= (
        {"c_attn", "c_proj", "c_fc"} if "gpt2" in kin.base.name else {"q_proj", "o_proj", "down_proj"}
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_shared_decoder_says_what_a_decoder_of_its_own_says(bases, dtype):
    for family in BASES:
        encoder, shared = pair(bases[family], dtype=dtype)
        alone = FrozenDecoder.from_pretrained(bases[family], device="cpu", dtype=dtype)
        vectors = encoder.compress(TEXTS)
        for _ in ("before training", "after it"):
            np.testing.assert_array_equal(shared.log_prob(vectors, TEXTS), alone.log_prob(vectors, TEXTS))
            assert shared.generate(vectors, max_new_tokens=8) == alone.generate(vectors, max_new_tokens=8)
            disturb(encoder)
        assert np.abs(encoder.compress(TEXTS) - vectors).max() > 0.01, "the adapter does something"
        logits = shared.model(torch.tensor([[1, 2]])).logits
        assert logits.shape == alone.model(torch.tensor([[1, 2]])).logits.shape, "no word was added"
        assert shared.model.config.vocab_size == alone.model.config.vocab_size


def test_the_adapter_stays_in_float32_over_a_base_in_bfloat16(tiny_base: Path):
    encoder, decoder = pair(tiny_base, dtype="bfloat16")
    assert {weight.dtype for weight in adapter_weights(encoder).values()} == {torch.float32}
    assert {weight.dtype for weight in decoder.model.parameters() if not weight.requires_grad} == {
        torch.bfloat16
    }


def gradients(encoder: AutoRegEncoder, decoder: FrozenDecoder, *, recompute: bool) -> dict[str, Tensor]:
    """Of a loss that encodes, decodes, encodes again and decodes again, in train mode, dropout included."""
    weights = adapter_weights(encoder)
    model = encoder.model.train()
    if recompute:
        recompute_activations(model)
    torch.manual_seed(0)
    loss = torch.zeros(())
    for texts in (TEXTS[:2], TEXTS[2:]):
        ids, lengths = pad_right(encoder.prompts.build(texts, "again").ids)
        states = compressed_states(model, ids, lengths, K)
        loss = loss - decoder.target_log_probs(states, decoder.target_ids(texts)).mean()
    loss.backward()
    assert model.training
    return {name: weight.grad.clone() for name, weight in weights.items()}


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_those_of_two_separate_copies(kin: Kin, recompute):
    arguments = LoraArguments(rank=4, alpha=8, dropout=0.2)
    (encoder, decoder), (twin, _) = pair(kin.base, arguments), pair(kin.base, arguments)
    alone = FrozenDecoder.from_pretrained(kin.base, device="cpu", dtype="float32")
    for one in (encoder, twin):
        disturb(one)
    found = gradients(encoder, decoder, recompute=recompute)
    expected = gradients(twin, alone, recompute=recompute)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        assert (found[name] - gradient).norm() <= 1e-6 * gradient.norm(), name
    assert all(weight.grad is None for weight in decoder.model.parameters() if not weight.requires_grad)


def state(body: torch.nn.Module) -> list[object]:
    switches = [getattr(module, "disable_adapters", None) for module in body.modules()]
    return [
        [switch for switch in switches if isinstance(switch, bool)],
        [module.training for module in body.modules()],
        [weight.requires_grad for weight in body.parameters()],
    ]


def test_the_base_alone_is_left_as_it_was_entered(tiny_base: Path):
    encoder, decoder = pair(tiny_base)
    body = encoder.model.get_base_model().train()
    body.layers[0].eval()  # not all in one mode
    before = state(body)
    alone = base_alone(body)
    with alone():
        inside = state(body)
        assert all(inside[0])
        assert not any(inside[1])
        assert inside[2] == before[2]
        with alone():
            assert state(body) == inside
        assert state(body) == inside
    assert state(body) == before
    with pytest.raises(ValueError, match="in the middle"), alone():
        raise ValueError("in the middle")
    assert state(body) == before
    assert not any(before[0])
    with pytest.raises(IndexError):
        decoder.target_log_probs(torch.zeros(1, K, encoder.hidden_size), [[10**6]])
    assert state(body) == before


def test_a_few_steps_lower_the_loss_and_leave_the_base_as_it_is(tiny_base: Path):
    encoder, decoder = pair(tiny_base)
    digest = {
        name: weight.clone() for name, weight in decoder.model.named_parameters() if not weight.requires_grad
    }
    weights = adapter_weights(encoder)
    optimizer = torch.optim.Adam(weights.values(), lr=1e-2)
    ids, lengths = pad_right(encoder.prompts.build(TEXTS, "again").ids)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        states = compressed_states(encoder.model, ids, lengths, K)
        loss = -decoder.target_log_probs(states, decoder.target_ids(TEXTS)).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(
        torch.equal(weight, digest[name])
        for name, weight in decoder.model.named_parameters()
        if name in digest
    )


def test_a_fresh_adapter_is_the_same_every_time_and_leaves_the_seed_alone(tiny_base: Path):
    torch.manual_seed(7)
    first, _ = pair(tiny_base)
    drawn, fingerprint = torch.rand(3), first.fingerprint
    torch.manual_seed(8)
    assert pair(tiny_base)[0].fingerprint == fingerprint
    assert not torch.equal(torch.rand(3), drawn)
    assert pair(tiny_base, LoraArguments(rank=4, alpha=8, seed=1))[0].fingerprint != fingerprint


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"rank": 0}, "rank must be a whole number"),
        ({"rank": 2.5}, "rank must be a whole number"),
        ({"alpha": 0}, "alpha must be above 0"),
        ({"dropout": 1.0}, "dropout is a share"),
        ({"target_modules": ()}, "target_modules names no layer"),
    ],
)
def test_settings_are_checked_where_they_are_made(what, message):
    with pytest.raises(ValueError, match=message):
        LoraArguments(**what)


def test_only_the_named_layers_get_an_adapter(tiny_base: Path):
    encoder, _ = pair(tiny_base, LoraArguments(rank=4, alpha=8, target_modules=("q_proj", "v_proj")))
    names = [name for name in adapter_weights(encoder) if "lora_" in name]
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in names} == {"q_proj", "v_proj"}
