"""What encoding in shards costs beside plain encoding, and loading beside adding: `python -m benchmarks.scale`.

Also the memory of the process that encodes, at two sizes of the corpus, and what a second machine brings: clusters of
one and of two machines on this one, each machine kept on a processor of its own. What is compared takes turns.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

try:
    from autoregembed_indexes import DocumentIndex
    from autoregembed_rag import AutoRegEncoder
    from autoregembed_rag.cli_index import human_bytes
    from autoregembed_rag.sharding import encode_shards, from_shards, read_shards
    from benchmarks.measures import RATE, Measures, markdown, paired, spread
    from benchmarks.pydoc import load_pydoc
    from benchmarks.report import environment, print_table, write_json
except ImportError as error:
    raise ImportError(f'{error}; the benchmarks need: pip install -e ".[faiss,bench,scale]"') from error

SHARDS, PLAIN = "in shards", "encode_documents"
LOAD, ADD = "from_shards", "DocumentIndex.add"
TWO, ONE = "two machines", "one machine"
ALONE, DRIVER = "encoding itself", "a cluster's driver"
CPU = "processor seconds"
SIZES = (16_000, 64_000, 256_000)  # short documents, for memory
HEADER = ["what", "measured", "ratio, by rounds"]
READING = """Ratios are medians of the rounds, with the least and the most in brackets; above 1 the first is faster.
Encoding: the same texts and weights; shards are read, checked, encoded, written and checked again. Processor seconds
are those of all threads, which others' work on the machine changes less. Loading: the same documents, from shards with
all checks, and from memory in batches of 2048, into new indexes on disk. Machines: Ray's, on this computer, each pinned
to one processor; "all" is the whole command, with the start of Ray's processes and of the encoders, "once all are at
work" counts from when each machine has finished a part. Memory: the largest process of `autoregembed encode`, model and
libraries included; the ratio is of the largest corpus to the smallest."""

app = typer.Typer(add_completion=False)


def write_corpus(file: Path, count: int | None = None, words: int | None = None) -> list[str]:
    """Docstrings as JSONL, distinct, the first so many words of each; their texts."""
    found = [document.content for document in load_pydoc().documents]
    texts = [" ".join(text.split()[:words]) if words else text for text in found]
    wanted = (f"{texts[i % len(texts)]} {i}" for i in range(count or len(texts)))
    chosen = list(dict.fromkeys(wanted))
    lines = (json.dumps({"_id": str(i), "text": text}) + "\n" for i, text in enumerate(chosen))
    file.write_text("".join(lines), encoding="utf-8")
    return chosen


def measure_encoding(folder: Path, rounds: int) -> dict[str, Any]:
    """Shards and plain encoding, in turns."""
    encoder = AutoRegEncoder.from_pretrained("mini")
    texts = write_corpus(folder / "corpus.jsonl")
    encoder.encode_documents(texts[:200])
    measures = Measures()
    for number in range(rounds):
        for system in (SHARDS, PLAIN)[:: 1 if number % 2 else -1]:
            start, worked = time.perf_counter(), time.process_time()
            if system == PLAIN:
                encoder.encode_documents(texts)
            else:
                encode_shards(folder / "corpus.jsonl", folder / "shards", model=encoder, part_bytes=1 << 20)
            measures.put(RATE, RATE, system, len(texts) / (time.perf_counter() - start))
            measures.put(CPU, "s", system, time.process_time() - worked)
        shutil.rmtree(folder / "shards")
    return {"documents": len(texts), "measures": measures.record(SHARDS)}


def measure_loading(folder: Path, rounds: int) -> dict[str, Any]:
    """Loading and adding, in turns."""
    write_corpus(folder / "corpus.jsonl", 60_000, 40)
    encode_shards(folder / "corpus.jsonl", folder / "shards", part_bytes=4 << 20)
    batches = list(read_shards(folder / "shards"))
    ids = [one for batch in batches for one in batch.ids]
    texts = [one for batch in batches for one in batch.texts]
    metadatas = [one for batch in batches for one in batch.metadatas]
    vectors = np.concatenate([batch.vectors for batch in batches])
    measures = Measures()
    for number in range(rounds):
        for system in (LOAD, ADD)[:: 1 if number % 2 else -1]:
            with DocumentIndex.create(folder / "index", dimension=vectors.shape[1]) as index:
                start, worked = time.perf_counter(), time.process_time()
                if system == LOAD:
                    from_shards(index, folder / "shards")
                else:
                    for begin in range(0, len(ids), 2048):
                        part = slice(begin, begin + 2048)
                        index.add(vectors[part], texts[part], ids[part], metadatas[part])
                measures.put(RATE, RATE, system, len(ids) / (time.perf_counter() - start))
                measures.put(CPU, "s", system, time.process_time() - worked)
            shutil.rmtree(folder / "index")
    return {"documents": len(ids), "dimension": vectors.shape[1], "measures": measures.record(LOAD)}


def measure_memory(folder: Path) -> dict[str, Any]:
    """The most that a process of `autoregembed encode` takes, which encodes or has a cluster encode."""
    found: dict[str, dict[str, int]] = {name: {} for name in (ALONE, DRIVER)}
    for count in SIZES:
        corpus = folder / f"{count}.jsonl"
        write_corpus(corpus, count, 8)
        found[ALONE][str(count)] = _peak(str(corpus), f"--output={folder}/alone-{count}")
        with cluster(sorted(os.sched_getaffinity(0))[:2]) as address:
            found[DRIVER][str(count)] = _peak(
                str(corpus), f"--output={folder}/driver-{count}", f"--ray={address}", "--cpus=3"
            )
    return {"bytes": found}


def _peak(*arguments: str) -> int:
    # By a small process, since Linux counts what a process was forked from as its own.
    watch = (
        "import os, subprocess, sys; process = subprocess.Popen(sys.argv[1:], stdout=sys.stderr); "
        "_, status, usage = os.wait4(process.pid, 0); print(usage.ru_maxrss); sys.exit(status != 0)"
    )
    command = [Path(sys.executable).with_name("autoregembed"), "encode", "--part-mb=1", *arguments]
    done = subprocess.run([sys.executable, "-c", watch, *command], check=True, stdout=subprocess.PIPE)  # noqa: S603
    return int(done.stdout) << 10


@contextmanager
def cluster(processors: list[int]) -> Iterator[str]:
    """A Ray cluster of a machine for each processor, pinned to it; its address."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    room = {"object_store_memory": 80 << 20}
    machines = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **room}
    )
    try:
        for processor in processors:
            node = machines.add_node(num_cpus=3, **room)
            raylet = node.all_processes["raylet"][0].process.pid
            for thread in Path(f"/proc/{raylet}/task").iterdir():  # what it starts is pinned, too
                os.sched_setaffinity(int(thread.name), {processor})
        yield machines.address
    finally:
        machines.shutdown()


def measure_machines(folder: Path, rounds: int) -> dict[str, Any] | None:
    """Two machines beside one; None where there are not two processors."""
    processors = sorted(os.sched_getaffinity(0))[:2]
    if len(processors) < 2:
        return None
    texts = write_corpus(folder / "corpus.jsonl", 40_000)
    measures, out = Measures(), folder / "shards"
    for number in range(rounds):
        for system in (TWO, ONE)[:: 1 if number % 2 else -1]:
            used = processors if system == TWO else processors[:1]
            with cluster(used) as address:
                start = time.perf_counter()
                encode_shards(folder / "corpus.jsonl", out, ray=address, cpus=3, part_bytes=1 << 19)
                measures.put("all", RATE, system, len(texts) / (time.perf_counter() - start))
            files = sorted(out.glob("part-*.json"), key=lambda file: file.stat().st_mtime)
            rows = sum(json.loads(file.read_text())["rows"] for file in files[len(used) :])
            begin, end = (files[place].stat().st_mtime for place in (len(used) - 1, -1))
            measures.put("once all are at work", RATE, system, rows / (end - begin))
            shutil.rmtree(out)
    return {"documents": len(texts), "parts": len(files), "measures": measures.record(TWO)}


def rows_of(record: dict[str, Any]) -> list[list[str]]:
    """The table."""
    rows = []
    for name, (first, second) in {
        "encoding": (SHARDS, PLAIN),
        "loading": (LOAD, ADD),
        "machines": (TWO, ONE),
    }.items():
        for measure, found in ((record.get(name) or {}).get("measures") or {}).items():
            values = [found["medians"][system] for system in (first, second)]
            shown = "{:,.0f} and {:,.0f} documents/s" if found["unit"] == RATE else "{:.1f} and {:.1f} s"
            what = f"{name}, {first} and {second}: {measure}"
            rows.append([what, shown.format(*values), spread(paired(found, first, second), "x")])
    if "memory" in record:
        for name, found in record["memory"]["bytes"].items():
            sizes = [f"{int(count):,} documents {human_bytes(size)}" for count, size in found.items()]
            least, *_, most = found.values()
            rows.append([f"memory, {name}", ", ".join(sizes), f"{most / least:.2f}x"])
    return rows


@app.command(epilog="Example: python -m benchmarks.scale --only encoding --only loading")
def main(
    only: Annotated[
        list[str] | None, typer.Option(help="encoding, loading, memory, machines; repeatable. Default: all.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each.")] = 5,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of the model; 1 measures best where others work, too.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where JSON and table go.")] = Path("results/scale"),
) -> None:
    """Measure encoding in shards and loading them."""
    parts = {
        "encoding": lambda folder: measure_encoding(folder, rounds),
        "loading": lambda folder: measure_loading(folder, rounds),
        "memory": measure_memory,
        "machines": lambda folder: measure_machines(folder, rounds),
    }
    chosen = only or list(parts)
    torch.set_num_threads(threads or torch.get_num_threads())
    if unknown := [name for name in chosen if name not in parts]:
        raise typer.BadParameter(f"there is no {unknown[0]!r}: choose from {', '.join(parts)}")
    file = out / "results.json"
    record = json.loads(file.read_text(encoding="utf-8")) if only and file.is_file() else {}
    for name in chosen:
        print(f"{name} ...", flush=True)
        before = os.getloadavg()[0]
        with tempfile.TemporaryDirectory() as folder:
            if (found := parts[name](Path(folder))) is not None:
                record[name] = {**found, "load before": before, "command": environment()["command"]}
    record |= {"threads": torch.get_num_threads(), **environment()}
    rows = rows_of(record)
    print_table(HEADER, rows)
    write_json(file, record)
    versions = ", ".join(f"{name} {found}" for name, found in record["versions"].items())
    commands = dict.fromkeys(record[name]["command"] for name in parts if name in record)
    head = f"mini on {record['cpu']}, {record['threads']} threads. {READING}\n\n"
    foot = f"\n{', '.join(f'`{command}`' for command in commands)}; Python {record['python']}, {versions}\n"
    (out / "table.md").write_text(head + markdown(HEADER, rows) + foot, encoding="utf-8")
    print(f"written: {file}, {out / 'table.md'}")


if __name__ == "__main__":
    app()
