"""The `autoregembed` command. Heavy imports wait until a command runs, so that --help is instant."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_errors import errors_in_one_line
from .cli_index import index, search

app = typer.Typer(
    help="Train and use AutoRegEmbed text embedders.", no_args_is_help=True, pretty_exceptions_enable=False
)
train = typer.Typer(help="The two training stages of the paper.", no_args_is_help=True)
app.add_typer(train, name="train")
app.add_typer(index, name="index")
app.command()(search)

Data = Annotated[Path, typer.Option(help="JSONL file, also .gz or .zst.")]
Output = Annotated[Path, typer.Option(help="Folder for the checkpoint; an interrupted run goes on there.")]
LearningRate = Annotated[float | None, typer.Option(help="Peak learning rate; default: the paper's.")]
BatchSize = Annotated[int, typer.Option(help="Rows per step and device.")]
Epochs = Annotated[float | None, typer.Option(help="Passes over the data; default: the paper's.")]
MaxSteps = Annotated[int | None, typer.Option(help="Steps at most.")]
SaveSteps = Annotated[int | None, typer.Option(help="Steps between checkpoints.")]
Seed = Annotated[int, typer.Option(help="Of the order of rows.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]


@train.command()
def compress(
    base: Annotated[str, typer.Option(help="Base language model: folder or hub id.")],
    data: Data,
    output: Output,
    num_compressed_tokens: Annotated[int, typer.Option(help="k, vectors per text.")] = 5,
    learning_rate: LearningRate = None,
    batch_size: BatchSize = 32,
    epochs: Epochs = None,
    max_steps: MaxSteps = None,
    save_steps: SaveSteps = 500,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Stage 1: information compression. Rows have `context`, `instruction`, `output`.

    Example: autoregembed train compress --base ./base --data pwc.jsonl --output ./compressed
    """
    from .decoder import FrozenDecoder
    from .encoder import AutoRegEncoder
    from .training.arguments import CompressionArguments
    from .training.compression import train_compression
    from .training.data import read_compression_rows

    with errors_in_one_line():
        rows = read_compression_rows(data)
        encoder = AutoRegEncoder.from_base(base, num_compressed_tokens, device=device, dtype="float32")
        arguments = CompressionArguments(
            **_given(learning_rate=learning_rate, epochs=epochs),
            batch_size=batch_size,
            max_steps=max_steps,
            save_steps=save_steps,
            seed=seed,
        )
        decoder = FrozenDecoder.from_pretrained(base, device=device)
        train_compression(encoder, decoder, rows, output, arguments)
    typer.echo(f"saved to {output}")


@train.command()
def align(
    model: Annotated[str, typer.Option(help="Checkpoint of stage 1: folder or hub id.")],
    data: Data,
    output: Output,
    similarity: Annotated[str, typer.Option(help="sigmoid (equation 2) or log_sigmoid.")] = "sigmoid",
    beta: Annotated[float, typer.Option(help="Scale of differences of log-probabilities.")] = 0.1,
    temperature: Annotated[float, typer.Option(help="tau of the softmax.")] = 0.1,
    num_negatives: Annotated[int, typer.Option(help="Negatives per query.")] = 1,
    learning_rate: LearningRate = None,
    batch_size: BatchSize = 32,
    epochs: Epochs = None,
    max_steps: MaxSteps = None,
    save_steps: SaveSteps = 500,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Stage 2: conditional distribution alignment. Rows have `query`, `pos` and optionally `neg`.

    Example: autoregembed train align --model ./compressed --data nli.jsonl --output ./aligned
    """
    from .decoder import FrozenDecoder
    from .encoder import AutoRegEncoder
    from .training.alignment import train_alignment
    from .training.arguments import AlignmentArguments
    from .training.data import read_alignment_rows

    with errors_in_one_line():
        rows = read_alignment_rows(data)
        encoder = AutoRegEncoder.from_pretrained(model, device=device, dtype="float32")
        arguments = AlignmentArguments(
            **_given(learning_rate=learning_rate, epochs=epochs),
            batch_size=batch_size,
            max_steps=max_steps,
            save_steps=save_steps,
            seed=seed,
            similarity=similarity,  # type: ignore[arg-type]  # validated by the loss
            beta=beta,
            temperature=temperature,
            num_negatives=num_negatives,
        )
        decoder = FrozenDecoder.from_pretrained(model, device=device)
        train_alignment(encoder, decoder, rows, output, arguments)
    typer.echo(f"saved to {output}")


def _given(**options: Any) -> dict[str, Any]:  # noqa: ANN401
    """The options that were given, so that the others keep their default."""
    return {name: value for name, value in options.items() if value is not None}
