"""Searching on a GPU: the same results as on the CPU, and the CPU where a GPU cannot.

Most tests run on a stand-in for FAISS' functions for GPUs, which has their limits; the last runs on a GPU.
"""

import logging
import pickle
import threading
import weakref
from contextlib import contextmanager

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoregembed_indexes import DocumentIndex, copies, gpu
from autoregembed_indexes.kinds import Kind

LOGGER = "autoregembed_indexes.gpu"


class Options:
    """FAISS' own options, where it was built without GPUs."""

    useFloat16 = shard = use_cuvs = False  # noqa: N815


class FakeGpus:
    """What FAISS does with GPUs, on the CPU: vectors and queries in float16, at most 2048 found, no removal."""

    def __init__(self, count=1, selectors="ignored"):
        self.count = count
        self.selectors = selectors  # or "refused", or "obeyed"
        self.memory = 2**40  # numbers
        self.failing = False
        self.uploads = []  # the GPUs of each
        self.probes = 0
        self.asked = []  # how many vectors each search asked for
        self.queries = []  # for how many queries
        self.selected = 0  # searches with a selector
        self.copies = weakref.WeakSet()

    def clone(self, resources, index, options, numbers):
        assert len(resources) == len(numbers)
        assert options.useFloat16
        assert options.shard
        lists = isinstance(index, faiss.IndexIVF)
        if isinstance(index, faiss.IndexIVFRaBitQ) or (
            type(index) is faiss.IndexScalarQuantizer and numbers[1:]
        ):
            if numbers[1:]:
                raise AssertionError("FAISS would make a second copy in main memory, and not say so")
            raise RuntimeError("This index type is not implemented on GPU.")
        if index.ntotal * index.d > self.memory:
            raise RuntimeError("alloc fail: out of memory")
        if lists:
            copy = faiss.clone_index(index)
        else:
            copy = faiss.IndexScalarQuantizer(
                index.d, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
            )
            copy.is_trained = True
            copy.add(index.reconstruct_n(0, index.ntotal))
        if index.ntotal == 8:
            self.probes += 1
        else:
            self.uploads.append(numbers)
        made = FakeIndex(self, copy)
        self.copies.add(made)
        return made


class FakeIndex:
    def __init__(self, gpus, index):
        self._gpus = gpus
        self._index = index

    def search(self, queries, k, *, params):
        gpus, lists = self._gpus, isinstance(self._index, faiss.IndexIVF)
        if k > 2048 or (lists and params.nprobe > 2048):
            raise RuntimeError("GPU index only supports min/max-K selection up to 2048")
        if gpus.failing or (params.sel and gpus.selectors == "refused"):
            raise RuntimeError("a CUDA error")
        if self._index.ntotal != 8:
            gpus.asked.append(k)
            gpus.queries.append(len(queries))
            gpus.selected += params.sel is not None
        selector = params.sel if gpus.selectors == "obeyed" else None
        if lists:
            params = faiss.SearchParametersIVF(sel=selector, nprobe=params.nprobe)
        else:
            params = faiss.SearchParameters(sel=selector)
        return self._index.search(queries.astype(np.float16).astype(np.float32), k, params=params)


@contextmanager
def fake_gpus(**options):
    made = FakeGpus(**options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faiss, "StandardGpuResources", object, raising=False)
        if not hasattr(faiss, "GpuMultipleClonerOptions"):
            patch.setattr(faiss, "GpuMultipleClonerOptions", Options, raising=False)
        patch.setattr(faiss, "get_num_gpus", lambda: made.count)
        patch.setattr(faiss, "index_cpu_to_gpu_multiple_py", made.clone, raising=False)
        patch.setattr(gpu, "WORTHWHILE", 1)
        gpu._obeys_selectors.cache_clear()
        yield made
    gpu._obeys_selectors.cache_clear()


@pytest.fixture
def gpus():
    with fake_gpus() as made:
        yield made


def crowd(count, dimension=16, spread=2e-3, seed=0):
    """Vectors so close together that float16 mistakes their order."""
    noise = np.random.default_rng(seed).normal(size=(count, dimension))
    return (np.linspace(1, 2, dimension) + spread * noise).astype(np.float32)


def names(numbers):
    return [str(number) for number in numbers]


def pair(vectors, factory="Flat", device="cuda", **options):
    """Two indexes of the same documents: on the GPU, and on the CPU."""
    made = []
    for where in (device, "cpu"):
        index = DocumentIndex.create(factory=factory, device=where, **options)
        index.add(
            vectors,
            names(range(len(vectors))),
            names(range(len(vectors))),
            [{"i": i} for i in range(len(vectors))],
        )
        made.append(index)
    return made


def shared(found, expected):
    """The share of what is expected that was found."""
    return len({hit.id for hit in found} & {hit.id for hit in expected}) / len(expected)


QUERIES = crowd(20, seed=1)


@pytest.mark.parametrize("factory", ["Flat", "SQfp16"])
@pytest.mark.parametrize("k", [1, 10, 400])
def test_results_are_those_of_the_cpu_though_the_gpu_rounds(gpus, factory, k):
    on_gpu, on_cpu = pair(crowd(400), factory)
    assert on_gpu.search(QUERIES, k) == on_cpu.search(QUERIES, k)
    assert gpus.asked
    assert (on_gpu.info()["device"], on_cpu.info()["device"]) == ("cuda", "cpu")


def test_only_queries_whose_nearest_the_gpu_cannot_tell_apart_are_asked_again_and_then_on_the_cpu(
    gpus, monkeypatch
):
    monkeypatch.setattr(Kind, "crowd", 40)
    apart = np.random.default_rng(0).normal(size=(100, 16))
    apart *= -np.sign(apart @ QUERIES[0])[:, None]  # away from the crowd
    on_gpu, on_cpu = pair(np.concatenate([apart, crowd(400)]))
    queries = np.concatenate([apart[:9], QUERIES[:1]])
    assert on_gpu.search(queries, 4) == on_cpu.search(queries, 4)
    assert (gpus.queries, gpus.asked) == ([10, 1], [12, 48])


@pytest.mark.parametrize("factory", ["IVF16,Flat", "IVF16,SQ8"])
def test_lists_are_searched_on_the_gpu(gpus, factory):
    vectors = np.random.default_rng(0).normal(size=(1000, 16)).astype(np.float32)
    on_gpu, on_cpu = pair(vectors, factory)
    assert on_gpu.info()["kind"] == factory
    found = zip(on_gpu.search(vectors[:50]), on_cpu.search(vectors[:50]), strict=True)
    assert np.mean([shared(one, other) for one, other in found]) > 0.95
    assert gpus.asked
    wanted = {"i": {"$lt": 30}}
    assert on_gpu.search(vectors[:50], 30, wanted) == on_cpu.search(vectors[:50], 30, wanted)


def test_what_was_deleted_or_replaced_since_the_upload_is_passed_over(gpus):
    both = pair(crowd(500))
    for index in both:
        index.search(QUERIES)
        index.delete(names(range(30)))
        index.add(crowd(20, seed=2), ["new"] * 20, names(range(490, 510)))
    gpus.asked.clear()
    assert both[0].search(QUERIES, 7) == both[1].search(QUERIES, 7)
    assert min(gpus.asked) >= 7 + 40  # 30 deleted, 10 replaced
    assert gpus.uploads == [[0]]


def test_a_snapshot_brings_a_new_upload_that_forgets_what_was_deleted(gpus, tmp_path):
    with DocumentIndex.create(tmp_path / "index", device="cuda") as index:
        index.add(crowd(300), [""] * 300, names(range(300)))
        index.search(QUERIES)
        index.delete(names(range(100)))
        index.snapshot()
        gpus.asked.clear()
        found = index.search(QUERIES, 200)
        assert gpus.asked == [200]
        assert gpus.uploads == [[0], [0]]
    with DocumentIndex.open(tmp_path / "index", device="cuda:0") as index:
        assert index.search(QUERIES, 200) == found
        assert gpus.uploads == [[0], [0], [0]]
    with DocumentIndex.open(tmp_path / "index", device="cpu") as index:
        assert index.search(QUERIES, 200) == found


def test_a_writer_folds_before_the_gpu_drowns_in_what_was_deleted(gpus):
    on_gpu, on_cpu = pair(crowd(2500))
    for index in (on_gpu, on_cpu):
        index.search(QUERIES)
        index.delete(names(range(gpu.MOST_BURIED)))
        index.search(QUERIES)
    assert gpus.uploads == [[0]]
    for index in (on_gpu, on_cpu):
        index.delete(names([gpu.MOST_BURIED]))
    gpus.asked.clear()
    assert on_gpu.search(QUERIES, 5) == on_cpu.search(QUERIES, 5)
    assert gpus.uploads == [[0], [0]]
    assert min(gpus.asked) < gpu.MOST_BURIED


def test_a_reader_asks_the_cpu_once_too_much_was_deleted(gpus, tmp_path):
    with DocumentIndex.create(tmp_path / "index", device="cpu") as index:
        index.add(crowd(2500), [""] * 2500, names(range(2500)))
        index.snapshot()
        with DocumentIndex.open(tmp_path / "index", read_only=True, device="cuda") as reader:
            reader.search(QUERIES)
            index.delete(names(range(2045)))
            gpus.asked.clear()
            assert reader.search(QUERIES, 5) == index.search(QUERIES, 5)
            assert gpus.asked == []


def test_in_memory_too_what_comes_after_the_upload_is_found_and_uploaded_in_time(gpus):
    both = pair(crowd(100))
    for first in range(100, 700, 100):
        for index in both:
            index.search(QUERIES)
            index.add(crowd(100, seed=first), [""] * 100, names(range(first, first + 100)))
        assert both[0].search(QUERIES, 20) == both[1].search(QUERIES, 20)
    assert len(gpus.uploads) == 3  # of 100, 300 and 700: when more has come than the GPU holds


@pytest.mark.parametrize(("selectors", "selected"), [("ignored", 0), ("refused", 0), ("obeyed", 1)])
def test_filters_are_exact_whether_or_not_faiss_obeys_selectors_on_gpus(selectors, selected):
    with fake_gpus(selectors=selectors) as gpus:
        on_gpu, on_cpu = pair(crowd(3000))
        few, most = {"i": {"$lt": 100}}, {"i": {"$gte": 100}}
        assert on_gpu.search(QUERIES, 10, few) == on_cpu.search(QUERIES, 10, few)
        assert (gpus.selected > 0, len(gpus.asked) > 0) == (selected, selected)
        assert on_gpu.search(QUERIES, 10, most) == on_cpu.search(QUERIES, 10, most)
        assert gpus.asked
        pair(crowd(100))[0].search(QUERIES)
        assert (gpus.probes, len(gpus.uploads)) == (1, 2)


def test_selectors_are_not_trusted_on_a_kind_that_was_not_probed():
    with fake_gpus(selectors="obeyed") as gpus:
        on_gpu, on_cpu = pair(crowd(3000), "SQfp16")
        assert on_gpu.search(QUERIES, 10, {"i": {"$lt": 100}}) == on_cpu.search(
            QUERIES, 10, {"i": {"$lt": 100}}
        )
        assert gpus.selected == 0


def test_k_is_limited_where_a_gpu_searches(gpus):
    on_gpu, on_cpu = pair(crowd(2100))
    assert on_gpu.search(QUERIES, 2048) == on_cpu.search(
        QUERIES, 2048
    )  # with the candidates above it, on the CPU
    with pytest.raises(ValueError, match=r"at most 2048 .* not 2049: ask for fewer, or open .* device='cpu'"):
        on_gpu.search(QUERIES, 2049)
    assert len(on_gpu.search(QUERIES, 5000, {"i": {"$lt": 50}})[0]) == 50
    on_gpu.delete(names(range(52)))
    assert len(on_gpu.search(QUERIES, 5000)[0]) == 2048


@pytest.mark.parametrize("factory", ["Flat", "SQfp16"])
def test_a_gpu_finds_the_candidates_of_fewer_tokens(gpus, factory):
    on_gpu, on_cpu = pair(crowd(2100), factory, tokens=2)
    assert on_gpu.search(QUERIES, 10, num_tokens=1) == on_cpu.search(QUERIES, 10, num_tokens=1)
    assert gpus.asked
    with pytest.raises(ValueError, match=r"at most 2048 .* not 2060: .* fetch_k"):
        on_gpu.search(QUERIES, 206, num_tokens=1)


@pytest.mark.parametrize(
    ("device", "factory", "expected"),
    [("cuda", "Flat", [0, 1]), ("auto", "Flat", [0, 1]), ("cuda:1", "Flat", [1]), ("cuda", "SQfp16", [0])],
)
def test_device_says_which_gpus(device, factory, expected):
    with fake_gpus(count=2) as gpus:
        index, _ = pair(crowd(50), factory, device)
        index.search(QUERIES)
        assert gpus.uploads == [expected]


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:2", "CPU", None])
def test_a_device_that_is_not_there_is_refused_before_anything_is_made(tmp_path, device):
    with fake_gpus(count=2):
        with pytest.raises(ValueError, match="device"):
            DocumentIndex.create(tmp_path / "index", device=device)
        assert not (tmp_path / "index").exists()
        DocumentIndex.create(tmp_path / "index").close()
        with pytest.raises(ValueError, match="device"):
            DocumentIndex.open(tmp_path / "index", device=device)
        DocumentIndex.open(tmp_path / "index").close()


@pytest.mark.parametrize(("device", "lines"), [("auto", 0), ("cpu", 0), ("cuda", 1), ("cuda:3", 1)])
@pytest.mark.parametrize("built", [True, False])
def test_without_a_gpu_the_cpu_searches_and_a_line_says_so_where_one_was_asked_for(
    gpus, monkeypatch, caplog, device, lines, built
):
    gpus.count = 0
    if not built:
        monkeypatch.delattr(faiss, "StandardGpuResources")
    index, on_cpu = pair(crowd(50), device=device)
    assert index.search(QUERIES) == on_cpu.search(QUERIES)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * lines
    assert all(repr(device) in record.message for record in caplog.records)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("device", "level"), [("cuda", "WARNING"), ("auto", "INFO")])
def test_a_kind_that_faiss_cannot_put_on_a_gpu_stays_on_the_cpu(caplog, count, device, level):
    caplog.set_level(logging.INFO, LOGGER)
    with fake_gpus(count=count) as gpus:
        index, on_cpu = pair(crowd(700), "IVF16,RaBitQ", device)
        assert index.search(QUERIES) == on_cpu.search(QUERIES) == index.search(QUERIES)
        assert gpus.asked == []
    assert [(record.levelname, record.name) for record in caplog.records] == [(level, LOGGER)]
    assert "700 vectors (IVF16,RaBitQ) stay on the CPU" in caplog.text


def test_a_gpu_without_room_is_done_without(gpus, caplog):
    gpus.memory = 1000
    on_gpu, on_cpu = pair(crowd(100))
    for _ in range(2):
        assert on_gpu.search(QUERIES) == on_cpu.search(QUERIES)
    on_gpu.add(crowd(1), ["new"])
    assert on_gpu.search(QUERIES[:1])[0]
    assert len(caplog.records) == 1
    assert "out of memory" in caplog.text


def test_a_gpu_that_fails_in_a_search_is_given_up(gpus, caplog):
    on_gpu, on_cpu = pair(crowd(100))
    on_gpu.search(QUERIES)
    gpus.failing = True
    for _ in range(2):
        assert on_gpu.search(QUERIES) == on_cpu.search(QUERIES)
    assert len(caplog.records) == 1
    assert on_gpu.info()["device"] == "cpu"
    for index in (on_gpu, on_cpu):
        index.add(crowd(10, seed=3), ["new"] * 10, names(range(95, 105)))
    assert on_gpu.search(QUERIES, 105) == on_cpu.search(QUERIES, 105)
    assert not gpus.copies


def test_a_small_index_is_not_worth_an_upload(gpus, monkeypatch):
    monkeypatch.setattr(gpu, "WORTHWHILE", 16 * 100)
    index = pair(crowd(99))[0]
    index.search(QUERIES)
    assert gpus.uploads == []
    index.add(crowd(1), ["one more"])
    index.search(QUERIES)
    assert gpus.uploads == [[0]]


def test_closing_gives_the_gpus_memory_back(gpus):
    index = pair(crowd(50))[0]
    index.search(QUERIES)
    assert len(gpus.copies) == 1
    index.close()
    assert not gpus.copies


def test_a_pickled_index_keeps_its_device(gpus, tmp_path):
    for device, uploads in (("cpu", []), ("cuda", [[0]])):
        with DocumentIndex.create(tmp_path / device, device=device) as index:
            index.add(crowd(50), [""] * 50)
            with pickle.loads(pickle.dumps(index)) as copy:  # noqa: S301
                copy.search(QUERIES)
            assert gpus.uploads == uploads


def test_threads_search_and_write_together(gpus):
    index, _ = pair(crowd(300))
    failures = []

    def work(number):
        try:
            for turn in range(10):
                hits = index.search(QUERIES[turn : turn + 1], 300)[0]
                assert all(hit.id == hit.text for hit in hits)
                assert len({hit.id for hit in hits}) == len(hits)
                new = names(range(1000 * number + 10 * turn, 1000 * number + 10 * turn + 10))
                index.add(crowd(10, seed=number), new, new)
                index.delete(names(range(30 * number + turn, 30 * number + turn + 3)))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


CHANGES = st.lists(
    st.tuples(st.sampled_from(["add", "delete", "snapshot"]), st.integers(0, 80), st.integers(1, 40)),
    max_size=6,
)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    changes=CHANGES,
    k=st.integers(1, 30),
    below=st.integers(0, 120),
    factory=st.sampled_from(["Flat", "SQfp16"]),
    selectors=st.sampled_from(["ignored", "refused", "obeyed"]),
)
def test_whatever_changes_the_gpu_finds_what_the_cpu_finds(changes, k, below, factory, selectors):
    with fake_gpus(selectors=selectors) as gpus:
        both = pair(crowd(60), factory)
        for seed, (change, first, count) in enumerate(changes):
            for index in both:
                index.search(QUERIES[:1])
                ids = names(range(first, first + count))
                if change == "add":
                    index.add(crowd(count, seed=seed), ids, ids, [{"i": int(doc_id)} for doc_id in ids])
                elif change == "delete":
                    index.delete(ids)
                else:
                    index.snapshot()
        for where in (None, {"i": {"$lt": below}}):
            assert both[0].search(QUERIES[:5], k, where) == both[1].search(QUERIES[:5], k, where)
        assert len(both[0]) == 0 or gpus.uploads


@pytest.mark.skipif(
    not hasattr(faiss, "StandardGpuResources") or not faiss.get_num_gpus(), reason="needs faiss-gpu and a GPU"
)
@pytest.mark.parametrize("factory", ["Flat", "SQfp16", "IVF64,Flat", "IVF64,SQ8", "IVF64,RaBitQ"])
def test_on_a_real_gpu(factory, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "WORTHWHILE", 1)
    monkeypatch.setattr(copies, "FOLD_VECTORS", 100)
    centres = np.random.default_rng(0).normal(size=(50, 1, 96))
    vectors = (centres + 0.3 * np.random.default_rng(1).normal(size=(50, 100, 96))).reshape(-1, 96)
    on_gpu, on_cpu = pair(vectors, factory)
    flat = "IVF" not in factory
    for changed in (False, True):
        if changed:
            for index in (on_gpu, on_cpu):
                index.delete(names(range(0, 1000, 3)))
                index.add(vectors[:500] + 0.1, ["new"] * 500, names(range(4800, 5300)))
        for k, where in ((1, None), (50, None), (50, {"i": {"$gte": 300}}), (50, {"i": {"$lt": 300}})):
            found, expected = on_gpu.search(vectors[:200], k, where), on_cpu.search(vectors[:200], k, where)
            if flat:
                assert found == expected
            assert np.mean([shared(*lines) for lines in zip(found, expected, strict=True)]) > 0.95
    assert on_gpu.info()["device"] == ("cpu" if "RaBitQ" in factory else "cuda")
