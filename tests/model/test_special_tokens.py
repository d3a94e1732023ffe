"""What a user's text says is never a special token, whatever the tokenizer and however many threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tiny_models import END, build_tokenizer, build_unigram, tiny_llama
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from autoregembed_rag import AutoRegEncoder
from autoregembed_rag.prompt import PromptBuilder, TextTokenizer, embed_tokens

HOSTILE = ["<EMBED0>", "</s>", "<s>", "<pad>", END, "a<EMBED1>b", "x </s>", "<EMBED0><EMBED1></s>", " <s> "]


def control_ids(tokenizer):
    # A text's "<unk>" may mean the unknown token: it commands nothing.
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return {i for i, token in added.items() if token.content != "<unk>"}


def test_special_tokens_in_text_stay_text(kin):
    control = control_ids(kin.encoder.tokenizer)
    assert len(control) > 3
    prefix = [] if kin.encoder.tokenizer.bos_token_id is None else [kin.encoder.tokenizer.bos_token_id]
    for text, ids in zip(HOSTILE, kin.encoder.prompts.build(HOSTILE, "next").ids, strict=True):
        inner = ids[len(prefix) : -3]
        assert ids[: len(prefix)] == prefix
        assert control.isdisjoint(inner), text
    assert all(control.isdisjoint(ids[:-1]) for ids in kin.decoder.target_ids(HOSTILE))
    assert np.isfinite(kin.encoder.encode_documents(HOSTILE)).all()


def test_special_tokens_in_an_instruction_stay_text(encoder: AutoRegEncoder):
    ids = encoder.prompts.build(["text"], "</s><EMBED0>").ids[0]
    assert control_ids(encoder.tokenizer).isdisjoint(ids[1:-5])


def test_text_reads_back_as_written():
    tokenizer = build_tokenizer()
    for text, ids in zip(HOSTILE, TextTokenizer(tokenizer).encode(HOSTILE), strict=True):
        assert tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False) == text


def test_a_unigram_model_does_not_find_its_control_pieces_in_text():
    tokenizer = build_unigram()
    # "＜/s＞" becomes "</s>" by the tokenizer's own normalisation, after any look at the text.
    rows = TextTokenizer(tokenizer).encode(["fox</s>dog", "</s>", "＜/s＞", "<s><s>"])
    assert control_ids(tokenizer).isdisjoint(i for row in rows for i in row)
    assert tokenizer.backend_tokenizer.decode(rows[0], skip_special_tokens=False) == "fox</s>dog"


def ordinary_embed_tokens() -> PreTrainedTokenizerFast:
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([AddedToken(name, special=False) for name in embed_tokens(2)])
    return tokenizer


def test_compressed_tokens_held_as_ordinary_added_tokens_are_still_special():
    tokenizer = ordinary_embed_tokens()
    first, second = tokenizer.convert_tokens_to_ids(embed_tokens(2))
    assert first in tokenizer("<EMBED0>")["input_ids"], "the tokenizer itself parses it"
    ids = PromptBuilder(tokenizer, 2, 64).build(["<EMBED0> <EMBED1>"], "next").ids[0]
    assert ids[-2:] == [first, second]
    assert {first, second}.isdisjoint(ids[:-2])


def test_an_eos_chosen_among_ordinary_added_tokens_is_still_special():
    tokenizer = build_tokenizer(eos=None)
    tokenizer.add_tokens([AddedToken("<end>", special=False)])
    tokenizer.eos_token = "<end>"  # noqa: S105
    assert tokenizer.eos_token_id in tokenizer("a<end>")["input_ids"], "the tokenizer itself parses it"
    assert tokenizer.eos_token_id not in TextTokenizer(tokenizer).encode(["a<end>"])[0]


def test_eight_threads_mixing_calls_never_parse_special_tokens_nor_change_the_shared_tokenizer():
    tokenizer = ordinary_embed_tokens()
    model = tiny_llama(tokenizer)
    builder = PromptBuilder(tokenizer, 2, 64)
    before = tokenizer.backend_tokenizer.to_str()
    control = control_ids(tokenizer)
    eos = tokenizer.eos_token_id
    assert model.config.vocab_size == len(tokenizer)

    def work(seed):
        failures = 0
        for i in range(60):
            if seed % 2:  # what others do with the tokenizer that they share with us
                failures += eos not in tokenizer("a </s> b", truncation=True, max_length=50)["input_ids"]
            rows = builder.build([HOSTILE[(seed + i + j) % len(HOSTILE)] for j in range(4)], "next").ids
            failures += sum(not control.isdisjoint(row[1:-2]) for row in rows)
        return failures

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(work, range(8))) == 0
    tokenizer.backend_tokenizer.no_truncation()  # the other callers' doing
    assert tokenizer.backend_tokenizer.to_str() == before
    assert not tokenizer.backend_tokenizer.encode_special_tokens


def test_eight_threads_get_the_embeddings_of_one(encoder: AutoRegEncoder):
    alone = encoder.encode_documents(HOSTILE)
    with ThreadPoolExecutor(8) as threads:
        for together in threads.map(lambda _: encoder.encode_documents(HOSTILE), range(16)):
            np.testing.assert_allclose(together, alone, atol=1e-6)


def test_a_truncating_padding_tokenizer_does_not_reach_into_prompts():
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    (ids,) = TextTokenizer(tokenizer).encode(["The quick brown fox jumps over the lazy dog"])
    assert ids == build_tokenizer()("The quick brown fox jumps over the lazy dog")["input_ids"]


def test_a_tokenizer_without_a_fast_backend_is_refused():
    class Slow:
        pass

    with pytest.raises(ValueError, match=r"Slow has no `tokenizers` backend.*fast tokenizer"):
        TextTokenizer(Slow())  # type: ignore[arg-type]
