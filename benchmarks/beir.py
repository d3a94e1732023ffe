"""Retrieval sets in BEIR's format, from a folder or from the Hugging Face hub.

    FOLDER/corpus.jsonl        {"_id": "...", "title": "...", "text": "..."}   a document per line
    FOLDER/queries.jsonl       {"_id": "...", "text": "..."}
    FOLDER/qrels/SPLIT.tsv     query-id <tab> corpus-id <tab> score, with a header line

Every score above 0 counts as relevant, with its grade for nDCG. Documents are read anew with every pass over them, so
that a set of any size fits into memory.
"""

from collections.abc import Callable, Iterable, Iterator, Sized
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from tqdm import tqdm

from autoregembed_rag.finetuning.judged import judgements
from autoregembed_rag.training.sources import numbered_rows

HUB_SPLITS = {"msmarco": "validation"}  # its judgements for "test" are TREC DL 2019's, another task


class Document(NamedTuple):
    """What is searched for; `title` may be empty."""

    id: str
    title: str
    text: str

    @property
    def content(self) -> str:
        """The one string that every system gets to see: the title, a line break and the text."""
        return f"{self.title}\n{self.text}" if self.title else self.text


Qrels = dict[str, dict[str, int]]


class Documents(Sized, Iterable[Document], Protocol):
    """So many documents, in the same order whenever they are read: a list, or a `Corpus`."""


class Corpus:
    """Documents that nothing holds: `read` begins anew."""

    def __init__(self, read: Callable[[], Iterator[Document]], count: int) -> None:
        self._read = read
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Document]:
        return islice(self._read(), self._count)


class RetrievalSet(NamedTuple):
    """Documents, the judged queries (id -> text) and their judgements (query id -> document id -> grade)."""

    name: str
    split: str
    documents: Documents
    queries: dict[str, str]
    qrels: Qrels


class BenchmarkDataError(ValueError):
    """Data that cannot be read; the message names the file (and line) and what to do."""


def load_folder(folder: Path, split: str = "test") -> RetrievalSet:
    """Read a BEIR folder; `BenchmarkDataError` names the file and line of what is wrong."""
    corpus, questions, judgements = (
        folder / "corpus.jsonl",
        folder / "queries.jsonl",
        folder / "qrels" / f"{split}.tsv",
    )
    for file in (corpus, questions, judgements):
        if not file.is_file():
            raise BenchmarkDataError(_missing(file, folder))
    name = folder.resolve().name
    documents = _counted(name, partial(_read_documents, corpus))
    texts = {_text(row, "_id", where): _text(row, "text", where) for where, row in _json_lines(questions)}
    return _assemble(name, split, documents, texts, _read_qrels(judgements))


def hub_rows(dataset: str, configuration: str | None, split: str, instead: str) -> Any:  # noqa: ANN401
    """The rows of a split on the Hugging Face hub; `BenchmarkDataError` if they cannot be had says what to do instead,
    with a copy from elsewhere."""
    try:
        from datasets import load_dataset

        return load_dataset(dataset, configuration, split=split)
    except ImportError as error:
        raise BenchmarkDataError(f'{error}; the hub needs: pip install "autoregembed-rag[train]"') from error
    except (OSError, ValueError) as error:  # offline, unknown name, unknown split: there is no common class
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BenchmarkDataError(
            f"cannot load {dataset} (split {split!r}) from the Hugging Face hub: {reason}. "
            f"With no network, download the set elsewhere and {instead}"
        ) from error


def load_hub(name: str, split: str | None = None) -> RetrievalSet:
    """Load `BeIR/NAME` and `BeIR/NAME-qrels` with `datasets`.

    The default split is "test", for MS MARCO "validation", its dev set. `BenchmarkDataError` where the set is
    unknown or cannot be reached, naming `--data-dir`.
    """
    split = split or HUB_SPLITS.get(name, "test")
    instead = "pass its folder with --data-dir DIR (corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv)"
    corpus = hub_rows(f"BeIR/{name}", "corpus", "corpus", instead)
    questions = hub_rows(f"BeIR/{name}", "queries", "queries", instead)
    judgements = hub_rows(f"BeIR/{name}-qrels", None, split, instead)

    def read() -> Iterator[Document]:
        return (Document(str(row["_id"]), row.get("title") or "", row["text"] or "") for row in corpus)

    qrels: Qrels = {}
    for row in judgements:
        qrels.setdefault(str(row["query-id"]), {})[str(row["corpus-id"])] = int(row["score"])
    texts = {str(row["_id"]): row["text"] for row in questions}
    return _assemble(name, split, _counted(name, read), texts, qrels)


def limit_documents(data: RetrievalSet, limit: int) -> RetrievalSet:
    """The first `limit` documents and the queries that keep a relevant one; other judgements are dropped.

    Easier than the whole set (fewer distractors, fewer answers to find): for trials, not for reporting.
    """
    documents = Corpus(partial(iter, data.documents), min(limit, len(data.documents)))
    kept = {document.id for document in documents}
    qrels = {
        query: {d: grade for d, grade in grades.items() if d in kept} for query, grades in data.qrels.items()
    }
    return _assemble(data.name, data.split, documents, data.queries, qrels)


def _assemble(
    name: str, split: str, documents: Documents, texts: dict[str, str], qrels: Qrels
) -> RetrievalSet:
    """Keep the queries that have a relevant document, as BEIR and TREC do; an empty set is an error."""
    judged = {query: grades for query, grades in qrels.items() if any(grade > 0 for grade in grades.values())}
    if unknown := judged.keys() - texts.keys():
        raise BenchmarkDataError(
            f"{name}: qrels of split {split!r} judge query {min(unknown)!r}, which the queries do not have"
        )
    if not len(documents) or not judged:
        raise BenchmarkDataError(
            f"{name}: {len(documents)} documents and {len(judged)} queries with a relevant one are left; "
            "at least one of each is needed (with --limit, raise it)"
        )
    return RetrievalSet(name, split, documents, {query: texts[query] for query in judged}, judged)


def _counted(name: str, read: Callable[[], Iterator[Document]]) -> Corpus:
    """The corpus, once every document has been read and no id twice; eight bytes of each are kept meanwhile."""
    rows = tqdm(read(), desc="reading documents", unit="doc", delay=2)
    ids = np.fromiter((hash(document.id) for document in rows), dtype=np.int64)
    if len(np.unique(ids)) != len(ids):
        raise BenchmarkDataError(f"{name}: a document _id occurs twice in the corpus; ids must be unique")
    return Corpus(read, len(ids))


def _read_documents(file: Path) -> Iterator[Document]:
    for where, row in _json_lines(file):
        yield Document(_text(row, "_id", where), _text(row, "title", where, ""), _text(row, "text", where))


def _missing(file: Path, folder: Path) -> str:
    splits = ", ".join(sorted(path.stem for path in folder.glob("qrels/*.tsv")))
    if splits and file.suffix == ".tsv":
        return f"{file} does not exist; the splits there are: {splits} (choose with --split)"
    return f"{file} does not exist; a BEIR folder holds corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv"


def _json_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line's place ("FILE, line N") and object."""
    try:
        for number, row in numbered_rows(file):
            yield f"{file}, line {number}", row
    except ValueError as error:
        raise BenchmarkDataError(str(error)) from error


def _text(row: dict[str, Any], field: str, where: str, default: str | None = None) -> str:
    value = row.get(field, default)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        problem = "is missing" if value is None else f"is {type(value).__name__}, not a string"
        raise BenchmarkDataError(f"{where}: field {field!r} {problem}")
    return value


def _read_qrels(file: Path) -> Qrels:
    qrels: Qrels = {}
    try:
        for _, query, document, grade in judgements(file):
            qrels.setdefault(query, {})[document] = grade
    except ValueError as error:
        raise BenchmarkDataError(str(error)) from error
    return qrels
