"""Reading an embedding back: what the decoder says when it gets nothing but compressed vectors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .decoder import FrozenDecoder
from .prompt import check_texts

# English words that carry a sentence and not its content: as many as search engines commonly leave out.
STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        """a an and are as at be but by for from had has have he her his i if in into is it its no not of on or she such
        that the their them then there these they this to was we were what when where which who will with you""",
    )
)


class Reading(NamedTuple):
    """What the vectors of a text said.

    Attributes:
        tokens: what the decoder wrote, in pieces, each with the probability in [0, 1] that it gave it.
        recovered: the content words of the original that it wrote, each once, in the original's order.
        lost: those that it did not.
        beyond: those that it did not, and hardly could: they come after as many tokens of the original as it may write.
    """

    tokens: list[tuple[str, float]]
    recovered: list[str]
    lost: list[str]
    beyond: list[str]

    @property
    def text(self) -> str:
        """What the decoder wrote."""
        return "".join(piece for piece, _ in self.tokens)

    @property
    def share(self) -> float:
        """Of the content words that were recovered or lost, how many were recovered; 1 where there are none."""
        words = len(self.recovered) + len(self.lost)
        return len(self.recovered) / words if words else 1.0


def content_words(text: str) -> list[str]:
    """The distinct words of a text, in lower case, but for those of one letter and those that only hold sentences
    together."""
    words = re.findall(r"\w\w+", text.lower())
    return [word for word in dict.fromkeys(words) if word not in STOP_WORDS]


def read_back(
    decoder: FrozenDecoder,
    compressed: np.ndarray,
    originals: Sequence[str],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 32,
) -> list[Reading]:
    """Have the decoder write what vectors say, and compare it with what was compressed into them.

    Args:
        decoder: the one that the encoder was trained with.
        compressed: e_c of n texts, [n, k, hidden].
        originals: the n texts.
        max_new_tokens: tokens at most for each.
        batch_size: texts that are written at once.

    Raises:
        ValueError: not as many originals as compressed texts.
    """
    originals = check_texts(originals, "originals")
    if len(compressed) != len(originals):
        raise ValueError(
            f"{len(compressed)} compressed texts and {len(originals)} originals: give as many of each"
        )
    written = decoder.generate_tokens(compressed, max_new_tokens=max_new_tokens, batch_size=batch_size)
    readings = []
    for original, tokens in zip(originals, written, strict=True):
        said = {*content_words("".join(piece for piece, _ in tokens))}
        within = {*content_words(decoder.beginning(original, max_new_tokens))}
        words = content_words(original)
        missing = [word for word in words if word not in said]
        readings.append(
            Reading(
                tokens,
                [word for word in words if word in said],
                [word for word in missing if word in within],
                [word for word in missing if word not in within],
            )
        )
    return readings


def states_of_vectors(vectors: np.ndarray, compressed: np.ndarray) -> np.ndarray:
    """Flattened embeddings as the decoder reads them, [n, j, hidden].

    An embedding keeps the direction of each compressed vector, not its length. The lengths come from the text's own
    compressed vectors, which have nearly the same for all texts.

    Args:
        vectors: [n, j * hidden], such as an index stores, of the first j compressed tokens.
        compressed: e_c of the same texts, [n, k, hidden], k at least j.

    Raises:
        ValueError: the vectors are not made of compressed vectors of that width.
    """
    hidden = compressed.shape[2]
    if vectors.shape[1] % hidden or not 0 < vectors.shape[1] <= compressed.shape[1] * hidden:
        raise ValueError(
            f"vectors of dimension {vectors.shape[1]} are not up to {compressed.shape[1]} compressed vectors of "
            f"{hidden}: only flattened embeddings of this encoder can be read"
        )
    states = vectors.reshape(len(vectors), -1, hidden).astype(np.float32)
    lengths = np.linalg.norm(compressed[:, : states.shape[1]], axis=2, keepdims=True)
    return np.asarray(states / np.linalg.norm(states, axis=2, keepdims=True) * lengths)
