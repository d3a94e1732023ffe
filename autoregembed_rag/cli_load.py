"""`autoregembed index DIR --from-shards SHARDS`: shards into an index."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from .cli_errors import errors_in_one_line

if TYPE_CHECKING:
    from autoregembed_indexes.places import AnyIndex

    from .sharding import Manifest

OPTION = "--from-shards"


class IndexGroup(TyperGroup):
    """`index DIR --from-shards SHARDS` is `index load DIR --from-shards SHARDS`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401
        if args and args[0] not in self.commands and any(word.split("=")[0] == OPTION for word in args):
            args = ["load", *args]
        return super().parse_args(ctx, args)


def load(
    from_shards: Annotated[
        str,
        typer.Option(
            metavar="SHARDS", help="Folder that autoregembed encode has finished.", show_default=False
        ),
    ],
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="[DIR]", help="Folder of the index, made if missing.", show_default=False),
    ] = None,
    milvus: Annotated[
        str | None,
        typer.Option(metavar="URI", help="A Milvus server instead of DIR.", show_default=False),
    ] = None,
    collection: Annotated[str, typer.Option(help="On that server; made if missing.")] = "autoregembed",
    token: Annotated[
        str | None,
        typer.Option(
            envvar="MILVUS_TOKEN", help="For that server: user:password or an API key.", show_default=False
        ),
    ] = None,
    factory: Annotated[str, typer.Option(help="How a new index searches, as FAISS writes it.")] = "auto",
    num_tokens: Annotated[
        int | None, typer.Option(min=1, help="Load only the first J compressed tokens.", show_default=False)
    ] = None,
) -> None:
    """Load encoded shards into an index; documents whose id is there are replaced.

    A run that was interrupted ends the same when it is started again.

    Example: autoregembed index ./my-index --from-shards ./shards
    """
    from autoregembed_indexes import DocumentIndexError

    with errors_in_one_line(DocumentIndexError):
        if (folder is None) == (milvus is None):
            raise ValueError("give either DIR, the folder of an index, or --milvus URI")
        # Imported here, for these take seconds.
        from .sharding.files import Place
        from .sharding.loading import add_shards, checked_manifest

        place = Place(from_shards)
        manifest = checked_manifest(place, num_tokens)
        with _index(manifest, folder, milvus, collection, token, factory) as opened:
            add_shards(opened, place, manifest, show_progress=True)
            held = len(opened)
    target = folder if milvus is None else f"{milvus}, collection {collection}"
    typer.echo(f"{manifest.documents:,} documents loaded; {target} holds {held:,}")


def _index(
    manifest: Manifest,
    folder: Path | None,
    milvus: str | None,
    collection: str,
    token: str | None,
    factory: str,
) -> AnyIndex:
    """The index to load into, made for the shards if it is not there."""
    from autoregembed_indexes.places import place_of

    on_server: dict[str, Any] = {} if milvus is None else {"collection_name": collection, "token": token}
    kind, place = place_of(folder, milvus, **on_server)
    expected: dict[str, Any] = {"dimension": manifest.dimension, "encoder": manifest.encoder}
    if kind.exists(**place):
        return kind.open(**place, **expected)
    return kind.create(**place, **expected, tokens=manifest.tokens, factory=factory)
