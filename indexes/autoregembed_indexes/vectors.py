"""Arrays in, unit vectors out: what is stored (float16) and what is compared (float32)."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float16 = NDArray[np.float16]
Float32 = NDArray[np.float32]

CHUNK_BYTES = 4 * 2**20


def as_matrix(vectors: ArrayLike, name: str) -> NDArray[np.generic]:
    """View `vectors` as a numeric array [n, d]; an empty list is [0, 0]."""
    array = np.asarray(vectors)
    if array.shape == (0,):
        return array.astype(np.float32).reshape(0, 0)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name} must be an array of floats [n, dimension], got dtype {array.dtype}")
    if array.ndim != 2:
        raise ValueError(f"{name} must have the shape [n, dimension], got {list(array.shape)}")
    return array


def normalise(matrix: NDArray[np.generic], names: Sequence[object]) -> Float32:
    """Scale the rows of `matrix` [n, d] to unit length, in float32.

    `names` says how an error calls each row. Raises ValueError for NaN, infinity or a row of zeros.
    """
    wide: NDArray[np.floating[Any]] = matrix.astype(
        np.float64 if matrix.dtype == np.float64 else np.float32, copy=False
    )
    squares = np.einsum("ij,ij->i", wide, wide)
    if ((squares > 1e-20) & (squares < 1e20)).all():
        ordinary: Float32 = (wide * (1 / np.sqrt(squares))[:, None]).astype(np.float32, copy=False)
        return ordinary
    # The largest entry is divided out before squaring, so that no finite row over- or underflows.
    largest = np.abs(wide).max(axis=1, keepdims=True, initial=0)
    bad = ~(np.isfinite(largest) & (largest > 0))[:, 0]
    if bad.any():
        position = int(bad.argmax())
        what = (
            "is all zeros, which has no direction" if largest[position, 0] == 0 else "holds NaN or infinity"
        )
        raise ValueError(f"{names[position]} {what}")
    scaled: Float32 = (wide / largest).astype(np.float32)
    scaled /= np.linalg.norm(scaled, axis=1, keepdims=True)
    return scaled


def round_for_storage(matrix: NDArray[np.generic], ids: Sequence[str]) -> Callable[[], Float16]:
    """Begin to round the unit rows of `matrix` to float16, in threads; calling the result waits for them.

    Then ValueError names the first row with NaN, infinity or nothing but zeros.
    """
    rounded = np.empty(matrix.shape, dtype=np.float16)
    step = max(1, CHUNK_BYTES // (4 * max(1, matrix.shape[1])))

    def round_from(start: int) -> None:
        part = slice(start, start + step)
        names = [f"vectors[{position}] (id {doc_id!r})" for position, doc_id in enumerate(ids[part], start)]
        rounded[part] = normalise(matrix[part], names)

    if len(matrix) <= step:
        round_from(0)
        return lambda: rounded
    threads = ThreadPoolExecutor(os.cpu_count())
    parts = [threads.submit(round_from, start) for start in range(0, len(matrix), step)]
    threads.shutdown(wait=False)

    def wait() -> Float16:
        for part in parts:
            part.result()
        return rounded

    return wait


def stored_to_unit(stored: Float16 | Float32, width: int) -> Float32:
    """Scale the first `width` entries of stored rows [n, d] to unit length, in float32; zeros stay zeros.

    Raises ValueError for NaN or infinity.
    """
    unit = stored[:, :width].astype(np.float32)
    norms = np.sqrt(np.einsum("ij,ij->i", unit, unit))[:, None]
    if not np.isfinite(norms).all():
        raise ValueError("a stored vector holds NaN or infinity")
    norms[norms == 0] = 1
    unit /= norms
    return unit
