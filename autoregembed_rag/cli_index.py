"""`autoregembed index ...` and `autoregembed search`: look into an index, check it, shrink it, search it."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_errors import errors_in_one_line
from .cli_load import IndexGroup, load

if TYPE_CHECKING:
    import numpy as np

    from autoregembed_indexes import DocumentIndex, Hit

    from .encoder import AutoRegEncoder

LINE_WIDTH = 100
BYTE_COUNTS = ("memory_budget", "bytes")

index = typer.Typer(
    cls=IndexGroup, help="Fill a document index from shards, and look after it.", no_args_is_help=True
)
index.command()(load)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the index.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class Mode(str, Enum):
    """What a search compares: meaning, words, or both."""

    vector = "vector"
    text = "text"
    hybrid = "hybrid"


@index.command()
def info(folder: Folder, as_json: AsJson = False) -> None:
    """Say what an index is: its settings, what it holds, and how it searches.

    Example: autoregembed index info ./my-index
    """
    from autoregembed_indexes import DocumentIndex, DocumentIndexError

    with (
        errors_in_one_line(DocumentIndexError),
        DocumentIndex.open(folder, read_only=True) as opened,
    ):
        facts = opened.info()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        typer.echo(f"{name.replace('_', ' '):{width}}  {_readable(name, value)}")


@index.command()
def verify(folder: Folder) -> None:
    """Check everything that can be checked; exit code 1, and a line for each problem, if anything is wrong.

    Reads the whole database. The index of words is checked only where the index can be opened for writing.

    Example: autoregembed index verify ./my-index
    """
    from autoregembed_indexes import DocumentIndexError, IndexDamagedError

    with errors_in_one_line(DocumentIndexError):
        try:
            with _open_to_verify(folder) as opened:
                problems = opened.verify()
                facts = {} if problems else opened.info()
        except IndexDamagedError as error:
            problems = [str(error)]
    for problem in problems:
        typer.echo(_one_line(problem))
    if problems:
        raise typer.Exit(1)
    count, dimension = facts["documents"], facts["dimension"]
    vectors = f"vectors of dimension {dimension:,}" if dimension else "no vectors"
    typer.echo(
        f"sound: {count:,} document{'' if count == 1 else 's'}, {vectors}, {human_bytes(facts['bytes'])}"
    )


@index.command()
def compact(
    folder: Folder,
    num_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Also write the copy of the first J tokens that search --num-tokens J needs."
        ),
    ] = None,
) -> None:
    """Make files as small and searches as fast as they can be: drop what is deleted, merge, rewrite.

    Takes, for a while, as much disk again.

    Example: autoregembed index compact ./my-index
    """
    from autoregembed_indexes import DocumentIndex, DocumentIndexError

    with errors_in_one_line(DocumentIndexError), DocumentIndex.open(folder) as opened:
        before = opened.info()["bytes"]
        if num_tokens is not None:
            opened.snapshot(num_tokens=num_tokens)
        opened.compact()
        after = opened.info()["bytes"]
    typer.echo(f"{human_bytes(before)} before, {human_bytes(after)} after")


def search(
    folder: Folder,
    query: Annotated[str, typer.Argument(metavar="QUERY", help="What to look for.", show_default=False)],
    model: Annotated[
        str, typer.Option(help="The encoder of the index: bundled name, folder or hub id.")
    ] = "mini",
    k: Annotated[int, typer.Option("-k", min=1, help="How many documents.")] = 10,
    where: Annotated[
        str | None,
        typer.Option("--filter", metavar="JSON", help='What metadata must be: \'{"lang": "de"}\'.'),
    ] = None,
    mode: Annotated[
        Mode, typer.Option(help="By meaning, by words (needs no model), or both fused by rank.")
    ] = Mode.vector,
    num_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Find candidates by the first J compressed tokens, rank them by all."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Search an index: rank, score, id and the first line of each document, best first.

    Example: autoregembed search ./my-index "who wrote Faust?" -k 3
    """
    from autoregembed_indexes import DocumentIndex, DocumentIndexError

    with errors_in_one_line(DocumentIndexError):
        wanted = None if where is None else _read_filter(where)
        if num_tokens is not None and mode is Mode.text:
            raise ValueError("--num-tokens needs vectors: --mode vector or hybrid")
        # Before the model, which takes seconds to load: most errors are in the path.
        with DocumentIndex.open(folder, read_only=True) as opened:
            if mode is Mode.text:
                hits = opened.search_text(query, k, wanted)
            else:
                vectors = _encode_query(query, model, opened)
                if mode is Mode.vector:
                    (hits,) = opened.search(vectors, k, wanted, num_tokens=num_tokens)
                else:
                    (hits,) = opened.search_hybrid(vectors, [query], k, wanted, num_tokens=num_tokens)
    if as_json:
        ranked = [{"rank": rank, **hit._asdict()} for rank, hit in enumerate(hits, 1)]
        typer.echo(json.dumps(ranked, indent=2))
    else:
        _print_hits(hits)


def _open_to_verify(folder: Path) -> DocumentIndex:
    """Open for writing where that is possible: only then can the index of words be checked."""
    from autoregembed_indexes import DocumentIndex, DocumentIndexError

    try:
        return DocumentIndex.open(folder)
    except DocumentIndexError as error:
        opened = DocumentIndex.open(folder, read_only=True)
        typer.echo(f"note: the index of words is not checked: {error}", err=True)
        return opened


def _read_filter(text: str) -> dict[str, Any]:
    from autoregembed_indexes.filters import compile_filter

    try:
        where: dict[str, Any] = json.loads(text)
        compile_filter(where)
    except (TypeError, ValueError) as error:
        raise ValueError(f"--filter {text}: {error}") from error
    return where


def _encode_query(query: str, model: str, opened: DocumentIndex) -> np.ndarray:
    """The query's embedding [1, dimension] by the encoder that the index was made with."""
    from .encoder import AutoRegEncoder
    from .pooling import truncate

    encoder = AutoRegEncoder.from_pretrained(model)
    check_encoder(opened.path, opened.encoder, repr(model), encoder)
    vectors = encoder.encode_queries([query])
    if (
        opened.tokens and opened.tokens < encoder.num_tokens
    ):  # an index of the first few is searched by as many
        vectors = truncate(vectors, encoder.num_tokens, opened.tokens)
    return vectors


def check_encoder(folder: Path | None, recorded: str | None, name: str, encoder: AutoRegEncoder) -> None:
    """ValueError if the index in `folder` records another encoder than the one called `name`."""
    if recorded is not None and recorded != encoder.fingerprint:
        raise ValueError(
            f"{folder} holds vectors of encoder {recorded}, but {name} is encoder {encoder.fingerprint}; give --model "
            "the one it was made with"
        )


def _print_hits(hits: list[Hit]) -> None:
    if not hits:
        typer.echo("no document found", err=True)
        return
    rows = [
        (str(rank), f"{hit.score:.4f}", _one_line(hit.id), _first_line(hit.text))
        for rank, hit in enumerate(hits, 1)
    ]
    ranks, scores, ids = (max(len(row[column]) for row in rows) for column in range(3))
    for rank, score, doc_id, line in rows:
        typer.echo(f"{rank:>{ranks}}  {score:>{scores}}  {doc_id:{ids}}  {line}".rstrip())


def _first_line(text: str) -> str:
    lines = text.strip().splitlines()
    line = _one_line(lines[0]) if lines else ""
    return line if len(line) <= LINE_WIDTH else f"{line[: LINE_WIDTH - 1]}…"


def _one_line(text: str) -> str:
    """Text as a terminal should get it: without line breaks, tabs and escape sequences."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def _readable(name: str, value: Any) -> str:  # noqa: ANN401
    if value is None or value == []:
        return "-"
    if name in BYTE_COUNTS:
        return human_bytes(value)
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def human_bytes(count: float) -> str:
    """12.3 MB and the like, in powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} PB"
