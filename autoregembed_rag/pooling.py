"""From compressed vectors to embeddings, and from embeddings of k tokens to those of fewer."""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from .config import Pooling, check_num_tokens

Vectors = TypeVar("Vectors", NDArray[np.float32], Tensor)

TOLERANCE = 0.01  # of a block's length: far more than float16 rounds, far less than mean pooling leaves


def pool(compressed: Tensor, pooling: Pooling) -> Tensor:
    """[n, k, hidden] -> unit rows in float32: [n, k * hidden] for "flatten", [n, hidden] for "mean".

    Flattened, each vector has length 1 / sqrt(k): an inner product is the mean of the k cosines.
    """
    vectors = compressed.float()
    if pooling == "mean":
        return F.normalize(vectors.mean(dim=1), dim=-1)
    flat = F.normalize(vectors, dim=-1).flatten(1)
    return flat / math.sqrt(vectors.shape[1])


def first_tokens(vectors: Vectors, tokens: int, num_tokens: int) -> Vectors:
    """The first `num_tokens` of the `tokens` blocks of flattened rows, scaled by sqrt(tokens / num_tokens)."""
    width = vectors.shape[-1] // tokens * num_tokens
    return vectors[..., :width] * math.sqrt(tokens / num_tokens)


def truncate(vectors: ArrayLike, tokens: int, num_tokens: int) -> NDArray[np.float32]:
    """Cut flattened embeddings to their first compressed tokens, with no encoding: attention is causal, so that
    these do not depend on the rest. The result is what an encoder of `num_tokens` gives.

    Args:
        vectors: [n, dimension], or one of [dimension], unit rows as `AutoRegEncoder` gives them.
        tokens: how many tokens they have: the encoder's `num_tokens`.
        num_tokens: how many to keep, 1 to `tokens`.

    Returns:
        float32 [n, dimension * num_tokens / tokens], unit rows.

    Raises:
        TypeError: `num_tokens` is no integer.
        ValueError: `num_tokens` is out of range, or the vectors are not of so many tokens of equal length. The mean
            of all tokens cannot be cut: it is made with pooling="flatten" or not at all.
    """
    num_tokens = check_num_tokens(num_tokens, tokens)
    flat = np.asarray(vectors, dtype=np.float32)
    dimension = flat.shape[-1] if flat.ndim else 0
    remedy = 'encode with pooling="flatten", and give the number of tokens of that encoder'
    if dimension % tokens:
        raise ValueError(f"dimension {dimension} is not made of {tokens} tokens of equal width: {remedy}")
    if flat.size:
        blocks = flat.reshape(*flat.shape[:-1], tokens, dimension // tokens)
        lengths = np.sqrt(tokens * np.einsum("...i,...i->...", blocks, blocks))
        if not (np.abs(lengths - 1) < TOLERANCE).all():
            raise ValueError(f"these are not unit vectors of {tokens} tokens of equal length: {remedy}")
    return first_tokens(flat, tokens, num_tokens)
