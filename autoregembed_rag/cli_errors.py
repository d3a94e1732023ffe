"""How the `autoregembed` command reports what a user can mend, and what a run does."""

from __future__ import annotations

import logging
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


class _Echo(logging.Handler):
    """Says log lines as what the command says."""

    def emit(self, record: logging.LogRecord) -> None:
        typer.echo(record.getMessage(), err=record.levelno > logging.INFO)


@contextmanager
def notes_echoed(name: str) -> Iterator[None]:
    """Inside, the command says what the logger `name` does: where a run goes on, that one has ended before."""
    logger, echo = logging.getLogger(name), _Echo()
    level = logger.level
    logger.addHandler(echo)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(echo)
        logger.setLevel(level)
