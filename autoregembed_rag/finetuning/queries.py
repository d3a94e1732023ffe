"""Queries made of passages: titles, headings and sentences, each with the passage that answers it.

No query can be answered by copying: one that stands word for word in its own text is left out, and a sentence is taken
out of its passage. No query has two answers either: a text that could be the query of two places (a title that two
documents share, a sentence of a disclaimer) is none.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from .passages import Passage, joined, sentence_spans

MIN_PASSAGE = 20
"""Letters and digits that are worth a passage."""

MIN_QUERY = 4
"""Letters of a title or heading."""

MIN_SENTENCE, MAX_SENTENCE = 25, 300
"""Letters of a sentence at least, characters at most."""

LETTERS = 0.6
"""A sentence's share of letters among its characters: lower in tables, references and formulas."""


@dataclass(frozen=True)
class Pair:
    """A query made of a passage; `document` is the passage as a row shows it, `body` its text, neither with `query`."""

    kind: Literal["title", "heading", "sentence"]
    query: str
    passage: Passage
    document: str
    body: str


def make_pairs(passages: Sequence[Passage]) -> dict[str, list[Pair]]:
    """Passage id -> every query that can be made of it."""
    places = _places(passages)
    pairs: dict[str, list[Pair]] = {}
    previous: Passage | None = None
    for p in passages:
        opens_document = previous is None or previous.document != p.document
        opens_section = previous is None or _section(previous) != _section(p)
        made = [
            *(_title_pairs(p) if opens_document else []),
            *(_heading_pairs(p, places) if opens_section and p.headings else []),
            *_sentence_pairs(p),
        ]
        pairs[p.id] = [pair for pair in made if _usable(pair, places)]
        previous = p
    return pairs


def _section(p: Passage) -> tuple[str, tuple[str, ...]]:
    return p.document, p.headings


def _title_pairs(p: Passage) -> Iterator[Pair]:
    if _letters(p.title) >= MIN_QUERY:
        yield Pair("title", p.title, p, joined("", p.headings, p.text), p.text)


def _heading_pairs(p: Passage, places: Counter[int]) -> Iterator[Pair]:
    """By the heading if it says enough by itself, else by title and heading."""
    heading = p.headings[-1]
    if len(heading.split()) > 1 and _letters(heading) >= MIN_QUERY and places[_key(heading)] == 1:
        yield Pair("heading", heading, p, joined(p.title, p.headings[:-1], p.text), p.text)
    elif p.title:
        yield Pair("heading", _full_heading(p), p, joined("", p.headings[:-1], p.text), p.text)


def _full_heading(p: Passage) -> str:
    return f"{p.title}: {p.headings[-1]}"


def _sentence_pairs(p: Passage) -> Iterator[Pair]:
    spans = sentence_spans(p.text)
    for start, end in spans if len(spans) > 1 else []:
        sentence = p.text[start:end]
        letters = _letters(sentence)
        short = letters < MIN_SENTENCE or len(sentence) > MAX_SENTENCE
        if short or letters < LETTERS * len(sentence) or "://" in sentence:
            continue
        rest = f"{p.text[:start].rstrip()} {p.text[end:].lstrip()}".strip()
        if sum(map(str.isalnum, rest)) >= max(MIN_PASSAGE, letters):
            yield Pair("sentence", " ".join(sentence.split()), p, joined(p.title, p.headings, rest), rest)


def _usable(pair: Pair, places: Counter[int]) -> bool:
    return places[_key(pair.query)] == 1 and fold(pair.query) not in fold(pair.document)


def _places(passages: Sequence[Passage]) -> Counter[int]:
    """How often a text could be a query: titles once a document, headings once a section, sentences always."""
    places: Counter[int] = Counter()
    titled = dict.fromkeys((p.document, p.title) for p in passages if p.title)
    places.update(_key(title) for _, title in titled)
    sections = {_section(p): p for p in passages if p.headings}
    places.update(_key(p.headings[-1]) for p in sections.values())
    places.update(_key(_full_heading(p)) for p in sections.values() if p.title)
    for p in passages:
        places.update(_key(p.text[start:end]) for start, end in sentence_spans(p.text))
    return places


def _letters(text: str) -> int:
    return sum(map(str.isalpha, text))


def fold(text: str) -> str:
    """The words of a text, whatever their case and the marks between them; a text without words as it is."""
    return " ".join(re.findall(r"\w+", text.casefold())) or text.strip()


def _key(text: str) -> int:
    return hash(fold(text))
