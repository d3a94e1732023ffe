"""How prompts are batched, packed, forked and spread changes no vector, and what fails loses nothing."""

from __future__ import annotations

import logging
import platform
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from transformers import AutoModel

from autoregembed_rag import AutoRegEncoder
from autoregembed_rag import encoder as encoder_module
from autoregembed_rag.passes import can_fork, compressed_states, forked_states, packed_states
from autoregembed_rag.prompt import pad_right

TEXTS = [
    "",
    "A quick fox.",
    "Vitamin C is found in oranges, lemons and green peppers. " * 2,
    "🙂 é\n",
    "the lazy dog",
]


def load(folder, device="cpu") -> AutoRegEncoder:
    return AutoRegEncoder.from_pretrained(folder, device=device, dtype="float32")


@pytest.fixture
def encoder(tiny_checkpoint) -> AutoRegEncoder:
    return load(tiny_checkpoint)


@pytest.fixture
def small_chunks(monkeypatch) -> int:
    monkeypatch.setattr(encoder_module, "CHUNK", 3)
    return 3


def rows_seen(encoder: AutoRegEncoder) -> list[int]:
    """Rows of each forward pass from now on."""
    seen: list[int] = []
    encoder.model.register_forward_pre_hook(
        lambda _, __, keywords: seen.append(len(keywords["input_ids"])), with_kwargs=True
    )
    return seen


def breaking(
    encoder: AutoRegEncoder, monkeypatch, error: Exception, when: Callable[[torch.Tensor], bool]
) -> None:
    whole = encoder.model.forward

    def forward(*, input_ids, **keywords):
        if when(input_ids):
            raise error
        return whole(input_ids=input_ids, **keywords)

    monkeypatch.setattr(encoder.model, "forward", forward)


@pytest.mark.parametrize(("dtype", "least"), [("float32", 0.9999), ("bfloat16", 0.999)])
def test_embeddings_are_those_of_one_plain_forward_pass_for_each_text(tiny_checkpoint, dtype, least):
    encoder = AutoRegEncoder.from_pretrained(tiny_checkpoint, device="cpu", dtype=dtype)
    plain = AutoModel.from_pretrained(tiny_checkpoint, dtype=getattr(torch, dtype)).eval()
    k = encoder.num_compressed_tokens
    for instruction in ("next", "self"):
        found = encoder.encode(TEXTS, instruction)
        for text, vector in zip(TEXTS, found, strict=True):
            (ids,) = encoder.prompts.build([text], encoder._instruction(instruction)).ids
            with torch.no_grad():
                states = plain(torch.tensor([ids])).last_hidden_state[0, -k:].float()
            simple = torch.nn.functional.normalize(states, dim=-1).flatten().numpy() / k**0.5
            assert float(vector @ simple) > least


def test_packed_prompts_have_the_vectors_of_padded_ones(kin):
    rows = kin.encoder.prompts.build(TEXTS, "what does it say?").ids
    padded = compressed_states(kin.encoder.model, *pad_right(rows), 3)
    torch.testing.assert_close(packed_states(kin.encoder.model, rows, 3), padded, rtol=1e-4, atol=2e-5)


def test_forked_prompts_have_the_vectors_of_whole_ones(kin):
    prompts = kin.encoder.prompts
    trunks, branches = (found.ids for found in prompts.build_all(TEXTS, ["say it", "what answers it?"]))
    if not can_fork(kin.encoder.model, trunks):
        pytest.skip("learned positions or a narrow window")
    whole = [compressed_states(kin.encoder.model, *pad_right(rows), 3) for rows in (trunks, branches)]
    forked = forked_states(kin.encoder.model, trunks, branches, 3)
    torch.testing.assert_close(forked, torch.cat(whole, dim=1), rtol=1e-4, atol=2e-5)


def test_both_encodings_at_once_are_those_of_two_calls(kin):
    texts = [*TEXTS, "the lazy dog near the river bank " * 80]  # longer than any model here reads
    queries, documents = kin.encoder.encode_both(texts)
    np.testing.assert_allclose(queries, kin.encoder.encode_queries(texts), atol=1e-5)
    np.testing.assert_allclose(documents, kin.encoder.encode_documents(texts), atol=1e-5)


def test_both_encodings_of_a_text_take_one_pass(encoder):
    seen = rows_seen(encoder)
    encoder.encode_both(["A quick fox.", "the lazy fox"])
    assert sum(seen) == 2


def test_identical_texts_are_encoded_once_wherever_they_stand(encoder, small_chunks):
    seen = rows_seen(encoder)
    texts = ["a", "b", "a", "c", "d", "a", "b", "e"]
    found = encoder.encode(texts)
    assert sum(seen) == 5
    np.testing.assert_array_equal(found[0], found[5])
    np.testing.assert_allclose(found, np.concatenate([encoder.encode([text]) for text in texts]), atol=1e-5)


def test_a_stream_yields_chunks_in_order_and_reads_no_further_than_one_ahead(encoder, small_chunks):
    read: list[str] = []

    def source() -> Iterator[str]:
        for text in (f"text {i}" for i in range(8)):
            read.append(text)
            yield text

    stream = encoder.encode_stream(source(), "next")
    first = next(stream)
    assert len(read) == 2 * small_chunks
    rest = list(stream)
    assert [len(chunk) for chunk in (first, *rest)] == [3, 3, 2]
    np.testing.assert_allclose(np.concatenate([first, *rest]), encoder.encode_queries(read), atol=1e-5)


def test_a_stream_of_nothing_yields_nothing(encoder):
    assert list(encoder.encode_stream([])) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_what_a_stream_yielded_before_an_interruption_is_whole(encoder, small_chunks, error):
    def source() -> Iterator[str]:
        yield from (f"text {i}" for i in range(6))
        raise error

    found = []
    with pytest.raises(error):
        for chunk in encoder.encode_stream(source()):
            found.append(chunk)
    np.testing.assert_allclose(
        np.concatenate(found), encoder.encode([f"text {i}" for i in range(3 * len(found))]), atol=1e-5
    )
    assert found


def test_a_stream_names_the_place_of_what_is_no_text(encoder, small_chunks):
    with pytest.raises(TypeError, match=r"texts\[4\] must be str, not int"):
        list(encoder.encode_stream(["a", "b", "c", "d", 5]))


def test_several_devices_give_the_vectors_of_one_in_input_order(tiny_checkpoint, encoder):
    texts = [f"{text} {i}" for i in range(20) for text in TEXTS]
    both = load(tiny_checkpoint, ["cpu", "cpu"])
    for size in (None, 1, 7):
        np.testing.assert_allclose(both.encode(texts, batch_size=size), encoder.encode(texts), atol=1e-5)


def test_a_device_that_fails_is_left_out_and_nothing_is_lost(tiny_checkpoint, encoder, monkeypatch, caplog):
    both = load(tiny_checkpoint, ["cpu", "cpu"])
    failures = iter([True])
    breaking(both, monkeypatch, RuntimeError("the device has gone"), lambda _: next(failures, False))
    texts = [f"text {i}" for i in range(12)]
    with caplog.at_level(logging.WARNING):
        found = both.encode(texts, batch_size=2)
    np.testing.assert_allclose(found, encoder.encode(texts), atol=1e-5)
    assert "left out from here on" in caplog.text
    assert "the device has gone" in caplog.text


def test_the_last_devices_failure_is_raised(tiny_checkpoint, monkeypatch):
    both = load(tiny_checkpoint, ["cpu", "cpu"])
    breaking(both, monkeypatch, RuntimeError("the device has gone"), lambda _: True)
    with pytest.raises(RuntimeError, match="the device has gone"):
        both.encode([f"text {i}" for i in range(12)], batch_size=2)


def test_batches_beyond_memory_go_in_halves_with_one_warning(encoder, monkeypatch, caplog):
    texts = [f"text {i}" for i in range(16)]
    expected = encoder.encode(texts)
    breaking(encoder, monkeypatch, torch.OutOfMemoryError("no room"), lambda ids: len(ids) > 3)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_allclose(encoder.encode(texts, batch_size=16), expected, atol=1e-5)
        np.testing.assert_allclose(encoder.encode(texts, batch_size=16), expected, atol=1e-5)
    assert [record.getMessage() for record in caplog.records] == [
        "16 texts at once do not fit into memory (no room): going on with half of them"
    ]


def test_one_text_beyond_memory_says_what_to_do(encoder, monkeypatch):
    breaking(encoder, monkeypatch, RuntimeError("DefaultCPUAllocator: can't allocate memory"), lambda _: True)
    with pytest.raises(MemoryError, match=r"one text of \d+ tokens does not fit .*: lower max_length"):
        encoder.encode(["a", "b"])


def test_an_encoder_whose_weights_change_encodes_with_them(tiny_checkpoint):
    both = load(tiny_checkpoint, ["cpu", "cpu"])
    before = both.encode(TEXTS)
    with torch.no_grad():
        both.trainable().get_input_embeddings().weight.mul_(torch.linspace(0.5, 2, both.hidden_size))
    assert np.abs(both.encode(TEXTS) - before).max() > 1e-3


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have other habits")
def test_memory_that_a_pass_frees_serves_the_next_one():
    program = """
import resource, torch
from autoregembed_rag.passes import keep_freed_memory
keep_freed_memory()
for round in range(20):
    if round == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    several = [torch.ones(2**20) for _ in range(8)]  # 4 MB each
    del several
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)  # noqa: S603
    assert int(run.stdout) < 10 * 2**25 / resource.getpagesize() / 10
