"""python -m recipes.mini: from text to a packaged checkpoint.

Every stage writes one thing into the work folder and is skipped when that thing is there, so an interrupted run
goes on where it stopped; the long stages go on from their own checkpoints.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoTokenizer, LlamaModel

from autoregembed_rag import AutoRegEncoder, FrozenDecoder
from autoregembed_rag.config import AutoRegConfig
from autoregembed_rag.loading import add_embed_tokens
from autoregembed_rag.training.alignment import train_alignment
from autoregembed_rag.training.arguments import AlignmentArguments, CompressionArguments
from autoregembed_rag.training.compression import train_compression

from . import bag, base_lm, data
from .package import package
from .sizes import SIZES, Size
from .tokenizer import train_tokenizer

logger = logging.getLogger("recipes.mini")


def main(
    corpus: Annotated[Path, typer.Option(help="Folder of pretrain-*, compress and pairs JSONL.")],
    work: Annotated[Path, typer.Option(help="Work folder; a second run goes on here.")] = Path("build/mini"),
    size: Annotated[str, typer.Option(help=" | ".join(SIZES))] = "cpu",
    output: Annotated[Path, typer.Option(help="Where the packaged checkpoint goes.")] = Path(
        "build/mini/package"
    ),
    seed: Annotated[int, typer.Option(help="Of every stage.")] = 0,
    until: Annotated[
        str | None, typer.Option(help="Stop after this stage, without a package.", show_default=False)
    ] = None,
) -> None:
    """Train `mini` from scratch.

    Example: python -m recipes.mini --corpus ../shared/data/corpus --output autoregembed_rag/checkpoints/mini
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    work.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(corpus, work, SIZES[size], seed)
    if until is not None and until not in recipe.stages():
        raise typer.BadParameter(f"{until!r} is no stage; the stages are {', '.join(recipe.stages())}")
    for name, stage in recipe.stages().items():
        recipe.run(name, stage)
        if name == until:
            return
    package(work, list(recipe.stages()), recipe.size, seed, output)
    logger.info("packaged into %s", output)


class Recipe:
    """The stages over one work folder."""

    def __init__(self, corpus: Path, work: Path, size: Size, seed: int) -> None:
        self.corpus = corpus
        self.work = work
        self.size = size
        self.seed = seed

    def stages(self) -> dict[str, Callable[[Path], object]]:
        """What is written, in order, and what writes it."""
        return {
            "tokenizer": self.tokenizer,
            "bag.safetensors": self.bag,
            "start": self.start,
            "reading.safetensors": self.reading,
            "packed.npy": self.pack,
            "base": self.base,
            "compressed": self.compress,
            "aligned": self.align,
        }

    def run(self, name: str, stage: Callable[[Path], object]) -> None:
        """Run a stage unless it is done; `NAME.seconds` says so, and how long it took."""
        done = self.work / f"{name}.seconds"
        if done.exists():
            logger.info("%s is there", name)
            return
        logger.info("%s ...", name)
        started = time.monotonic()
        stage(self.work / name)
        done.write_text(f"{time.monotonic() - started:.0f}\n")
        logger.info("%s took %s s", name, done.read_text().strip())

    def tokenizer(self, output: Path) -> None:
        texts = data.documents_up_to(self.corpus, self.size.tokenizer_characters)
        train_tokenizer(texts, self.size.vocab_size, self.size.max_length, output)

    def bag(self, output: Path) -> None:
        tokenizer = self._tokenizer()
        stream = bag.batches(
            data.pairs_by_source(self.corpus, self.seed),
            list(data.documents_up_to(self.corpus, self.size.bag_characters)),
            tokenizer,
            self.size.bag_batch,
            self.seed,
        )
        bag.train_bag(
            stream,
            len(tokenizer),
            dimension=self.size.hidden_size - bag.RESERVED,
            steps=self.size.bag_steps,
            seed=self.seed,
            output=output,
        )

    def start(self, output: Path) -> None:
        torch.manual_seed(self.seed)
        tokenizer = self._tokenizer()
        add_embed_tokens(tokenizer, self.size.num_compressed_tokens)
        config = AutoRegConfig(
            num_compressed_tokens=self.size.num_compressed_tokens, max_length=self.size.max_length
        )
        shape = base_lm.llama(tokenizer, self.size, self.size.encoder_intermediate_size)
        encoder = AutoRegEncoder(LlamaModel(shape), tokenizer, config)
        bag.write_bag(encoder, self.work / "bag.safetensors")
        encoder.save_pretrained(output)

    def reading(self, output: Path) -> None:
        rows = data.pairs(self.corpus, self.seed, self.size.reading_rows)
        base_lm.write_reading(self._encoder("start"), rows, self.size.reading_length, output)

    def pack(self, output: Path) -> None:
        texts = data.documents(self.corpus)
        base_lm.pack_tokens(self._tokenizer(), texts, self.size.pretrain_tokens, output)

    def base(self, output: Path) -> None:
        text = base_lm.Text(
            self.work / "packed.npy", self.work / "reading.safetensors", self.size.pretrain_length
        )
        base_lm.train_base_lm(
            self._tokenizer(), text, self.work / "bag.safetensors", self.size, seed=self.seed, output=output
        )

    def compress(self, output: Path) -> None:
        train_compression(
            self._encoder("start"),
            self._decoder(),
            data.compression_rows(self.corpus, self.seed, self.size.compress_rows),
            output,
            CompressionArguments(epochs=1, seed=self.seed, save_steps=self.size.save_steps),
        )

    def align(self, output: Path) -> None:
        train_alignment(
            self._encoder("compressed"),
            self._decoder(),
            data.pairs(self.corpus, self.seed, self.size.align_rows),
            output,
            AlignmentArguments(epochs=1, seed=self.seed, save_steps=self.size.save_steps),
        )

    def _tokenizer(self) -> AutoTokenizer:
        return AutoTokenizer.from_pretrained(self.work / "tokenizer")

    def _encoder(self, stage: str) -> AutoRegEncoder:
        return AutoRegEncoder.from_pretrained(self.work / stage, dtype="float32")

    def _decoder(self) -> FrozenDecoder:
        return FrozenDecoder.from_pretrained(self.work / "base")


if __name__ == "__main__":
    typer.run(main)
