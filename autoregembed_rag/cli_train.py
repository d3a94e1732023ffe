"""`autoregembed train`: the stages of training. Their options are the fields of the stages' settings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer

from .cli_errors import errors_in_one_line, notes_echoed
from .training.arguments import AlignmentArguments, CompressionArguments, ContrastArguments, StageArguments

train = typer.Typer(help="The two training stages of the paper, and one more.", no_args_is_help=True)

Command = TypeVar("Command", bound=Callable[..., None])

Data = Annotated[Path, typer.Option(help="JSONL (also .gz, .zst), CSV, TSV, Parquet or Arrow file.")]
SkipInvalid = Annotated[bool, typer.Option("--skip-invalid", help="Leave out invalid rows, with a warning.")]
Unique = Annotated[
    bool,
    typer.Option("--unique", help="Keep the first row of each context (compress) or of equal rows (others)."),
]
Output = Annotated[Path, typer.Option(help="Folder for the checkpoint; an interrupted run goes on there.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Lora = Annotated[int | None, typer.Option(help="Train a LoRA adapter of this rank instead of all weights.")]
KeepAdapter = Annotated[
    bool, typer.Option("--keep-adapter", help="Save the adapter alone instead of merging it into its base.")
]


def with_settings(kind: type[StageArguments]) -> Callable[[Command], Command]:
    """Give a command an option for every field of `kind`; its parameter `settings` receives them as one object."""

    def decorate(command: Command) -> Command:
        @wraps(command)
        def wrapper(**options: Any) -> None:  # noqa: ANN401
            with (
                errors_in_one_line(FloatingPointError, MemoryError),
                notes_echoed("autoregembed_rag.training.stage"),
            ):
                settings = kind(**{field.name: options.pop(field.name) for field in fields(kind)})
                command(**options, settings=settings)

        hints = get_type_hints(command, include_extras=True)
        own = [p for p in inspect.signature(command).parameters.values() if p.name != "settings"]
        parameters = [p.replace(annotation=hints[p.name]) for p in own] + _options(kind)
        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
        return wrapper  # type: ignore[return-value]

    return decorate


def _options(kind: type[StageArguments]) -> list[inspect.Parameter]:
    helps, hints = _documented(kind), get_type_hints(kind)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=Annotated[_plain(hints[field.name]), typer.Option(help=helps[field.name])],
        )
        for field in fields(kind)
    ]


def _plain(hint: Any) -> Any:  # noqa: ANN401
    """A choice of names is a str here; the settings refuse what is none of them."""
    return (
        str if get_origin(hint) is not None and all(isinstance(arg, str) for arg in get_args(hint)) else hint
    )


def _documented(kind: type[StageArguments]) -> dict[str, str]:
    """What the docstrings of `kind` and its bases say of each field."""
    helps: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        attributes = (inspect.getdoc(base) or "").partition("Attributes:\n")[2]
        for name, text in re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", attributes, flags=re.MULTILINE):
            sentence = " ".join(text.split())
            helps[name] = sentence[0].upper() + sentence[1:]
    return helps


@train.command()
@with_settings(CompressionArguments)
def compress(
    *,
    base: Annotated[str, typer.Option(help="Base language model: folder or hub id.")],
    data: Data,
    output: Output,
    unique: Unique = False,
    skip_invalid: SkipInvalid = False,
    num_compressed_tokens: Annotated[int, typer.Option(help="k, vectors per text.")] = 5,
    lora: Lora = None,
    keep_adapter: KeepAdapter = False,
    device: Device = "auto",
    settings: CompressionArguments,
) -> None:
    """Stage 1: information compression. Rows have `context`, `instruction`, `output`.

    Example: autoregembed train compress --base ./base --data pwc.jsonl --output ./compressed
    """
    from .decoder import FrozenDecoder
    from .encoder import AutoRegEncoder
    from .training.compression import train_compression
    from .training.data import compression_rows
    from .training.lora import LoraArguments, lora_pair

    _check_keep_adapter(lora, keep_adapter)
    rows = compression_rows(data, unique=unique, skip_invalid=skip_invalid)
    if lora is None:
        encoder = AutoRegEncoder.from_base(base, num_compressed_tokens, device=device, dtype="float32")
        decoder = FrozenDecoder.from_pretrained(base, device=device)
    else:
        adapter = LoraArguments(rank=lora, alpha=2 * lora)
        encoder, decoder = lora_pair(
            base, adapter, num_compressed_tokens=num_compressed_tokens, device=device
        )
    train_compression(encoder, decoder, rows, output, settings, merge_adapter=not keep_adapter)
    _say_saved(output)


@train.command()
@with_settings(AlignmentArguments)
def align(
    *,
    model: Annotated[str, typer.Option(help="Checkpoint of stage 1: folder or hub id.")],
    data: Data,
    output: Output,
    unique: Unique = False,
    skip_invalid: SkipInvalid = False,
    lora: Lora = None,
    keep_adapter: KeepAdapter = False,
    device: Device = "auto",
    settings: AlignmentArguments,
) -> None:
    """Stage 2: conditional distribution alignment. Rows have `query`, `pos` and optionally `neg`.

    Example: autoregembed train align --model ./compressed --data nli.jsonl --output ./aligned
    """
    from .decoder import FrozenDecoder
    from .encoder import AutoRegEncoder
    from .training.alignment import train_alignment
    from .training.data import alignment_rows
    from .training.lora import LoraArguments, lora_pair

    _check_keep_adapter(lora, keep_adapter)
    rows = alignment_rows(data, unique=unique, skip_invalid=skip_invalid)
    if lora is None:
        encoder = AutoRegEncoder.from_pretrained(model, device=device, dtype="float32")
        decoder = FrozenDecoder.from_pretrained(model, device=device)
    else:
        encoder, decoder = lora_pair(model, LoraArguments(rank=lora, alpha=2 * lora), device=device)
    train_alignment(encoder, decoder, rows, output, settings, merge_adapter=not keep_adapter)
    _say_saved(output)


@train.command()
@with_settings(ContrastArguments)
def contrast(
    *,
    model: Annotated[str, typer.Option(help="Checkpoint: bundled name, folder or hub id.")],
    data: Data,
    output: Output,
    unique: Unique = False,
    skip_invalid: SkipInvalid = False,
    device: Device = "auto",
    settings: ContrastArguments,
) -> None:
    """A last stage that the paper does not have: an in-batch softmax over cosines. Rows as for `align`.

    Example: autoregembed train contrast --model ./aligned --data pairs.jsonl --output ./fitted
    """
    from .encoder import AutoRegEncoder
    from .training.contrast import train_contrast
    from .training.data import alignment_rows

    rows = alignment_rows(data, unique=unique, skip_invalid=skip_invalid)
    encoder = AutoRegEncoder.from_pretrained(model, device=device, dtype="float32")
    train_contrast(encoder, rows, output, settings)
    _say_saved(output)


def _check_keep_adapter(lora: int | None, keep_adapter: bool) -> None:
    if keep_adapter and lora is None:
        raise ValueError("--keep-adapter keeps what --lora trains: give --lora RANK with it, or leave it out")


def _say_saved(output: Path) -> None:
    from accelerate import PartialState

    if PartialState().is_main_process:
        typer.echo(f"saved to {output}")
