"""Where an index is: in memory, in a folder, or on a server; what every framework's store asks."""

import os
from typing import Any

from autoregembed_indexes.index import DocumentIndex
from autoregembed_indexes.milvus import MilvusDocumentIndex

AnyIndex = DocumentIndex | MilvusDocumentIndex


def place_of(
    path: str | os.PathLike[str] | None,
    uri: str | None,
    collection_name: str | None = None,
    token: Any = None,  # noqa: ANN401
) -> tuple[type[AnyIndex], dict[str, Any]]:
    """The class of the index at a path or a uri, and the arguments that say where, for its `create` and `open`.

    `token` is a str, or a pydantic SecretStr. Raises ValueError for a path and a uri together, and for what belongs to
    a server without a uri.
    """
    server: dict[str, Any] = {"collection_name": collection_name, "token": token}
    given = {name: value for name, value in server.items() if value is not None}
    if uri is None:
        if given:
            raise ValueError(
                f"{' and '.join(given)} belong to a server: give its uri, too, or leave them out"
            )
        return DocumentIndex, {"path": path}
    if path is not None:
        raise ValueError(
            f"path={str(path)!r} and uri={uri!r}: an index is in a folder or on a server; give one"
        )
    if hasattr(token, "get_secret_value"):
        given["token"] = token.get_secret_value()
    return MilvusDocumentIndex, {"uri": uri, **given}
