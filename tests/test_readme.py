"""What the README shows is what happens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from autoregembed_rag.cli import app
from langchain_autoregembed import AutoRegEmbeddings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_snippets_run_as_written_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(snippets) >= 4
    names: dict = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)  # noqa: S102
    assert names["queries"].shape == names["documents"].shape == (1, 1600)
    assert names["hits"][0].id == "shutil.copytree"
    printed = capsys.readouterr().out
    assert printed.count("Goethe wrote Faust.") == 2
    assert "Don Quixote" not in printed


def test_the_page_on_reranking_shows_what_happens(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "reranking.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for snippet in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(compile(snippet, "reranking.md", "exec"), names)  # noqa: S102
    ranked, scores, best, _ = capsys.readouterr().out.splitlines()
    assert ranked.startswith("[(0, ")
    assert len(scores.split()) == 2
    assert best.startswith("Goethe wrote Faust. 0.")


def test_the_snippet_that_moves_a_community_store_moves_it(tmp_path, monkeypatch):
    community = pytest.importorskip(
        "langchain_community.vectorstores", reason="langchain-community is not installed"
    )
    monkeypatch.chdir(tmp_path)
    old = community.FAISS.from_texts(
        ["Goethe wrote Faust.", "Basalt is a rock."],
        AutoRegEmbeddings(),
        [{"n": 1}, {"n": 2}],
        ids=["a", "b"],
    )
    old.save_local("faiss_index")
    (snippet,) = re.findall(r"```py\n(.*?)```", README, flags=re.DOTALL)
    names: dict = {}
    exec(compile(snippet, "README.md", "exec"), names)  # noqa: S102
    moved = names["store"].similarity_search_with_score("Who wrote Faust?", k=2)
    assert [(document.id, document.metadata) for document, _ in moved] == [("a", {"n": 1}), ("b", {"n": 2})]
    distances = {
        document.page_content: distance
        for document, distance in old.similarity_search_with_score("Who wrote Faust?")
    }
    for document, cosine in moved:
        assert cosine == pytest.approx(1 - distances[document.page_content] / 2, abs=1e-3)


@pytest.mark.parametrize(
    "words",
    sorted(
        set(
            re.findall(
                r"^autoregembed (train \w+|index \w+|search|mine|finetune|explain)",
                README,
                flags=re.MULTILINE,
            )
        )
    ),
)
def test_commands_shown_exist_with_the_options_shown(words):
    shown = re.search(rf"^autoregembed {words} (.*)$", README, flags=re.MULTILINE)
    assert shown
    page = CliRunner().invoke(app, [*words.split(), "--help"]).output
    for option in re.findall(r"--[a-z-]+", shown.group(1)):
        assert option in page


def test_make_targets_shown_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"^make (\w+)", README, flags=re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_files_linked_from_the_readme_exist():
    for link in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def test_the_ci_script_runs_the_readmes_test_command():
    assert "make test" in README
    assert "make test" in (ROOT / ".ci" / "run").read_text().splitlines()
