"""Text, instruction and compressed tokens -> token ids: the only place, for training and inference alike.

    <bos> text \\n instruction \\n <EMBED0> ... <EMBEDk-1>

Text and instruction are tokenised apart and joined as ids. User text goes through a private copy of the
tokenizer that never parses special tokens: setting `split_special_tokens` on a call would change the shared
tokenizer under other threads' feet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

# A text's first tokens do not depend on its distant end, so a long text is tokenised from its start only: so
# many characters for each token wanted. Where that gives too few tokens, the whole text is tokenised.
CHARACTERS_PER_TOKEN = 32
# The last tokens of a start cut off mid-word may differ from the whole text's: so many more are asked for.
MARGIN = 16

_cut: ContextVar[set[str] | None] = ContextVar("cut", default=None)


def embed_tokens(k: int) -> list[str]:
    """The names of the compressed tokens: `<EMBED0>` ... `<EMBEDk-1>`."""
    return [f"<EMBED{i}>" for i in range(k)]


def check_texts(texts: Iterable[str], argument: str = "texts", first: int = 0) -> list[str]:
    """`texts` as a list of str; TypeError names the index, counted from `first`, and type of what is not one."""
    if isinstance(texts, str):
        raise TypeError(f"{argument} must be a sequence of texts, not one str: pass [text]")
    checked = list(texts)
    for index, text in enumerate(checked, first):
        if not isinstance(text, str):
            raise TypeError(f"{argument}[{index}] must be str, not {type(text).__name__}")
    return checked


@contextmanager
def collecting_cut() -> Iterator[set[str]]:
    """Inside, every text that is cut is put into this set, and no step warns of its own: for a caller whose steps cut
    the same texts and who warns once."""
    found: set[str] = set()
    before = _cut.set(found)
    try:
        yield found
    finally:
        _cut.reset(before)


def collect_cut(texts: Iterable[str]) -> bool:
    """Hand over texts that were cut; False: nobody collects them, so a warning is due."""
    found = _cut.get()
    if found is not None:
        found.update(texts)
    return found is not None


class TextTokenizer:
    """A private copy of a tokenizer for text that nobody vouches for: `</s>` in it is four characters."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, control_tokens: Sequence[str] = ()) -> None:
        """Copy `tokenizer`; its own special tokens and `control_tokens` are special here even if the tokenizer
        holds them as ordinary added ones."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ValueError(
                f"{type(tokenizer).__name__} has no `tokenizers` backend: load the model's fast tokenizer "
                "(a tokenizer.json beside the weights)"
            )
        self._backend = Tokenizer.from_str(backend.to_str())
        self._backend.add_special_tokens(
            [
                AddedToken(token, special=True, normalized=False)
                for token in (*tokenizer.all_special_tokens, *control_tokens)
            ]
        )
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        self._spelled = self._spell_special(tokenizer.unk_token_id)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A pickled or copied tokenizer keeps everything but this."""
        self.__dict__.update(state)
        self._backend.encode_special_tokens = True

    def encode(self, texts: Sequence[str], limit: int | None = None) -> list[list[int]]:
        """Token ids of each text, at most `limit + 1` of them: one more than `limit` says it was longer."""
        if limit is None:
            return self._encode(texts)
        enough = limit + MARGIN
        head = CHARACTERS_PER_TOKEN * enough
        rows = self._encode([text[:head] for text in texts])
        short = [i for i, text in enumerate(texts) if len(text) > head and len(rows[i]) < enough]
        for i, row in zip(short, self._encode([texts[i] for i in short]), strict=True):
            rows[i] = row
        return [row[: limit + 1] for row in rows]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self._backend.encode_batch_fast([_valid(text) for text in texts], add_special_tokens=False)
        return [self._without_special(row.ids) for row in encoded]

    def _without_special(self, ids: list[int]) -> list[int]:
        if self._spelled.keys().isdisjoint(ids):
            return ids
        return [piece for token in ids for piece in self._spelled.get(token, [token])]

    def _spell_special(self, unknown: int | None) -> dict[int, list[int]]:
        """Special token ids -> the ids of their characters: a Unigram model knows `</s>` as one of its pieces,
        and finds it in text. The unknown token is left alone: it means what it says."""
        special = {i: t.content for i, t in self._backend.get_added_tokens_decoder().items() if t.special}
        special.pop(-1 if unknown is None else unknown, None)
        spelled = {}
        for token, name in special.items():
            pieces = [piece.id for character in name for piece in self._backend.model.tokenize(character)]
            # A token of one character cannot be spelled in others.
            if pieces and special.keys().isdisjoint(pieces):
                spelled[token] = pieces
        return spelled


def _valid(text: str) -> str:
    """`text` with lone surrogates, which UTF-8 cannot carry, replaced by U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def pad_right(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids [n, longest], padded on the right with 0, and the lengths [n].

    Causal attention never looks to the right, so no mask is needed and the padding token is of no account.
    """
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    ids = np.zeros((len(rows), lengths.max()), dtype=np.int64)
    ids[np.arange(ids.shape[1]) < lengths[:, None]] = np.fromiter(
        chain.from_iterable(rows), dtype=np.int64, count=lengths.sum()
    )
    return torch.from_numpy(ids), torch.from_numpy(lengths)


# What one more forward pass costs, in tokens of padding that it may save.
GROUP_COST = 128


def length_groups(lengths: Sequence[int], *, most: int | None = None) -> list[list[int]]:
    """Rows of like length together, longest first, where that saves more padding than another pass costs.

    Args:
        lengths: tokens of each row.
        most: tokens of a group at most, padding included, unless one row alone is longer.
    """
    groups: list[list[int]] = []
    padding = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups:
            longest = lengths[groups[-1][0]]
            padding += longest - lengths[i]
            full = most is not None and longest * (len(groups[-1]) + 1) > most
        if not groups or full or padding > GROUP_COST:
            groups.append([])
            padding = 0
        groups[-1].append(i)
    return groups


class Prompts(NamedTuple):
    """A batch of prompts: token ids per row, and the places of the texts that had to be cut to fit."""

    ids: list[list[int]]
    cut: list[int]


class PromptBuilder:
    """Builds prompts of at most `max_length` tokens for one tokenizer with its k compressed tokens."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, num_compressed_tokens: int, max_length: int
    ) -> None:
        names = embed_tokens(num_compressed_tokens)
        vocabulary = tokenizer.get_vocab()
        if missing := [name for name in names if name not in vocabulary]:
            raise ValueError(
                f"the tokenizer lacks the compressed tokens {', '.join(missing)}: "
                "add them with AutoRegEncoder.from_base(base, num_compressed_tokens=k)"
            )
        self._text = TextTokenizer(tokenizer, control_tokens=names)
        self._prefix = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
        self._compressed = [vocabulary[name] for name in names]
        self._max_length = max_length

    def with_max_length(self, max_length: int) -> PromptBuilder:
        """The same for prompts of at most `max_length` tokens."""
        other = copy(self)
        other._max_length = max_length
        return other

    def max_text_tokens(self, instruction: str) -> int:
        """Tokens of text that fit beside `instruction`; ValueError if none do."""
        return self._room(self._suffix(instruction))

    def _room(self, suffix: list[int]) -> int:
        room = self._max_length - len(self._prefix) - len(suffix)
        if room < 1:
            raise ValueError(
                f"the instruction leaves no room for text within max_length={self._max_length}: "
                "shorten it or raise max_length"
            )
        return room

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text alone, uncut."""
        return [len(row) for row in self._text.encode(texts)]

    def build(self, texts: Sequence[str], instruction: str) -> Prompts:
        """Prompts for `texts` under `instruction`; the last k ids of every row are the compressed tokens."""
        return self.build_all(texts, [instruction])[0]

    def build_all(self, texts: Sequence[str], instructions: Sequence[str]) -> list[Prompts]:
        """`build` for each instruction, with each text tokenised once."""
        suffixes = [self._suffix(instruction) for instruction in instructions]
        rooms = [self._room(suffix) for suffix in suffixes]
        rows = self._text.encode(texts, limit=max(rooms))
        return [
            Prompts(
                [self._prefix + row[:room] + suffix for row in rows],
                [i for i, row in enumerate(rows) if len(row) > room],
            )
            for suffix, room in zip(suffixes, rooms, strict=True)
        ]

    def build_each(self, texts: Sequence[tuple[str, str]]) -> list[list[int]]:
        """Prompts for texts, each under an instruction of its own: (text, instruction) -> token ids, in their order."""
        ids: list[list[int]] = [[] for _ in texts]
        for instruction in dict.fromkeys(instruction for _, instruction in texts):
            under = [i for i, (_, other) in enumerate(texts) if other == instruction]
            for i, row in zip(under, self.build([texts[i][0] for i in under], instruction).ids, strict=True):
                ids[i] = row
        return ids

    def _suffix(self, instruction: str) -> list[int]:
        return self._text.encode([f"\n{instruction}\n"])[0] + self._compressed
