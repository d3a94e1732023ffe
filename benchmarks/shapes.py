"""Random language models of known shapes, for speeds that do not depend on what a model knows."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from autoregembed_rag import AutoRegEncoder
from autoregembed_rag.loading import decoder_folder


@dataclass(frozen=True)
class Shape:
    """A random Llama over the tokenizer of `mini`, whose vocabulary is filled up with tokens that no text has."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocabulary: int
    batch_size: int
    kv_heads: int | None = None

    def write(self, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
        """Make the folder of a base language model: input and output embeddings apart, seed 0."""
        tokenizer = AutoTokenizer.from_pretrained(decoder_folder("mini"))
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=max(self.vocabulary, len(tokenizer)),
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads or self.heads,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    def write_checkpoint(self, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
        """Make the folder of an untrained encoder."""
        base = self.write(folder / "base", dtype)
        AutoRegEncoder.from_base(base, device="cpu", dtype=dtype).save_pretrained(folder)
        return folder


SHAPES = {
    "58m": Shape(hidden=512, layers=8, heads=8, intermediate=1376, vocabulary=32_000, batch_size=32),
    "qwen2.5-0.5b": Shape(896, 24, 14, 4864, 151_936, batch_size=32, kv_heads=2),
    "llama2-7b": Shape(4096, 32, 32, 11008, 32_000, batch_size=32),
    "tiny": Shape(hidden=32, layers=2, heads=4, intermediate=64, vocabulary=0, batch_size=4),
}
