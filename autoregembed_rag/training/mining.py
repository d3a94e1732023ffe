"""Hard negatives: documents that an index ranks high for a query though they do not answer it.

For each row the `top_k` nearest documents of its query (under I_next) lose, in this order: texts known to answer,
near-duplicates of the positive, and likely false negatives; `num_negatives` of what is left are taken, none of them a
near-duplicate of another.

Notable decisions:
- a false negative is told by its score as a share of the positive's own, as positives differ in how high they score
  ("TopK-PercPos" of NV-Retriever, arXiv 2407.15831). A share of a score of 0 or less would let pass what scores better
  than the positive, so the margin is taken off downwards: a candidate may score at most s - (1 - max_share) |s|. Where
  s <= 0 the encoder does not know why the positive answers; such rows are usually left short, not given bad negatives;
- texts are the same when they are after white space is normalised. Texts that differ by more are near-duplicates when
  the cosine of their document vectors (under I_self) says so; it takes the stored vectors, so nothing is encoded twice;
- rows are read in parts and written as they come: what grows with their number is 16 bytes a row, the hashes by which
  the other positives of a query are known.
"""

from __future__ import annotations

import hashlib
import json
import logging
import operator
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ..encoder import AutoRegEncoder
from .data import AlignmentRow, Rows, alignment_rows
from .mining_report import COUNTS, Histogram, MiningReport
from .output_file import check_output, whole_or_not_at_all
from .sources import RowSource

if TYPE_CHECKING:
    from autoregembed_indexes import DocumentIndex, Hit

logger = logging.getLogger(__name__)

Strategy = Literal["top", "random"]
Vectors = NDArray[np.float32]

ROWS_AT_ONCE = 512
"""Rows searched together: enough to fill batches evenly, while their candidates fit in memory."""


@dataclass(frozen=True)
class MiningArguments:
    """What counts as a hard negative.

    Attributes:
        top_k: documents searched per query; the positives among them count.
        num_negatives: negatives per row; a row's own come first, and all of them are kept.
        max_share: a candidate that scores above this share of the positive's score is taken for a false negative.
        duplicate_cosine: two documents of a higher cosine are near-duplicates; 1 leaves only equal texts.
        skip_top: leave out so many first candidates that are not positives.
        strategy: "top" takes the best candidates left, "random" draws among them.
        seed: of what "random" draws; the draws do not depend on `batch_size`.
        batch_size: texts per forward pass of the encoder.

    Raises TypeError or ValueError, naming the setting, for one that cannot be used.
    """

    top_k: int = 50
    num_negatives: int = 1
    max_share: float = 0.95
    duplicate_cosine: float = 0.98
    skip_top: int = 0
    strategy: Strategy = "top"
    seed: int = 0
    batch_size: int = 32

    def __post_init__(self) -> None:
        for name, least in {
            "top_k": 1,
            "num_negatives": 1,
            "skip_top": 0,
            "seed": 0,
            "batch_size": 1,
        }.items():
            if operator.index(getattr(self, name)) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        for name in ("max_share", "duplicate_cosine"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, not {getattr(self, name)}")
        if self.num_negatives + self.skip_top > self.top_k:
            raise ValueError(
                f"num_negatives + skip_top is {self.num_negatives + self.skip_top}, more than the top_k={self.top_k} "
                "documents searched: raise top_k"
            )
        if self.strategy not in get_args(Strategy):
            raise ValueError(
                f"strategy must be one of {', '.join(get_args(Strategy))}, not {self.strategy!r}"
            )


def mine_negatives(
    encoder: AutoRegEncoder,
    index: DocumentIndex,
    rows: RowSource,
    output: str | os.PathLike[str],
    arguments: MiningArguments | None = None,
) -> MiningReport:
    """Write the rows with hard negatives from `index` to `output`.

    Args:
        encoder: embeds the queries, and the positives and own negatives that the search does not find.
        index: the documents, embedded by the same encoder (or only the first of its compressed tokens).
        rows: what `alignment_rows` takes.
        output: a JSONL file, which appears when it is whole, replacing one of that name. Each line has `query`, `pos`,
            `neg` (a list, the row's own first), `pos_score` and `neg_scores` (cosines); other fields are not kept.
            Rows for which too few candidates are left have fewer negatives, or none.
        arguments: by default `MiningArguments()`.

    Raises:
        ValueError: a bad row, an empty index, one of another encoder (both fingerprints are named) or dimension, or
            an output that is not named .jsonl or is the file of the rows.
        OSError: the output cannot be written; nothing is left of it.
    """
    arguments = arguments or MiningArguments()
    output = Path(output)
    check_output(output, [rows] if isinstance(rows, str | os.PathLike) else [])
    _check_index(encoder, index)
    checked = alignment_rows(rows)
    with whole_or_not_at_all(output) as file:
        miner = _Miner(encoder, index, checked, arguments)
        for record in tqdm(miner.records(), "mining", total=len(checked), unit="row", disable=None):
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    report = miner.report()
    if report.short_rows:
        logger.warning(
            "%d of %d rows have fewer than %d negatives, %d have none: raise top_k or max_share, or search more "
            "documents",
            report.short_rows,
            report.rows,
            arguments.num_negatives,
            report.empty_rows,
        )
    return report


def _check_index(encoder: AutoRegEncoder, index: DocumentIndex) -> None:
    """Raise for an index that this encoder cannot search, before the hours that encoding may take."""
    if len(index) == 0:
        raise ValueError(f"{index!r} is empty: add the documents to choose negatives from")
    if index.encoder is not None and index.encoder != encoder.fingerprint:
        raise ValueError(
            f"{index!r} holds vectors of encoder {index.encoder}, but {encoder!r} is encoder {encoder.fingerprint}; "
            "mine with the encoder that the index was made with, or make a new index"
        )
    if index.tokens and index.dimension != index.tokens * encoder.hidden_size:
        raise ValueError(
            f"{index!r} holds {index.tokens} vectors of {(index.dimension or 0) // index.tokens} dimensions per "
            f"document, but the hidden size of {encoder!r} is {encoder.hidden_size}; mine with the encoder that the "
            "index was made with, or make a new index"
        )
    if not index.tokens and index.dimension != encoder.dimension:
        raise ValueError(
            f"{index!r} holds vectors of dimension {index.dimension}, but {encoder!r} makes {encoder.dimension}; mine "
            "with the encoder that the index was made with, or make a new index"
        )


class _KnownPositives:
    """The positives of each query over all rows, as hashes: 16 bytes a row."""

    def __init__(self, rows: Rows[AlignmentRow]) -> None:
        queries, positives = np.empty(len(rows), np.uint64), np.empty(len(rows), np.uint64)
        for i in tqdm(range(len(rows)), "comparing rows", unit="row", delay=2, disable=None):
            queries[i], positives[i] = text_key(rows[i].query), text_key(rows[i].pos)
        order = np.argsort(queries)
        self._queries, self._positives = queries[order], positives[order]

    def of(self, query: int) -> set[int]:
        """Keys of the positives of the query of that key."""
        key = np.uint64(query)
        first, last = (np.searchsorted(self._queries, key, side) for side in ("left", "right"))
        return set(self._positives[first:last].tolist())


class _Keyed(NamedTuple):
    """A hit and the key of its text."""

    id: str
    score: float
    text: str
    key: int


class _Positive(NamedTuple):
    vector: Vectors
    score: float


class _Miner:
    """One run: what it searches with, and what it has counted so far."""

    def __init__(
        self,
        encoder: AutoRegEncoder,
        index: DocumentIndex,
        rows: Rows[AlignmentRow],
        arguments: MiningArguments,
    ) -> None:
        self.encoder, self.index, self.rows, self.arguments = encoder, index, rows, arguments
        # Either side may hold only the first of the k vectors of a flattened embedding: those are compared.
        self.width = min(encoder.dimension, index.dimension or 0)
        self.positives = _KnownPositives(rows)
        self.counts = Counter(dict.fromkeys(COUNTS, 0) | {"rows": len(rows)})
        self.positive_scores, self.negative_scores = Histogram(-1, 1), Histogram(-1, 1)
        self.candidate_shares, self.negative_shares = Histogram(0, 2), Histogram(0, 2)

    def records(self) -> Iterator[dict[str, Any]]:
        """The lines of the output, in the order of the rows."""
        for start in range(0, len(self.rows), ROWS_AT_ONCE):
            rows = self.rows[start : start + ROWS_AT_ONCE]
            queries = self._embed(self.encoder.encode_queries, [row.query for row in rows])
            found = [self._keyed(hits) for hits in self.index.search(queries, self.arguments.top_k)]
            encoded = self._encode_missing(rows, found)
            for number, row in enumerate(rows):
                yield self._record(start + number, row, queries[number], found[number], encoded)

    def report(self) -> MiningReport:
        """What the records so far came to."""
        return MiningReport(
            **self.counts,
            positive_scores=self.positive_scores,
            negative_scores=self.negative_scores,
            candidate_shares=self.candidate_shares,
            negative_shares=self.negative_shares,
            settings={
                **asdict(self.arguments),
                "encoder": self.encoder.fingerprint,
                "documents": len(self.index),
                "rows_digest": self.rows.digest,
            },
        )

    def _record(
        self, number: int, row: AlignmentRow, query: Vectors, hits: list[_Keyed], encoded: dict[str, Vectors]
    ) -> dict[str, Any]:
        positive = _hit_with(row.pos, hits)
        if positive is None:
            vector = encoded[row.pos]
            score = float(query @ vector)
        else:
            vector = self._stored([positive])[0]
            score = positive.score
        own = [encoded[text] for text in row.neg]
        chosen = self._choose(number, row, hits, _Positive(vector, score), own)
        total = len(row.neg) + len(chosen)
        self.counts.update(
            positives_found=int(positive is not None),
            negatives=len(chosen),
            own_negatives=len(row.neg),
            short_rows=int(total < self.arguments.num_negatives),
            empty_rows=int(total == 0),
        )
        mined = np.array([hit.score for hit in chosen])
        self.positive_scores.add(np.array([score]))
        self.negative_scores.add(mined)
        self.negative_shares.add(share_of(mined, score))
        return {
            "query": row.query,
            "pos": row.pos,
            "neg": [*row.neg, *(hit.text for hit in chosen)],
            "pos_score": round(score, 4),
            "neg_scores": [
                round(float(value), 4) for value in (*(query @ other for other in own), *mined.tolist())
            ],
        }

    def _choose(
        self, number: int, row: AlignmentRow, hits: list[_Keyed], positive: _Positive, own: list[Vectors]
    ) -> list[_Keyed]:
        """The hits that become negatives, beside the row's own."""
        wanted = self.arguments.num_negatives - len(row.neg)
        if wanted <= 0:
            return []
        candidates = self._without_answers(row, hits)
        if not candidates:
            return []
        stored = self._stored(candidates)
        scores = np.array([hit.score for hit in candidates])
        self.candidate_shares.add(share_of(scores, positive.score))
        near = stored @ positive.vector > self.arguments.duplicate_cosine
        false = ~near & (scores > self._ceiling(positive.score))
        self.counts.update(near_duplicates=int(near.sum()), false_negatives=int(false.sum()))
        places = np.flatnonzero(~near & ~false)
        if self.arguments.strategy == "random":
            places = np.random.default_rng([self.arguments.seed, number]).permutation(places)

        chosen: list[_Keyed] = []
        vectors = list(own)
        keys = {text_key(text) for text in row.neg}
        for place in places:
            hit, vector = candidates[place], stored[place]
            if hit.key in keys or any(vector @ other > self.arguments.duplicate_cosine for other in vectors):
                self.counts["near_duplicates"] += 1
                continue
            chosen.append(hit)
            if len(chosen) == wanted:
                break
            vectors.append(vector)
            keys.add(hit.key)
        return chosen

    def _without_answers(self, row: AlignmentRow, hits: list[_Keyed]) -> list[_Keyed]:
        """Without the query's own text, its positives in all rows, and then the first `skip_top`."""
        query = text_key(row.query)
        answers = {query} | self.positives.of(query)
        candidates = [hit for hit in hits if hit.key not in answers]
        self.counts["positives"] += len(hits) - len(candidates)
        return candidates[self.arguments.skip_top :]

    def _ceiling(self, positive: float) -> float:
        """The highest score of a candidate that is not taken for a false negative."""
        return positive - (1 - self.arguments.max_share) * abs(positive)

    def _keyed(self, hits: list[Hit]) -> list[_Keyed]:
        return [_Keyed(hit.id, hit.score, hit.text, text_key(hit.text)) for hit in hits]

    def _encode_missing(self, rows: list[AlignmentRow], found: list[list[_Keyed]]) -> dict[str, Vectors]:
        """Vectors of the rows' own negatives, and of positives that are not among what was found."""
        texts = {text: None for row in rows for text in row.neg}
        texts |= {
            row.pos: None for row, hits in zip(rows, found, strict=True) if _hit_with(row.pos, hits) is None
        }
        vectors = self._embed(self.encoder.encode_documents, list(texts))
        return dict(zip(texts, vectors, strict=True))

    def _embed(self, encode: Callable[..., Vectors], texts: list[str]) -> Vectors:
        return self._cut(encode(texts, batch_size=self.arguments.batch_size))

    def _stored(self, hits: list[_Keyed]) -> Vectors:
        return self._cut(self.index.vectors([hit.id for hit in hits]))

    def _cut(self, vectors: Vectors) -> Vectors:
        """The first `width` entries as unit rows."""
        if vectors.shape[1] == self.width:
            return vectors
        part = vectors[:, : self.width]
        unit: Vectors = part / np.linalg.norm(part, axis=1, keepdims=True)
        return unit


def text_key(text: str) -> int:
    """64 bits that are the same for texts that differ only in white space."""
    normal = " ".join(text.split()).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(normal, digest_size=8).digest(), "little")


def share_of(scores: NDArray[np.float64], positive: float) -> NDArray[np.float64]:
    """Scores as a share of the positive's: 1 + (score - positive) / |positive|, so that more is always closer.

    For a positive above 0 that is score / positive. [n] -> [n]; a positive of 0 has no share: [0].
    """
    if positive == 0:
        return np.empty(0)
    return 1 + (scores - positive) / abs(positive)


def _hit_with(text: str, hits: list[_Keyed]) -> _Keyed | None:
    key = text_key(text)
    return next((hit for hit in hits if hit.key == key), None)
