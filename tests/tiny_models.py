"""Tokenizers and language models of a few thousand parameters, one for each kind that the library promises."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SENTENCES = [
    "The quick brown fox jumps over the lazy dog near the river bank.",
    "Find documents that can answer this question.",
    "Find sentences that are semantically similar to this text.",
    "A compressed vector is a condition for a language model; it can be read back.",
    "Retrieval finds the passages that answer a question, and a reader writes the answer.",
    "Vitamin C is found in oranges, lemons and green peppers, 100 grams at a time.",
]

END = "<|endoftext|>"
SENTENCEPIECE = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def build_tokenizer(
    *,
    bos: str | None = "<s>",
    eos: str | None = "</s>",
    pad: str | None = "<pad>",
    padding_side: str = "right",
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 400 tokens."""
    special = [token for token in dict.fromkeys((bos, eos, pad)) if token is not None]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        SENTENCES * 2,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad, padding_side=padding_side
    )


def build_whole_text_bpe() -> PreTrainedTokenizerFast:
    """A BPE as converted from SentencePiece: spaces are letters, so a whole text is one word."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))  # noqa: S106
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Replace("▁", " ")
    tokenizer.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(vocab_size=300, special_tokens=[*SENTENCEPIECE.values()], show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SENTENCEPIECE)


def build_unigram() -> PreTrainedTokenizerFast:
    """A Unigram model, which holds `<s>` and `</s>` as pieces like any other."""
    special = [*SENTENCEPIECE.values()]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        [*SENTENCES, "a < b / c > d"] * 3,
        trainers.UnigramTrainer(
            vocab_size=200, special_tokens=special, unk_token=special[0], show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SENTENCEPIECE)


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}


def tiny_llama(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    """A random Llama: hidden 32, 2 layers, 128 positions."""
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **SIZES)
    return LlamaForCausalLM(config).eval()


Family = tuple[PreTrainedTokenizerFast, PreTrainedModel]


def mistral() -> Family:
    """Pads left, no pad token; a sliding window of 8 tokens; output embeddings of its own."""
    tokenizer = build_tokenizer(pad=None, padding_side="left")
    config = MistralConfig(vocab_size=len(tokenizer), sliding_window=8, tie_word_embeddings=False, **SIZES)
    return tokenizer, MistralForCausalLM(config)


def qwen2() -> Family:
    """No bos; pads with eos."""
    tokenizer = build_tokenizer(bos=None, eos=END, pad=END)
    return tokenizer, Qwen2ForCausalLM(
        Qwen2Config(vocab_size=len(tokenizer), tie_word_embeddings=True, **SIZES)
    )


def qwen3() -> Family:
    """No bos; pads left; more head dimensions than hidden / heads."""
    tokenizer = build_tokenizer(bos=None, eos=END, padding_side="left")
    return tokenizer, Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), head_dim=16, **SIZES))


def gpt2() -> Family:
    """One token for bos and eos, no pad; a vocabulary of more rows than the tokenizer has tokens."""
    tokenizer = build_tokenizer(bos=END, eos=END, pad=None)
    config = GPT2Config(
        vocab_size=len(tokenizer) + 64, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2
    )
    return tokenizer, GPT2LMHeadModel(config)


def llama_unigram() -> Family:
    """A Llama over Unigram pieces."""
    tokenizer = build_unigram()
    return tokenizer, LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SIZES))


def llama() -> Family:
    """bos, eos and pad, pads right, tied embeddings."""
    tokenizer = build_tokenizer()
    return tokenizer, tiny_llama(tokenizer)


FAMILIES: dict[str, Callable[[], Family]] = {
    build.__name__: build for build in (llama, mistral, qwen2, qwen3, gpt2, llama_unigram)
}


def write_base(folder: Path, family: str = "llama") -> Path:
    """The folder of a plain random language model of a family."""
    torch.manual_seed(0)
    tokenizer, model = FAMILIES[family]()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
