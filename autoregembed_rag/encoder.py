"""AutoRegEncoder: texts -> compressed vectors -> embeddings."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from .card import remove_card, write_card
from .config import AutoRegConfig, Pooling, check_num_tokens
from .fingerprint import encoder_fingerprint
from .history import read_history
from .last_layer import restrict_last_layer
from .loading import (
    add_embed_tokens,
    check_causal,
    check_positions,
    embedding_table,
    initial_rows,
    load_model,
    load_tokenizer,
    model_arguments,
    resolve_device,
    resolve_folder,
    untrained_config,
)
from .passes import Passes
from .pooling import first_tokens, pool
from .prompt import PromptBuilder, Prompts, check_texts, collect_cut
from .weights import (
    checkpoint_config,
    grow_table,
    is_adapted,
    load_body,
    quantize_body,
    read_weights,
    write_checkpoint,
)

logger = logging.getLogger(__name__)

# Texts tokenised and sorted by length at once, for each device: enough to fill passes evenly, small against any corpus.
CHUNK = 2048


class AutoRegEncoder:
    """Embeds queries under I_next and documents under I_self with a causal language model.

    Make one with `from_pretrained` or `from_base`. Thread-safe; pickles by the folder it came from.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: AutoRegConfig,
        *,
        num_tokens: int | None = None,
        source: Path | None = None,
        load_arguments: dict[str, Any] | None = None,
        devices: Sequence[torch.device] = (),
    ) -> None:
        """Wrap a body (no language-model head) and its tokenizer.

        Args:
            model: the causal body, in eval mode.
            tokenizer: holds `<EMBED0>` ... `<EMBEDk-1>`.
            config: what the checkpoint records.
            num_tokens: keep only the first so many of the k vectors (flatten pooling only).
            source: the folder the weights came from, while they are unchanged.
            load_arguments: keywords with which `from_pretrained(source)` makes this encoder again.
            devices: where to encode at the same time, the model's own and others; none is the model's own.
        """
        check_positions(model, config.max_length)
        k = config.num_compressed_tokens
        self.num_tokens = k if num_tokens is None else check_num_tokens(num_tokens, k)
        if self.num_tokens < k and config.pooling == "mean":
            raise ValueError(
                f'num_tokens={num_tokens} cannot truncate pooling="mean", which mixes all {k} vectors: '
                'use pooling="flatten"'
            )
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.prompts = PromptBuilder(tokenizer, k, config.max_length)
        _ = self.max_text_tokens  # raises now, not at the first text, if an instruction fills the prompt
        check_causal(model)
        restrict_last_layer(model)
        self._source = source
        self._load_arguments = load_arguments or {}
        self._fingerprint: str | None = None
        self._passes = Passes(model, k, devices or [model.device])
        self._pid = os.getpid()

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = "mini",
        *,
        device: str | torch.device | Sequence[str] = "auto",
        dtype: str | torch.dtype = "auto",
        attn_implementation: str = "auto",
        pooling: Pooling | None = None,
        num_tokens: int | None = None,
        query_instruction: str | None = None,
        document_instruction: str | None = None,
        max_length: int | None = None,
        quantize: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        trust_remote_code: bool = False,
    ) -> AutoRegEncoder:
        """Load a trained checkpoint.

        Args:
            model: a bundled name ("mini"), a folder, or a hub id. A folder without `autoregembed.json`, such as
                the paper's own checkpoints, is taken with the default settings if its tokenizer holds `<EMBEDi>`.
            device: "auto" is CUDA, then MPS, then the CPU. Several, such as ["cuda:0", "cuda:1"], share the texts.
            dtype: "auto" is bfloat16 where the hardware computes in it, else float32.
            attn_implementation: "auto" is FlashAttention 2 on CUDA where installed, else sdpa.
            pooling, query_instruction, document_instruction, max_length: None is what the checkpoint records.
            num_tokens: use only the first so many compressed vectors; None is all.
            quantize: "int8" keeps the weights in 8 bits (needs torchao): half of bfloat16's memory, hardly another
                speed, cosines of 0.99 and more with the full vectors. Such an encoder is neither trained nor saved.
            revision: of a hub id: a branch, a tag or a commit; None is its main branch.
            token: for a private hub id, and the base model of an adapter; None is the one of `hf auth login` or
                HF_TOKEN.
            trust_remote_code: run Python code that comes with the model; off unless you ask.

        Raises:
            FileNotFoundError: nothing can be loaded under that name; the message lists what would work.
            ValueError: not an AutoRegEmbed checkpoint, or a setting that does not fit it.
        """
        changes = {
            "pooling": pooling,
            "query_instruction": query_instruction,
            "document_instruction": document_instruction,
            "max_length": max_length,
        }
        changes = {name: value for name, value in changes.items() if value is not None}
        folder = resolve_folder(model, revision=revision, token=token)
        tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
        recorded = checkpoint_config(folder, tokenizer.get_vocab())
        config = replace(recorded, **changes)  # type: ignore[arg-type]
        names = [device] if isinstance(device, str | torch.device) else list(device)
        devices = [resolve_device(name) for name in names]
        place, arguments = model_arguments(devices[0], dtype, attn_implementation, trust_remote_code)
        body = load_body(folder, place, arguments, token=token)
        if quantize is not None:
            quantize_body(body, quantize)
        return cls(
            body,
            tokenizer,
            config,
            num_tokens=num_tokens,
            source=folder,
            load_arguments={
                **changes,
                "device": [str(name) for name in names],
                "dtype": dtype,
                "attn_implementation": attn_implementation,
                "num_tokens": num_tokens,
                "quantize": quantize,
                "trust_remote_code": trust_remote_code,
            },
            devices=devices,
        )

    @classmethod
    def from_base(
        cls,
        base: str | Path,
        num_compressed_tokens: int = 5,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        attn_implementation: str = "auto",
        max_length: int = 512,
        trust_remote_code: bool = False,
    ) -> AutoRegEncoder:
        """An untrained encoder from a base language model: its body plus k new tokens `<EMBEDi>`.

        The new rows start as `loading.initial_rows` says; `base` becomes the decoder.
        """
        folder = resolve_folder(base)
        tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
        ids = add_embed_tokens(tokenizer, num_compressed_tokens)
        place, arguments = model_arguments(device, dtype, attn_implementation, trust_remote_code)
        body = load_model(AutoModel, folder, arguments)
        rows = initial_rows(embedding_table(body)[: len(tokenizer) - len(ids)], len(ids))
        grow_table(body, 1 + max(ids))  # the ids decide, not len(tokenizer): a vocabulary may have holes
        with torch.no_grad():
            embedding_table(body)[ids] = rows
        config = untrained_config(base, folder, body, num_compressed_tokens, max_length)
        return cls(body.to(place), tokenizer, config)  # type: ignore[arg-type]

    @property
    def hidden_size(self) -> int:
        """Dimensions of one compressed vector."""
        return embedding_table(self.model).shape[1]

    @property
    def num_compressed_tokens(self) -> int:
        """k, the number of compressed tokens in a prompt."""
        return self.config.num_compressed_tokens

    @property
    def dimension(self) -> int:
        """Dimensions of one embedding: `num_tokens * hidden_size` flattened, `hidden_size` for the mean."""
        return self.hidden_size * (1 if self.config.pooling == "mean" else self.num_tokens)

    @property
    def max_text_tokens(self) -> int:
        """Tokens of text that fit under either instruction; longer texts are cut."""
        return min(self.prompts.max_text_tokens(self._instruction(name)) for name in ("next", "self"))

    @overload
    def count_tokens(self, texts: str) -> int: ...  # type: ignore[overload-overlap]
    @overload
    def count_tokens(self, texts: Sequence[str]) -> list[int]: ...
    def count_tokens(self, texts: str | Sequence[str]) -> int | list[int]:
        """Tokens of a text, or of each of several: a `length_function` for text splitters."""
        if isinstance(texts, str):
            return self.prompts.count_tokens([texts])[0]
        return self.prompts.count_tokens(check_texts(texts))

    @property
    def fingerprint(self) -> str:
        """Names everything that decides an embedding's meaning: weights, tokenizer, instructions, k, pooling,
        max_length. Not the device, dtype or attention it runs with, nor `num_tokens`, which only truncates.

        FileNotFoundError: it is asked for the first time, and the folder that the encoder was loaded from is gone.
        """
        if self._fingerprint is None:
            weights = self._source or self.model
            vocabulary = self.tokenizer.get_vocab()
            self._fingerprint = encoder_fingerprint(weights, vocabulary, self.prompts, self.config)
        return self._fingerprint

    @property
    def has_adapter(self) -> bool:
        """Is the model a LoRA adapter around base weights, as `training.lora.lora_pair` makes it? An adapter that
        `from_pretrained` loads is merged, and is none."""
        return is_adapted(self.model)

    def trainable(self) -> PreTrainedModel:
        """The body (of an encoder with an adapter, the peft model), whose weights the caller is about to change: from
        here on the fingerprint is taken from memory, and the encoder no longer pickles until it is saved and loaded
        again. ValueError: they are quantized."""
        self._refuse_quantized()
        self._source = None
        self._fingerprint = None
        self._passes = Passes(
            self.model, self.num_compressed_tokens, [self.model.device]
        )  # copies would not learn
        return self.model

    def encode_queries(
        self, texts: Sequence[str], *, batch_size: int | None = None, show_progress: bool = False
    ) -> np.ndarray:
        """Embeddings of queries, under I_next: float32 [n, dimension], unit rows, in input order."""
        return self.encode(texts, "next", batch_size=batch_size, show_progress=show_progress)

    def encode_documents(
        self, texts: Sequence[str], *, batch_size: int | None = None, show_progress: bool = False
    ) -> np.ndarray:
        """Embeddings of documents, under I_self: float32 [n, dimension], unit rows, in input order."""
        return self.encode(texts, "self", batch_size=batch_size, show_progress=show_progress)

    def encode(
        self,
        texts: Sequence[str],
        instruction: str = "self",
        *,
        batch_size: int | None = None,
        show_progress: bool = False,
    ) -> np.ndarray:
        """Embeddings under an instruction.

        Args:
            texts: any valid or broken Unicode; special tokens in it are plain characters.
            instruction: "next" (I_next), "self" (I_self) or an instruction in words.
            batch_size: texts per forward pass; by default as many as make up the tokens that suit the device.
            show_progress: draw a bar.

        Returns:
            float32 [n, dimension], unit rows, in input order; [0, dimension] for no texts.

        Raises:
            TypeError: a text is not str; index and type are named.
        """
        return self._gather(texts, (instruction,), self._pooled, (self.dimension,), batch_size, show_progress)

    def encode_stream(
        self,
        texts: Iterable[str],
        instruction: str = "self",
        *,
        batch_size: int | None = None,
        show_progress: bool = False,
        on_cut: Callable[[int], None] | None = None,
    ) -> Iterator[np.ndarray]:
        """Embeddings of texts that need not all be in memory, a few thousand at a time.

        What was yielded is yours whatever happens to the rest: Ctrl-C, an error in `texts`, a device that fails.

        Args:
            texts: read as they are needed, by this thread, one chunk ahead.
            instruction, batch_size, show_progress: as `encode` has them.
            on_cut: called at the end with how many texts were cut, instead of a warning.

        Yields:
            float32 [up to 2048 per device, dimension], in input order.

        Raises:
            TypeError: a text is not str; its index in all of `texts` is named.
        """
        yield from self._stream(texts, (instruction,), self._pooled, batch_size, show_progress, on_cut=on_cut)

    def encode_both(
        self, texts: Sequence[str], *, batch_size: int | None = None, show_progress: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """`encode_queries` and `encode_documents` of the same texts: two arrays, float32 [n, dimension].

        What a text's two prompts have in common, the text, goes through the model once, except under
        FlashAttention 2 and in models without rotary positions.
        """
        k = self.num_compressed_tokens

        def pooled(compressed: Tensor) -> Tensor:
            return torch.stack([self._pooled(compressed[:, :k]), self._pooled(compressed[:, k:])], dim=1)

        shape = 2, self.dimension
        both = self._gather(texts, ("next", "self"), pooled, shape, batch_size, show_progress)
        return both[:, 0], both[:, 1]

    def compress(
        self,
        texts: Sequence[str],
        instruction: str = "self",
        *,
        batch_size: int | None = None,
        show_progress: bool = False,
    ) -> np.ndarray:
        """The raw compressed vectors e_c, what the decoder reads: float32 [n, k, hidden], in input order."""
        shape = self.num_compressed_tokens, self.hidden_size
        return self._gather(texts, (instruction,), Tensor.float, shape, batch_size, show_progress)

    def _pooled(self, compressed: Tensor) -> Tensor:
        vectors = pool(compressed, self.config.pooling)
        k = self.num_compressed_tokens
        return vectors if self.num_tokens == k else first_tokens(vectors, k, self.num_tokens)

    def _gather(
        self,
        texts: Sequence[str],
        instructions: tuple[str, ...],
        finish: Callable[[Tensor], Tensor],
        shape: tuple[int, ...],
        batch_size: int | None,
        show_progress: bool,
    ) -> np.ndarray:
        """What `_stream` yields of all texts, each distinct one encoded once."""
        texts = check_texts(texts)
        times = Counter(texts)
        out = np.empty((len(times), *shape), dtype=np.float32)
        done = 0
        for vectors in self._stream(times, instructions, finish, batch_size, show_progress, times):
            out[done : done + len(vectors)] = vectors
            done += len(vectors)
        if len(times) == len(texts):
            return out
        places = {text: place for place, text in enumerate(times)}
        return out[[places[text] for text in texts]]

    def _stream(
        self,
        texts: Iterable[str],
        instructions: tuple[str, ...],
        finish: Callable[[Tensor], Tensor],
        batch_size: int | None,
        show_progress: bool,
        times: Mapping[str, int] | None = None,
        on_cut: Callable[[int], None] | None = None,
    ) -> Iterator[np.ndarray]:
        """Chunk by chunk, e_c of each text as `finish` makes it; `times` says how often the caller has it."""
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        if os.getpid() != self._pid:
            raise RuntimeError(
                "this encoder was made before a fork, and PyTorch's threads do not survive one: make the encoder "
                "inside the child process, or start processes with multiprocessing's 'spawn' method"
            )
        words = [self._instruction(instruction) for instruction in instructions]
        num_texts = num_cut = 0
        with tqdm(
            total=times and len(times), desc="encode", unit="text", disable=not show_progress
        ) as progress:
            for chunk, prompts in self._prompts(texts, words):
                out = None
                jobs = list(zip(*(under.ids for under in prompts), strict=True))
                for places, compressed in self._passes.run(jobs, batch_size):
                    vectors = finish(compressed).cpu().numpy()
                    if out is None:
                        out = np.empty((len(chunk), *vectors.shape[1:]), dtype=np.float32)
                    out[places] = vectors
                    progress.update(len(places))
                num_texts += sum(times[text] for text in chunk) if times else len(chunk)
                cut = [chunk[i] for i in {*chain(*(under.cut for under in prompts))}]
                if not collect_cut(cut):
                    num_cut += sum(times[text] if times else 1 for text in cut)
                assert out is not None  # noqa: S101  (no chunk is empty)
                yield out
        if on_cut is not None:
            on_cut(num_cut)
        elif num_cut:
            logger.warning(
                "%d of %d texts were cut to %d tokens: split long texts, or raise max_length",
                num_cut,
                num_texts,
                min(map(self.prompts.max_text_tokens, words)),
            )

    def _prompts(
        self, texts: Iterable[str], instructions: list[str]
    ) -> Iterator[tuple[list[str], list[Prompts]]]:
        """Chunks of texts with their prompts under each instruction, tokenised while the chunk before is encoded."""
        size = CHUNK * self._passes.num_devices
        rest = iter(texts)
        chunks = iter(lambda: list(islice(rest, size)), [])
        with ThreadPoolExecutor(1, thread_name_prefix="tokenize") as thread:
            ahead: tuple[list[str], Future[list[Prompts]]] | None = None
            for number, chunk in enumerate(chunks):
                check_texts(chunk, first=number * size)
                if number == 0 and len(chunk) < size:  # all there is: one query needs no thread
                    yield chunk, self.prompts.build_all(chunk, instructions)
                    return
                coming = chunk, thread.submit(self.prompts.build_all, chunk, instructions)
                if ahead is not None:
                    yield ahead[0], ahead[1].result()
                ahead = coming
            if ahead is not None:
                yield ahead[0], ahead[1].result()

    def _instruction(self, name: str) -> str:
        if not isinstance(name, str):
            raise TypeError(f"instruction must be 'next', 'self' or words, not {type(name).__name__}")
        known = {"next": self.config.query_instruction, "self": self.config.document_instruction}
        return known.get(name, name)

    def save_pretrained(
        self, folder: str | Path, *, state_dict: Mapping[str, Tensor] | None = None, card: bool = True
    ) -> None:
        """Write a Hugging Face model folder, `autoregembed.json`, the two files by which sentence-transformers opens
        it, and a model card; each file appears whole or not at all.

        An encoder with an adapter writes that alone, in peft's format and without a card; `from_pretrained(folder)`
        merges it into the base, and saving the result writes a whole model.

        Args:
            folder: made if missing; weights of an earlier save are replaced.
            state_dict: weights to write instead of the live ones, named as in `model.state_dict()`.
            card: write README.md, for which the weights are read once more; one that somebody has written or changed
                stays as it is. False: leave it out, and remove one that an earlier save generated.

        Raises:
            ValueError: `folder` is the decoder, which would be lost, or the weights are quantized.
        """
        self._refuse_quantized()
        history = read_history(self._source if card and state_dict is None else None)
        write_checkpoint(Path(folder), self.model, self.tokenizer, self.config, state_dict)
        if card:
            write_card(self, Path(folder), history)
        else:
            remove_card(Path(folder))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload AutoRegEncoder",
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        card: str | Mapping[str, Any] | None = None,
    ) -> str:
        """Upload the checkpoint, its decoder and a model card to the Hugging Face hub, from where
        `from_pretrained(repo_id)` loads them.

        Weights that are unchanged since they were loaded are uploaded as they are stored, whatever dtype they run in,
        so that the fingerprint stays; others as they are in memory, an adapter that `from_pretrained` loaded merged. A
        decoder that is a folder on this machine goes along as `decoder/`; of one that is a hub id only the name does.

        Args:
            repo_id: "user/name" or "name", which is one's own; made if missing.
            commit_message: of the upload.
            private: make a new repository private; None is what its owner has set. One that is there stays as it is.
            token: with the right to write; None is the one of `hf auth login` or HF_TOKEN.
            revision: branch to upload to, made if missing; None is main.
            create_pr: open a pull request instead.
            card: the README.md, by `card.model_card` for example. None: the one in the folder that the encoder was
                loaded from if somebody has written it, else the repository's if somebody has written that, else a
                generated one. A mapping is for that one: its `scores`, `license` and `language`, as
                `card.model_card` takes them.

        Returns:
            The URL of the commit, or of the pull request.

        Raises:
            ValueError: `repo_id` is none; the encoder has a live adapter, is quantized, or its decoder is gone; a
                mapping is given where somebody has written a card.
            PermissionError: nobody is logged in, or without the right to write there.
            ConnectionError: the hub cannot be reached.
            OSError: it refuses for another reason, which is named.
        """
        from .hub import push

        self._refuse_quantized()
        return push(
            self,
            repo_id,
            commit_message=commit_message,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            card=card,
        )

    def load_weights(self, folder: str | Path) -> None:
        """Put the weights that `save_pretrained` wrote to `folder` into the live model, on its device: those of the
        whole model, or of the adapter. Nothing is rounded: a dtype that is too narrow for them gives way to theirs.

        Raises:
            FileNotFoundError: `folder` holds no weights of this kind.
            ValueError: they differ from the model's in name or shape.
        """
        read_weights(self.trainable(), Path(folder))

    @property
    def quantize(self) -> str | None:
        """In how many bits the weights are kept, as `from_pretrained` was told: "int8", or None for their dtype."""
        kept: str | None = self._load_arguments.get("quantize")
        return kept

    def _refuse_quantized(self) -> None:
        if self.quantize:
            raise ValueError(
                "an encoder with quantized weights is neither trained nor saved nor pushed: load it without quantize"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        if self._source is None:
            raise TypeError(
                "an encoder that was never saved cannot be pickled: save_pretrained(folder) and load it from there"
            )
        return _reopen, (str(self._source), self._load_arguments)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({str(self._source) if self._source else 'unsaved'!r}, "
            f"dimension={self.dimension}, k={self.num_compressed_tokens}, pooling={self.config.pooling!r}, "
            f"device={str(self.model.device)!r}, dtype={str(self.model.dtype)!r})"
        )


def _reopen(source: str, arguments: dict[str, Any]) -> AutoRegEncoder:
    return AutoRegEncoder.from_pretrained(source, **arguments)
