"""The base language model: a Llama of a few million parameters, trained from scratch on packed text."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments

from autoregembed_rag.training.checkpoints import newest_checkpoint, remove_all_but
from autoregembed_rag.training.trainer import SafeTrainer

from .bag import warm_start
from .sizes import Size


def pack_tokens(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], limit: int, output: Path) -> None:
    """Write up to `limit` token ids as uint16: <s> text </s> <s> text </s> ..."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids: list[np.ndarray] = []
    total = 0
    with tqdm(total=limit, desc="tokenise", unit="token", unit_scale=True) as progress:
        for text in texts:
            row = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
            ids.append(np.asarray([bos, *row, eos], dtype=np.uint16))
            total += len(row) + 2
            progress.update(len(row) + 2)
            if total >= limit:
                break
    np.save(output, np.concatenate(ids)[:limit])


class PackedTokens(Dataset[dict[str, torch.Tensor]]):
    """Consecutive windows of a memory-mapped token file."""

    def __init__(self, path: Path, length: int) -> None:
        self.tokens = np.load(path, mmap_mode="r")
        self.length = length

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = self.tokens[index * self.length : (index + 1) * self.length].astype(np.int64)
        ids = torch.from_numpy(window)
        return {"input_ids": ids, "labels": ids}


def train_base_lm(
    tokenizer: PreTrainedTokenizerFast, packed: Path, bag: Path, size: Size, *, seed: int, output: Path
) -> None:
    """Pre-train for one pass over `packed` and save model and tokenizer to `output`."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=size.hidden_size,
            num_hidden_layers=size.num_layers,
            num_attention_heads=size.num_heads,
            num_key_value_heads=size.num_heads,
            intermediate_size=size.intermediate_size,
            max_position_embeddings=2 * size.max_length,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    warm_start(model, bag, silence_later_layers=False)
    work = output.with_name(output.name + ".work")
    # The last windows are never trained on: they measure perplexity.
    windows = PackedTokens(packed, size.pretrain_length)
    held_out = max(1, len(windows) // 100)
    train = torch.utils.data.Subset(windows, range(len(windows) - held_out))
    evaluate = torch.utils.data.Subset(windows, range(len(windows) - held_out, len(windows)))
    trainer = SafeTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(work),
            per_device_train_batch_size=size.pretrain_batch,
            per_device_eval_batch_size=size.pretrain_batch,
            num_train_epochs=1,
            learning_rate=2e-3,
            weight_decay=0.1,
            adam_beta2=0.95,
            warmup_steps=0.05,
            lr_scheduler_type="cosine",
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            seed=seed,
            logging_steps=max(1, size.save_steps // 10),
            save_steps=size.save_steps,
            report_to="none",
        ),
        train_dataset=train,
        eval_dataset=evaluate,
    )
    newest = newest_checkpoint(work)
    if work.is_dir():
        remove_all_but(newest, work)
    trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
    loss = trainer.evaluate()["eval_loss"]
    model.config.held_out_perplexity = round(math.exp(loss), 2)
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
