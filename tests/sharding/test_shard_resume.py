"""A run that was interrupted goes on, encodes nothing twice, and refuses what it was not begun with."""

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from shard_files import make_documents, rows_of, write_lines

from autoregembed_rag import AutoRegEncoder

PART = 4000


def command(source, output, model, *more):
    program = "from autoregembed_rag.cli import app; app()"
    words = ["encode", source, "--output", output, "--model", model, "--dtype", "float32", *more]
    return [sys.executable, "-c", program, *map(str, words)]


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def records(folder):
    """The finished parts, and when each was written."""
    return {file.name: file.stat().st_mtime_ns for file in Path(folder).glob("part-*.json")}


def test_kill_9_loses_no_finished_part(run, tiny_checkpoint, tmp_path):
    source = write_lines(tmp_path / "corpus.jsonl", make_documents(6000))
    settings = {"model": str(tiny_checkpoint), "dtype": "float32", "part_bytes": 100_000}
    call = f"encode_shards({str(source)!r}, {str(tmp_path / 'shards')!r}, **{settings})"
    # As many threads as here: sums of floats depend on it.
    threads = f"import torch; torch.set_num_threads({torch.get_num_threads()})"
    program = f"{threads}; from autoregembed_rag.sharding import encode_shards; {call}"
    process = subprocess.Popen([sys.executable, "-c", program])  # noqa: S603
    while len(records(tmp_path / "shards")) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = records(tmp_path / "shards")
    manifest = run(source, tmp_path / "shards", part_bytes=100_000)
    assert 2 <= len(before) < len(manifest.parts)
    after = records(tmp_path / "shards")
    assert {name: after[name] for name in before} == before
    run(source, tmp_path / "undisturbed", part_bytes=100_000)
    assert rows_of(tmp_path / "shards") == rows_of(tmp_path / "undisturbed")
    assert names(tmp_path / "shards") == names(tmp_path / "undisturbed")


def test_a_full_disk_is_an_error_and_loses_nothing(run, corpus, tiny_checkpoint, tmp_path):
    """The limit is on the size of one file, which the system refuses in the same way."""
    run(corpus, tmp_path / "whole")
    small = min(file.stat().st_size for file in (tmp_path / "whole").glob("*.parquet")) // 2

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (small, small))

    words = command(corpus, tmp_path / "shards", tiny_checkpoint)
    result = subprocess.run(  # noqa: S603
        words, capture_output=True, text=True, preexec_fn=limit, check=False
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "File too large" in result.stderr
    assert names(tmp_path / "shards") == ["manifest.json"]
    run(corpus, tmp_path / "shards")
    assert rows_of(tmp_path / "shards") == rows_of(tmp_path / "whole")


@pytest.fixture(scope="module")
def finished(run, corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "shards"
    run(corpus, folder, part_bytes=PART)
    return folder


def test_a_finished_folder_is_not_encoded_again(run, corpus, finished):
    before = records(finished)
    assert run(corpus, finished, part_bytes=PART).documents == 200
    assert records(finished) == before


@pytest.mark.parametrize("damage", ["no record", "record", "no shard", "shard"])
def test_only_a_part_that_is_not_whole_is_encoded_again(damage, run, corpus, finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "shards")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest |= {"complete": False, "shards": None}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (shard,) = folder.glob("part-000003-*.parquet")
    file = folder / "part-000003.json" if "record" in damage else shard
    if damage.startswith("no"):
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-10])
    before = records(folder)
    run(corpus, folder, part_bytes=PART)
    after = records(folder)
    assert {name for name in after if after[name] != before.get(name)} == {"part-000003.json"}
    assert rows_of(folder) == rows_of(finished)


def test_what_killed_processes_left_is_taken_away(run, corpus, tmp_path):
    run(corpus, tmp_path / "shards", part_bytes=PART)
    listed = names(tmp_path / "shards")
    manifest = json.loads((tmp_path / "shards" / "manifest.json").read_text())
    (tmp_path / "shards" / "manifest.json").write_text(
        json.dumps(manifest | {"complete": False, "shards": None})
    )
    (tmp_path / "shards" / ".part-000001-0123.new").write_bytes(b"half")
    (tmp_path / "shards" / "part-000001-ffffffff.parquet").write_bytes(b"of an attempt that lost")
    run(corpus, tmp_path / "shards", part_bytes=PART)
    assert names(tmp_path / "shards") == listed


def test_another_encoder_or_instruction_is_refused_by_name(run, corpus, finished, make_checkpoint, tmp_path):
    other = make_checkpoint(tmp_path / "other", num_compressed_tokens=4)
    fingerprint = AutoRegEncoder.from_pretrained(other).fingerprint
    for settings, words in (
        ({"model": other}, f"the encoder '[0-9a-f]+', and this is '{fingerprint}'"),
        ({"instruction": "query"}, "the instruction 'Find sentences .*, and this is 'Find documents"),
        ({"num_tokens": 3}, "the number of compressed tokens 5, and this is 3"),
        ({"pooling": "mean"}, "the encoder"),
        ({"part_bytes": PART + 1}, "the bytes of a part"),
    ):
        with pytest.raises(ValueError, match=f"was begun with {words}.*another --output"):
            run(corpus, finished, **{"part_bytes": PART, **settings})


def test_a_changed_input_is_refused_by_name(run, corpus, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        shutil.copy(corpus, folder / name)
        (folder / name).write_text((folder / name).read_text().replace("doc-", f"{name}-"))
    run(folder, tmp_path / "shards")
    (folder / "c.txt").write_text("more")
    (folder / "a.jsonl").unlink()
    with (folder / "b.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(
        ValueError, match=r"a.jsonl is gone, b.jsonl was changed, c.txt is new.*another --output"
    ):
        run(folder, tmp_path / "shards")
