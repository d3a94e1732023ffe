"""What `make demo` runs: search Python's own documentation through LangChain, offline, in a minute or two.

Documents are the docstrings of the running Python's standard library; the model is the bundled `mini`.
"""

import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from transformers.utils import logging

from benchmarks.pydoc import standard_library_documents
from langchain_autoregembed import AutoRegEmbeddings, AutoRegVectorStore

QUESTIONS = (
    "How do I copy a whole folder with everything inside?",
    "Remember the results of an expensive function so that repeated calls are instant",
    "How do I run several coroutines at the same time and collect their results?",
    "Which of these words did the user mean, given a typo?",
    "Turn a dict into the part of a URL after the question mark",
)

app = typer.Typer(add_completion=False)


@app.command()
def main(
    model: Annotated[str, typer.Option(help="Bundled name, folder or hub id.")] = "mini",
    limit: Annotated[int | None, typer.Option(min=1, help="Index the first N documents only.")] = None,
) -> None:
    """Index the standard library's docstrings and ask five questions."""
    logging.disable_progress_bar()  # of reading weights, over before it is drawn
    start = time.perf_counter()
    embedding = AutoRegEmbeddings(model=model, show_progress=True)
    documents = standard_library_documents()[:limit]
    print(f"{len(documents):,} docstrings of the standard library, model {model!r}")
    with tempfile.TemporaryDirectory() as folder:
        store = AutoRegVectorStore(embedding, path=Path(folder, "index"))
        store.add_texts(
            [document.content for document in documents], ids=[document.id for document in documents]
        )
        indexed = time.perf_counter()
        for question in QUESTIONS:
            asked = time.perf_counter()
            hits = store.similarity_search_with_score(question, k=3)
            print(f"\n{question}  ({1000 * (time.perf_counter() - asked):.0f} ms)")
            for found, score in hits:
                summary = found.page_content.partition("\n")[2].partition("\n")[0]
                print(f"  {score:.3f}  {found.id:<36}  {summary[:70]}")
        store.close()
    print(f"\nindexed in {indexed - start:.1f} s, everything in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    app()
