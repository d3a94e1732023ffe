"""FrozenDecoder: its scores against a plain computation, token by token, and what it refuses."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import SIZES, build_tokenizer, tiny_llama
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from autoregembed_rag import AutoRegEncoder, FrozenDecoder, chunked
from autoregembed_rag.prompt import TextTokenizer

TEXTS = ["A quick fox.", "Vitamin C is found in oranges.", "the river bank", ""]
TARGETS = ["Oranges hold vitamin C.", "", "🙂 </s> fox", "A reader writes the answer."]


def plain_log_prob(model, tokenizer, states, target):
    """Each token and <eos> by a forward pass of its own; sums in float64. Differentiable."""
    embed = model.get_input_embeddings()
    ids = [*TextTokenizer(tokenizer).encode([target])[0], tokenizer.eos_token_id]
    total = torch.zeros((), dtype=torch.float64)
    for t, token in enumerate(ids):
        read = torch.cat([states[None].to(embed.weight.dtype), embed(torch.tensor([ids[:t]]).long())], dim=1)
        logits = model(inputs_embeds=read).logits[0, -1]
        total = total + logits.double().log_softmax(dim=-1)[token]
    return total


def test_log_prob_is_the_sum_over_tokens_and_eos(kin):
    compressed = kin.encoder.compress(TEXTS, "next")
    found = kin.decoder.log_prob(compressed, TARGETS)
    assert found.dtype == np.float32
    assert found.shape == (4,)
    with torch.no_grad():
        expected = [
            plain_log_prob(kin.decoder.model, kin.decoder.tokenizer, torch.from_numpy(states), target).item()
            for states, target in zip(compressed, TARGETS, strict=True)
        ]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_batch_composition_changes_no_score(kin):
    compressed = kin.encoder.compress(TEXTS, "self")
    together = kin.decoder.log_prob(compressed, TARGETS)
    alone = [kin.decoder.log_prob(compressed[i : i + 1], TARGETS[i : i + 1])[0] for i in range(4)]
    np.testing.assert_allclose(together, alone, atol=1e-4)
    np.testing.assert_allclose(
        kin.decoder.log_prob(compressed[::-1].copy(), TARGETS[::-1], batch_size=3)[::-1], alone, atol=1e-4
    )


def test_generation_is_greedy_and_deterministic(kin):
    compressed = kin.encoder.compress(TEXTS, "self")
    written = kin.decoder.generate(compressed, max_new_tokens=6)
    assert written == kin.decoder.generate(torch.from_numpy(compressed), max_new_tokens=6)
    assert len(written) == 4
    model, tokenizer = kin.decoder.model, kin.decoder.tokenizer
    for states, text in zip(torch.from_numpy(compressed), written, strict=True):
        ids: list[int] = []
        with torch.no_grad():
            while len(ids) < 6 and tokenizer.eos_token_id not in ids:
                embedded = model.get_input_embeddings()(torch.tensor([ids]).long())
                read = torch.cat([states[None], embedded], dim=1)
                ids.append(int(model(inputs_embeds=read).logits[0, -1].argmax()))
        assert text == tokenizer.decode(ids, skip_special_tokens=True)


def test_generation_with_nothing_to_read(decoder: FrozenDecoder):
    assert decoder.generate(np.empty((0, 5, 32), dtype=np.float32)) == []
    assert decoder.log_prob(np.empty((0, 5, 32), dtype=np.float32), []).shape == (0,)


def test_a_cut_target_has_no_eos_and_is_reported(tiny_base: Path, encoder: AutoRegEncoder, caplog):
    short = FrozenDecoder.from_pretrained(tiny_base, device="cpu", dtype="float32", max_target_tokens=4)
    eos = short.tokenizer.eos_token_id
    assert [len(ids) for ids in short.target_ids(["?", "???", "????", "?" * 1000])] == [2, 4, 4, 4]
    assert [ids[-1] == eos for ids in short.target_ids(["?", "???", "????", "?" * 1000])] == [
        True,
        True,
        False,
        False,
    ]
    compressed = encoder.compress(["a", "b", "c"])
    with caplog.at_level(logging.WARNING, "autoregembed_rag"):
        cut = short.log_prob(compressed, ["?", "????", "?" * 1000])
    assert len(caplog.records) == 1
    assert "2 of 3 targets were cut to 4 tokens" in caplog.text
    expected = plain_log_prob(short.model, short.tokenizer, torch.from_numpy(compressed[1]), "????")
    last = plain_log_prob(short.model, short.tokenizer, torch.from_numpy(compressed[1]), "???")
    assert cut[1] > expected.item(), "no <eos> is paid for"
    assert cut[1] != pytest.approx(last.item())


def test_targets_leave_room_in_a_model_of_few_positions(kin):
    """GPT-2 has no embedding for position 128; others were never trained there."""
    wide = FrozenDecoder(kin.decoder.model, kin.decoder.tokenizer, max_target_tokens=512)
    assert wide.max_target_tokens == 128 - 32
    compressed = kin.encoder.compress(["a"])
    assert np.isfinite(wide.log_prob(compressed, ["the lazy dog " * 200])).all()


def test_max_target_tokens_must_be_positive(tiny_base: Path):
    with pytest.raises(ValueError, match="max_target_tokens must be at least 1, not 0"):
        FrozenDecoder.from_pretrained(tiny_base, device="cpu", max_target_tokens=0)


def test_it_stays_frozen_under_any_trainer(decoder: FrozenDecoder):
    parent = torch.nn.ModuleDict({"decoder": decoder, "other": torch.nn.Dropout()})
    assert decoder.train() is decoder
    assert parent.train()["other"].training
    assert not any(module.training for module in decoder.modules())
    assert not any(weight.requires_grad for weight in decoder.parameters())


def test_gradients_reach_the_compressed_vectors_alone(
    decoder: FrozenDecoder, encoder: AutoRegEncoder, monkeypatch
):
    monkeypatch.setattr(chunked, "LOGIT_ROWS", 5)  # several pieces
    states = torch.from_numpy(encoder.compress(TEXTS)).requires_grad_()
    scores = decoder.token_log_probs(states, decoder.target_ids(TARGETS)).summed(4)
    scores.sum().backward()
    plain = torch.from_numpy(encoder.compress(TEXTS)).requires_grad_()
    expected = [
        plain_log_prob(decoder.model, decoder.tokenizer, row, target)
        for row, target in zip(plain, TARGETS, strict=True)
    ]
    torch.stack(expected).sum().backward()
    np.testing.assert_allclose(states.grad, plain.grad, rtol=1e-3, atol=1e-4)
    assert states.grad.abs().amax(dim=(1, 2)).min() > 0
    assert all(weight.grad is None for weight in decoder.parameters())


def test_token_log_probs_name_the_row_of_every_token(decoder: FrozenDecoder, encoder: AutoRegEncoder):
    targets = [[5, 6, 7], [8], [9, 10]]
    found = decoder.token_log_probs(torch.from_numpy(encoder.compress(TEXTS[:3])), targets)
    assert found.rows.tolist() == [0, 0, 0, 1, 2, 2]
    assert (found.values < 0).all()
    np.testing.assert_allclose(
        found.summed(3), [found.values[:3].sum(), found.values[3], found.values[4:].sum()], rtol=1e-6
    )


def test_a_bfloat16_model_sums_in_float32(tiny_base: Path, encoder: AutoRegEncoder):
    half = FrozenDecoder.from_pretrained(tiny_base, device="cpu", dtype="bfloat16", max_target_tokens=90)
    assert half.model.dtype == torch.bfloat16
    compressed = torch.from_numpy(encoder.compress(["A quick fox."]))
    ids = half.target_ids(["Oranges, lemons and green peppers. " * 20])
    found = half.token_log_probs(compressed, ids)
    assert found.values.dtype == torch.float32
    with torch.no_grad():
        embedded = half.model.get_input_embeddings()(torch.tensor(ids))
        read = torch.cat([compressed.bfloat16(), embedded[:, :-1]], dim=1)
        logits = half.model(inputs_embeds=read).logits[0, 4:].double()
    expected = logits.log_softmax(dim=-1)[torch.arange(90), torch.tensor(ids[0])].sum().item()
    # bfloat16 cannot tell numbers of this size apart by less than 2.
    assert expected < -256
    assert found.summed(1).item() == pytest.approx(expected, abs=1e-2)


def test_a_checkpoint_of_another_size_is_named(decoder: FrozenDecoder):
    with pytest.raises(ValueError, match=r"compressed has shape \[2, 5, 48\].*reads \[n, k, 32\]"):
        decoder.log_prob(np.zeros((2, 5, 48), dtype=np.float32), ["a", "b"])
    with pytest.raises(ValueError, match=r"shape \[2, 160\]"):
        decoder.generate(np.zeros((2, 160), dtype=np.float32))


def test_bad_arguments_are_named(decoder: FrozenDecoder):
    states = np.zeros((2, 5, 32), dtype=np.float32)
    with pytest.raises(ValueError, match="2 compressed texts and 1 targets"):
        decoder.log_prob(states, ["a"])
    with pytest.raises(TypeError, match=r"targets\[1\] must be str, not int"):
        decoder.log_prob(states, ["a", 1])
    with pytest.raises(TypeError, match="targets must be a sequence of texts"):
        decoder.log_prob(states, "ab")
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        decoder.log_prob(states, ["a", "b"], batch_size=0)


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = build_tokenizer(eos=None)
    with pytest.raises(ValueError, match=r"no eos token.*set tokenizer\.eos_token"):
        FrozenDecoder(tiny_llama(tokenizer), tokenizer)


CHANGED = {
    "logit scale": lambda n: CohereForCausalLM(CohereConfig(vocab_size=n, logit_scale=0.25, **SIZES)),
    "soft cap": lambda n: Gemma2ForCausalLM(
        Gemma2Config(vocab_size=n, head_dim=8, final_logit_softcapping=2.0, **SIZES)
    ),
    "scaling": lambda n: GraniteForCausalLM(GraniteConfig(vocab_size=n, logits_scaling=8.0, **SIZES)),
}


@pytest.mark.parametrize("kind", CHANGED)
def test_a_model_that_changes_its_logits_is_refused(kind):
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="changes its logits after the output embedding"):
        FrozenDecoder(CHANGED[kind](len(tokenizer)), tokenizer)
