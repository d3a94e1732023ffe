"""How the `autoregembed` command reports what a user can mend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def errors_in_one_line(*more: type[Exception]) -> Iterator[None]:
    """What a user can mend, errors of the types `more` included, is said in a line; the rest keeps its traceback."""
    mendable: tuple[type[Exception], ...] = (ValueError, OSError, ImportError, *more)
    try:
        yield
    except mendable as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
