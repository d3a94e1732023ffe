"""`autoregembed explain`: what an embedding says when it is read back."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from .cli_errors import errors_in_one_line
from .cli_index import check_encoder

if TYPE_CHECKING:
    import numpy as np

    from .decoder import FrozenDecoder
    from .encoder import AutoRegEncoder
    from .reading import Reading

WIDTH = 100
SHOWN_WORDS = 12


class Stored(NamedTuple):
    """A document of an index: its text, its vector [1, dimension], the fingerprint of its encoder, its folder."""

    text: str
    vector: np.ndarray
    encoder: str | None
    folder: Path


def explain(
    text: Annotated[
        str | None, typer.Argument(metavar="TEXT", help="A text of your own.", show_default=False)
    ] = None,
    model: Annotated[str, typer.Option(help="A checkpoint: bundled name, folder or hub id.")] = "mini",
    decoder: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The language model that reads, by folder or hub id. Default: the one that the checkpoint names.",
            show_default=False,
        ),
    ] = None,
    index: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="An index, for a vector stored there.", show_default=False),
    ] = None,
    doc_id: Annotated[
        str | None, typer.Option("--id", help="The document in the index.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens that the decoder writes at most.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Have the decoder say what a text's vectors hold, with its confidence in each token, and what was lost.

    Of a text of your own, as a document (I_self) and as a query (I_next); of an indexed document, the stored vector.

    Example: autoregembed explain "Vitamin C prevents scurvy."
    """
    with errors_in_one_line():
        if (text is None) == (index is None) or (index is None) != (doc_id is None):
            raise ValueError("give a TEXT, or both --index DIR and --id ID")
        # Before the model, which takes seconds to load: most errors are in the path.
        stored = None if index is None else _stored(index, doc_id or "")

        from .encoder import AutoRegEncoder

        encoder = AutoRegEncoder.from_pretrained(model)
        reader = _reader(decoder, encoder, model)
        if stored is None:
            readings = _of_text(text or "", encoder, reader, max_new_tokens)
        else:
            readings = _of_stored(stored, encoder, reader, max_new_tokens)
    if as_json:
        record = [
            {"what": what, "text": reading.text, "share": reading.share, **reading._asdict()}
            for what, reading in readings.items()
        ]
        typer.echo(json.dumps(record, indent=2, ensure_ascii=False))
    else:
        typer.echo("\n\n".join(_shown(what, reading, max_new_tokens) for what, reading in readings.items()))


def _reader(decoder: str | None, encoder: AutoRegEncoder, model: str) -> FrozenDecoder:
    from .decoder import FrozenDecoder

    if decoder is not None:
        return FrozenDecoder.from_pretrained(decoder)
    if encoder.config.decoder is None:
        raise ValueError(
            f"{model} does not name its decoder: give --decoder the base language model that it was trained with"
        )
    try:
        return FrozenDecoder.for_encoder(encoder)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; or give --decoder") from error


def _stored(folder: Path, doc_id: str) -> Stored:
    from autoregembed_indexes import DocumentIndex, DocumentIndexError

    with errors_in_one_line(DocumentIndexError), DocumentIndex.open(folder, read_only=True) as opened:
        found = opened.get([doc_id])
        if not found:
            raise ValueError(f"{folder} has no document with the id {doc_id!r}")
        return Stored(found[0].text, opened.vectors([doc_id]), opened.encoder, folder)


def _of_text(text: str, encoder: AutoRegEncoder, decoder: FrozenDecoder, most: int) -> dict[str, Reading]:
    import numpy as np

    from .reading import read_back

    names = {"as a document (I_self)": "self", "as a query (I_next)": "next"}
    states = np.concatenate([encoder.compress([text], name) for name in names.values()])
    readings = read_back(decoder, states, [text] * len(names), max_new_tokens=most)
    return dict(zip(names, readings, strict=True))


def _of_stored(
    stored: Stored, encoder: AutoRegEncoder, decoder: FrozenDecoder, most: int
) -> dict[str, Reading]:
    from .reading import read_back, states_of_vectors

    check_encoder(stored.folder, stored.encoder, str(encoder), encoder)
    if encoder.config.pooling == "mean":
        raise ValueError("mean-pooled vectors cannot be read back: the decoder reads the compressed vectors")
    states = states_of_vectors(stored.vector, encoder.compress([stored.text], "self"))
    return {"the stored vector": read_back(decoder, states, [stored.text], max_new_tokens=most)[0]}


def _shown(what: str, reading: Reading, most: int) -> str:
    pieces = " ".join(f"{' '.join(piece.split()) or '·'} {chance:.0%}," for piece, chance in reading.tokens)
    words = len(reading.recovered) + len(reading.lost)
    beyond = f"; {len(reading.beyond)} more lie beyond the first {most} tokens, the most that is written"
    lines = [
        f"{what}: {' '.join(reading.text.split())!r}",
        f"sure of each piece: {pieces.rstrip(',')}",
        f"content words: {len(reading.recovered)} of {words} ({reading.share:.0%}){beyond if reading.beyond else ''}",
        f"kept: {_listed(reading.recovered)}",
        f"lost: {_listed(reading.lost)}",
    ]
    return "\n".join(textwrap.fill(line, WIDTH, subsequent_indent="    ") for line in lines)


def _listed(words: list[str]) -> str:
    more = len(words) - SHOWN_WORDS
    return ", ".join(words[:SHOWN_WORDS]) + (f" and {more} more" if more > 0 else "") or "-"
