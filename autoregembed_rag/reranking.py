"""Ranking documents by what the decoder makes of them once it has read the query's compressed vectors."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import Literal, Protocol, get_args, runtime_checkable

import numpy as np

from .decoder import FrozenDecoder
from .encoder import AutoRegEncoder
from .fingerprint import PROBE
from .prompt import check_texts, collecting_cut

logger = logging.getLogger(__name__)

Prior = Literal["none", "document", "unconditional"]

# Of reciprocal-rank fusion (Cormack et al., 2009): how little the first places differ.
RANK_CONSTANT = 60
# Documents whose priors are computed before they are kept.
CHUNK = 2048


@runtime_checkable
class NumberCache(Protocol):
    """Keeps a number for a text under a name; `DocumentIndex` does so on disk."""

    @property
    def read_only(self) -> bool:
        """Whether nothing can be put in."""

    def cached(self, name: str, texts: Sequence[str]) -> np.ndarray:
        """Float32 [n], NaN where there is none."""

    def cache(self, name: str, texts: Sequence[str], numbers: np.ndarray) -> None:
        """Keep the number of each text."""


def check_settings(prior: object, weight: object, batch_size: object, cache: object) -> None:
    """ValueError, which says what would do, for what a `GenerativeReranker` cannot be made with."""
    if prior not in get_args(Prior):
        raise ValueError(f"prior must be one of {', '.join(get_args(Prior))}, not {prior!r}")
    if weight is not None and not (isinstance(weight, Real) and 0 <= float(weight) < np.inf):
        raise ValueError(f"weight must be a number of at least 0, or None, not {weight!r}")
    if not isinstance(batch_size, Integral) or batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size!r}")
    if cache is not None and not isinstance(cache, NumberCache):
        raise ValueError(f"priors are kept in a DocumentIndex, or with None nowhere, not in {cache!r:.100}")


class GenerativeReranker:
    """Scores documents by how likely the decoder is to write them when it reads the query under I_next.

        score(q, d) = log p(d | e_q,next) - prior(d)

    The prior takes out what makes a document likely under any query: nothing ("none"), log p(d | e_d,self), which is
    what S1 of the paper compares it with (section 3.3), or log p(d) under no text at all ("unconditional"), which makes
    the score the pointwise mutual information of query and document. All are in nats, the mean over the document's
    tokens, or with `per_token=False` their sum.

    `rank` fuses the ranking by these scores with the order in which the documents come, which is a search's: only a
    strong decoder ranks better alone. Pickles by the folders that encoder and decoder came from.
    """

    def __init__(
        self,
        encoder: AutoRegEncoder,
        decoder: FrozenDecoder,
        *,
        prior: Prior = "unconditional",
        per_token: bool = True,
        weight: float | None = 0.25,
        batch_size: int = 32,
        cache: NumberCache | None = None,
    ) -> None:
        """Put an encoder and its decoder together.

        Args:
            encoder: compresses queries, and documents for the prior "document".
            decoder: the one that the encoder was trained with.
            prior: what is subtracted.
            per_token: the mean over a document's tokens, which does not favour short documents, instead of the sum.
            weight: what the ranking by scores counts beside the order in which documents come, which counts 1; None: it
                alone counts.
            batch_size: documents per forward pass.
            cache: where priors are kept, such as the `DocumentIndex` that the documents are in.

        Raises:
            ValueError: the decoder reads vectors of another width; `prior` is none of the three; `weight` is negative;
                `cache` keeps no numbers.
        """
        check_settings(prior, weight, batch_size, cache)
        if encoder.hidden_size != decoder.hidden_size:
            raise ValueError(
                f"the encoder's vectors have {encoder.hidden_size} entries and the decoder reads "
                f"{decoder.hidden_size}: use the decoder that the encoder was trained with"
            )
        self.encoder = encoder
        self.decoder = decoder
        self.prior: Prior = prior
        self.per_token = per_token
        self.weight = weight
        self.batch_size = batch_size
        self.cache = cache

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | AutoRegEncoder = "mini",
        decoder: str | Path | FrozenDecoder | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        prior: Prior = "unconditional",
        per_token: bool = True,
        weight: float | None = 0.25,
        batch_size: int = 32,
        cache: NumberCache | None = None,
    ) -> GenerativeReranker:
        """Load a checkpoint and its decoder.

        Args:
            model: a bundled name, a folder, a hub id, or an encoder that is loaded.
            decoder: the base language model, loaded or by name; None: the one that the checkpoint names.
            device, dtype: of what is loaded here.
            prior, per_token, weight, batch_size, cache: see the constructor.

        Raises:
            FileNotFoundError: encoder or decoder cannot be loaded; the message says how to name one.
            ValueError: that, or an argument is wrong, which is said before anything is loaded.
        """
        check_settings(prior, weight, batch_size, cache)
        for name, value, kind in (("model", model, AutoRegEncoder), ("decoder", decoder, FrozenDecoder)):
            if not isinstance(value, (str, Path, kind)) and (name, value) != ("decoder", None):
                raise ValueError(
                    f"{name} must be a name, a folder or a ready {kind.__name__}, not {type(value).__name__}"
                )
        if not isinstance(model, AutoRegEncoder):
            model = AutoRegEncoder.from_pretrained(model, device=device, dtype=dtype)
        if decoder is None:
            decoder = FrozenDecoder.for_encoder(model, device=device, dtype=dtype)
        elif not isinstance(decoder, FrozenDecoder):
            decoder = FrozenDecoder.from_pretrained(decoder, device=device, dtype=dtype)
        return cls(
            model,
            decoder,
            prior=prior,
            per_token=per_token,
            weight=weight,
            batch_size=batch_size,
            cache=cache,
        )

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        top_n: int | None = None,
        score_threshold: float | None = None,
    ) -> list[tuple[int, float]]:
        """Places in `documents` with their scores, best first.

        Args:
            query: what is asked.
            documents: in the order in which a search found them, best first.
            top_n: how many come back at most; None: all.
            score_threshold: leaves out documents of which `scores` says less.

        Returns:
            (place, score): what `scores` says where `weight` is None, else the sum 1 / (60 + place) + weight / (60 +
            rank), which compares within this result only.
        """
        if top_n is not None and top_n < 1:
            raise ValueError(f"top_n must be at least 1, not {top_n}")
        scores = self.scores(query, documents)
        order = np.argsort(-scores, kind="stable")
        found = scores
        if self.weight is not None:
            ranks = np.empty(len(scores))
            ranks[order] = np.arange(len(scores))
            found = 1 / (RANK_CONSTANT + 1 + np.arange(len(scores))) + self.weight / (
                RANK_CONSTANT + 1 + ranks
            )
            order = np.argsort(-found, kind="stable")
        least = -np.inf if score_threshold is None else score_threshold
        return [(int(place), float(found[place])) for place in order if scores[place] >= least][:top_n]

    def scores(self, query: str, documents: Sequence[str]) -> np.ndarray:
        """The score of each document, higher is better: float32 [n].

        Args:
            query: encoded once, under I_next.
            documents: n texts. What the models have no room for is cut, and one warning says of how many.
        """
        documents = check_texts(documents, "documents")
        with self._one_warning(documents, query):
            states = self.encoder.compress([query], "next")
            return np.asarray(self._log_prob(states, documents) - self._priors(documents, False))

    def priors(self, documents: Sequence[str], *, show_progress: bool = False) -> np.ndarray:
        """What each document's score is measured against, float32 [n]; it depends on no query.

        Priors that `cache` has are taken from there, and others put there as they are computed, unless it is read-only:
        call this once with all documents of an index to have none computed while someone waits for an answer.
        """
        documents = check_texts(documents, "documents")
        with self._one_warning(documents):
            return self._priors(documents, show_progress)

    def kept_priors(self, documents: Sequence[str]) -> np.ndarray:
        """Those priors that need not be computed, float32 [n], NaN for the others."""
        if self.prior == "none":
            return np.zeros(len(documents), dtype=np.float32)
        if self.cache is None:
            return np.full(len(documents), np.nan, dtype=np.float32)
        return self.cache.cached(self._prior_name, documents)

    def _priors(self, documents: list[str], show_progress: bool) -> np.ndarray:
        found = self.kept_priors(documents)
        missing = np.flatnonzero(np.isnan(found))
        for start in range(0, len(missing), CHUNK):
            places = missing[start : start + CHUNK]
            texts = [documents[place] for place in places]
            found[places] = numbers = self._compute_priors(texts, show_progress)
            if self.cache is not None and not self.cache.read_only:
                self.cache.cache(self._prior_name, texts, numbers)
        return found

    def _compute_priors(self, documents: Sequence[str], show_progress: bool) -> np.ndarray:
        if self.prior == "unconditional":
            return self._log_prob(None, documents, show_progress)
        states = self.encoder.compress(documents, "self", show_progress=show_progress)
        return self._log_prob(states, documents, show_progress)

    def _log_prob(
        self, states: np.ndarray | None, documents: Sequence[str], show_progress: bool = False
    ) -> np.ndarray:
        found = self.decoder.log_prob(
            states,
            documents,
            per_token=self.per_token,
            batch_size=self.batch_size,
            show_progress=show_progress,
        )
        if not np.isfinite(found).all():
            raise ValueError(
                f"the decoder's log-probabilities are not finite in {self.decoder.model.dtype}: load it in "
                "another dtype"
            )
        return found

    @contextmanager
    def _one_warning(self, documents: Sequence[str], query: str | None = None) -> Iterator[None]:
        """Say once what was cut inside, where several steps cut the same documents."""
        with collecting_cut() as cut:
            yield
        if cut:
            number = sum(document in cut for document in documents)
            what = [f"{number} of {len(documents)} documents"] if number else []
            logger.warning(
                "%s cut (the encoder takes %d tokens, the decoder %d): split long texts",
                " and ".join([*what, "the query"] if query in cut else what)
                + (" were" if number else " was"),
                self.encoder.max_text_tokens,
                self.decoder.max_target_tokens,
            )

    @property
    def _prior_name(self) -> str:
        """All that decides a prior."""
        scale = "per token" if self.per_token else "in sum"
        encoder, decoder = self.encoder, self.decoder
        conditions = "nothing"
        if self.prior == "document":
            conditions = f"{encoder.fingerprint} in {encoder.model.dtype}, quantized {encoder.quantize}"
        tokens = decoder.tokenizer.bos_token_id, decoder.tokenizer.eos_token_id, decoder.target_ids([PROBE])
        tokenizer = hashlib.sha256(repr(tokens).encode()).hexdigest()[:16]
        return (
            f"log p given {conditions}, {scale}, by {decoder.fingerprint} over tokens {tokenizer}, "
            f"at most {decoder.max_target_tokens} tokens"
        )
