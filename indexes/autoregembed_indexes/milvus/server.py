"""The connection to a Milvus server: how it is made, how it fails, and what the server can do."""

import contextvars
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, NoReturn
from urllib.parse import urlsplit

from autoregembed_indexes.errors import DocumentIndexError

CONNECT_SECONDS = 5
# Calls that cannot reach the server are tried again after 0.01, 0.03 ... 3 seconds: about 7 seconds in all.
RETRIES = 7
CONNECT_FAILED = 2  # pymilvus' own code
TOKEN_VARIABLE = "MILVUS_TOKEN"  # noqa: S105  (where the token is, not what it is)

# pymilvus is imported at first use, and has no types.
Client = Any

_calling = contextvars.ContextVar("calling", default=False)
_TOO_LARGE = re.compile("larger than max|exceed the limit size|exceeds the limit", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,253}")


class TooLargeError(DocumentIndexError):
    """A message, or the answer to it, is larger than the server lets pass."""


class Server:
    """A client of one server, whose errors are told in a line."""

    def __init__(self, uri: str, token: str | None) -> None:
        """Connect. Raises ImportError without pymilvus, DocumentIndexError where no server answers or takes the token.

        `uri` is "http://host:port", "https://host:port", or a path that ends in ".db", for milvus-lite. Without a
        token the environment variable MILVUS_TOKEN is used, if there is one.
        """
        self.uri = _checked_uri(uri)
        self.is_lite = "://" not in uri
        client = _import_client()
        given = os.environ.get(TOKEN_VARIABLE, "") if token is None else token
        with self.calls("connect"):
            self.client: Client = client(uri, token=given, timeout=CONNECT_SECONDS)
            self.version_text = f"lite {version('milvus-lite')}" if self.is_lite else self._ask_version()

    def close(self) -> None:
        """Let go of the connection, which pymilvus shares with others to the same server."""
        self.client.close()

    def _ask_version(self) -> str:
        try:
            return str(self.client.get_server_version(timeout=CONNECT_SECONDS))
        except Exception as error:
            if _status(error)[0] != "UNIMPLEMENTED":
                raise
            return "of unknown version"  # milvus-lite 2 as a server of its own

    @property
    def has_half(self) -> bool | None:
        """Whether it says that it stores float16 vectors; None: its version does not tell."""
        return self._version >= (2, 4) if self._version else None

    @property
    def has_words(self) -> bool:
        """Whether it searches by words, with BM25."""
        return self.is_lite or self._version >= (2, 5)

    @property
    def _version(self) -> tuple[int, ...]:
        """As (2, 3); empty for milvus-lite, which counts otherwise, and for a server that cannot say its own."""
        found = re.match(r"v?(\d+)\.(\d+)", self.version_text)
        return (int(found[1]), int(found[2])) if found else ()

    @contextmanager
    def calls(self, doing: str) -> Iterator[None]:
        """Run calls of the client, so that what goes wrong is raised as one error, and logged by nobody else."""
        before = _calling.set(True)
        try:
            yield
        except Exception as error:
            if not _is_from_client(error):
                raise
            self._fail(doing, error)
        finally:
            _calling.reset(before)

    def _fail(self, doing: str, error: Exception) -> NoReturn:
        code, reason = _status(error)
        where = f"Milvus at {self.uri}: cannot {doing}"
        if code in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
            raise DocumentIndexError(
                f"{where}, the server refuses the token ({reason}); give token='user:password' or an API key, or set "
                f"{TOKEN_VARIABLE}"
            ) from None
        if code in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "CONNECT_FAILED"):
            raise DocumentIndexError(
                f"{where}, no server answers ({reason}); check that it runs and that the address is right"
            ) from None
        kind = (
            TooLargeError if code == "RESOURCE_EXHAUSTED" or _TOO_LARGE.search(reason) else DocumentIndexError
        )
        raise kind(f"{where}: {reason}") from None


def check_name(collection_name: str) -> str:
    """Return the name of a collection; ValueError for one that Milvus does not take."""
    if not isinstance(collection_name, str):
        raise TypeError(f"collection_name must be a str, got {type(collection_name).__name__}")
    if not _NAME.fullmatch(collection_name):
        raise ValueError(
            f"collection_name {collection_name!r} is not one that Milvus takes: up to 254 letters (A to Z), digits and "
            "underscores, no digit first"
        )
    return collection_name


def _checked_uri(uri: str) -> str:
    if not isinstance(uri, str):
        raise TypeError(f"uri must be a str, got {type(uri).__name__}")
    parts = urlsplit(uri)
    if parts.username or parts.password:
        raise ValueError("a uri must not hold a password: give it as token='user:password'")
    if not (uri.endswith(".db") if "://" not in uri else parts.scheme in ("http", "https", "tcp", "unix")):
        raise ValueError(
            f"uri {uri!r} is not a server's: write 'http://host:19530', or the path of a milvus-lite file, 'FILE.db'"
        )
    return uri


def _import_client() -> Client:
    try:
        from pymilvus import MilvusClient
    except ImportError as error:
        raise ImportError(
            'MilvusDocumentIndex needs pymilvus: pip install "autoregembed-rag[scale]"'
        ) from error
    # pymilvus logs what it raises, with the whole traceback; here it is raised again as an error of ours.
    for name in ("decorators", "client.connection_manager", "milvus_client.milvus_client"):
        log = logging.getLogger(f"pymilvus.{name}")
        if _is_not_ours not in log.filters:
            log.addFilter(_is_not_ours)
    return MilvusClient


def _is_not_ours(_: logging.LogRecord) -> bool:
    return not _calling.get()


def _is_from_client(error: Exception) -> bool:
    from grpc import RpcError  # type: ignore[import-untyped]
    from pymilvus.exceptions import MilvusException

    return isinstance(error, (MilvusException, RpcError))


def _status(error: Any) -> tuple[str, str]:  # noqa: ANN401
    """gRPC's name of what went wrong, "" where it has none, and the reason in a line."""
    for each in (error.__cause__, error):
        if hasattr(each, "details"):
            name = each.code().name
            return name, " ".join(str(each.details()).split())[:400] or name
    code = "CONNECT_FAILED" if getattr(error, "code", None) == CONNECT_FAILED else ""
    return code, " ".join(str(getattr(error, "message", error)).split())[:400]
