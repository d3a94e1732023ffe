"""What a path holds: documents, labelled pairs, or a BEIR folder with or without labels."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ..training.sources import numbered_rows
from .reading import JSONL, NAMED, SUFFIXES, document_files

Kind = Literal["documents", "pairs", "beir", "beir without labels"]

WANTED = f"""a path to fine-tune on is one of
  - a folder of documents ({", ".join(SUFFIXES)}), or one such file; a JSONL line has "text" and maybe "title", "_id"
  - a file of labelled pairs or triplets: JSONL lines with "query", "pos" and maybe "neg"
  - a BEIR folder: corpus.jsonl and, with labels, queries.jsonl and qrels/train.tsv"""


def corpus_kind(path: str | Path) -> Kind:
    """What `path` holds; ValueError lists what it may be."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; {WANTED}")
    if path.is_file():
        return _file_kind(path)
    if (path / "corpus.jsonl").is_file():
        return "beir" if (path / "qrels" / "train.tsv").is_file() else "beir without labels"
    files, unreadable = document_files(path)
    if files:
        return "documents"
    if unreadable:
        raise ValueError(
            f"{path} holds no documents that can be read ({', '.join(unreadable[:NAMED])}): allow these to be read"
        )
    raise ValueError(f"{path} holds no documents; {WANTED}")


def _file_kind(path: Path) -> Kind:
    if not path.name.lower().endswith(SUFFIXES):
        raise ValueError(f"{path} is of an unknown kind; {WANTED}")
    if not path.name.lower().endswith(JSONL):
        return "documents"
    _, first = next(numbered_rows(path), (0, {}))
    if "query" in first and "pos" in first:
        return "pairs"
    if "text" in first:
        return "documents"
    raise ValueError(f"{path}: the first line has the fields {sorted(first)}; {WANTED}")
