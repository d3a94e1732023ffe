"""What is compared: an embedding model with a `DocumentIndex`, and BM25. Both see the same strings."""

import tempfile
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import bm25s
import numpy as np
import Stemmer
from tqdm import tqdm

from autoregembed_indexes import DocumentIndex, Hit, MilvusDocumentIndex
from autoregembed_indexes.places import AnyIndex
from autoregembed_rag import GenerativeReranker
from benchmarks.beir import BenchmarkDataError, Document, Documents
from benchmarks.models import HYBRID, Candidate

Ranking = list[tuple[str, float]]
"""Document ids and scores of one query, best first."""

DOCUMENTS_PER_CHUNK = 2048
QUERIES_PER_CHUNK = 256
SILENT_BM25_DOCUMENTS = 50_000  # indexed in a few seconds, without progress bars


class System(Protocol):
    """Something that ranks documents."""

    @property
    def name(self) -> str: ...
    @property
    def resumed_at(self) -> int: ...  # documents that an earlier run has indexed
    def index(self, documents: Documents) -> None: ...
    def search(self, queries: Sequence[str], k: int) -> list[Ranking]: ...
    def index_bytes(self) -> int | None: ...  # None where it lies elsewhere
    def details(self) -> dict[str, Any]: ...


class BM25:
    """bm25s with k1 0.9, b 0.4 (Anserini's), the English Snowball stemmer and English stop words."""

    name = "BM25"
    resumed_at = 0

    def __init__(self) -> None:
        self._stemmer = Stemmer.Stemmer("english")
        self._model = bm25s.BM25(k1=0.9, b=0.4)
        self._ids: list[str] = []

    def index(self, documents: Documents) -> None:
        """Tokenise and index `documents`."""
        self._ids = [document.id for document in documents]
        slow = len(documents) > SILENT_BM25_DOCUMENTS
        tokens = self._tokenize([document.content for document in documents], show_progress=slow)
        self._model.index(tokens, show_progress=slow)

    def search(self, queries: Sequence[str], k: int) -> list[Ranking]:
        """The best `k` documents of each query that share a word with it."""
        tokens = self._tokenize(queries)
        slow = len(queries) > 1 and len(self._ids) > SILENT_BM25_DOCUMENTS
        found = self._model.retrieve(tokens, k=min(k, len(self._ids)), show_progress=slow)
        rows = zip(found.documents, found.scores, strict=True)
        return [
            [(self._ids[i], float(score)) for i, score in zip(*row, strict=True) if score > 0] for row in rows
        ]

    def index_bytes(self) -> int:
        """Bytes of the index as bm25s saves it, without the texts."""
        with tempfile.TemporaryDirectory() as folder:
            self._model.save(folder, show_progress=False)
            return folder_bytes(Path(folder))

    def details(self) -> dict[str, Any]:
        """The settings."""
        return {"k1": 0.9, "b": 0.4, "stemmer": "english", "stopwords": "english"}

    def _tokenize(self, texts: Sequence[str], show_progress: bool = False) -> Any:  # noqa: ANN401
        return bm25s.tokenize(list(texts), stopwords="en", stemmer=self._stemmer, show_progress=show_progress)


class Dense:
    """An encoder and a `DocumentIndex` on disk, in `folder`; for a hybrid candidate the words of the query, too.

    An index that is there already, of a run that was killed, is gone on with.
    """

    def __init__(self, candidate: Candidate, folder: Path, batch_size: int | None = None) -> None:
        self.name = candidate.name
        self._candidate = candidate
        self.encoder = encoder = candidate.encoder
        self.folder = folder
        self._batch_size = batch_size
        settings = {"dimension": encoder.dimension, "encoder": encoder.fingerprint}
        self.documents: AnyIndex = (
            DocumentIndex.open(folder, **settings)
            if DocumentIndex.exists(folder)
            else DocumentIndex.create(folder, **settings)
        )
        self.resumed_at = len(self.documents)

    def index(self, documents: Documents) -> None:
        """Encode and store `documents`, a few thousand at a time: memory holds those only, and what is stored stays."""
        done, rest = self.resumed_at, iter(documents)
        self._check_same(done, _last(rest, done))
        with tqdm(total=len(documents), initial=done, desc=f"{self.name}: documents", unit="doc") as progress:
            while chunk := list(islice(rest, DOCUMENTS_PER_CHUNK)):
                texts = [document.content for document in chunk]
                vectors = self.encoder.encode_documents(texts, batch_size=self._batch_size)
                self.documents.add(vectors, texts, ids=[document.id for document in chunk])
                progress.update(len(chunk))

    def _check_same(self, done: int, last: list[Document]) -> None:
        """BenchmarkDataError if the index holds other documents than the first so many, of which some are given."""
        stored = [found.text for found in self.documents.get([document.id for document in last])]
        if stored != [document.content for document in last] or (done and not last):
            raise BenchmarkDataError(
                f"{self.folder} holds an index of other documents: delete it, or give another --out"
            )

    def search(self, queries: Sequence[str], k: int) -> list[Ranking]:
        """The best `k` documents of each query."""
        return [[(hit.id, hit.score) for hit in hits] for hits in self.hits(queries, k)]

    def hits(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """Encode `queries` and return the best `k` documents of each."""
        results: list[list[Hit]] = []
        chunks = list(_chunks(queries, QUERIES_PER_CHUNK))
        for chunk in tqdm(chunks, desc=f"{self.name}: queries", unit="batch", disable=len(chunks) == 1):
            vectors = self.encoder.encode_queries(chunk, batch_size=self._batch_size)
            if self._candidate.use == HYBRID:
                results += self.documents.search_hybrid(vectors, chunk, k)
            else:
                results += self.documents.search(vectors, k)
        return results

    def index_bytes(self) -> int | None:
        """Bytes of the index's folder: vectors, texts, ids and their bookkeeping."""
        return folder_bytes(self.folder)

    def details(self) -> dict[str, Any]:
        """Which model this was."""
        return self._candidate.details

    def close(self) -> None:
        """Close the index."""
        self.documents.close()


class OnMilvus(Dense):
    """The same vectors and texts on a Milvus server, every one of them compared: it must find what `dense` finds.

    They are read from the index of `dense`, so that adding them is all that indexing takes here.
    """

    resumed_at = 0

    def __init__(self, dense: Dense, uri: str) -> None:
        """`dense` has its documents already."""
        self.name = f"{dense.name}, Milvus"
        self.encoder = dense.encoder
        self._candidate = dense._candidate
        self._batch_size = dense._batch_size
        self._dense = dense
        settings: dict[str, Any] = {"dimension": self.encoder.dimension, "encoder": self.encoder.fingerprint}
        self.documents = MilvusDocumentIndex.create(
            uri, f"benchmark_{uuid.uuid4().hex}", factory="Flat", **settings
        )

    def index(self, documents: Documents) -> None:
        """Add what the other has."""
        rest = iter(documents)
        with tqdm(total=len(documents), desc=f"{self.name}: documents", unit="doc") as progress:
            while chunk := list(islice(rest, DOCUMENTS_PER_CHUNK)):
                ids = [document.id for document in chunk]
                self.documents.add(
                    self._dense.documents.vectors(ids), [document.content for document in chunk], ids=ids
                )
                progress.update(len(chunk))

    def index_bytes(self) -> None:
        """The server does not tell."""

    def details(self) -> dict[str, Any]:
        """Which model this was, and what searched."""
        info = self.documents.info()
        return {**super().details(), **{name: info[name] for name in ("server", "kind", "vectors")}}

    def close(self) -> None:
        """Drop the collection."""
        assert isinstance(self.documents, MilvusDocumentIndex)  # noqa: S101
        self.documents.drop()


class Reranked:
    """The best `depth` documents of another system, ranked anew by an encoder's decoder; the rest come after them."""

    def __init__(self, dense: Dense, depth: int, reranker: GenerativeReranker) -> None:
        """`dense` has its documents already."""
        self.name = f"{dense.name}, {depth} reranked"
        self._dense = dense
        self._depth = depth
        self._reranker = reranker
        reranker.cache = dense.documents
        self.resumed_at = 0

    def index(self, documents: Documents) -> None:
        """Compute what does not depend on a query; the index keeps it."""
        rest = iter(documents)
        resumes = self._dense.resumed_at > 0  # else a prior that is there is of the same text, met before
        with tqdm(total=len(documents), desc=f"{self.name}: priors", unit="doc") as progress:
            while chunk := list(islice(rest, DOCUMENTS_PER_CHUNK)):
                texts = [document.content for document in chunk]
                if resumes:
                    self.resumed_at += int(np.isfinite(self._reranker.kept_priors(texts)).sum())
                self._reranker.priors(texts)
                progress.update(len(chunk))

    def search(self, queries: Sequence[str], k: int) -> list[Ranking]:
        """Search as the other does, and rank again."""
        found = self._dense.hits(queries, max(k, self._depth))
        progress = tqdm(
            zip(queries, found, strict=True), f"{self.name}: queries", len(found), disable=len(found) == 1
        )
        return [self._rank(query, hits)[:k] for query, hits in progress]

    def _rank(self, query: str, hits: list[Hit]) -> Ranking:
        best, rest = hits[: self._depth], hits[self._depth :]
        ranked = self._reranker.rank(query, [hit.text for hit in best])
        order = [best[place].id for place, _ in ranked] + [hit.id for hit in rest]
        return [(doc_id, -float(rank)) for rank, doc_id in enumerate(order)]

    def index_bytes(self) -> int | None:
        """Bytes of the other's index, with the priors."""
        return self._dense.index_bytes()

    def details(self) -> dict[str, Any]:
        """Which model this was, and how it ranked."""
        settings = {name: getattr(self._reranker, name) for name in ("prior", "per_token", "weight")}
        return {**self._dense.details(), "reranked": self._depth, **settings}


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _last(documents: Iterator[Document], count: int) -> list[Document]:
    """The last chunk of the first `count`, having read these."""
    last: deque[Document] = deque(maxlen=DOCUMENTS_PER_CHUNK)
    last.extend(tqdm(islice(documents, count), total=count, desc="read again", unit="doc", delay=2))
    return list(last)


def _chunks(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
