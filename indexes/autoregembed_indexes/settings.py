"""What an index is made for, and whether vectors fit it."""

import operator
import uuid
import zlib
from typing import NamedTuple

from autoregembed_indexes.errors import IndexMismatchError
from autoregembed_indexes.kinds import check_factory
from autoregembed_indexes.lexical import check_tokenizer
from autoregembed_indexes.records import is_valid_text


class State(NamedTuple):
    """The settings of an index, and the version that its last change and its last deletion gave it."""

    name: str
    factory: str
    dimension: int | None
    tokens: int | None
    encoder: str | None
    tokenizer: str
    memory_budget: int
    version: int = 0
    deleted: int = 0

    @property
    def checksum(self) -> int:
        """Of the settings, without the versions."""
        return zlib.crc32(repr(self[:7]).encode(errors="replace"))


def new_state(
    factory: str,
    dimension: int | None,
    tokens: int | None,
    encoder: str | None,
    tokenizer: str,
    memory_budget: int,
) -> State:
    """Check the settings of an index to be made, and give it a name that no other index has."""
    if encoder is not None and not isinstance(encoder, str):
        raise TypeError(f"encoder must be a fingerprint (str) or None, got {type(encoder).__name__}")
    if encoder is not None and not is_valid_text(encoder):
        raise ValueError(f"encoder {encoder!r} holds a lone surrogate, which is not valid Unicode")
    check_tokenizer(tokenizer)
    state = State(
        uuid.uuid4().hex,
        check_factory(factory),
        None if dimension is None else at_least_one("dimension", dimension),
        None if tokens is None else at_least_one("tokens", tokens),
        encoder,
        tokenizer,
        at_least_one("memory_budget", memory_budget),
    )
    if state.dimension is not None:
        _check_tokens(state.dimension, state.tokens)
    return state


def _check_tokens(dimension: int, tokens: int | None) -> None:
    if tokens is not None and dimension % tokens:
        raise ValueError(f"dimension {dimension} is not made of {tokens} tokens of equal width")


def at_least_one(name: str, value: int) -> int:
    """Check a size; ValueError names it."""
    size = operator.index(value)
    if not 1 <= size < 2**62:
        raise ValueError(f"{name} must be at least 1, and less than 2**62, got {size}")
    return size


def check_opened(name: str, state: State, dimension: int | None, encoder: str | None) -> None:
    """Raise IndexMismatchError unless the index holds what is expected; None on a side is not compared."""
    if encoder is not None and state.encoder is not None and encoder != state.encoder:
        raise IndexMismatchError(
            f"{name} holds vectors of encoder {state.encoder}, not of encoder {encoder}; use the encoder "
            "it was made with, or make a new index"
        )
    if dimension is not None and state.dimension is not None and dimension != state.dimension:
        raise IndexMismatchError(f"{name} holds vectors of dimension {state.dimension}, not {dimension}")


def check_added(width: int, state: State) -> None:
    """Raise unless vectors of dimension `width` can be added."""
    if state.dimension is None:
        _check_tokens(at_least_one("dimension", width), state.tokens)
    elif width != state.dimension:
        raise IndexMismatchError(f"vectors have dimension {width}, the index has dimension {state.dimension}")


def check_query(width: int, dimension: int, tokens: int | None) -> None:
    """Raise IndexMismatchError unless queries of dimension `width` can be compared with stored vectors."""
    token_width = dimension // tokens if tokens else dimension
    if width == dimension or (0 < width < dimension and width % token_width == 0):
        return
    if tokens:
        remedy = f", or a smaller multiple of {token_width}"
    else:
        remedy = "; queries of fewer tokens need an index made with DocumentIndex.create(tokens=...)"
    raise IndexMismatchError(f"query vectors have dimension {width}, the index needs {dimension}{remedy}")


def first_width(num_tokens: int | None, width: int, state: State) -> int:
    """How many of a query's `width` entries its first `num_tokens` tokens are; None is all, width 0 no query at all.

    Raises IndexMismatchError where the index does not know of tokens, ValueError for a number that is out of range.
    """
    if num_tokens is None:
        return width
    wanted = operator.index(num_tokens)
    if state.tokens is None:
        raise IndexMismatchError(
            f"num_tokens={wanted} needs an index that knows of how many tokens its vectors are made: "
            "make it with DocumentIndex.create(tokens=...), or leave num_tokens out"
        )
    most = width * state.tokens // state.dimension if width and state.dimension else state.tokens
    if not 1 <= wanted <= most:
        raise ValueError(
            f"num_tokens must be between 1 and {most}, the tokens that a query has, got {wanted}"
        )
    return wanted * width // most
