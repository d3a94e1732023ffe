"""Byte-level BPE on lower-cased text. Lower case because a small vocabulary has better uses than case.

The default instructions are a token each: every prompt is ten tokens shorter, and what an instruction says cannot be
mistaken for the text.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from autoregembed_rag.config import DOCUMENT_INSTRUCTION, QUERY_INSTRUCTION

BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int, output: Path) -> None:
    """Train on `texts` and write a Hugging Face tokenizer folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    # A leading space makes the first word of a text the same token as anywhere else.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=max_length,
    )
    fast.add_tokens(
        [AddedToken(text, normalized=False) for text in (QUERY_INSTRUCTION, DOCUMENT_INSTRUCTION)]
    )
    fast.save_pretrained(output)
