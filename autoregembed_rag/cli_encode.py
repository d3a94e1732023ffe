"""`autoregembed encode`: documents into shards of vectors, on this machine or on a cluster."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from .cli_errors import errors_in_one_line, notes_echoed

RAY_ADDRESS = re.compile(r"auto|local|ray://.+|[^/]+:\d+")


class EncodeCommand(TyperCommand):
    """`--ray` needs no value: what follows it is one only if it looks like an address."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401
        if "--ray" in args:
            place = args.index("--ray") + 1
            if not any(RAY_ADDRESS.fullmatch(word) for word in args[place : place + 1]):
                args = [*args[:place], "auto", *args[place:]]
        return super().parse_args(ctx, args)


def encode(
    source: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="JSONL (also .gz, .zst, .bz2), Parquet or text: a file or a folder, here or at s3://, gs://.",
            show_default=False,
        ),
    ],
    output: Annotated[
        str, typer.Option(metavar="DIR", help="Folder for the shards; an interrupted run goes on there.")
    ],
    model: Annotated[str, typer.Option(help="The encoder: bundled name, folder or hub id.")] = "mini",
    instruction: Annotated[
        str, typer.Option(metavar="document|query|TEXT", help="Encode as documents, as queries, or as told.")
    ] = "document",
    num_tokens: Annotated[
        int | None, typer.Option(min=1, help="Keep the first J compressed tokens only.", show_default=False)
    ] = None,
    pooling: Annotated[
        str | None, typer.Option(help="flatten or mean. Default: what the checkpoint records.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="auto (all GPUs, or the CPU), cpu, cuda, mps, or several: cuda:0,cuda:1.")
    ] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="[ADDRESS]",
            help="Encode on a Ray cluster, host:port; without ADDRESS the one on this machine, started if need be.",
            show_default=False,
        ),
    ] = None,
    cpus: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Of each encoder on a cluster without GPUs. Default: all of the smallest machine, at most 8.",
        ),
    ] = None,
    part_mb: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="About how many MiB of the input make a shard. Default: 16, or more for more than 20,000 of these.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Encode documents into a folder of Parquet shards: ids, texts, metadata and vectors in half precision.

    A run that was interrupted goes on when it is started again. autoregembed index DIR --from-shards loads the result.

    Example: autoregembed encode corpus.jsonl --output ./shards
    """
    with errors_in_one_line(MemoryError, RuntimeError), notes_echoed("autoregembed_rag.sharding"):
        from .sharding import encode_shards
        from .sharding.encoding import keep_few_shapes

        keep_few_shapes()
        manifest = encode_shards(
            source,
            output,
            model=model,
            instruction=instruction,
            num_tokens=num_tokens,
            pooling=pooling,  # type: ignore[arg-type]
            device=device.split(",") if "," in device else device,
            dtype=dtype,
            ray=ray,
            cpus=cpus,
            part_bytes=None if part_mb is None else part_mb << 20,
            show_progress=True,
        )
    typer.echo(
        f"{manifest.documents:,} documents, vectors of dimension {manifest.dimension:,}, "
        f"{len(manifest.parts):,} shard{'' if len(manifest.parts) == 1 else 's'} in {output}"
    )
