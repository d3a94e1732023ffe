"""The base language model, trained from scratch: the decoder.

Language modelling of a few million tokens teaches a small model nothing about vectors that it never read. So every
batch holds both: windows of packed text, and texts to be written from the compressed vectors of the encoder as it
starts, the text itself from those under I_self, its answer from those under I_next. Both losses are next-token
log-likelihoods.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, TrainingArguments

from autoregembed_rag import AutoRegEncoder, FrozenDecoder
from autoregembed_rag.prompt import pad_right
from autoregembed_rag.training.checkpoints import newest_checkpoint, remove_all_but
from autoregembed_rag.training.data import AlignmentRow
from autoregembed_rag.training.trainer import SafeTrainer

from .bag import table_rows
from .sizes import Size

logger = logging.getLogger(__name__)

Item = tuple[Tensor, Tensor, list[list[int]]]
"""A window of ids; and what belongs to it: compressed vectors [n, k, hidden], the ids of n targets."""


def llama(tokenizer: PreTrainedTokenizerBase, size: Size, intermediate_size: int) -> LlamaConfig:
    """The shape of encoder or decoder."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_heads,
        intermediate_size=intermediate_size,
        max_position_embeddings=2 * size.max_length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def pack_tokens(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], limit: int, output: Path) -> None:
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


def write_reading(encoder: AutoRegEncoder, rows: Sequence[AlignmentRow], longest: int, output: Path) -> None:
    """Save the vectors of `rows` and what is to be written from them: half answers, half the texts themselves."""
    half = len(rows) // 2
    asked, repeated = rows[:half], rows[half:]
    vectors = np.concatenate(
        [
            encoder.compress([row.query for row in asked], "next", show_progress=True),
            encoder.compress([row.pos for row in repeated], "self", show_progress=True),
        ]
    ).astype(np.float16)
    tokenizer = encoder.tokenizer
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(
        [row.pos for row in rows], add_special_tokens=False
    )
    targets = [[*e.ids, tokenizer.eos_token_id][:longest] for e in encoded]
    save_file(
        {
            "vectors": torch.from_numpy(vectors),
            "ids": torch.tensor([i for target in targets for i in target], dtype=torch.int32),
            "lengths": torch.tensor([len(target) for target in targets]),
        },
        output,
    )


class Text(Dataset[Item]):
    """Windows of a memory-mapped token file, and as many rows to be written from vectors as there are for each."""

    def __init__(self, packed: Path, reading: Path, length: int) -> None:
        self.tokens = np.load(packed, mmap_mode="r")
        self.length = length
        tensors = load_file(reading)
        # Any row may come in any window: those of one kind lie together.
        order = torch.randperm(len(tensors["vectors"]), generator=torch.Generator().manual_seed(0))
        targets = tensors["ids"].split(tensors["lengths"].tolist())
        self.vectors = tensors["vectors"][order]
        self.targets = [targets[i].tolist() for i in order]
        self.rows = len(self.targets) // len(self)
        if self.rows == 0:
            raise ValueError(
                f"{len(self.targets)} rows to be written from vectors for {len(self)} windows of text: raise "
                "reading_rows, or lower pretrain_tokens"
            )

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitem__(self, index: int) -> Item:
        window = self.tokens[index * self.length : (index + 1) * self.length].astype(np.int64)
        rows = slice(index * self.rows, (index + 1) * self.rows)
        return torch.from_numpy(window), self.vectors[rows], self.targets[rows]


def collate(items: list[Item]) -> dict[str, Tensor]:
    """One batch of `Text`."""
    windows, vectors, targets = zip(*items, strict=True)
    ids, lengths = pad_right([target for of_window in targets for target in of_window])
    return {
        "input_ids": torch.stack(windows),
        "vectors": torch.cat(vectors),
        "targets": ids,
        "lengths": lengths,
    }


class TextTrainer(SafeTrainer):
    """Minimises the sum of both mean losses per token."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *_: object, **__: object) -> Tensor:
        """Called by Trainer."""
        windows = inputs["input_ids"]
        return model(input_ids=windows, labels=windows).loss + writing_loss(model, inputs)


def writing_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean negative log-likelihood of a token of the targets, each read after its vectors."""
    vectors, ids, lengths = batch["vectors"], batch["targets"], batch["lengths"]
    table = model.get_input_embeddings()
    read = torch.cat([vectors.to(table.weight.dtype), table(ids[:, :-1])], dim=1)
    hidden = model.base_model(inputs_embeds=read, use_cache=False).last_hidden_state[
        :, vectors.shape[1] - 1 :
    ]
    real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    return F.cross_entropy(model.get_output_embeddings()(hidden[real]).float(), ids[real])


def train_base_lm(
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    bag: Path,
    size: Size,
    *,
    seed: int,
    output: Path,
) -> None:
    """Train for one pass over `text`, and save model, tokenizer and held-out perplexities to `output`."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(llama(tokenizer, size, size.intermediate_size))
    rows = table_rows(load_file(bag)["vectors"])
    with torch.no_grad():
        model.get_input_embeddings().weight[: len(rows)] = rows
    work = output.with_name(output.name + ".work")
    # The last windows are never trained on: they measure perplexity.
    kept = max(1, len(text) // 100)
    trainer = TextTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(work),
            per_device_train_batch_size=size.pretrain_batch,
            num_train_epochs=1,
            learning_rate=2e-3,
            weight_decay=0.1,
            adam_beta2=0.95,
            warmup_steps=0.05,
            lr_scheduler_type="cosine",
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            torch_compile=torch.cuda.is_available(),
            remove_unused_columns=False,
            seed=seed,
            logging_steps=max(1, size.save_steps // 10),
            save_steps=size.save_steps,
            report_to="none",
        ),
        data_collator=collate,
        train_dataset=Subset(text, range(len(text) - kept)),
    )
    newest = newest_checkpoint(work)
    if work.is_dir():
        remove_all_but(newest, work)
    trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
    model.cpu().eval().to(torch.bfloat16)
    found = perplexities(model, tokenizer, [text[i] for i in range(len(text) - kept, len(text))])
    logger.info("held out: %s", found)
    model.config.held_out_perplexity = found
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


@torch.inference_mode()
def perplexities(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]
) -> dict[str, float]:
    """Per token: of running text; of texts after their own vectors, and after those of the text before."""
    windows = torch.stack([window for window, _, _ in items])
    running = [float(model(input_ids=rows, labels=rows).loss) for rows in windows.split(8)]
    vectors = torch.cat([of_window for _, of_window, _ in items])
    targets = [target for _, _, of_window in items for target in of_window]
    tokens = sum(map(len, targets))
    decoder = FrozenDecoder(model, tokenizer)
    own, other = (
        -float(decoder.target_log_probs(read, targets).sum()) / tokens
        for read in (vectors, vectors.roll(1, dims=0))
    )
    values = {"text": np.mean(running), "own_vectors": own, "others_vectors": other}
    return {name: round(math.exp(float(value)), 2) for name, value in values.items()}
