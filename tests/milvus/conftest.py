"""A real Milvus server for a session of tests, and indexes on it and on milvus-lite."""

import shutil
import subprocess
import uuid
from pathlib import Path

import pytest

from autoregembed_indexes import MilvusDocumentIndex

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-milvus" / "bin" / "python"
TOKEN = "root:Milvus"  # what a new server has


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The address of a server that wants a token."""
    pytest.importorskip("pymilvus")
    if not PYTHON.exists():
        pytest.skip("no .venv-milvus: `make test` makes it, with the Milvus server in it")
    folder = tmp_path_factory.mktemp("milvus")
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [PYTHON, Path(__file__).with_name("serve.py"), folder / "data"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            port = process.stdout.readline().strip()
            if not port:
                pytest.fail(f"the Milvus server did not start: {(folder / 'log').read_text()[-2000:]}")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.stdin.close()
            process.wait(timeout=30)
            shutil.rmtree(folder, ignore_errors=True)  # with the server's programs, half a gigabyte


@pytest.fixture(autouse=True)
def token(monkeypatch):
    """Give the token as users may, by the environment."""
    monkeypatch.setenv("MILVUS_TOKEN", TOKEN)


@pytest.fixture(scope="session")
def lite(tmp_path_factory):
    """The address of a milvus-lite file."""
    pytest.importorskip("milvus_lite")
    return str(tmp_path_factory.mktemp("lite") / "documents.db")


@pytest.fixture
def name():
    """A collection name that no other test has."""
    return f"t_{uuid.uuid4().hex}"


@pytest.fixture
def make(server, name):
    """Make an index on the server that is dropped at the end of the test."""
    made = []

    def create(**options):
        made.append(MilvusDocumentIndex.create(server, name, **{"factory": "Flat", **options}))
        return made[-1]

    yield create
    for index in made:
        drop(server, name)
        index.close()


def drop(uri, name):
    """Drop a collection."""
    from pymilvus import MilvusClient

    MilvusClient(uri, token=TOKEN).drop_collection(name)
