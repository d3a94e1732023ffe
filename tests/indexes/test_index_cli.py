"""`autoregembed index ...` and `autoregembed search`: what they print, what they leave, how they fail."""

import json
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest
from typer.testing import CliRunner

from autoregembed_indexes import DocumentIndex
from autoregembed_rag import AutoRegEncoder
from autoregembed_rag.cli import app

TEXTS = ["The fox is red.\nIt is quick.", "The dog barks at the fox.", "A river bank.", "Un río verde."]
IDS = ["fox", "dog", "bank", "río"]
LANGUAGES = ["en", "en", "en", "es"]
QUERY = "Where is the fox?"
COMMANDS = ["index info", "index verify", "index compact", "search"]


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def output(*words):
    result = run(*words)
    assert result.exit_code == 0, result.output
    return result.stdout


def error(*words):
    """The one line that a command which cannot do its work prints."""
    result = run(*words)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    # Loading a model draws a bar of its own.
    (line,) = [line for line in result.stderr.splitlines() if line and not line.startswith("Loading weights")]
    assert line.startswith("error: ")
    return line


def arguments(command, folder):
    return [*command.split(), folder, *(["fox", "--mode", "text"] if command == "search" else [])]


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint):
    """The tiny encoder as the command loads it."""
    return AutoRegEncoder.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "index"
    with DocumentIndex.create(path, encoder=tiny.fingerprint, tokens=5) as index:
        index.add(tiny.encode_documents(TEXTS), TEXTS, IDS, [{"lang": lang} for lang in LANGUAGES])
        index.create_metadata_index("lang")
    return path


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "my index")


def test_info_is_an_aligned_table(folder, tiny):
    lines = output("index", "info", folder).splitlines()
    table = {line[:16].rstrip(): line[18:] for line in lines}
    assert all(line[16:18] == "  " and line[18] != " " for line in lines)
    with DocumentIndex.open(folder, read_only=True) as index:
        assert list(table) == [name.replace("_", " ") for name in index.info()]
    assert table["path"] == str(folder)
    assert (table["documents"], table["tokens"], table["encoder"]) == ("4", "5", tiny.fingerprint)
    assert (table["snapshot"], table["metadata indexes"]) == ("-", "lang")
    assert table["memory budget"] == "1.1 GB"
    assert table["bytes"].endswith(" kB")


def test_info_as_json_is_what_the_index_says(folder):
    with DocumentIndex.open(folder, read_only=True) as index:
        assert json.loads(output("index", "info", folder, "--json")) == index.info()


def test_an_index_that_is_sound_is_called_so(folder):
    assert output("index", "verify", folder).startswith("sound: 4 documents, vectors of dimension 160, ")


def test_an_empty_index_is_sound_and_finds_nothing(tmp_path, tiny_checkpoint):
    with DocumentIndex.create(tmp_path / "empty") as index:
        assert output("index", "info", index.path, "--json")
    assert output("index", "verify", index.path).startswith("sound: 0 documents, no vectors, ")
    assert output("index", "compact", index.path)
    result = run("search", index.path, QUERY, "--model", tiny_checkpoint)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "no document found" in result.stderr
    assert json.loads(output("search", index.path, QUERY, "--mode", "text", "--json")) == []


def test_every_damaged_document_is_a_line_and_the_exit_code_is_1(folder):
    with closing(sqlite3.connect(folder / "documents.sqlite")) as database, database:
        database.execute("UPDATE documents SET text = 'changed' WHERE id IN ('dog', 'bank')")
    result = run("index", "verify", folder)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    for doc_id in ("dog", "bank"):
        assert lines.count(f"document '{doc_id}' does not have its checksum") == 1
    (words,) = [line for line in lines if "checksum" not in line]
    assert words.startswith("the index of words does not agree with the texts")


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE vectors SET vector = zeroblob(length(vector)) WHERE row = 2",
        "DELETE FROM vectors WHERE row = 2",
        "DELETE FROM state",
    ],
)
def test_damage_that_keeps_an_index_from_opening_is_a_problem_in_one_line(folder, damage):
    with closing(sqlite3.connect(folder / "documents.sqlite")) as database, database:
        database.execute(damage)
    result = run("index", "verify", folder)
    assert (result.exit_code, len(result.stdout.splitlines())) == (1, 1)
    assert "is damaged: " in result.stdout
    for command in ("index info", "index compact"):
        assert "is damaged: " in error(*arguments(command, folder))


def test_a_damaged_snapshot_is_a_problem(folder):
    with DocumentIndex.open(folder) as index:
        index.snapshot()
    snapshot = folder / "vectors-160.faiss"
    content = bytearray(snapshot.read_bytes())
    content[len(content) // 3] ^= 1
    snapshot.write_bytes(content)
    result = run("index", "verify", folder)
    assert result.exit_code == 1
    assert str(snapshot) in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_without_an_index_is_an_error_in_one_line(tmp_path, command):
    for path in (tmp_path / "not there", tmp_path):
        assert f"no index at {path}: " in error(*arguments(command, path))
    assert list(tmp_path.iterdir()) == []


def test_compact_says_what_it_saved_and_keeps_what_is_found(folder):
    with DocumentIndex.open(folder) as index:
        index.add([[1.0] * 160] * 1000, ["to be deleted " * 50] * 1000, ids=[str(i) for i in range(1000)])
        index.delete([str(i) for i in range(1000)])
    found = output("search", folder, "fox", "--mode", "text")
    before, after = output("index", "compact", folder).removesuffix(" after\n").split(" before, ")
    assert before.endswith("MB")
    assert after.endswith("kB")
    assert output("search", folder, "fox", "--mode", "text") == found


def test_beside_a_writer_everything_works_but_compact(folder):
    with DocumentIndex.open(folder):
        checked = run("index", "verify", folder)
        assert (checked.exit_code, checked.stdout[:6]) == (0, "sound:")
        assert "note: the index of words is not checked: " in checked.stderr
        assert "is open for writing" in checked.stderr
        assert json.loads(output("index", "info", folder, "--json"))["documents"] == 4
        assert output("search", folder, "fox", "--mode", "text")
        assert "is open for writing" in error("index", "compact", folder)
    assert run("index", "verify", folder).stderr == ""


@pytest.mark.parametrize("mode", ["vector", "text", "hybrid"])
def test_search_finds_what_the_index_finds(folder, tiny, tiny_checkpoint, mode):
    vectors = tiny.encode_queries([QUERY])
    with DocumentIndex.open(folder) as index:
        expected = {
            "vector": lambda: index.search(vectors, 3)[0],
            "text": lambda: index.search_text(QUERY, 3),
            "hybrid": lambda: index.search_hybrid(vectors, [QUERY], 3)[0],
        }[mode]()
    words = ["search", folder, QUERY, "-k", "3", "--model", tiny_checkpoint, "--mode", mode]
    found = json.loads(output(*words, "--json"))
    assert [hit.pop("rank") for hit in found] == [*range(1, len(expected) + 1)]
    assert [hit.pop("score") for hit in found] == pytest.approx([hit.score for hit in expected], abs=1e-6)
    assert found == [{"id": hit.id, "text": hit.text, "metadata": hit.metadata} for hit in expected]
    lines = [line.split(maxsplit=3) for line in output(*words).splitlines()]
    assert lines == [
        [str(rank), f"{hit.score:.4f}", hit.id, hit.text.partition("\n")[0]]
        for rank, hit in enumerate(expected, 1)
    ]


def test_a_filter_limits_a_search(folder, tiny_checkpoint):
    words = ["search", folder, QUERY, "--json", "--model", tiny_checkpoint, "--filter"]
    assert [hit["id"] for hit in json.loads(output(*words, '{"lang": "es"}'))] == ["río"]
    assert len(json.loads(output(*words, '{"lang": {"$in": ["es", "en"]}}'))) == 4


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ("lang=es", "Expecting value"),
        ("[1]", "must be a dict"),
        ('{"lang": {"$in": 3}}', "must be a list"),
        ('{"lang": {"$like": "e%"}}', "is not an operator"),
    ],
)
def test_a_bad_filter_is_an_error_before_any_model_is_loaded(folder, where, why):
    line = error("search", folder, QUERY, "--filter", where, "--model", "not/there")
    assert line.startswith(f"error: --filter {where}: ")
    assert why in line


def test_the_model_must_be_the_one_that_the_index_was_made_with(folder, tiny):
    line = error("search", folder, QUERY)
    assert tiny.fingerprint in line
    assert AutoRegEncoder.from_pretrained("mini").fingerprint in line
    assert "give --model the one it was made with" in line


def test_search_by_words_needs_no_model(folder):
    assert "fox" in output("search", folder, QUERY, "--mode", "text", "--model", "not/there")


def test_an_index_of_the_first_of_the_vectors_is_searched_by_as_many(tmp_path, tiny_checkpoint):
    short = AutoRegEncoder.from_pretrained(tiny_checkpoint, num_tokens=2)
    with DocumentIndex.create(tmp_path / "short", encoder=short.fingerprint, tokens=2) as index:
        index.add(short.encode_documents(TEXTS), TEXTS, IDS)
        expected = index.search(short.encode_queries([QUERY]))[0]
    found = json.loads(output("search", tmp_path / "short", QUERY, "--model", tiny_checkpoint, "--json"))
    assert [hit["id"] for hit in found] == [hit.id for hit in expected]
    assert [hit["score"] for hit in found] == pytest.approx([hit.score for hit in expected], abs=1e-6)


def test_the_first_tokens_find_documents_that_all_tokens_rank(made, tiny, tiny_checkpoint):
    search = ("search", made, QUERY, "--model", tiny_checkpoint, "--json", "-k", 2)
    for mode in ("vector", "hybrid"):
        found = json.loads(output(*search, "--mode", mode, "--num-tokens", 2))
        assert found == json.loads(output(*search, "--mode", mode)), "four documents are all candidates"
    assert "num_tokens must be between 1 and 5" in error(*search, "--num-tokens", 6)
    line = error("search", made, QUERY, "--mode", "text", "--num-tokens", 2, "--model", "not/there")
    assert line == "error: --num-tokens needs vectors: --mode vector or hybrid"


def test_compacting_writes_the_copy_of_the_first_tokens_too(folder):
    output("index", "compact", folder, "--num-tokens", 2)
    assert {file.name for file in folder.glob("*.faiss")} == {"vectors-160.faiss", "vectors-64.faiss"}
    assert "num_tokens must be between 1 and 5" in error("index", "compact", folder, "--num-tokens", 6)


def test_a_document_takes_one_line_whatever_it_holds(tmp_path):
    texts = ["\n\n needle\twith \x1b[31mcolour\x00 \nsecond line", "needle " * 100, "needle"]
    with DocumentIndex.create(tmp_path / "index") as index:
        index.add([[1.0, 0.0]] * 3, texts, ids=["a\nb", "long", ""])
    lines = output("search", index.path, "needle", "--mode", "text").splitlines()
    assert len(lines) == 3
    assert all(line.isprintable() for line in lines)
    assert any(line.endswith("  a b   needle with [31mcolour") for line in lines)
    assert any("  long  needle needle" in line and line.endswith("…") for line in lines)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command):
    assert f"Example: autoregembed {command} ./my-index" in output(*command.split(), "--help")


def test_the_command_starts_without_heavy_imports():
    script = (
        "import sys, autoregembed_rag.cli; "
        "print(sorted({'torch', 'faiss', 'numpy', 'autoregembed_indexes'} & set(sys.modules)))"
    )
    started = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)  # noqa: S603
    assert started.stdout == "[]\n"
