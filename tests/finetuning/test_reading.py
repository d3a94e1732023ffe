"""Documents from files of all kinds: what is read, what is left out, and what is said of it."""

import json
import logging
import os
import re
from pathlib import Path

import pytest

from autoregembed_rag.finetuning.corpus import CorpusArguments, prepare
from autoregembed_rag.finetuning.documents import Section, html_document, markdown_document, text_document
from autoregembed_rag.finetuning.kinds import corpus_kind
from autoregembed_rag.finetuning.reading import read_documents


def test_markdown_gives_title_headings_and_text_without_marks():
    document = markdown_document(
        "guide.md",
        "---\ntitle: Front\n---\n\nPods\n====\nA [pod](x.md) runs **containers**.\n\n"
        "## Restarts ##\n```sh\n# not a heading\n```\nThey restart.\n\n### Back-off\nIt grows.\n\n## Limits\nCPU.\n",
    )
    assert document.title == "Pods"
    assert document.sections == (
        Section((), "A pod runs containers."),
        Section(("Restarts",), "# not a heading\nThey restart."),
        Section(("Restarts", "Back-off"), "It grows."),
        Section(("Limits",), "CPU."),
    )
    assert markdown_document("a.md", "---\ntitle: 'Front'\n---\nText.").title == "Front"
    assert markdown_document("a.md", "# C#\ntext <!-- hidden\nlines --> seen <!-- open").title == "C#"
    assert markdown_document("a.md", "text <!-- hidden\nlines -->seen <!-- open").sections == (
        Section((), "text seen <!-- open"),
    )
    assert markdown_document("a.md", "---\n---\nText.").sections == (Section((), "Text."),)
    assert markdown_document("a.md", "No heading.\n\n---\n\nA rule above.").sections == (
        Section((), "No heading.\n\n---\n\nA rule above."),
    )


@pytest.mark.parametrize(
    ("front", "is_settings"),
    [
        ("title: A\ntags:\n- a\n- b\nauthor:\n  name: B\nog:title: C\nempty:\n", True),
        ("# a comment\n\ntitle: A\nlist: [\n  a\n]\n", True),
        ("", True),
        ("Real words between two rules.\n\nMore of them.\n", False),
        ("Note: these are real words.\n\nMore of them.\n", False),
        ("- one point\n- another\n", False),
        ("# A heading\n", False),
    ],
)
def test_only_settings_between_two_rules_are_front_matter(front, is_settings):
    document = markdown_document("a.md", f"---\n{front}---\nText.\n")
    words = document.title + "".join("".join(s.headings) + s.text for s in document.sections)
    lost = [word for word in re.findall("[a-zA-Z]{3,}", front) if word not in words]
    assert "Text." in words
    assert not lost if not is_settings else document.sections == (Section((), "Text."),)


def test_html_gives_title_headings_and_text_without_menus_and_scripts():
    document = html_document(
        "page.html",
        "<html><head><title>Pods - Site</title><style>p {}</style></head><body><nav><h2>Menu</h2>home</nav>"
        "<h1>Pods &amp; more</h1><p>One   <b>pod</b>.<p>Two<br>pods.<script>run()</script>"
        "<h2>Code</h2><pre>if x:\n    y</pre><footer>(c)</footer></body></html>",
    )
    assert document.title == "Pods & more"
    assert document.sections == (
        Section((), "One pod.\n\nTwo\n\npods."),
        Section(("Code",), "if x:\n    y"),
    )


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<div><nav>menu</div><p>Text after.", "Text after."),  # <nav> ends with what it stands in
        ("<h2>Head<p>Text after.", "Text after."),  # a heading without an end tag
        ("</div></nav>Text after.", "Text after."),
        ("<p>Text after", "Text after"),
    ],
)
def test_broken_html_loses_no_text(page, text):
    assert [section.text for section in html_document("x", page).sections] == [text]


@pytest.mark.parametrize(
    ("text", "title", "body"),
    [
        ("The Title\n\nBody text.", "The Title", "Body text."),
        ("The Title\n=========\nBody text.", "The Title", "Body text."),
        ("A sentence.\n\nAnother.", "", "A sentence.\n\nAnother."),
        ("A line that\nwraps.", "", "A line that\nwraps."),
        ("Only a line", "", "Only a line"),
        (f"{'word ' * 30}\n\nBody.", "", f"{'word ' * 30}\n\nBody."),
    ],
)
def test_the_first_line_of_a_text_is_a_title_only_if_it_looks_like_one(text, title, body):
    document = text_document("x.txt", text)
    assert (document.title, document.sections[0].text) == (title, body)


def test_a_folder_is_read_in_all_levels_and_what_is_left_out_is_named(tmp_path, caplog):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b.txt").write_bytes("Über uns.".encode("utf-16"))
    (tmp_path / "sub" / "a.md").write_text("# T\ntext", encoding="utf-8-sig")
    (tmp_path / "sub" / "rows.jsonl").write_text(
        '{"_id": "7", "title": "T", "text": "x"}\n\n{"text": "y"}\n{"text": " "}'
    )
    (tmp_path / ".git" / "c.txt").write_text("hidden")
    (tmp_path / ".d.txt").write_text("hidden")
    (tmp_path / "e.pdf").write_text("no text format")
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.md").write_text("# Only a title\n")
    with caplog.at_level(logging.WARNING):
        documents = read_documents(tmp_path)
    assert [document.id for document in documents] == [
        "b.txt",
        "sub/a.md",
        "sub/rows.jsonl:7",
        "sub/rows.jsonl:3",
    ]
    assert documents[0].sections[0].text == "Über uns."
    assert documents[1].title == "T"
    assert "1 files are not UTF-8 text and were left out; save them as UTF-8: bad.txt" in caplog.text
    assert "2 documents hold no text and were left out: empty.md, sub/rows.jsonl:4" in caplog.text


def test_what_cannot_be_read_is_named_and_the_rest_is_read(tmp_path, caplog, monkeypatch):
    for name in ("a", "bad", "closed/b", "open/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.md").write_text("Some text.")
    (tmp_path / "lost.md").symlink_to("nowhere.md")
    listing, reading = os.scandir, Path.read_bytes

    def scandir(folder):
        if Path(folder).name == "closed":
            raise PermissionError(13, "Permission denied", str(folder))
        return listing(folder)

    def read_bytes(file):
        if file.name == "bad.md":
            raise OSError(5, "Input/output error")  # as the system says it: without a name
        return reading(file)

    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert [document.id for document in read_documents(tmp_path)] == ["a.md", "open/c.md"]
    assert "3 files or folders cannot be read and were left out: " in caplog.text
    for name in ("closed (Permission denied)", "bad.md (Input/output error)", "lost.md (No such file"):
        assert name in caplog.text
    for name in ("a.md", "bad.md", "lost.md", "open/c.md"):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=r"no documents that can be read \(closed \(Permission denied\)\)"):
        corpus_kind(tmp_path)


def test_links_to_folders_are_followed_and_no_folder_is_read_twice(tmp_path):
    (tmp_path / "notes" / "more").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("Some text.")
    (tmp_path / "elsewhere" / "b.txt").write_text("Other text.")
    (tmp_path / "notes" / "more" / "around").symlink_to(tmp_path / "notes")
    (tmp_path / "notes" / "linked").symlink_to(tmp_path / "elsewhere")
    assert [document.id for document in read_documents(tmp_path / "notes")] == ["a.txt", "linked/b.txt"]
    (tmp_path / "notes" / "a.txt").unlink()
    assert corpus_kind(tmp_path / "notes") == "documents"


def test_names_and_ids_that_are_not_unicode_are_written_as_escapes(tmp_path):
    text = "One sentence that is long enough to ask for. Another one, which is just as long as that."
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).write_text(f"{text} In a file.")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    rows = [{"_id": f"\ud800{i}", "text": text.replace("one", f"row{i}")} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ids = [document.id for document in read_documents(tmp_path)]
    assert ids == ["caf\\udce9.txt", *(f"rows.jsonl:\\ud800{i}" for i in range(3))]
    settings = CorpusArguments(lambda texts: [len(text) // 4 for text in texts], max_tokens=100)
    assert prepare(tmp_path, settings).evaluation.queries


def test_a_row_whose_id_is_null_has_the_number_of_its_line(tmp_path):
    rows = [{"_id": None, "text": "x"}, {"_id": None, "id": "own", "text": "y"}, {"text": "z"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [document.id for document in read_documents(tmp_path / "rows.jsonl")] == ["1", "own", "3"]


def test_a_body_that_begins_with_its_title_as_a_sentence_loses_it(tmp_path):
    rows = [
        {
            "_id": "1",
            "title": "the flow past a Sphere .",
            "text": "The flow past  a sphere . a method is given .",
        },
        {
            "_id": "2",
            "title": "the flow past a sphere .",
            "text": "the flow past a sphere fixed in a stream .",
        },
        {"_id": "3", "title": "only this", "text": "Only this."},
    ]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    texts = [document.sections[0].text for document in read_documents(tmp_path / "corpus.jsonl")]
    assert texts == ["a method is given .", "the flow past a sphere fixed in a stream .", "Only this."]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{broken", r"corpus\.jsonl, line 2: "),
        ('{"_id": "2", "title": "t"}', r"corpus\.jsonl, line 2: field 'text' must be a text, not NoneType"),
        ('{"_id": "2", "text": "x", "title": 3}', r"line 2: field 'title' must be a text, not int"),
        (
            '{"_id": "1", "text": "x"}',
            r"corpus\.jsonl, line 1 and .*corpus\.jsonl, line 2: two documents have the id '1'",
        ),
    ],
)
def test_a_broken_document_line_is_named(tmp_path, line, complaint):
    (tmp_path / "corpus.jsonl").write_text(f'{{"_id": "1", "text": "fine"}}\n{line}\n')
    with pytest.raises(ValueError, match=complaint):
        read_documents(tmp_path / "corpus.jsonl")
