"""`autoregembed mine`: give rows of queries and positives hard negatives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .cli_errors import errors_in_one_line

if TYPE_CHECKING:
    from autoregembed_indexes import DocumentIndex

    from .encoder import AutoRegEncoder
    from .training.data import AlignmentRow, Rows
    from .training.mining_report import MiningReport

DOCUMENTS_AT_ONCE = 2048


class Strategy(str, Enum):
    """Which of the candidates left become negatives."""

    top = "top"
    random = "random"


def mine(
    data: Annotated[
        Path, typer.Option(help="Rows with `query`, `pos` and optionally `neg`: JSONL and more.")
    ],
    output: Annotated[Path, typer.Option(help="JSONL file for the rows with negatives.")],
    model: Annotated[str, typer.Option(help="The encoder: bundled name, folder or hub id.")] = "mini",
    index: Annotated[Path | None, typer.Option(help="Folder of an index to take negatives from.")] = None,
    corpus: Annotated[
        Path | None,
        typer.Option(help="Or JSONL (also .gz, .zst) with `text` and optionally `title`, such as BEIR's."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Folder for report.json and histogram.png.", metavar="DIR")
    ] = None,
    num_negatives: Annotated[int, typer.Option(help="Negatives per row, its own included.")] = 1,
    top_k: Annotated[int, typer.Option(help="Documents searched per query.")] = 50,
    max_share: Annotated[
        float,
        typer.Option(help="What scores above this share of the positive's score is a false negative."),
    ] = 0.95,
    duplicate_cosine: Annotated[
        float, typer.Option(help="Documents of a higher cosine are near-duplicates.")
    ] = 0.98,
    skip_top: Annotated[int, typer.Option(help="Leave out so many first candidates.")] = 0,
    strategy: Annotated[Strategy, typer.Option(help="The best candidates, or any.")] = Strategy.top,
    seed: Annotated[int, typer.Option(help="Of the random strategy.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Texts per forward pass.")] = 32,
    skip_invalid: Annotated[bool, typer.Option(help="Leave out invalid rows, with a warning.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
) -> None:
    """Mine hard negatives: documents near a query that are neither its positives nor nearly as good.

    They come from --index or --corpus; with neither, from the rows' own positives.

    Example: autoregembed mine --data pairs.jsonl --corpus corpus.jsonl --output mined.jsonl --report mined
    """
    from autoregembed_indexes import DocumentIndexError

    from .encoder import AutoRegEncoder
    from .training.data import alignment_rows
    from .training.mining import MiningArguments, mine_negatives
    from .training.mining_report import new_figure
    from .training.output_file import check_output

    with errors_in_one_line(DocumentIndexError):
        if index is not None and corpus is not None:
            raise ValueError("give --index or --corpus, not both")
        arguments = MiningArguments(
            top_k=top_k,
            num_negatives=num_negatives,
            max_share=max_share,
            duplicate_cosine=duplicate_cosine,
            skip_top=skip_top,
            strategy=strategy.value,
            seed=seed,
            batch_size=batch_size,
        )
        check_output(output, [data] if corpus is None else [data, corpus], report)
        if report is not None:
            new_figure()  # says now, not after the mining, that matplotlib is missing
        rows = alignment_rows(data, skip_invalid=skip_invalid)
        with _opened(index) as documents:
            encoder = AutoRegEncoder.from_pretrained(model, device=device)
            if index is None:
                texts = _positives(rows) if corpus is None else _corpus(corpus)
                _fill(documents, encoder, texts, batch_size)
            mined = mine_negatives(encoder, documents, rows, output, arguments)
        if report is not None:
            mined.save(report)
    typer.echo(_summary(mined, output))


@contextmanager
def _opened(folder: Path | None) -> Iterator[DocumentIndex]:
    """The index in a folder, or an empty one in memory."""
    from autoregembed_indexes import DocumentIndex

    opened = DocumentIndex.create() if folder is None else DocumentIndex.open(folder, read_only=True)
    with opened:
        yield opened


def _positives(rows: Rows[AlignmentRow]) -> Iterator[tuple[str, str]]:
    """(place, text) of each row's positive."""
    return ((rows.place(i), rows[i].pos) for i in range(len(rows)))


def _corpus(file: Path) -> Iterator[tuple[str, str]]:
    """(place, content) of each document: its title, a line break and its text."""
    from .training.sources import numbered_rows

    for line, document in numbered_rows(file):
        place = f"{file}, line {line}"
        title, text = document.get("title") or "", document.get("text")
        if not isinstance(text, str) or not isinstance(title, str):
            raise ValueError(f"{place}: a document needs a field 'text', and a 'title' must be a text")
        content = f"{title}\n{text}" if title else text
        if content.strip():
            yield place, content


def _fill(
    index: DocumentIndex, encoder: AutoRegEncoder, texts: Iterator[tuple[str, str]], batch_size: int
) -> None:
    """Embed each different text once. Ids are places, which an error then names."""
    from tqdm import tqdm

    with tqdm(desc="embedding documents", unit="document", disable=None) as progress:
        distinct = _distinct(texts)
        while part := list(islice(distinct, DOCUMENTS_AT_ONCE)):
            places, contents = zip(*part, strict=True)
            index.add(encoder.encode_documents(contents, batch_size=batch_size), contents, places)
            progress.update(len(part))


def _distinct(texts: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    from .training.mining import text_key

    seen: set[int] = set()
    for place, text in texts:
        key = text_key(text)
        if key not in seen:
            seen.add(key)
            yield place, text


def _summary(mined: MiningReport, output: Path) -> str:
    left_out = (
        f"{mined.positives:,} known answers, {mined.near_duplicates:,} near-duplicates, "
        f"{mined.false_negatives:,} likely false negatives"
    )
    return (
        f"{mined.negatives:,} negatives for {mined.rows:,} rows, saved to {output}\n"
        f"left out: {left_out}\n"
        f"rows with fewer negatives than asked for: {mined.short_rows:,}, with none: {mined.empty_rows:,}"
    )
