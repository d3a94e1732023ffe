"""Encoding on a real Ray cluster of two machines: what dies there, and what is wrong there."""

import json
import os
import signal
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from shard_files import make_documents, rows_of, write_lines
from typer.testing import CliRunner

from autoregembed_rag.cli import app
from autoregembed_rag.sharding import cluster as module
from autoregembed_rag.sharding.cluster import Cluster
from autoregembed_rag.sharding.encoding import Job, Loading
from autoregembed_rag.sharding.files import Place
from autoregembed_rag.sharding.manifest import read_manifest
from autoregembed_rag.sharding.workers import PartEncoder

PARTS = 16
MEMORY = 80 << 20


@pytest.fixture(scope="module")
def machines():
    """Two machines of two processors each, where the death of one is noticed within seconds."""
    from ray.cluster_utils import Cluster as Machines

    health = {
        "health_check_initial_delay_ms": 0,
        "health_check_period_ms": 1000,
        "health_check_timeout_ms": 5000,
        "health_check_failure_threshold": 2,
    }
    head = {
        "num_cpus": 2,
        "object_store_memory": MEMORY,
        "include_dashboard": False,
        "_system_config": health,
    }
    machines = Machines(initialize_head=True, head_node_args=head)
    yield machines
    machines.shutdown()


@pytest.fixture(scope="module")
def long_corpus(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("long") / "corpus.jsonl", make_documents(1000, 60))


def part_bytes(corpus):
    return -(-corpus.stat().st_size // PARTS)


def encoders_on(machine):
    """The processes of the encoders of a machine, which are its raylet's children."""
    raylet = machine.all_processes["raylet"][0].process.pid
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == raylet and b"PartEncoder" in (process / "cmdline").read_bytes():
                found.append(int(process.name))
        except OSError:  # it has ended
            continue
    return found


def wait_for_parts(folder, count):
    end = time.monotonic() + 60
    while len(list(folder.glob("part-*.json"))) < count and time.monotonic() < end:
        time.sleep(0.02)


def test_a_killed_encoder_and_a_lost_machine_change_no_row(machines, run, long_corpus, tmp_path):
    second = machines.add_node(num_cpus=2, object_store_memory=MEMORY)
    size, folder, killed = part_bytes(long_corpus), tmp_path / "shards", []

    def disturb():
        wait_for_parts(folder, 3)
        for process in encoders_on(machines.head_node):
            os.kill(process, signal.SIGKILL)
            killed.append(process)
        wait_for_parts(folder, 6)
        killed.extend(encoders_on(second))
        machines.remove_node(second, allow_graceful=False)
        killed.append(len(list(folder.glob("part-*.json"))))

    thread = threading.Thread(target=disturb)
    thread.start()
    manifest = run(long_corpus, folder, part_bytes=size, ray=machines.address)
    thread.join()
    *processes, finished = killed
    assert len(processes) == 2
    assert finished < len(manifest.parts) == PARTS
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # as many as an encoder had there: sums of floats depend on it
    run(long_corpus, tmp_path / "undisturbed", part_bytes=size)
    torch.set_num_threads(threads)
    assert rows_of(folder) == rows_of(tmp_path / "undisturbed")


def test_a_cluster_goes_on_with_what_one_machine_began(machines, run, corpus, tmp_path):
    run(corpus, tmp_path / "shards", part_bytes=9000)
    whole = rows_of(tmp_path / "shards")
    manifest = json.loads((tmp_path / "shards" / "manifest.json").read_text())
    (tmp_path / "shards" / "manifest.json").write_text(
        json.dumps(manifest | {"complete": False, "shards": None})
    )
    (tmp_path / "shards" / "part-000001.json").unlink()
    (cut,) = (tmp_path / "shards").glob("part-000003-*.parquet")
    cut.write_bytes(cut.read_bytes()[:-1])
    kept = [file for file in (tmp_path / "shards").glob("part-*.json") if file.name != "part-000003.json"]
    before = {file: file.stat().st_mtime_ns for file in kept}
    assert len(before) > 2
    run(corpus, tmp_path / "shards", part_bytes=9000, ray=machines.address)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert [row[:3] for row in rows_of(tmp_path / "shards")] == [row[:3] for row in whole]


def test_a_machine_lost_for_good_is_an_error_and_no_hang(machines, run, long_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.5)
    monkeypatch.setattr(module, "PATIENCE", 1.0)
    large = machines.add_node(num_cpus=4, object_store_memory=MEMORY)
    size, folder = part_bytes(long_corpus), tmp_path / "shards"

    def lose():
        wait_for_parts(folder, 1)
        machines.remove_node(large, allow_graceful=False)

    thread = threading.Thread(target=lose)
    thread.start()
    with pytest.raises(
        RuntimeError, match=r"lost every machine that has 4 CPUs.*the same command, which goes on"
    ):
        run(long_corpus, folder, part_bytes=size, ray=machines.address, cpus=4)
    thread.join()
    with pytest.raises(RuntimeError, match=r"no machine of the cluster has 4 CPUs.*they have 2 CPUs"):
        run(long_corpus, folder, part_bytes=size, ray=machines.address, cpus=4)


def test_a_bad_line_comes_back_from_the_cluster_in_one_line(machines, tiny_checkpoint, tmp_path):
    file = write_lines(tmp_path / "corpus.jsonl", [{"text": "a"}] * 40 + [{"text": ""}])
    words = [
        "encode",
        file,
        "--output",
        tmp_path / "shards",
        "--model",
        tiny_checkpoint,
        "--ray",
        machines.address,
    ]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = [line for line in result.stderr.splitlines() if "error" in line]
    assert line.startswith(f"error: {file}, line 41 (byte 560): 'text' is empty")


def test_an_address_where_nothing_answers_is_an_error_within_seconds(corpus, tiny_checkpoint, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        words = [
            "encode",
            "--ray",
            address,
            corpus,
            "--output",
            tmp_path / "shards",
            "--model",
            tiny_checkpoint,
        ]
        result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: no Ray cluster can be reached at {address}")
    for wrong in ("nonsense", "host:port"):
        with pytest.raises(ConnectionError, match=r"is no address of a Ray cluster"):
            Cluster(wrong)


def test_the_ray_option_takes_no_input_for_an_address(tmp_path):
    for words in (["--ray", "missing.jsonl"], ["missing.jsonl", "--ray"], ["--ray=auto", "missing.jsonl"]):
        result = CliRunner().invoke(app, ["encode", *words, "--output", str(tmp_path / "shards")])
        assert result.stderr.startswith(f"error: there is nothing at {Path('missing.jsonl').absolute()}")


@pytest.fixture(scope="module")
def job(run, corpus, tmp_path_factory):
    """A folder whose only part is not encoded yet."""
    folder = tmp_path_factory.mktemp("job") / "shards"
    run(corpus, folder)
    (folder / "part-000000.json").unlink()
    return Job.of(read_manifest(Place(folder)), Place(corpus.parent), Place(folder))


def outcome(job, model):
    part = read_manifest(job.output).parts[0]
    found = PartEncoder(job, Loading(str(model), None, None, "cpu", "float32"), 1)(
        {"part": [json.dumps(part)]}
    )
    return found["record"][0], found["error"][0]


def test_a_machine_that_does_not_see_the_output_says_so(job, tiny_checkpoint, tmp_path):
    for other in (replace(job, output=Place(tmp_path)), replace(job, name="another")):
        part = read_manifest(job.output).parts[0]
        worker = PartEncoder(other, Loading(str(tiny_checkpoint), None, None, "cpu", "float32"), 1)
        (error,) = worker({"part": [json.dumps(part)]})["error"]
        assert f"does not see {other.output}: the output must be on storage that all machines share" in error
        assert socket.gethostname() in error


def test_a_machine_with_another_model_says_so(job, make_checkpoint, tmp_path):
    record, error = outcome(job, make_checkpoint(tmp_path / "other", num_compressed_tokens=4))
    assert not record
    assert f"on this machine, and {job.encoder} where the command was started" in error
    assert "is not a model that can be loaded" in outcome(job, tmp_path / "missing")[1]


def test_a_part_that_another_attempt_finished_is_not_encoded_again(job, tiny_checkpoint, tmp_path):
    record, error = outcome(job, tiny_checkpoint)
    file = Path(job.output.path, "part-000000.json")
    written = file.stat().st_mtime_ns
    assert (json.loads(record), error) == (json.loads(file.read_text()), "")
    assert outcome(job, tiny_checkpoint) == (record, "")
    assert file.stat().st_mtime_ns == written
