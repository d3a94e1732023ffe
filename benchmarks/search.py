"""How fast `DocumentIndex` is beside FAISS itself and community FAISS: `python -m benchmarks.search`.

All see the same vectors, texts and metadata in one process, taking turns; a figure is the median of the rounds.
FAISS itself holds vectors only, and finds positions: what the others add to it is the price of the rest. Files are
in the page cache. Memory is what opening and 64 searches add to a fresh process, files mapped into it included.
Ratios say how many times better `DocumentIndex` does: above 1 it is faster, or smaller.
"""

import gc
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

try:
    from autoregembed_indexes import DocumentIndex
    from benchmarks.measures import RATE, Measures, markdown, ratio_chart, table
    from benchmarks.report import environment, print_table, write_json
    from benchmarks.stores import BareFaiss, CommunityStore, OurStore, Store, memory, remove
    from benchmarks.synthetic import Collection, Float32, Where, conditions, isotropic, recall, structured
except ImportError as error:
    raise ImportError(f'{error}; the benchmarks need: pip install -e ".[faiss,bench]"') from error

K = 10
BATCH = 64
SINGLES = 8  # queries of a round that are searched one at a time
FILTERED = 32  # queries for which the results of a filter are counted
COMMUNITY_FETCH_K = 20  # its default
CHANGED_SHARE = 0.01

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Setting:
    """What is built: how many documents, how wide, and `DocumentIndex`'s factory."""

    documents: int
    dimension: int
    factory: str

    def __str__(self) -> str:
        return f"{self.documents:,} x {self.dimension:,}, {self.factory}"

    @property
    def exact(self) -> bool:
        """Whether all vectors are compared, as community FAISS does."""
        return self.factory in ("auto", "Flat")


DEFAULT = (
    Setting(100_000, 1280, "auto"),
    Setting(100_000, 1280, "Flat"),
    Setting(5_000, 20_480, "auto"),
    Setting(5_000, 20_480, "IVF,RaBitQ"),
    Setting(5_000, 20_480, "IVF,RaBitQ2"),
)
SMALL = (Setting(2_000, 128, "Flat"), Setting(2_000, 128, "IVF,RaBitQ"))
CHARTED = (
    "add",
    "add, save and close",
    "open and first search",
    "search, one query",
    f"search, batch of {BATCH}: per query",
    *(f"filter {share}, key indexed" for share in ("0.1 %", "1 %", "10 %", "50 %")),
    "upsert 1 %, on disk",
    "delete 1 %, on disk",
    "memory",
    "disk",
)
READING = f"""`vs`: how many times faster, or smaller, {OurStore.name} is. {BareFaiss.name} itself holds no
ids, texts or metadata, and is given each filter as a ready bitmap. {CommunityStore.name} filters the `fetch_k` nearest,
here 2 k / selectivity. `on disk` includes writing what is not on disk yet, which only {OurStore.name} flushes to
the device. Memory is what opening and 64 searches add to a fresh process, files mapped into it included."""


def measure(setting: Setting, folder: Path, rounds: int, seed: int) -> dict[str, Any]:
    """Measure one setting in an empty folder."""
    data = structured(setting.documents, setting.dimension, seed)
    stores = make_stores(setting, folder)
    measures = Measures()
    measure_building(stores, data, rounds, measures)
    measure_sizes(stores, data, measures)
    measure_opening(stores, data, rounds, measures)
    for store in stores:
        store.open()
    measure_searches(stores, data, rounds, measures)
    measure_filters(stores, data, rounds, measures)
    measure_changes(stores, data, rounds, seed, measures)
    for store in stores:
        store.close()
        remove(store)
    ours = stores[0]
    if not setting.exact:
        measure_recall(make_stores(setting, folder), isotropic(data, seed + 1), measures)
    return {**asdict(setting), "kind": ours.kind, "measures": measures.record(ours.name)}


def make_stores(setting: Setting, folder: Path) -> list[Any]:
    """`DocumentIndex` first, FAISS second; community FAISS where it is installed and the setting is exact."""
    found: list[Store] = [OurStore(folder / "ours", setting.factory), BareFaiss(folder / "faiss")]
    if setting.exact and CommunityStore.installed():
        found.append(CommunityStore(folder / "community", setting.dimension))
    return found


def measure_building(stores: list[Any], data: Collection, rounds: int, measures: Measures) -> None:
    """Add all documents to empty stores, write what is not on disk yet, and close."""
    prepared: dict[str, Any] = {store.name: data.vectors for store in stores}
    for store in stores:
        if isinstance(store, CommunityStore):
            lists = measures.time("array to lists", store.name, partial(store.prepare, data.vectors))
            prepared[store.name] = lists
    gc.freeze()  # or every collection would walk through the lists, in anyone's time
    for _ in range(rounds):
        for store in stores:
            remove(store)
            start = time.perf_counter()
            store.add(prepared[store.name], data)
            seconds = time.perf_counter() - start
            stores[1].kind = stores[0].kind  # now known: FAISS itself is built alike
            measures.put("add", RATE, store.name, len(data.texts) / seconds)
            measures.time("save and close", store.name, partial(_save_and_close, store))
            seconds += measures.last("save and close", store.name)
            measures.put("add, save and close", RATE, store.name, len(data.texts) / seconds)
    gc.unfreeze()


def measure_sizes(stores: list[Any], data: Collection, measures: Measures) -> None:
    """Memory and disk of closed stores."""
    flat = data.vectors.nbytes
    for store in stores:
        resident = memory(store, data.queries)
        if resident is not None:
            measures.put("memory", "B", store.name, sum(resident.values()))
            measures.put("memory of its own, without mapped files", "B", store.name, resident["RssAnon"])
        files = sum(file.stat().st_size for file in store.folder.iterdir())
        measures.put("disk", "B", store.name, files)
        measures.put("FAISS file", "B", store.name, store.vector_bytes())
        measures.put("FAISS file / float32 vectors", "", store.name, store.vector_bytes() / flat)


def measure_opening(stores: list[Any], data: Collection, rounds: int, measures: Measures) -> None:
    """Open, and search once."""
    for _ in range(rounds):
        for store in stores:
            query = store.prepare(data.queries[:1])
            measures.time("open", store.name, store.open)
            measures.time("first search", store.name, partial(store.search, query, K))
            total = measures.last("open", store.name) + measures.last("first search", store.name)
            measures.put("open and first search", "s", store.name, total)
            store.close()


def measure_searches(stores: list[Any], data: Collection, rounds: int, measures: Measures) -> None:
    """Search one at a time and in a batch, and by words; and how much of the exact best is found."""
    ours = stores[0]
    prepared = {store.name: store.prepare(data.queries) for store in stores}
    batches = {name: queries[:BATCH] for name, queries in prepared.items()}
    scores = data.queries @ data.vectors.T
    for store in stores:
        found = store.positions(store.search(prepared[store.name], K))
        measures.put(f"recall@{K}", "", store.name, recall(found, scores, K))
    del scores
    for _ in range(rounds):
        for store in stores:
            work = partial(_one_by_one, store, prepared[store.name][:SINGLES])
            measures.time("search, one query", store.name, work, SINGLES)
        for store in stores:
            work = partial(store.search, batches[store.name], K)
            measures.time(f"search, batch of {BATCH}: per query", store.name, work, BATCH)
        texts = data.query_texts[:SINGLES]
        measures.time("search_text, one query", ours.name, partial(_by_words, ours, texts), SINGLES)
        hybrid = partial(_hybrid, ours, data.queries[:SINGLES], texts)
        measures.time("search_hybrid, one query", ours.name, hybrid, SINGLES)


def measure_filters(stores: list[Any], data: Collection, rounds: int, measures: Measures) -> None:
    """Search with a filter, without an index on its key and with one, which only `DocumentIndex` has."""
    wheres = conditions(data, K)
    prepared = {store.name: store.prepare(data.queries[:SINGLES]) for store in stores}
    for share, where in wheres.items():
        _measure_found(stores, data, share, where, measures)
    for state in ("key not indexed", "key indexed"):
        if state == "key indexed":
            for where in wheres.values():
                stores[0].index.create_metadata_index(where.key)
        for _ in range(rounds):
            for share, where in wheres.items():
                for store in stores:
                    work = partial(_one_by_one, store, prepared[store.name], where)
                    measures.time(f"filter {share}, {state}", store.name, work, SINGLES)


def _measure_found(stores: list[Any], data: Collection, share: str, where: Where, measures: Measures) -> None:
    """How many documents a filtered search finds, and how many of those that it should."""
    queries = data.queries[:FILTERED]
    scores = np.where(where.matches, queries @ data.vectors.T, -np.inf)
    k = min(K, int(where.matches.sum()))
    name = f"filter {share}: found of {k}"
    for store in stores:
        found = _positions(store, queries, where)
        measures.put(name, "", store.name, _mean_length(found))
        if stores[0].kind.startswith("IVF"):
            measures.put(f"filter {share}: recall@{K}", "", store.name, recall(found, scores, k))
        if isinstance(store, CommunityStore):
            found = _positions(store, queries, replace(where, fetch_k=COMMUNITY_FETCH_K))
            measures.put(f"{name}, fetch_k {COMMUNITY_FETCH_K}", "", store.name, _mean_length(found))


def measure_changes(stores: list[Any], data: Collection, rounds: int, seed: int, measures: Measures) -> None:
    """Replace and delete 1 % of the documents, others in each round, and write what is not on disk yet."""
    order = np.random.default_rng(seed).permutation(len(data.texts))
    size = max(1, int(len(order) * CHANGED_SHARE))
    for number in range(rounds):
        part = order[size * number : size * (number + 1)]
        for store in stores:
            vectors = store.prepare(data.vectors[part[::-1]])
            measures.time("upsert 1 %", store.name, partial(store.upsert, part, vectors, data))
            _time_saving("upsert 1 %", store, measures)
        for store in stores:
            measures.time("delete 1 %", store.name, partial(store.delete, part))
            _time_saving("delete 1 %", store, measures)


def measure_recall(stores: list[Any], data: Collection, measures: Measures) -> None:
    """How much of the exact best is found where vectors have no structure."""
    scores = data.queries @ data.vectors.T
    for store in stores:
        store.add(store.prepare(data.vectors), data)
        stores[1].kind = stores[0].kind
        found = store.positions(store.search(store.prepare(data.queries), K))
        measures.put(f"recall@{K}, vectors without structure", "", store.name, recall(found, scores, K))
        store.close()
        remove(store)


def _save_and_close(store: Store) -> None:
    store.save()
    store.close()


def _time_saving(measure: str, store: Store, measures: Measures) -> None:
    start = time.perf_counter()
    store.save()
    total = measures.last(measure, store.name) + time.perf_counter() - start
    measures.put(f"{measure}, on disk", "s", store.name, total)


def _one_by_one(store: Store, queries: Any, where: Where | None = None) -> list[Any]:  # noqa: ANN401
    return [store.search(queries[number : number + 1], K, where) for number in range(len(queries))]


def _positions(store: Store, queries: Float32, where: Where) -> list[list[int]]:
    found = _one_by_one(store, store.prepare(queries), where)
    return [store.positions(results)[0] for results in found]


def _by_words(store: OurStore, texts: Sequence[str]) -> None:
    for text in texts:
        store.index.search_text(text, K)


def _hybrid(store: OurStore, queries: Any, texts: Sequence[str]) -> None:  # noqa: ANN401
    for number, text in enumerate(texts):
        store.index.search_hybrid(queries[number : number + 1], [text], K)


def _mean_length(found: Sequence[Sequence[int]]) -> float:
    return statistics.fmean(len(line) for line in found)


@app.command(epilog="Example: python -m benchmarks.search --n 20000 --dimension 768 --factory IVF,SQ8")
def main(
    n: Annotated[
        int | None, typer.Option(min=100, help="Documents; with it, one setting of your own.")
    ] = None,
    dimension: Annotated[int | None, typer.Option(min=8, help="Entries of a vector, likewise.")] = None,
    factory: Annotated[
        str | None, typer.Option(help="DocumentIndex's factory, likewise: Flat, IVF,SQ8, ...")
    ] = None,
    small: Annotated[bool, typer.Option("--small", help="A quick run: 2,000 documents, 128 wide.")] = False,
    rounds: Annotated[int, typer.Option(min=1, max=50, help="How often each time is taken.")] = 5,
    out: Annotated[Path, typer.Option(help="Where JSON, table and PNG go.")] = Path("results/search"),
    seed: Annotated[int, typer.Option(help="Draws vectors, texts and metadata.")] = 0,
) -> None:
    """Measure adding, opening, searching, filtering, deleting, memory and disk, side by side."""
    settings: tuple[Setting, ...] = SMALL if small else DEFAULT
    if n or dimension or factory:
        own = settings[0]
        settings = (Setting(n or own.documents, dimension or own.dimension, factory or own.factory),)
    try:
        for setting in settings:
            DocumentIndex.create(factory=setting.factory).close()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    if not CommunityStore.installed():
        print(f"{CommunityStore.name} is left out; it needs: pip install langchain-community")
    start = time.perf_counter()
    results = []
    for setting in settings:
        print(f"{setting}: measuring ...", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            results.append(measure(setting, Path(folder), rounds, seed))
        print_table(*_table(results[-1]))
    record = {
        "rounds": rounds,
        "seed": seed,
        "seconds": time.perf_counter() - start,
        "commit": _commit(),
        **environment(),
        "settings": results,
    }
    record["versions"] = {**environment()["versions"], **_community_version()}
    write_report(out, record)
    print(f"written: {', '.join(str(out / name) for name in ('results.json', 'table.md', 'results.png'))}")


def write_report(out: Path, record: dict[str, Any]) -> None:
    """Write results.json, table.md and results.png."""
    write_json(out / "results.json", record)
    versions = ", ".join(f"{name} {found}" for name, found in record["versions"].items())
    head = (
        f"Medians of {record['rounds']} rounds on {record['cpu']}, {record['cpu_count']} cores. {READING}\n\n"
        f"`{record['command']}`; Python {record['python']}, {versions}; commit {record['commit']}\n"
    )
    tables = [markdown(*_table(result)) for result in record["settings"]]
    (out / "table.md").write_text("\n".join([head, *tables]), encoding="utf-8")
    panels = {
        _title(result): {name: result["measures"][name] for name in CHARTED if name in result["measures"]}
        for result in record["settings"]
    }
    compared = {name for result in record["settings"] for name in result["measures"]["add"]["ratios"]}
    title = f"{OurStore.name}: how many times faster, or smaller (log scale)"
    ratio_chart(out / "results.png", title, panels, sorted(compared))


def _table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    return table(_title(result), result["measures"], list(result["measures"]["add"]["medians"]))


def _title(result: dict[str, Any]) -> str:
    kind = "" if result["kind"] == result["factory"] else f" ({result['kind']})"
    return f"{result['documents']:,} x {result['dimension']:,}, {result['factory']}{kind}"


def _community_version() -> dict[str, str]:
    return {"langchain-community": version("langchain-community")} if CommunityStore.installed() else {}


def _commit() -> str | None:
    """The checkout's commit, marked where files differ from it; None without git."""
    git = shutil.which("git")
    if git is None:
        return None
    folder = Path(__file__).parent
    command = [git, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)  # noqa: S603
    return found.stdout.strip() or None


if __name__ == "__main__":
    app()
