"""`autoregembed finetune`: fit a model to a corpus, and say whether it became better."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from .cli_errors import errors_in_one_line

NOT_BETTER = 3
"""The exit code where the trained model is not better than the one it started from."""


def finetune(
    path: Annotated[
        Path,
        typer.Argument(
            help="Folder or file of documents (.txt, .md, .html, .jsonl), a JSONL file of pairs, or a BEIR folder."
        ),
    ],
    output: Annotated[
        Path, typer.Option(help="Folder for the checkpoint and report; an interrupted run goes on there.")
    ],
    model: Annotated[
        str, typer.Option(help="Checkpoint or base language model: bundled name, folder or hub id.")
    ] = "mini",
    minutes: Annotated[float | None, typer.Option(help="Time for all; default: all epochs.")] = None,
    stages: Annotated[
        str | None,
        typer.Option(
            help="Of compression, alignment and contrast, separated by commas; they run in this order. Default: all "
            "for a base language model, else contrast."
        ),
    ] = None,
    rate_factor: Annotated[
        float, typer.Option(help="Multiplies every stage's learning rate; below 1 is gentler.")
    ] = 1.0,
    held_out: Annotated[float, typer.Option(help="Share of documents or queries to measure on.")] = 0.1,
    labels: Annotated[bool, typer.Option(help="Use the labels of a BEIR folder.")] = True,
    lora: Annotated[
        int | None, typer.Option(help="Train a LoRA adapter of this rank, then merge it.")
    ] = None,
    blend: Annotated[
        float | None,
        typer.Option(
            help="Share of the trained weights in the result; the rest is the weights' before training. "
            "Default: 0.5 for a checkpoint, 1 for a base language model."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
) -> None:
    """Fine-tune on your own corpus, with or without labels, and measure nDCG@10 on a held-out part before and after.

    Exit code 0: better. 3: worse, or no difference that can be told. 2: an error.

    Example: autoregembed finetune ./docs --output ./fitted --minutes 10
    """
    from .finetuning import FinetuneArguments, default_arguments
    from .finetuning import finetune as run

    with errors_in_one_line(FloatingPointError, MemoryError):
        known = FinetuneArguments().stages
        chosen = [name.strip() for name in stages.split(",")] if stages else default_arguments(model).stages
        if unknown := [name for name in chosen if name not in known]:
            raise ValueError(f"there is no stage {unknown[0]!r}: choose from {', '.join(known)}")
        if not rate_factor > 0:
            raise ValueError(f"--rate-factor must be above 0, not {rate_factor}")
        settings = {
            name: replace(stage, learning_rate=rate_factor * stage.learning_rate) if name in chosen else None
            for name, stage in known.items()
        }
        arguments = FinetuneArguments(
            **settings,  # type: ignore[arg-type]
            minutes=minutes,
            held_out=held_out,
            use_labels=labels,
            lora=lora,
            blend=blend,
            seed=seed,
        )
        report = run(path, output, model, arguments, device=device, announce=typer.echo)
    typer.echo(f"{report}\nsaved to {output}")
    if not report.better:
        raise typer.Exit(NOT_BETTER)
