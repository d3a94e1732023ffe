"""Passages: pieces of documents that fit a prompt, and the sentences in them.

A long section is cut in halves until each fits: pieces of like size rather than full ones and a small rest, at a
paragraph's end where there is one near the middle, else at a sentence's, else at a space. Nothing but the white space
around a cut is lost.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from .documents import Document

CountTokens = Callable[[list[str]], Sequence[int]]
"""Tokens of each text: `AutoRegEncoder.count_tokens`."""

COUNTED_AT_ONCE = 1024
CHARACTERS_PER_TOKEN = 8
"""A text of more characters than this for each token allowed is cut before it is tokenised: few languages have as many,
and a passage that could have been longer does no harm."""

WINDOW = 4000
"""Characters on either side of the middle in which a boundary is looked for."""


@dataclass(frozen=True)
class Passage:
    """A piece of one section of a document.

    Attributes:
        id: unique in the corpus: the document's id, "#" and a number from 0.
        document: the document's id.
        title: the document's, possibly empty.
        headings: the section's, from the outermost to its own.
        text: the passage itself, without title and headings.
    """

    id: str
    document: str
    title: str
    headings: tuple[str, ...]
    text: str

    @property
    def content(self) -> str:
        """Title, headings and text: what a reader needs to understand the passage."""
        return joined(self.title, self.headings, self.text)


def joined(title: str, headings: Sequence[str], text: str) -> str:
    """Title, headings and text, a line each; empty ones leave nothing."""
    return "\n".join(part for part in (title, *headings, text) if part)


def split_documents(
    documents: Sequence[Document], *, count_tokens: CountTokens, max_tokens: int
) -> list[Passage]:
    """The passages of `documents`, in order, each with its title and headings of at most `max_tokens` tokens.

    A title or headings of more than a quarter of `max_tokens` become part of the text. ValueError if `max_tokens` is
    too small for a single character.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, not {max_tokens}")

    def fit(texts: list[str], limit: int) -> list[bool]:
        return _fit(texts, limit, count_tokens)

    whole = [
        Passage("", document.id, document.title, section.headings, section.text.strip())
        for document in documents
        for section in document.sections
    ]
    short = fit([joined(p.title, p.headings, "") for p in whole], max_tokens // 4)
    pending = [(p if ok else _as_text(p), False) for p, ok in zip(whole, short, strict=True)]
    while any(not done for _, done in pending):
        fits = iter(fit([p.content for p, done in pending if not done], max_tokens))
        pending = [
            item
            for p, done in pending
            for item in ([(p, True)] if done or next(fits) else [(half, False) for half in _halves(p)])
        ]
    numbers: dict[str, int] = {}
    passages = []
    for p, _ in pending:
        number = numbers[p.document] = numbers.get(p.document, -1) + 1
        passages.append(replace(p, id=f"{p.document}#{number}"))
    return passages


def _fit(texts: list[str], limit: int, count_tokens: CountTokens) -> list[bool]:
    fits = [len(text) <= CHARACTERS_PER_TOKEN * limit for text in texts]
    counted = [i for i, maybe in enumerate(fits) if maybe and texts[i]]
    for part in (counted[i : i + COUNTED_AT_ONCE] for i in range(0, len(counted), COUNTED_AT_ONCE)):
        for i, count in zip(part, count_tokens([texts[i] for i in part]), strict=True):
            fits[i] = count <= limit
    return fits


def _as_text(passage: Passage) -> Passage:
    return replace(passage, title="", headings=(), text=passage.content)


_PARAGRAPH = re.compile(r"\n\s*\n\s*")
_SPACE = re.compile(r"\s+")


def _halves(passage: Passage) -> list[Passage]:
    text = passage.text.strip()
    if len(text) < 2:
        raise ValueError(
            f"max_tokens is too small: {text!r} alone, with its title and headings, has more tokens; raise it"
        )
    cut = _cut(text)
    return [replace(passage, text=half) for half in (text[:cut].rstrip(), text[cut:].lstrip())]


def _cut(text: str) -> int:
    """Where to cut, in (0, len(text)): the best kind of boundary not far from the middle, there the nearest."""
    middle, reach = len(text) // 2, min(WINDOW, len(text) // 4)
    low, high = middle - reach, middle + reach
    for ends in (
        _ends(_PARAGRAPH, text, low, high),
        sentence_ends(text, low, high),
        _ends(_SPACE, text, low, high),
    ):
        if near := [end for end in ends if 0 < end < len(text)]:
            return min(near, key=lambda end: abs(end - middle))
    return middle


def _ends(pattern: re.Pattern[str], text: str, low: int, high: int) -> Iterator[int]:
    return (match.end() for match in pattern.finditer(text, low, high))


# The look-behind keeps a row of stops from being tried at each of them.
_STOP = re.compile(r"(?<![.!?…])[.!?…]+[\"'”’)\]]*\s+|[。！？]+\s*")
_ABBREVIATIONS = {
    "al",
    "approx",
    "cf",
    "dr",
    "e.g",
    "eq",
    "eqs",
    "etc",
    "fig",
    "figs",
    "i.e",
    "mr",
    "mrs",
    "ms",
    "no",
    "nos",
    "p",
    "pp",
    "prof",
    "ref",
    "sec",
    "st",
    "vs",
}


def sentence_ends(text: str, low: int = 0, high: int | None = None) -> Iterator[int]:
    """Where sentences end in text[low:high], after the space: where the next one begins.

    A full stop ends one if white space precedes it (as in tokenised text) or what follows begins like a sentence, and
    no abbreviation or initial precedes it.
    """
    for match in _STOP.finditer(text, low, len(text) if high is None else high):
        if match[0][0] in "。！？" or _is_end(text, match):
            yield match.end()


def _is_end(text: str, match: re.Match[str]) -> bool:
    start = match.start()
    if start and text[start - 1].isspace():
        return True
    following = text[match.end() : match.end() + 1]
    if following and not (following.isupper() or following.isdigit() or following in "\"'“‘([-*•"):
        return False
    word = re.split(r"[\s(\[]", text[max(0, start - 12) : start])[-1].lower()
    return match[0][0] != "." or not (word in _ABBREVIATIONS or (len(word) == 1 and word.isalpha()))


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """(start, end) of each sentence, without the white space around it; a paragraph's end ends a sentence too."""
    ends = sorted({*sentence_ends(text), *_ends(_PARAGRAPH, text, 0, len(text)), len(text)})
    spans = []
    for start, end in zip([0, *ends], ends, strict=False):
        piece = text[start:end]
        if bare := piece.strip():
            first = start + piece.index(bare)
            spans.append((first, first + len(bare)))
    return spans
