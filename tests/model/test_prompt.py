"""Prompts: their layout, what is cut, and how long texts are tokenised."""

from __future__ import annotations

import logging
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import build_tokenizer, build_unigram, build_whole_text_bpe
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from autoregembed_rag import AutoRegEncoder
from autoregembed_rag.prompt import PromptBuilder, TextTokenizer, embed_tokens

INSTRUCTION = "Find documents that can answer this question."


def with_embed_tokens(k=2, **arguments):
    tokenizer = build_tokenizer(**arguments)
    tokenizer.add_special_tokens({"additional_special_tokens": embed_tokens(k)})
    return tokenizer


def plain_ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("bos", ["<s>", None])
def test_a_prompt_is_bos_text_instruction_and_compressed_tokens(bos, padding_side):
    tokenizer = with_embed_tokens(bos=bos, padding_side=padding_side)
    (ids,), cut = PromptBuilder(tokenizer, 2, 64).build(["A quick fox."], INSTRUCTION)
    assert ids == [
        *([tokenizer.bos_token_id] if bos else []),
        *plain_ids(tokenizer, "A quick fox."),
        *plain_ids(tokenizer, f"\n{INSTRUCTION}\n"),
        *tokenizer.convert_tokens_to_ids(["<EMBED0>", "<EMBED1>"]),
    ]
    assert cut == []


def test_text_and_instruction_are_tokenised_apart():
    tokenizer = with_embed_tokens()
    builder = PromptBuilder(tokenizer, 2, 100)
    (empty, full), _ = builder.build(["", "text\n"], INSTRUCTION)
    suffix = empty[1:]
    assert full == [tokenizer.bos_token_id, *plain_ids(tokenizer, "text\n"), *suffix]


def test_only_the_text_is_cut():
    builder = PromptBuilder(with_embed_tokens(), 2, 40)
    (short, long), cut = builder.build(["fox", "fox jumps over the lazy dog " * 50], INSTRUCTION)
    assert len(long) == 40
    suffix = len(short) - 1 - len(plain_ids(build_tokenizer(), "fox"))
    assert long[-suffix:] == short[-suffix:]
    assert cut == [1]


def test_a_text_that_just_fits_is_not_cut():
    tokenizer = with_embed_tokens()
    builder = PromptBuilder(tokenizer, 2, 40)
    room = builder.max_text_tokens(INSTRUCTION)
    text = "?" * room
    assert len(plain_ids(tokenizer, text)) == room
    assert builder.build([text], INSTRUCTION).cut == []
    assert builder.build([text + "?"], INSTRUCTION).cut == [0]
    assert len(builder.build([text + "?"], INSTRUCTION).ids[0]) == 40


def test_an_instruction_that_fills_the_prompt_is_refused():
    with pytest.raises(ValueError, match="no room for text within max_length=40"):
        PromptBuilder(with_embed_tokens(), 2, 40).build(["text"], INSTRUCTION * 5)


def test_a_tokenizer_without_the_compressed_tokens_is_refused():
    with pytest.raises(ValueError, match=r"lacks the compressed tokens <EMBED2>, <EMBED3>.*from_base"):
        PromptBuilder(with_embed_tokens(2), 4, 64)


def test_a_call_that_cut_texts_logs_one_warning_with_the_count(encoder: AutoRegEncoder, caplog):
    long = "the lazy dog near the river bank " * 100
    with caplog.at_level(logging.WARNING, "autoregembed_rag"):
        encoder.encode_documents(["short", long, "short", long, long], batch_size=1)
    assert len(caplog.records) == 1
    assert "3 of 5 texts were cut" in caplog.text
    caplog.clear()
    encoder.encode_documents(["short"])
    assert not caplog.records


def test_max_text_tokens_fit_under_both_instructions(encoder: AutoRegEncoder, caplog):
    text = "?" * encoder.max_text_tokens
    assert encoder.count_tokens(text) == encoder.max_text_tokens
    assert encoder.count_tokens([text, ""]) == [encoder.max_text_tokens, 0]
    encoder.encode_queries([text])
    encoder.encode_documents([text])
    assert not caplog.records
    encoder.encode_queries([text + "?"])
    encoder.encode_documents([text + "?"])
    assert caplog.records


TOKENIZERS = [TextTokenizer(build()) for build in (build_tokenizer, build_whole_text_bpe, build_unigram)]
FRAGMENTS = [
    "a",
    "the ",
    "answer",
    "semantically",
    "  ",
    "\n",
    "🙂",
    "é",
    "e\u0301",
    "0",
    "=",
    "ti",
    "on",
    "\ud800",
]


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["byte-level", "whole-text", "unigram"])
@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    runs=st.lists(st.tuples(st.sampled_from(FRAGMENTS), st.integers(1, 600)), min_size=1, max_size=6),
    limit=st.integers(1, 8),
)
def test_a_long_text_gives_the_ids_of_the_whole_text_cut(tokenizer, runs, limit):
    text = "".join(fragment * times for fragment, times in runs)
    (whole,) = tokenizer.encode([text])
    assert tokenizer.encode([text], limit) == [whole[: limit + 1]]


def test_words_longer_than_the_start_of_a_text_allows_for_are_not_cut_in_two():
    word = "abcdefghijklmnopqrstuvwxyz" * 2 + "abcdefgh"
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.train_from_iterator([word] * 5, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    tokenizer = TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    text = f"{word} " * 500
    (whole,) = tokenizer.encode([text])
    assert len(whole) == 500
    for limit in range(1, 20):
        assert tokenizer.encode([text], limit) == [whole[: limit + 1]]


@pytest.mark.parametrize("unit", ["a", " ", "The quick brown fox. ", "\ud800", "</s>"])
def test_ten_megabytes_take_no_longer_than_their_start(encoder: AutoRegEncoder, unit):
    text = unit * (10_000_000 // len(unit))
    started = time.process_time()
    vectors = encoder.encode_documents([text])
    assert time.process_time() - started < 2  # not the clock, which others move
    assert abs((vectors**2).sum() - 1) < 1e-5


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["byte-level", "whole-text", "unigram"])
def test_one_word_of_a_million_characters_is_tokenised_whole_in_seconds(tokenizer):
    started = time.process_time()
    (ids,) = tokenizer.encode(["ab" * 500_000])
    # Linear time is about a second; quadratic time would be an hour.
    assert time.process_time() - started < 30
    assert len(ids) > 100_000
