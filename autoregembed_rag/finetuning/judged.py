"""A judged corpus in BEIR's format: corpus.jsonl, queries.jsonl, qrels/train.tsv and perhaps qrels/dev.tsv."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..training.sources import numbered_rows
from .documents import check_id, valid_unicode
from .passages import joined

logger = logging.getLogger(__name__)

Qrels = Mapping[str, Mapping[str, int]]
"""Query id -> document id -> grade; above 0 is relevant."""


@dataclass(frozen=True)
class Judged:
    """Documents (id -> title and text), queries (id -> text) and the judgements to train on and to hold out.

    Every query of `train` and `dev` has a relevant document in `corpus`; `dev` is empty if there is no dev.tsv.
    ValueError for an id that is not valid Unicode.
    """

    corpus: Mapping[str, str]
    queries: Mapping[str, str]
    train: Qrels
    dev: Qrels

    def __post_init__(self) -> None:
        for name in (*self.queries, *self.corpus):
            check_id(name)


def read_judged(folder: str | Path) -> Judged:
    """Read a BEIR folder; what test.tsv judges is not read, and documents without text are left out.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a line is malformed, an id occurs twice, or a judged query does not exist; file and line are named.
    """
    folder = Path(folder)
    corpus = _texts(folder / "corpus.jsonl", titled=True)
    queries = _texts(folder / "queries.jsonl", titled=False)
    train = _qrels(folder / "qrels" / "train.tsv", queries, corpus)
    dev_file = folder / "qrels" / "dev.tsv"
    dev = _qrels(dev_file, queries, corpus) if dev_file.is_file() else {}
    return Judged({key: text for key, text in corpus.items() if text}, queries, train, dev)


def _texts(file: Path, *, titled: bool) -> dict[str, str]:
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist; a judged BEIR folder has corpus.jsonl and queries.jsonl"
        )
    texts: dict[str, str] = {}
    for number, row in numbered_rows(file):
        fields = [row.get("_id"), row.get("text"), (row.get("title") or "") if titled else ""]
        for name, value in zip(("_id", "text", "title"), fields, strict=True):
            if not isinstance(value, str):
                raise ValueError(
                    f"{file}, line {number}: field {name!r} must be a text, not {type(value).__name__}"
                )
        key, text, title = valid_unicode(str(fields[0])), str(fields[1]), str(fields[2])
        if key in texts:
            raise ValueError(f"{file}, line {number}: the _id {key!r} occurs twice; ids must be unique")
        texts[key] = joined(title.strip(), (), text.strip())
    return texts


def judgements(file: Path) -> Iterator[tuple[str, str, str, int]]:
    """The place, query id, document id and grade of each line of a file of qrels, with or without a header.

    ValueError names file and line of what is malformed.
    """
    with file.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip() and not (number == 1 and _is_header(line)):
                place = f"{file}, line {number}"
                yield place, *_judgement(line, place)


def _qrels(file: Path, queries: Mapping[str, str], corpus: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """The judgements of existing documents with text, of queries with a relevant one among them."""
    qrels: dict[str, dict[str, int]] = {}
    missing = 0
    for place, query, document, grade in judgements(file):
        if not queries.get(query):
            raise ValueError(f"{place}: query {query!r} is not in queries.jsonl or has no text")
        if corpus.get(document):
            qrels.setdefault(query, {})[document] = grade
        else:
            missing += 1
    if missing:
        logger.warning("%s judges %d documents that are not in corpus.jsonl or have no text", file, missing)
    return {query: grades for query, grades in qrels.items() if max(grades.values()) > 0}


def _is_header(line: str) -> bool:
    """Three names, the last of them no number; ids may look like anything."""
    *_, score = cells = line.split("\t")
    return len(cells) == 3 and re.fullmatch(r"[A-Za-z][\w -]*", score.strip()) is not None


def _judgement(line: str, place: str) -> tuple[str, str, int]:
    try:
        line.encode()
    except UnicodeEncodeError:  # what surrogateescape made of bytes that are not UTF-8
        raise ValueError(f"{place}: broken UTF-8; save the file as UTF-8") from None
    try:
        query, document, grade = line.rstrip("\r\n").split("\t")
        return query, document, int(grade)
    except ValueError:
        raise ValueError(
            f"{place}: expected query-id, corpus-id and a whole-number score separated by tabs, found {line.rstrip()!r}"
        ) from None
