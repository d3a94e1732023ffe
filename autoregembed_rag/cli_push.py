"""`autoregembed push`: a checkpoint to the Hugging Face hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .cli_errors import errors_in_one_line


def push(
    model: Annotated[
        str, typer.Argument(metavar="DIR", help="Folder of the checkpoint.", show_default=False)
    ],
    repo_id: Annotated[
        str, typer.Argument(metavar="REPO_ID", help="user/name; made if missing.", show_default=False)
    ],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a new repository. Default: its owner's.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, made if missing. Default: main.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    commit_message: Annotated[str, typer.Option(help="Of the upload.")] = "Upload AutoRegEncoder",
    token: Annotated[
        str | None, typer.Option(help="With the right to write. Default: of `hf auth login` or HF_TOKEN.")
    ] = None,
    card: Annotated[Path | None, typer.Option(help="A README.md to upload as the model card.")] = None,
    license: Annotated[str | None, typer.Option(help="For the model card: apache-2.0, mit, ...")] = None,  # noqa: A002
    language: Annotated[str | None, typer.Option(help="For the model card: en, or en,de.")] = None,
    scores: Annotated[
        list[Path] | None,
        typer.Option(
            help="For the model card: results.json of benchmarks.retrieval or benchmarks.sts; repeatable."
        ),
    ] = None,
) -> None:
    """Upload a checkpoint with its decoder and a model card; log in with `hf auth login` or HF_TOKEN.

    A README.md that you give by --card or have written into DIR goes as it is; otherwise the card says what training
    left on record, and what --license, --language and --scores add.

    Example: autoregembed push ./fitted my-name/fitted --license apache-2.0
    """
    with errors_in_one_line():
        # Imported here, for these take seconds.
        from .encoder import AutoRegEncoder

        facts = {
            "license": license,
            "language": language.split(",") if language else None,
            "scores": [_read(file) for file in scores or []],
        }
        facts = {name: value for name, value in facts.items() if value}
        if card is not None and facts:
            raise ValueError(
                f"--{', --'.join(facts)} cannot change the card that --card gives: write it there"
            )
        written = None if card is None else card.read_text(encoding="utf-8")
        # In float32, or what an adapter merges to would depend on this machine; whole models go up as they are stored.
        encoder = AutoRegEncoder.from_pretrained(model, device="cpu", dtype="float32", token=token)
        url = encoder.push_to_hub(
            repo_id,
            commit_message=commit_message,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            card=facts if written is None else written,
        )
    typer.echo(url)


def _read(file: Path) -> dict[str, object]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is no JSON report: {error}") from error
