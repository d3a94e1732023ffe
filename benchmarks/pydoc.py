"""The offline retrieval set `pydoc`: find the part of Python's standard library that answers a question.

Documents are the docstrings of the running interpreter's own standard library (`benchmarks.standard_library`), so the
set needs no download; queries and judgements are written by hand in `data/pydoc-queries.jsonl`. Docstrings differ a
little between Python versions, so compare figures of one Python version only.
"""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.beir import Document, RetrievalSet

QUERIES_FILE = Path(__file__).parent / "data" / "pydoc-queries.jsonl"


def load_pydoc() -> RetrievalSet:
    """The documents of the running Python, the bundled questions and their judgements."""
    rows = [json.loads(line) for line in QUERIES_FILE.read_text(encoding="utf-8").splitlines()]
    queries = {row["_id"]: row["text"] for row in rows}
    qrels = {row["_id"]: dict.fromkeys(row["relevant"], 1) for row in rows}
    return RetrievalSet("pydoc", "test", standard_library_documents(), queries, qrels)


def standard_library_documents() -> list[Document]:
    """One document per documented public object, in the order of their names.

    Collected in a fresh interpreter that sees no other library, since importing hundreds of modules is better done
    where it leaves nothing behind. Takes about a second.
    """
    command = [sys.executable, "-E", "-S", "-m", "benchmarks.standard_library"]
    checkout = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=checkout, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True)  # noqa: S603
    return [Document(*fields) for fields in json.loads(done.stdout)]
