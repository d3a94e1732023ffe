"""FrozenDecoder: its scores against a plain computation, token by token, and what it refuses."""

from __future__ import annotations

import logging
import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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
from autoregembed_rag import decoder as decoder_module
from autoregembed_rag.losses import js_divergence, kl_divergence
from autoregembed_rag.prompt import GROUP_COST, TextTokenizer, length_groups

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


def test_the_mean_over_tokens_is_the_sum_by_their_number(kin):
    compressed = kin.encoder.compress(TEXTS, "next")
    tokens = [len(ids) for ids in kin.decoder.target_ids(TARGETS)]
    assert len({*tokens}) > 2
    found = kin.decoder.log_prob(compressed, TARGETS, per_token=True)
    np.testing.assert_allclose(found * tokens, kin.decoder.log_prob(compressed, TARGETS), rtol=1e-6)


def test_one_text_serves_all_targets(kin):
    compressed = kin.encoder.compress(TEXTS[:1], "next")
    found = kin.decoder.log_prob(compressed, TARGETS)
    np.testing.assert_allclose(found, kin.decoder.log_prob(compressed.repeat(4, axis=0), TARGETS), atol=1e-4)
    assert kin.decoder.log_prob(compressed, []).shape == (0,)


def test_under_no_text_a_target_follows_the_first_token(kin):
    model, tokenizer = kin.decoder.model, kin.decoder.tokenizer
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    expected = []
    for target in TARGETS:
        ids = [first, *TextTokenizer(tokenizer).encode([target])[0], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double().log_softmax(dim=-1)
        expected.append(sum(logits[t, token].item() for t, token in enumerate(ids[1:])))
    np.testing.assert_allclose(kin.decoder.log_prob(None, TARGETS), expected, rtol=1e-5, atol=1e-4)


def test_generated_tokens_carry_the_probability_they_had(kin):
    compressed = kin.encoder.compress(TEXTS, "self")
    written = kin.decoder.generate_tokens(compressed, max_new_tokens=6)
    texts = kin.decoder.generate(compressed, max_new_tokens=6, no_repeat_ngram_size=2)
    assert ["".join(piece for piece, _ in tokens) for tokens in written] == texts
    model = kin.decoder.model
    for states, tokens in zip(torch.from_numpy(compressed), written, strict=True):
        with torch.no_grad():
            chances = model(inputs_embeds=states[None]).logits[0, -1].double().softmax(dim=-1)
        if tokens:
            assert tokens[0][1] == pytest.approx(chances.max().item(), rel=1e-4)
        assert all(0 < chance <= 1 for _, chance in tokens)
    assert kin.decoder.generate_tokens(compressed[:0]) == []


def test_the_same_is_written_however_many_texts_at_once(kin, monkeypatch):
    compressed = kin.encoder.compress(TEXTS, "self")
    texts = kin.decoder.generate(compressed, max_new_tokens=6)
    tokens = kin.decoder.generate_tokens(compressed, max_new_tokens=6)
    rows, generate = [], kin.decoder.model.generate

    def counting(*, inputs_embeds, **settings):
        rows.append(len(inputs_embeds))
        return generate(inputs_embeds=inputs_embeds, **settings)

    monkeypatch.setattr(kin.decoder.model, "generate", counting)
    assert kin.decoder.generate(compressed, max_new_tokens=6, batch_size=3) == texts
    found = kin.decoder.generate_tokens(compressed, max_new_tokens=6, batch_size=3)
    assert rows == [3, 1, 3, 1]
    for one, other in zip(found, tokens, strict=True):
        assert [piece for piece, _ in one] == [piece for piece, _ in other]
        np.testing.assert_allclose([chance for _, chance in one], [chance for _, chance in other], rtol=1e-3)


def test_several_texts_can_be_drawn_for_each_vector(decoder: FrozenDecoder, encoder: AutoRegEncoder):
    compressed = encoder.compress(TEXTS[:2])
    drawn = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 2, "batch_size": 1}
    assert len(decoder.generate(compressed, **drawn)) == 6


def test_positions_that_a_model_has_not_learned_are_refused(kin):
    states = kin.encoder.compress(TEXTS[:1])
    most = 128 - states.shape[1] + 1
    many = np.repeat(states, 96, axis=1)[:, :96]
    target = ["the lazy dog " * 200]
    assert len(kin.decoder.generate(states, max_new_tokens=most, min_new_tokens=most)) == 1
    assert len(kin.decoder.generate_tokens(states, max_new_tokens=most)) == 1
    if hasattr(kin.decoder.model.base_model, "rotary_emb"):
        assert np.isfinite(kin.decoder.log_prob(many, target)).all()
        return
    model = type(kin.decoder.model).__name__
    for write in (kin.decoder.generate, kin.decoder.generate_tokens):
        with pytest.raises(
            ValueError, match=f"need 129 positions, and {model} has 128: lower max_new_tokens"
        ):
            write(states, max_new_tokens=most + 1)
    with pytest.raises(ValueError, match="96 compressed vectors and 40 tokens need 135 positions"):
        kin.decoder.log_prob(many, target)
    assert np.isfinite(kin.decoder.log_prob(many, ["fox"])).all()


def test_a_pickle_opens_the_folder_again(decoder: FrozenDecoder, encoder: AutoRegEncoder):
    pickled = pickle.dumps(decoder)
    assert len(pickled) < 2_000
    twin = pickle.loads(pickled)  # noqa: S301
    assert twin.fingerprint == decoder.fingerprint
    states = encoder.compress(TEXTS)
    np.testing.assert_array_equal(twin.log_prob(states, TARGETS), decoder.log_prob(states, TARGETS))
    with pytest.raises(TypeError, match="has not loaded cannot be pickled: save its model"):
        pickle.dumps(FrozenDecoder(decoder.model, decoder.tokenizer))


def test_the_fingerprint_is_that_of_the_weights_as_they_are_now(tiny_base: Path, monkeypatch):
    decoder = FrozenDecoder.from_pretrained(tiny_base, device="cpu", dtype="float32")
    before = decoder.fingerprint
    weight = decoder.model.get_input_embeddings().weight
    with torch.no_grad():
        weight.mul_(2)
    changed = decoder.fingerprint
    assert changed != before
    with monkeypatch.context() as patch:
        patch.setattr(decoder_module, "weights_digest", None)  # whoever calls it fails
        assert decoder.fingerprint == changed
    with torch.no_grad():
        weight.div_(2)
    assert decoder.fingerprint == before
    decoder.model.half()
    assert decoder.fingerprint not in (before, changed)


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
    scores = decoder.target_log_probs(states, decoder.target_ids(TARGETS))
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


# So different in length that they run in several groups, in another order than they are given.
UNEVEN = [[7, 8], [5] * 90, [9], [6] * 50, [4, 3, 2] * 20, [5] * 3, [8] * 40, [1]] * 4


def score(decoder: FrozenDecoder, kind: str, given: torch.Tensor, targets) -> torch.Tensor:
    """Either kind of value for every target; the divergence is between each e_c and its mirror image."""
    if kind == "log_probs":
        return decoder.target_log_probs(given, targets)
    divergence = {"kl": kl_divergence, "js": js_divergence}[kind]
    return decoder.target_divergences(given, -given, targets, divergence)


@pytest.fixture(scope="module")
def uneven_states(encoder: AutoRegEncoder) -> torch.Tensor:
    return torch.from_numpy(encoder.compress([f"text number {i}" for i in range(len(UNEVEN))]))


@pytest.mark.parametrize("kind", ["log_probs", "kl", "js"])
def test_values_come_in_the_order_of_the_targets_however_they_are_grouped(
    kind, decoder: FrozenDecoder, uneven_states: torch.Tensor
):
    assert len(length_groups([len(ids) for ids in UNEVEN])) > 2
    together = score(decoder, kind, uneven_states, UNEVEN)
    alone = [score(decoder, kind, uneven_states[i : i + 1], [ids]) for i, ids in enumerate(UNEVEN)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
    order = torch.randperm(len(UNEVEN), generator=torch.Generator().manual_seed(0))
    shuffled = score(decoder, kind, uneven_states[order], [UNEVEN[i] for i in order])
    torch.testing.assert_close(shuffled, together[order], rtol=1e-4, atol=1e-3)


def test_the_first_vectors_are_the_first_argument_of_a_divergence(
    decoder: FrozenDecoder, uneven_states: torch.Tensor
):
    first, second, targets = uneven_states[:3], uneven_states[3:6], UNEVEN[:3]
    found = decoder.target_divergences(first, second, targets, kl_divergence)
    embed = decoder.model.get_input_embeddings()
    for row, ids in enumerate(targets):
        logits = []
        for states in (first[row], second[row]):
            read = torch.cat([states, embed(torch.tensor(ids[:-1], dtype=torch.long))])
            logits.append(decoder.model(inputs_embeds=read[None]).logits[0, 4:].detach().double())
        p, q = (table.softmax(-1) for table in logits)
        expected = (p * (p / q).log()).sum(-1).mean().item()
        assert found[row].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["log_probs", "kl", "js"])
def test_activations_exist_for_one_group_at_a_time_and_are_computed_once(
    kind, decoder: FrozenDecoder, uneven_states: torch.Tensor, monkeypatch
):
    passes: list[int] = []

    def record(_, __, keywords: dict) -> None:
        rows, read, _ = keywords["inputs_embeds"].shape
        passes.append(rows * (read - given.shape[1] + 1))

    handle = decoder.model.base_model.register_forward_pre_hook(record, with_kwargs=True)
    both = 1 if kind == "log_probs" else 2
    found = {}
    for most in (10**6, 130):
        monkeypatch.setattr(decoder_module, "GROUP_TOKENS", most)
        given = uneven_states.clone().requires_grad_()
        values = score(decoder, kind, given, UNEVEN)
        forward = len(passes)
        kept = kept_for_backward(values)
        assert kept == given.shape, "nothing is kept but the gradient"
        values.square().sum().backward()
        assert len(passes) == forward, "the backward pass computes nothing again"
        assert max(passes) <= both * most
        found[most] = (values.detach(), given.grad)
        passes.clear()
    handle.remove()
    torch.testing.assert_close(found[130][0], found[10**6][0], rtol=1e-4, atol=1e-4)
    error = (found[130][1] - found[10**6][1]).norm() / found[10**6][1].norm()
    assert error < 1e-4


def kept_for_backward(values: torch.Tensor) -> torch.Size:
    """The shape of all that the graph behind `values` holds, if it is one node over its inputs."""
    shapes = {tensor.shape for tensor in values.grad_fn.saved_tensors}
    (shape,) = shapes
    return shape


def test_a_float64_model_keeps_float64(tiny_base: Path, encoder: AutoRegEncoder):
    wide = FrozenDecoder.from_pretrained(tiny_base, device="cpu", dtype="float64")
    given = torch.from_numpy(encoder.compress(TEXTS)).double().requires_grad_()
    for kind in ("log_probs", "kl", "js"):
        found = score(wide, kind, given, wide.target_ids(TARGETS))
        assert found.dtype == torch.float64
        (gradient,) = torch.autograd.grad(found.sum(), given)
        assert gradient.dtype == torch.float64
    assert wide.log_prob(given.detach(), TARGETS).dtype == np.float32


LENGTHS = st.lists(st.integers(0, 600), max_size=40)


@settings(max_examples=200, deadline=None)
@given(lengths=LENGTHS, most=st.none() | st.integers(1, 2000))
def test_length_groups_hold_every_row_once_longest_first(lengths, most):
    groups = length_groups(lengths, most=most)
    in_order = [i for group in groups for i in group]
    assert sorted(in_order) == [*range(len(lengths))]
    found = [lengths[i] for i in in_order]
    assert found == sorted(found, reverse=True)
    for group in groups:
        longest = lengths[group[0]]
        assert sum(longest - lengths[i] for i in group) <= GROUP_COST
        assert most is None or longest * len(group) <= most or len(group) == 1


@settings(max_examples=50, deadline=None)
@given(lengths=LENGTHS, most=st.none() | st.integers(1, 2000))
def test_length_groups_are_no_more_than_padding_and_memory_ask_for(lengths, most):
    groups = length_groups(lengths, most=most)
    for group, following in pairwise(groups):
        one_more = [lengths[i] for i in (*group, following[0])]
        padding = sum(one_more[0] - length for length in one_more)
        assert padding > GROUP_COST or (most is not None and one_more[0] * len(one_more) > most)


def test_a_bfloat16_model_sums_in_float32(tiny_base: Path, encoder: AutoRegEncoder):
    half = FrozenDecoder.from_pretrained(tiny_base, device="cpu", dtype="bfloat16", max_target_tokens=90)
    assert half.model.dtype == torch.bfloat16
    compressed = torch.from_numpy(encoder.compress(["A quick fox."]))
    ids = half.target_ids(["Oranges, lemons and green peppers. " * 20])
    found = half.target_log_probs(compressed, ids)
    assert found.dtype == torch.float32
    with torch.no_grad():
        embedded = half.model.get_input_embeddings()(torch.tensor(ids))
        read = torch.cat([compressed.bfloat16(), embedded[:, :-1]], dim=1)
        logits = half.model(inputs_embeds=read).logits[0, 4:].double()
    expected = logits.log_softmax(dim=-1)[torch.arange(90), torch.tensor(ids[0])].sum().item()
    # bfloat16 cannot tell numbers of this size apart by less than 2.
    assert expected < -256
    assert found.item() == pytest.approx(expected, abs=1e-2)


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
    for write in (decoder.generate, decoder.generate_tokens):
        with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
            write(states, batch_size=0)
    with pytest.raises(ValueError, match="leave attention_mask, return_dict_in_generate out"):
        decoder.generate(states, return_dict_in_generate=True, attention_mask=None)


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
