"""Training rows and a held-out evaluation from somebody's own corpus, with or without labels.

Without labels both stages' rows are made of the documents (`prepare_documents`):

- stage 2 aligns a title with the beginning of its document, a heading with its section, a sentence with the passage
  that it was taken out of;
- stage 1 learns the two conditions that stage 2 then compares, p(d | e_d,self) and p(d | e_q,next) (section 3.3): each
  passage is reconstructed from itself under I_self, and written from one of its queries under I_next. The paper's
  stage 1 data, PWC, mixes reconstruction with instructions that ask for another text in the same way.

Notable decisions:
- No query can be answered by copying (see `queries`): what it was made of is missing from its row's text and from the
  evaluation's. A real index does hold titles; so reconstruction and a sentence's rows show documents with theirs.
- The evaluation searches all passages without title and headings, a held-out sentence taken out of its own. All
  passages have the same form, whether training saw them or not, so that the form gives nothing away. It is harder
  than a search by title in a real index, and comparable only with itself.
- Whole documents are held out; no text of theirs is in any row. As queries stand in one place only, none of a held-out
  document's is a title, heading or sentence of another.
- Long documents: the title stands for the first passage in training, and for all of them in the evaluation.

With labels, queries are held out: those of qrels/dev.tsv, else a random share. Documents, which an index knows
beforehand, are not. What test.tsv judges is never read.

The corpus is in memory: several times its size on disk.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config import DOCUMENT_INSTRUCTION, QUERY_INSTRUCTION
from ..training.data import AlignmentRow, CompressionRow, alignment_rows
from .documents import Document
from .evaluation import Evaluation
from .judged import Judged, Qrels, read_judged
from .kinds import Kind, corpus_kind
from .passages import CountTokens, Passage, split_documents
from .queries import MIN_PASSAGE, Pair, fold, make_pairs
from .reading import read_documents

PER_PASSAGE = 3
"""Alignment rows of one passage, at most."""

PER_QUERY = 10
"""Alignment rows of one labelled query, at most; the highest grades first."""

MAX_HELD_OUT = 500
"""Held-out documents or queries, at most: enough to tell models apart, few enough to encode twice."""

MAX_SEARCHED = 50_000
"""Texts that the evaluation searches, at most: what is relevant and a random part of the rest."""


@dataclass(frozen=True)
class Prepared:
    """What a fine-tuning run needs.

    Attributes:
        kind: what the path was taken for.
        compression: rows of stage 1.
        alignment: rows of stage 2, without negatives unless the labels have some.
        evaluation: held-out queries, what is searched and what is relevant.
        counts: how many of what, for a plan that is shown before training.
    """

    kind: Kind
    compression: list[CompressionRow]
    alignment: list[AlignmentRow]
    evaluation: Evaluation
    counts: dict[str, int]


@dataclass(frozen=True)
class Corpus:
    """The passages of a corpus, near-empty and repeated ones left out, and how many these were."""

    passages: tuple[Passage, ...]
    documents: int
    near_empty: int
    duplicates: int


@dataclass(frozen=True)
class CorpusArguments:
    """How rows are made; validated here.

    Attributes:
        count_tokens: the encoder's.
        max_tokens: of a passage with its title; the encoder's `max_text_tokens` or fewer.
        seed: decides what is held out and which sentences are queries.
        held_out: share of the documents (or labelled queries) that training does not see, in (0, 1).
        query_instruction, document_instruction: I_next and I_self, as the encoder records them.
    """

    count_tokens: CountTokens
    max_tokens: int
    seed: int = 0
    held_out: float = 0.1
    query_instruction: str = QUERY_INSTRUCTION
    document_instruction: str = DOCUMENT_INSTRUCTION

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must be between 0 and 1, not {self.held_out}: 0.1 holds out a tenth")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {self.max_tokens}")

    def share(self, available: int) -> int:
        """How many of `available`, 2 or more, are held out: at least 1, at most MAX_HELD_OUT, never all."""
        return max(1, min(MAX_HELD_OUT, available - 1, round(self.held_out * available)))


def prepare(path: str | Path, arguments: CorpusArguments, *, use_labels: bool = True) -> Prepared:
    """Rows for both stages and a held-out evaluation from what `path` holds.

    Args:
        path: documents, labelled pairs or a BEIR folder; see `kinds.corpus_kind`.
        arguments: seed, share held out, passage length.
        use_labels: False takes a BEIR folder's documents alone.

    Raises:
        FileNotFoundError: there is no such path.
        ValueError: it is none of these, a line is malformed (file and line are named), or too little is left to
            train on and to hold out.
    """
    path = Path(path)
    kind = corpus_kind(path)
    if kind == "pairs":
        return prepare_pairs(list(alignment_rows(path)), arguments)
    if kind == "beir" and use_labels:
        return prepare_judged(read_judged(path), arguments)
    source = path if kind == "documents" else path / "corpus.jsonl"
    return prepare_documents(
        read_documents(source), arguments, kind="documents" if kind == "documents" else "beir without labels"
    )


def read_corpus(documents: Sequence[Document], arguments: CorpusArguments) -> Corpus:
    """Split documents into passages, leaving out near-empty ones and all but the first of those with equal text."""
    passages = split_documents(
        documents, count_tokens=arguments.count_tokens, max_tokens=arguments.max_tokens
    )
    full = [p for p in passages if sum(map(str.isalnum, p.text)) >= MIN_PASSAGE]
    first = {" ".join(p.text.split()): p for p in reversed(full)}
    kept = tuple(p for p in full if first[" ".join(p.text.split())] is p)
    return Corpus(kept, len(documents), len(passages) - len(full), len(full) - len(kept))


def prepare_documents(
    documents: Sequence[Document], arguments: CorpusArguments, *, kind: Kind = "documents"
) -> Prepared:
    """Rows and evaluation from documents without labels, as the module's docstring describes."""
    corpus = read_corpus(documents, arguments)
    pairs = make_pairs(corpus.passages)
    makers = list(dict.fromkeys(p.document for p in corpus.passages if pairs[p.id]))
    if len(makers) < 2:
        raise ValueError(
            f"queries can be made of {len(makers)} of {corpus.documents} documents, training and holding out need two: "
            "a document gives queries by its title, headings or sentences; a single long one can be split into files"
        )
    held_out = set(random.Random(arguments.seed).sample(makers, arguments.share(len(makers))))
    chosen = {
        p.id: _choose(pairs[p.id], random.Random(f"{arguments.seed} {p.id}"))
        for p in corpus.passages
        if p.document not in held_out
    }
    compression = [
        row
        for p in corpus.passages
        if p.document not in held_out
        for row in _compression(p.content, [(pair.query, pair.document) for pair in chosen[p.id]], arguments)
    ]
    rows = [pair for of_passage in chosen.values() for pair in of_passage]
    evaluation = _evaluation(corpus.passages, pairs, held_out, arguments.seed)
    return Prepared(
        kind=kind,
        compression=compression,
        alignment=[AlignmentRow(pair.query, pair.document) for pair in rows],
        evaluation=evaluation,
        counts={
            "documents": corpus.documents,
            "passages": len(corpus.passages),
            "near-empty passages left out": corpus.near_empty,
            "repeated passages left out": corpus.duplicates,
            "documents held out": len(held_out),
            **{
                f"{name} pairs": sum(pair.kind == name for pair in rows)
                for name in ("title", "heading", "sentence")
            },
            **_sizes(compression, len(rows), evaluation),
        },
    )


def _sizes(compression: list[CompressionRow], alignment: int, evaluation: Evaluation) -> dict[str, int]:
    return {
        "compression rows": len(compression),
        "alignment rows": alignment,
        "held-out queries": len(evaluation.queries),
        "texts searched": len(evaluation.corpus),
    }


def _compression(
    text: str, queries: Sequence[tuple[str, str]], arguments: CorpusArguments
) -> Iterator[CompressionRow]:
    """The text from itself under I_self, and from its first query under I_next."""
    yield CompressionRow(text, arguments.document_instruction, text)
    for query, document in queries[:1]:
        yield CompressionRow(query, arguments.query_instruction, document)


def _choose(pairs: list[Pair], rng: random.Random) -> list[Pair]:
    """Title and heading first, then random sentences."""
    named = [pair for pair in pairs if pair.kind != "sentence"]
    sentences = [pair for pair in pairs if pair.kind == "sentence"]
    return [*named, *rng.sample(sentences, min(len(sentences), PER_PASSAGE - len(named)))]


def _evaluation(
    passages: Sequence[Passage], pairs: dict[str, list[Pair]], held_out: set[str], seed: int
) -> Evaluation:
    """One query of each kind, where there is one, for every held-out document."""
    by_document: dict[str, list[Passage]] = defaultdict(list)
    for p in passages:
        by_document[p.document].append(p)
    corpus = {p.id: p.text for p in passages}
    queries: dict[str, str] = {}
    qrels: dict[str, dict[str, int]] = {}
    for document in (name for name in by_document if name in held_out):
        rng = random.Random(f"{seed} {document}")
        available = [pair for p in by_document[document] for pair in pairs[p.id]]
        for kind in ("sentence", "heading", "title"):
            if not (of_kind := [pair for pair in available if pair.kind == kind]):
                continue
            pair = rng.choice(of_kind)
            if kind == "sentence":
                corpus[pair.passage.id] = pair.body
            relevant = [p.id for p in by_document[document] if _answers(p, pair)]
            if not any(fold(pair.query) in fold(corpus[text]) for text in relevant):
                queries[f"{kind} of {document}"] = pair.query
                qrels[f"{kind} of {document}"] = dict.fromkeys(relevant, 1)
    if not queries:
        raise ValueError(
            f"nothing can be asked about the {len(held_out)} held-out documents that does not stand word for word in "
            "its answer: hold out a larger share (held_out, --held-out), or add documents with titles and sentences of "
            "their own"
        )
    return _searching(queries, corpus, qrels, seed)


def _answers(p: Passage, pair: Pair) -> bool:
    if pair.kind == "sentence":
        return p.id == pair.passage.id
    return pair.kind == "title" or p.headings == pair.passage.headings


def _searching(
    queries: dict[str, str], corpus: dict[str, str], qrels: dict[str, dict[str, int]], seed: int
) -> Evaluation:
    """With at most MAX_SEARCHED texts: the relevant ones and a random part of the rest."""
    relevant = {text for grades in qrels.values() for text in grades}
    others = [text for text in corpus if text not in relevant]
    room = max(0, MAX_SEARCHED - len(relevant))
    kept = relevant | set(random.Random(seed).sample(others, min(room, len(others))))
    return Evaluation(queries, {text: corpus[text] for text in corpus if text in kept}, qrels)


def prepare_pairs(rows: Sequence[AlignmentRow], arguments: CorpusArguments) -> Prepared:
    """Rows and evaluation from labelled pairs: a share of the queries is held out, with every row that holds one of
    them as any of its texts. All positives and negatives are searched."""
    queries = list(dict.fromkeys(fold(row.query) for row in rows))
    if len(queries) < 2:
        raise ValueError(f"{len(queries)} distinct queries; training and holding out need at least two")
    held_out = set(random.Random(arguments.seed).sample(queries, arguments.share(len(queries))))
    train = [row for row in rows if held_out.isdisjoint(map(fold, (row.query, row.pos, *row.neg)))]
    if not train:
        raise ValueError("every row shares a text with a held-out query: nothing is left to train on")
    ids: dict[str, str] = {}
    for text in (text for row in rows for text in (row.pos, *row.neg)):
        ids.setdefault(text, f"text {len(ids)}")
    qrels: dict[str, dict[str, int]] = defaultdict(dict)
    texts: dict[str, str] = {}
    for row in rows:
        if (key := fold(row.query)) in held_out:
            texts.setdefault(key, row.query)
            qrels[key][ids[row.pos]] = 1
    evaluation = _searching(texts, {name: text for text, name in ids.items()}, qrels, arguments.seed)
    firsts = {row.pos: row.query for row in reversed(train)}
    compression = [
        made for pos, query in firsts.items() for made in _compression(pos, [(query, pos)], arguments)
    ]
    counts = {"labelled rows": len(rows), "queries": len(queries), "queries held out": len(held_out)}
    return Prepared(
        "pairs", compression, train, evaluation, counts | _sizes(compression, len(train), evaluation)
    )


def prepare_judged(judged: Judged, arguments: CorpusArguments) -> Prepared:
    """Rows and evaluation from a judged corpus: its dev queries are held out, else a share of the train queries.

    Documents are whole, as an index of this format has them; the encoder cuts them at its length. Documents judged
    not relevant (grade 0) are negatives.
    """
    train, held_out = _held_out_queries(judged, arguments)
    hidden = {fold(judged.queries[query]) for query in held_out}
    train = {query: grades for query, grades in train.items() if fold(judged.queries[query]) not in hidden}
    if not train:
        raise ValueError("no training query is left beside those that are held out")
    alignment = [
        row
        for query, grades in train.items()
        for row in _judged_rows(judged, query, grades, random.Random(f"{arguments.seed} {query}"))
    ]
    if not alignment:
        raise ValueError(
            f"each of the {len(train)} training queries has the very text of every document that is relevant to it, "
            "which teaches nothing, so that no row is left: judge other documents, or train without labels "
            "(use_labels=False, --no-labels)"
        )
    firsts = {row.pos: row.query for row in reversed(alignment)}
    compression = [
        row
        for text in judged.corpus.values()
        for row in _compression(text, [(firsts[text], text)] if text in firsts else [], arguments)
    ]
    qrels = {query: dict(grades) for query, grades in held_out.items()}
    queries = {query: judged.queries[query] for query in qrels}
    evaluation = _searching(queries, dict(judged.corpus), qrels, arguments.seed)
    counts = {"documents": len(judged.corpus), "queries": len(train), "queries held out": len(held_out)}
    return Prepared(
        "beir", compression, alignment, evaluation, counts | _sizes(compression, len(alignment), evaluation)
    )


def _held_out_queries(judged: Judged, arguments: CorpusArguments) -> tuple[Qrels, Qrels]:
    """(train, held out), the latter at most MAX_HELD_OUT."""
    rng = random.Random(arguments.seed)
    if judged.dev:
        kept = judged.dev if len(judged.dev) <= MAX_HELD_OUT else rng.sample(list(judged.dev), MAX_HELD_OUT)
        return {q: g for q, g in judged.train.items() if q not in judged.dev}, {
            q: judged.dev[q] for q in kept
        }
    if len(judged.train) < 2:
        raise ValueError(f"{len(judged.train)} judged queries; training and holding out need at least two")
    names = set(rng.sample(list(judged.train), arguments.share(len(judged.train))))
    return (
        {q: g for q, g in judged.train.items() if q not in names},
        {q: g for q, g in judged.train.items() if q in names},
    )


def _judged_rows(
    judged: Judged, query: str, grades: Mapping[str, int], rng: random.Random
) -> Iterator[AlignmentRow]:
    """The best PER_QUERY positives of a query, equal grades in random order."""
    text = judged.queries[query]
    known = sorted(grades)
    rng.shuffle(known)
    positives = sorted((d for d in known if grades[d] > 0), key=lambda d: -grades[d])
    right = {judged.corpus[d] for d in positives}
    wrong = dict.fromkeys(judged.corpus[d] for d in known if grades[d] <= 0)
    negatives = tuple(t for t in wrong if t not in right)[:PER_QUERY]
    for positive in dict.fromkeys(judged.corpus[d] for d in positives[:PER_QUERY]):
        if positive.strip() != text.strip():
            yield AlignmentRow(text, positive, negatives)
