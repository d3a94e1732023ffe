"""The commands, end to end on tiny data with a tiny model."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("bm25s")
pytest.importorskip("faiss")
pytest.importorskip("ir_measures")
pytest.importorskip("langchain_core")
pytest.importorskip("matplotlib")

from autoregembed_indexes import DocumentIndex
from autoregembed_rag import GenerativeReranker
from benchmarks import demo, hotspots, latency, passages, reranking, retrieval, sts, systems
from benchmarks.beir import load_folder
from benchmarks.models import BaseModel, SentenceTransformerModel, load_candidates
from benchmarks.pydoc import standard_library_documents

WORDS = [
    "orange",
    "lemon",
    "river",
    "water",
    "fox",
    "dog",
    "bank",
    "quick",
    "lazy",
    "vitamin",
    "pepper",
    "answer",
]


@pytest.fixture
def beir_folder(tmp_path: Path) -> Path:
    root = tmp_path / "words"
    (root / "qrels").mkdir(parents=True)
    documents = [
        {"_id": f"d{i}", "title": word, "text": f"All about {word}."} for i, word in enumerate(WORDS)
    ]
    queries = [{"_id": f"q{i}", "text": word} for i, word in enumerate(WORDS)]
    qrels = "".join(f"q{i}\td{i}\t1\n" for i in range(len(WORDS)))
    (root / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents), encoding="utf-8")
    (root / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries), encoding="utf-8")
    (root / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + qrels, encoding="utf-8")
    return root


def run(app, *arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_retrieval_reports_model_base_and_bm25_and_writes_json_and_png(
    beir_folder, tiny_checkpoint, tmp_path
):
    out = tmp_path / "out"
    result = run(
        retrieval.app,
        "--data-dir",
        beir_folder,
        "--model",
        tiny_checkpoint,
        "--base",
        tiny_checkpoint,
        "--out",
        out,
    )
    assert result.exit_code == 0, result.output
    assert "nDCG@10" in result.output
    record = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert (record["dataset"], record["split"], record["documents"], record["queries"]) == (
        "words",
        "test",
        12,
        12,
    )
    model, base, last, bm25 = record["results"]
    assert [entry["details"]["dimension"] for entry in (model, base, last)] == [160, 32, 32]
    assert len(model["details"]["fingerprint"]) >= 8
    assert bm25["measures"] == {"nDCG@10": 1, "Recall@100": 1, "MRR@10": 1}
    # A dense index returns all 12 documents, so Recall@100 is 1 whatever the model is worth.
    assert all(entry["measures"]["Recall@100"] == 1 for entry in (model, base, last))
    assert all(
        entry[key] > 0 for entry in record["results"] for key in ("documents_per_second", "ms_per_query")
    )
    assert model["index_bytes"] > 12 * 160 * 2
    assert record["cpu"]
    assert record["versions"]["torch"]
    assert (out / "results.png").read_bytes().startswith(b"\x89PNG")


class Killed(BaseException):
    """As far as a test can be killed."""


def killed_after(chunks: int, monkeypatch) -> None:
    """`DocumentIndex.add` returns so often, and no more."""
    add, done = DocumentIndex.add, []

    def adding(self, *arguments, **keywords):
        if len(done) == chunks:
            raise Killed
        done.append(1)
        return add(self, *arguments, **keywords)

    monkeypatch.setattr(DocumentIndex, "add", adding)


def test_a_killed_run_goes_on_where_it_stopped(beir_folder, tiny_checkpoint, tmp_path, monkeypatch):
    arguments = ["--data-dir", beir_folder, "--model", tiny_checkpoint, "--out"]
    assert run(retrieval.app, *arguments, tmp_path / "whole").exit_code == 0
    monkeypatch.setattr(systems, "DOCUMENTS_PER_CHUNK", 3)
    with monkeypatch.context() as patch:
        killed_after(2, patch)
        with pytest.raises(Killed):
            run(retrieval.app, *arguments, tmp_path / "out")
    result = run(retrieval.app, *arguments, tmp_path / "out")
    assert result.exit_code == 0, result.output
    whole, resumed = (
        json.loads((tmp_path / name / "results.json").read_text(encoding="utf-8"))["results"]
        for name in ("whole", "out")
    )
    assert resumed[0]["details"]["resumed_at"] == 6
    assert [entry["measures"] for entry in resumed] == [entry["measures"] for entry in whole]
    assert not (tmp_path / "out" / "indexes").exists()


def test_an_index_of_other_documents_is_refused_and_kept(beir_folder, tiny_checkpoint, tmp_path, monkeypatch):
    arguments = ["--data-dir", beir_folder, "--model", tiny_checkpoint, "--out", tmp_path / "out"]
    monkeypatch.setattr(systems, "DOCUMENTS_PER_CHUNK", 3)
    with monkeypatch.context() as patch:
        killed_after(2, patch)
        with pytest.raises(Killed):
            run(retrieval.app, *arguments)
    corpus = beir_folder / "corpus.jsonl"
    corpus.write_text(corpus.read_text(encoding="utf-8").replace("All about", "Nothing on"), encoding="utf-8")
    result = run(retrieval.app, *arguments)
    assert result.exit_code == 2
    assert "holds an index of other documents: delete it, or give another --out" in result.stderr
    assert list((tmp_path / "out" / "indexes").iterdir())


def test_a_large_run_says_beforehand_what_it_takes(beir_folder, tiny_checkpoint, tmp_path, monkeypatch):
    arguments = ["--data-dir", beir_folder, "--model", tiny_checkpoint, "--out", tmp_path / "out"]
    monkeypatch.setattr(retrieval, "LARGE", 10)
    monkeypatch.setattr(retrieval, "BM25_DOCUMENTS", 10)
    result = run(retrieval.app, *arguments)
    assert result.exit_code == 0, result.output
    assert "12 documents to encode, about 0 s at" in result.output
    assert "BM25 is left out" in result.output
    full = shutil._ntuple_diskusage(100, 100, 0)
    monkeypatch.setattr(retrieval.shutil, "disk_usage", lambda _: full)
    result = run(retrieval.app, *arguments)
    assert result.exit_code == 2
    assert "give an --out with more" in result.stderr


def test_made_passages_are_a_set_that_can_be_searched(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    text = " ".join(f"word{i}" for i in range(400))
    (corpus / "pretrain-0.jsonl").write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
    pair = {"query": "What is a fox?", "pos": "A fox is an animal.", "source": passages.SOURCE}
    (corpus / "pairs.jsonl").write_text(json.dumps(pair) + "\n", encoding="utf-8")
    passages.main(tmp_path / "out", count=5, questions=1, corpus=corpus)
    data = load_folder(tmp_path / "out")
    assert data.queries == {"q0": "What is a fox?"}
    assert data.qrels == {"q0": {"d0": 1}}
    found = list(data.documents)
    assert [document.id for document in found] == [f"d{i}" for i in range(5)]
    assert found[0].text == "A fox is an animal."
    assert len(found[1].text.split()) == passages.WORDS


def test_latency_prints_each_kind_with_its_recall(beir_folder, tiny_checkpoint, tmp_path):
    options = ("--data-dir", beir_folder, "--model", tiny_checkpoint, "--kinds", "Flat", "--out", tmp_path)
    result = run(latency.app, *options, "--num-tokens", 1, "--num-tokens", 2)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    uses = ("", ", 1 of 5 tokens, refined", ", 2 of 5 tokens, refined")
    assert list(record["kinds"]) == [kind + use for kind in ("SQfp16", "Flat") for use in uses]
    assert {row["recall"] for row in record["kinds"].values()} == {1}, "twelve documents are all candidates"
    assert len({row["nDCG@10"] for row in record["kinds"].values()}) == 1
    by_all, by_one, by_two = (record["kinds"][f"Flat{use}"]["bytes"] for use in uses)
    assert by_all - by_two == pytest.approx(12 * 4 * 3 * 32, abs=9)  # the files' heads differ by a digit
    assert by_two - by_one == pytest.approx(12 * 4 * 32, abs=9)
    assert record["floor of exact search, ms"] == 1000 * 2 * 12 * 160 / record["bandwidth"]
    assert "Flat, 2 of 5 tokens, refined" in result.output
    for wrong in (0, 5):
        result = run(latency.app, *options, "--num-tokens", wrong)
        assert (result.exit_code, "give fewer" in result.output) == (2, True)


def test_calls_compares_the_frameworks_with_the_encoder(tiny_checkpoint, tmp_path):
    pytest.importorskip("langchain_core")
    pytest.importorskip("llama_index.core")
    from benchmarks import calls

    result = run(
        calls.app,
        *("--model", tiny_checkpoint, "--documents", 6, "--rounds", 2, "--out", tmp_path),
    )
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert {"encode_both", "AutoRegVectorStore.from_texts"} <= record["times as fast"].keys()
    assert calls.ENCODE not in record["times as fast"]
    assert all(len(rates) == 2 for rates in record["measures"]["rounds"].values())
    assert record["cosine"][calls.ENCODE] > 0.99
    assert "LlamaIndex, get_text_embedding_batch" in (tmp_path / "table.md").read_text(encoding="utf-8")


def test_hotspots_draws_the_shares_of_a_checkpoint_and_of_a_shape(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(hotspots, "TEXTS", {"mixed": lambda: ["a fox", "a lemon " * 20]})
    result = run(hotspots.app, *("--model", tiny_checkpoint, "--shape", "tiny", "--out", tmp_path))
    assert result.exit_code == 0, result.output
    shares = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["shares"]
    assert list(shares) == [f"{tiny_checkpoint.name}, mixed", "random tiny, mixed"]
    for parts in shares.values():
        assert sum(parts.values()) == pytest.approx(1)
        assert parts["matrix products"] > 0
        assert parts[hotspots.TOKENS] > 0
    assert (tmp_path / "results.png").stat().st_size > 0


def test_retrieval_ranks_the_best_anew_by_the_decoder(beir_folder, tiny_checkpoint, tmp_path):
    arguments = ("--data-dir", beir_folder, "--model", tiny_checkpoint, "--rerank", 12, "--out", tmp_path)
    result = run(retrieval.app, *arguments)
    assert result.exit_code == 0, result.output
    plain, anew, bm25 = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["results"]
    assert anew["system"] == f"{plain['system']}, 12 reranked"
    assert anew["details"]["reranked"] == 12
    assert anew["measures"]["Recall@100"] == plain["measures"]["Recall@100"]
    assert anew["measures"]["nDCG@10"] != plain["measures"]["nDCG@10"]
    assert anew["ms_per_query"] > 0
    assert bm25["system"] == "BM25"


@pytest.mark.parametrize("kept", [0, 6, 12])
def test_a_killed_run_counts_only_the_priors_that_it_computes(
    kept, beir_folder, tiny_checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr(systems, "DOCUMENTS_PER_CHUNK", 3)
    arguments = ["--data-dir", beir_folder, "--model", tiny_checkpoint, "--rerank", 12, "--out", tmp_path]
    with monkeypatch.context() as patch:
        add, done = DocumentIndex.cache, []

        def caching(self, name, texts, numbers):
            if len(done) == kept:
                raise Killed
            done.extend(texts)
            add(self, name, texts, numbers)

        def ranking(*_, **__):
            raise Killed

        patch.setattr(DocumentIndex, "cache", caching)
        patch.setattr(GenerativeReranker, "rank", ranking)
        with pytest.raises(Killed):
            run(retrieval.app, *arguments)
    result = run(retrieval.app, *arguments)
    assert result.exit_code == 0, result.output
    _, anew, _ = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["results"]
    assert anew["details"].get("resumed_at", 0) == kept
    assert (anew["documents_per_second"] is None) == (kept == 12)


def test_retrieval_says_before_it_begins_that_a_decoder_is_missing(beir_folder, tiny_base, tmp_path):
    from autoregembed_rag import AutoRegEncoder

    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    AutoRegEncoder.from_base(base, device="cpu").save_pretrained(tmp_path / "model")
    shutil.rmtree(base)
    arguments = ("--data-dir", beir_folder, "--model", tmp_path / "model", "--rerank", 4)
    result = run(retrieval.app, *arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "names the decoder" in result.stderr
    assert not (tmp_path / "out").exists()


def test_every_way_to_rerank_is_measured(beir_folder, tiny_checkpoint, tmp_path):
    arguments = ("--data-dir", beir_folder, "--split", "test", "--model", tiny_checkpoint, "--depth", 4)
    result = run(reranking.app, *arguments, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["results"]
    assert len(rows) == 1 + 3 * 2 * (1 + len(reranking.WEIGHTS))
    assert len({row["measures"]["nDCG@10"] for row in rows}) > 1
    assert {*rows[0]["measures"]} == {"nDCG@10", "MRR@10"}
    assert "Recall" not in result.output
    assert run(reranking.app, *arguments[:-1], 100, "--out", tmp_path).exit_code == 0
    rows = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["results"]
    assert {row["measures"]["Recall@100"] for row in rows} == {1}, "all documents are found"


def test_the_ways_are_those_of_the_reranker(encoder, decoder, beir_folder):
    data = load_folder(beir_folder)
    texts = [document.content for document in data.documents]
    scored = reranking.score(encoder, decoder, data, depth=5)
    found = {(name, weight): rankings for name, weight, rankings in reranking.ways(scored)}
    for prior, per_token, weight in (("unconditional", True, 0.25), ("document", False, None)):
        reranker = GenerativeReranker(encoder, decoder, prior=prior, per_token=per_token, weight=weight)
        name = f"prior {prior}, {'mean' if per_token else 'sum'} over tokens"
        for query, before, after in zip(
            data.queries.values(), scored.found, found[name, "" if weight is None else "0.25"], strict=True
        ):
            ranked = reranker.rank(query, [texts[place] for place in before])
            assert [before[place] for place, _ in ranked] == after


def test_fewer_tokens_and_mean_pooling_change_the_dimension(beir_folder, tiny_checkpoint, tmp_path):
    for options, dimension in ((("--num-tokens", 2), 64), (("--pooling", "mean"), 32)):
        arguments = (
            "--data-dir",
            beir_folder,
            "--model",
            tiny_checkpoint,
            "--out",
            tmp_path,
            "--limit",
            5,
            *options,
        )
        result = run(retrieval.app, *arguments)
        assert result.exit_code == 0, result.output
        record = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
        assert record["results"][0]["details"]["dimension"] == dimension
        assert (record["limit"], record["documents"], record["queries"]) == (5, 5, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data-dir", "nowhere"], "does not exist"),
        (["--data-dir", "nowhere", "--dataset", "scifact"], "give one of them"),
        (["--split", "dev"], "split test only"),
        (["--data-dir", "FOLDER", "--model", "no-such-model"], "What works"),
    ],
)
def test_wrong_arguments_exit_2_with_one_kind_line(beir_folder, arguments, message):
    result = run(
        retrieval.app, *(beir_folder if argument == "FOLDER" else argument for argument in arguments)
    )
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("error:") == 1


@pytest.mark.parametrize("average", ["mean", "last"])
def test_the_base_embedding_is_the_mean_of_the_real_tokens_states_or_the_last(tiny_base, average):
    import torch
    from transformers import AutoModel, AutoTokenizer

    texts = ["A fox.", "The quick brown fox jumps over the lazy dog near the river bank.", ""]
    model, tokenizer = AutoModel.from_pretrained(tiny_base), AutoTokenizer.from_pretrained(tiny_base)
    expected = []
    for text in texts:
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            states = model(torch.tensor([ids])).last_hidden_state[0].double().numpy()
        pooled = states.mean(0) if average == "mean" else states[-1]
        expected.append(pooled / np.linalg.norm(pooled))
    vectors = BaseModel(str(tiny_base), average, dtype="float32").encode_documents(texts, batch_size=2)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_a_comparison_holds_every_use_of_a_checkpoint_with_the_same_weights(tiny_checkpoint):
    full, hybrid, *others = load_candidates(None, None, [str(tiny_checkpoint)])
    assert hybrid.name == f"{full.name}, hybrid"
    assert hybrid.encoder is full.encoder
    assert [candidate.use for candidate in others] == [
        "4 of 5 tokens",
        "3 of 5 tokens",
        "2 of 5 tokens",
        "1 of 5 tokens",
        "mean pooling",
    ]
    texts = ["A fox near the river.", "Water."]
    whole = full.encoder.encode_documents(texts).reshape(2, 5, -1)
    for candidate in others[:-1]:
        kept = whole[:, : int(candidate.use[0])].reshape(2, -1)
        expected = kept / np.linalg.norm(kept, axis=1, keepdims=True)
        np.testing.assert_allclose(candidate.encoder.encode_documents(texts), expected, atol=2e-2)
    assert others[-1].encoder.dimension == full.encoder.hidden_size
    assert len({candidate.parameters for candidate in (full, *others)}) == 1


def test_the_hybrid_system_finds_by_words_what_the_vectors_do_not(beir_folder, tiny_checkpoint, tmp_path):
    arguments = ("--data-dir", beir_folder, "--compare", tiny_checkpoint, "--out", tmp_path)
    result = run(retrieval.app, *arguments)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    scores = {entry["system"]: entry["measures"]["nDCG@10"] for entry in record["results"]}
    name = next(iter(scores))
    assert scores[f"{name}, hybrid"] > scores[name]


def test_a_sentence_transformers_folder_is_embedded_as_its_library_does(tiny_base, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.models import Pooling, Transformer

    words = Transformer(str(tiny_base))
    words.tokenizer.pad_token = words.tokenizer.eos_token
    folder = tmp_path / "outside"
    library.SentenceTransformer(
        modules=[words, Pooling(words.get_embedding_dimension())],
        prompts={"query": "find: ", "document": ""},
        device="cpu",
    ).save(str(folder))
    [candidate] = load_candidates([str(folder)], None)
    model, texts = library.SentenceTransformer(str(folder)), ["A fox.", "Water near the bank."]
    assert isinstance(candidate.encoder, SentenceTransformerModel)
    for encode, prompt in (
        (candidate.encoder.encode_queries, "find: "),
        (candidate.encoder.encode_documents, ""),
    ):
        expected = model.encode([prompt + text for text in texts], normalize_embeddings=True)
        np.testing.assert_allclose(encode(texts), expected, atol=1e-3)
    assert candidate.encoder.dimension == 32
    with pytest.raises(ValueError, match="give it as --model"):
        load_candidates(None, None, [str(folder)])


def test_two_models_whose_folders_share_a_name_stay_two(tiny_checkpoint, tmp_path):
    names = []
    for run_name in ("one", "two"):
        shutil.copytree(tiny_checkpoint, tmp_path / run_name / "final")
        names.append(str(tmp_path / run_name / "final"))
    assert [candidate.name for candidate in load_candidates(names, None)] == names
    assert [candidate.name for candidate in load_candidates(names[:1], None)] == ["final"]


def test_a_checkpoint_stands_for_its_own_base_model(tiny_checkpoint, tiny_base):
    own = BaseModel(str(tiny_checkpoint), "mean")
    assert own.fingerprint == BaseModel(str(tiny_base), "mean").fingerprint


def test_the_demo_answers_each_question_with_three_objects_and_their_summaries(tiny_checkpoint):
    result = run(demo.app, "--model", tiny_checkpoint, "--limit", 40)
    assert result.exit_code == 0, result.output
    assert all(question in result.output for question in demo.QUESTIONS)
    documents = {document.id: document.text for document in standard_library_documents()[:40]}
    hits = [line.split(maxsplit=2) for line in result.output.splitlines() if line.startswith("  ")]
    assert len(hits) == 3 * len(demo.QUESTIONS)
    assert all(
        documents[name].startswith(summary) and -1 <= float(score) <= 1 for score, name, summary in hits
    )


def test_sts_reports_the_rank_correlation_of_every_file_and_writes_it(tiny_checkpoint, tmp_path):
    rows = [
        ("5.0", "A fox.", "A fox."),
        ("2.5", "A fox runs.", "A dog runs far."),
        ("0", "Water.", "Lemons are yellow"),
    ]
    files = []
    for name, header in (("one", "score\tsentence1\tsentence2\n"), ("two", "")):
        files.append(tmp_path / name / "dev.tsv")
        files[-1].parent.mkdir()
        text = header + "".join("\t".join(row) + "\n" for row in rows)
        files[-1].write_text(text, encoding="utf-8")
    result = run(
        sts.app, *files, "--model", tiny_checkpoint, "--base", tiny_checkpoint, "--out", tmp_path / "out"
    )
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert record["sets"] == {"one dev": 3, "two dev": 3}
    assert len(record["results"]) == 3
    for entry in record["results"]:
        # Equal sentences have cosine 1, the highest score: whatever the model, the first rank is right.
        assert round(entry["spearman"]["one dev"]) in {50, 100}
        assert entry["spearman"]["one dev"] == entry["spearman"]["two dev"]
    assert (tmp_path / "out" / "results.png").read_bytes().startswith(b"\x89PNG")


def test_sts_correlates_the_cosines_of_the_pairs_in_their_order():
    class Angles:
        """Embeds "30" as the unit vector at 30 degrees."""

        def encode_documents(self, texts, show_progress=False):
            radians = np.radians([float(text) for text in texts])
            return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)

    def correlation(*second):
        scores = np.array([5.0, 3.0, 4.0, 1.0])
        return sts.evaluate_pairs(Angles(), sts.Pairs("angles", scores, ["0"] * 4, list(second)))

    assert correlation("5", "60", "30", "90") == pytest.approx(100)
    assert correlation("90", "30", "60", "5") == pytest.approx(-100)
    # Ranks 4, 2, 3, 1 against 3, 2, 4, 1: 1 - 6 * (1 + 0 + 1 + 0) / (4 * 15).
    assert correlation("30", "60", "5", "90") == pytest.approx(80)


def test_sts_reads_the_papers_sets_from_the_hub(tiny_checkpoint, tmp_path, monkeypatch):
    """The hub cannot be reached in tests, so `datasets` is played: what is asked of it, and what comes of its rows."""
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(path, configuration, *, split):
        asked.append((path, configuration, split))
        return [
            {"sentence1": "a fox", "sentence2": "a fox", "score": 5},
            {"sentence1": "a fox", "sentence2": "water", "score": 1},
        ]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    result = run(sts.app, "--hub", "all", "--model", tiny_checkpoint, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert len(asked) == 10
    assert ("mteb/sts17-crosslingual-sts", "en-en", "test") in asked
    record = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert set(record["sets"]) == set(sts.HUB)
    assert all(value == pytest.approx(100) for value in record["results"][0]["spearman"].values())


@pytest.mark.parametrize(
    ("arguments", "message"), [((), "nothing to measure"), (("--hub", "sts99"), "no set of the paper")]
)
def test_sts_says_what_it_can_measure(arguments, message):
    result = run(sts.app, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_sts_names_the_line_that_is_not_a_pair(tmp_path):
    file = tmp_path / "bad.tsv"
    file.write_text("score\tsentence1\tsentence2\n1.0\tonly one\n", encoding="utf-8")
    result = run(sts.app, file)
    assert result.exit_code == 2
    assert "bad.tsv, line 2" in result.stderr
