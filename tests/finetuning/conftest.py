"""A small corpus of documents."""

from pathlib import Path

import pytest

THINGS = [
    "fox",
    "dog",
    "river",
    "bank",
    "lemon",
    "pepper",
    "vector",
    "reader",
    "passage",
    "model",
    "answer",
    "jump",
]


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Twelve Markdown files whose titles share words with their texts."""
    folder = tmp_path_factory.mktemp("notes")
    for i, thing in enumerate(THINGS):
        near = THINGS[(i + 1) % len(THINGS)]
        (folder / f"{thing}.md").write_text(
            f"# All about every {thing}\n\nNobody has yet seen a {thing} like this one here. "
            f"Sometimes people find a {thing} that is near the {near}.\n",
            encoding="utf-8",
        )
    return folder
