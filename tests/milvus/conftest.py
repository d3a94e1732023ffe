"""Real Milvus servers for a session of tests, and indexes on them and on milvus-lite."""

import shutil
import subprocess
import uuid
from contextlib import contextmanager
from pathlib import Path

import pytest

from autoregembed_indexes import MilvusDocumentIndex

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-milvus" / "bin" / "python"
TOKEN = "root:Milvus"  # noqa: S105  (what a new server has)


@pytest.fixture(scope="session", autouse=True)
def token():
    """Give the token as users may, by the environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MILVUS_TOKEN", TOKEN)
        yield TOKEN


@contextmanager
def serving(script, folder):
    """The address of a server that a script of this folder runs with the packages of .venv-milvus."""
    pytest.importorskip("pymilvus")
    if not PYTHON.exists():
        pytest.skip("no .venv-milvus: `make test` makes it, with the Milvus servers in it")
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(  # noqa: S603
            [PYTHON, Path(__file__).with_name(script), folder / "data"],
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


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The address of a server that wants a token."""
    with serving("serve.py", tmp_path_factory.mktemp("milvus")) as uri:
        yield uri


@pytest.fixture(scope="session")
def half(tmp_path_factory):
    """The address of a server that stores float16 vectors, and cannot say its version."""
    with serving("serve_half.py", tmp_path_factory.mktemp("half")) as uri:
        yield uri


@pytest.fixture(scope="session")
def lite(tmp_path_factory):
    """The address of a milvus-lite file."""
    pytest.importorskip("milvus_lite")
    return str(tmp_path_factory.mktemp("lite") / "documents.db")


@pytest.fixture(scope="session", params=["server", "lite"])
def uri(request):
    """The address of each."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def collections():
    """Empty indexes, made at the first use, as a server takes seconds to make one: (uri, settings) -> index."""
    made = {}

    def empty(uri, **options):
        key = (uri, *sorted(options.items()))
        if key not in made:
            made[key] = MilvusDocumentIndex.create(uri, _name(), **{"factory": "Flat", **options})
        made[key].clear()
        return made[key]

    yield empty
    for index in made.values():
        index.close()


@pytest.fixture
def make(server):
    """Make an index of its own on the server."""
    made = []

    def create(**options):
        made.append(MilvusDocumentIndex.create(server, _name(), **{"factory": "Flat", **options}))
        return made[-1]

    yield create
    for index in made:
        index.close()


@pytest.fixture
def new_name():
    """A collection's name that no other has."""
    return _name()


def _name():
    return f"t_{uuid.uuid4().hex}"
