"""`autoregembed plan`: what it prints, that its arithmetic is right, and how it refuses."""

import json
import re

import pytest
from transformers import LlamaConfig
from typer.testing import CliRunner

from autoregembed_rag.cli import app

WIDE = LlamaConfig(
    hidden_size=8192, num_hidden_layers=2, num_attention_heads=64, intermediate_size=64, vocab_size=64
)


def run(*words):
    return CliRunner().invoke(app, ["plan", *map(str, words)])


def output(*words):
    result = run(*words)
    assert result.exit_code == 0, result.output
    return result.stdout


def facts(*words):
    return json.loads(output(*words, "--json"))


def rows(found, **wanted):
    return [row for row in found["indexes"] if all(row[key] == value for key, value in wanted.items())]


def test_hours_are_operations_over_what_the_devices_reach():
    found = facts(
        "--documents", "100M", "--tokens", 300, "--model", "llama2-7b", "--gpus", 8, "--device", "a100"
    )
    encoding, (plan,) = found["encoding"], found["plans"]
    matrices, last, n = (
        32 * (4 * 4096**2 + 3 * 4096 * 11008),
        2 * 4096**2 + 3 * 4096 * 11008,
        encoding["prompt"],
    )
    assert n == 300 + encoding["around"]
    attention = 2 * 31 * 4096 * n**2 + 4 * 4096 * 5 * n
    assert encoding["operations"] == 2 * (matrices * n - last * (n - 5)) + attention
    assert plan["operations"] == 10**8 * encoding["operations"]
    assert plan["device_seconds"] == pytest.approx(plan["operations"] / (312e12 * 0.4))
    assert plan["wall_seconds"] == pytest.approx(plan["device_seconds"] / 8)
    assert facts("--documents", 1, "--utilisation", 0.8)["encoding"]["utilisation"] == 0.8


def test_a_small_model_on_a_gpu_waits_for_its_tokenizer_which_is_said():
    encoding = facts("--documents", "1M", "--device", "h100")["encoding"]
    assert encoding["documents_per_second"] == encoding["by_tokenising"] < encoding["by_operations"]
    assert "tokenising, not the GPU, is what limits" in output("--documents", "1M", "--device", "h100")
    assert "tokenising, not the GPU" not in output(
        "--documents", "1M", "--device", "h100", "--model", "llama2-7b"
    )


def test_a_speed_that_was_measured_is_taken():
    found = facts("--documents", "3.6M", "--documents-per-second", 100, "--gpus", 4)
    assert (found["plans"][0]["device_seconds"], found["plans"][0]["wall_seconds"]) == (36_000, 9_000)
    assert "documents/s, as given" in output("--documents", "1M", "--documents-per-second", 100)


def test_one_number_of_documents_is_shown_with_its_arithmetic():
    text = output("--documents", "2M", "--tokens", 100, "--model", "mini", "--device", "cpu", "--gpus", 2)
    assert text.startswith("2,000,000 documents of 100 tokens, mini (6.6M parameters), 1,600 dimensions")
    assert "100 of text + 11 of bos, instruction and compressed tokens = 111 tokens" in text
    assert "2 x (1,433,600 x 111 - 512,000 x 106) = 210 MFLOP" in text
    assert "2 x 1 x 320 x 111^2 + 4 x 320 x 5 x 111 = 8.6 MFLOP" in text
    assert "(a core of an AMD EPYC with bfloat16 instructions, measured) x 0.25 (measured)" in text
    assert "core hours" in text
    assert "2 x 1,600 of vector (float16) + 480 of text + 100 of metadata and id = 3.8 kB" in text
    names = [f"DocumentIndex {kind}" for kind in ("Flat", "SQfp16", "IVF,SQ8", "IVF,RaBitQ", "IVF,RaBitQ9")]
    for name in (*names, "Milvus FLAT", "Milvus IVF_SQ8", "Milvus HNSW"):
        assert len(re.findall(rf"^  {name} ", text, re.MULTILINE)) == 2  # by kind, and by number of tokens


def test_without_a_number_there_is_a_table_from_1m_to_10b():
    text = output("--tokens", 100)
    assert re.search(r"documents +1M +10M +100M +1B +10B\n  operations ", text)
    assert text.count("DocumentIndex IVF,RaBitQ4") == 3  # on disk, in memory, machines
    assert [plan["documents"] for plan in facts()["plans"]] == [10**6, 10**7, 10**8, 10**9, 10**10]


def test_fewer_tokens_take_their_share_of_memory():
    (plan,) = facts("--documents", "1M", "--model", "mini")["plans"]
    flat = [row["memory"] for row in rows(plan, factory="Flat")]
    assert flat == [10**6 * (4 * 320 * width + 8) for width in range(1, 6)]
    assert [plan["shards"][str(width)] for width in (1, 5)] == [
        pytest.approx(10**6 * (2 * 320 * width + 256 * 4.8 + 100)) for width in (1, 5)
    ]
    text = output("--documents", "1M", "--num-tokens", 2)
    assert "640 dimensions (2 of 5 compressed tokens of 320)" in text


def test_machines_are_counted_by_what_they_may_use():
    (plan,) = facts("--documents", "100M", "--memory", "64GB")["plans"]
    (flat,) = rows(plan, engine="Milvus", factory="FLAT", num_tokens=5)
    assert flat["machines"] == -(-flat["memory"] // (0.8 * 64e9))
    (plan,) = facts("--documents", "100M", "--memory", "64GiB")["plans"]
    assert rows(plan, engine="Milvus", factory="FLAT", num_tokens=5)[0]["machines"] == -(
        -flat["memory"] // (0.8 * 64 * 2**30)
    )


def test_more_dimensions_than_milvus_takes_are_said(tmp_path):
    WIDE.save_pretrained(tmp_path)
    (plan,) = facts("--documents", "1M", "--model", tmp_path)["plans"]
    assert [row["why_not"] is None for row in rows(plan, factory="HNSW")] == [True, True, True, True, False]
    text = output("--documents", "1M", "--model", tmp_path)
    assert "note: no: Milvus ends at 32,768 dimensions: keep fewer compressed tokens (--num-tokens)" in text
    assert re.search(r"Milvus HNSW +- +- +- +no\n", text)


def test_a_database_that_sqlite_cannot_hold_is_said():
    text = output("--documents", "10B", "--model", "llama2-7b")
    assert "note: no: the database of one DocumentIndex ends at 70.4 TB" in text
    assert re.search(r"DocumentIndex IVF,RaBitQ .* no\n", text)


def test_a_text_that_is_longer_than_the_model_reads_is_cut_which_is_said():
    encoding = facts("--documents", "1M", "--tokens", 9000)["encoding"]
    assert (encoding["prompt"], encoding["text_tokens"], encoding["tokens"]) == (512, 501, 9000)
    text = output("--documents", "1M", "--tokens", 9000)
    assert "501 of text (cut from 9,000)" in text
    assert "note: texts are cut: the model reads 501 tokens of a text (max_length 512)" in text


def test_weights_that_do_not_fit_a_gpu_are_said(tmp_path):
    LlamaConfig(
        hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, intermediate_size=28672
    ).save_pretrained(tmp_path)
    text = output("--documents", "1M", "--model", tmp_path, "--device", "a100")
    assert re.search(r"the weights, 1\d\d\.\d GB in bfloat16, do not fit into one a100 of 80\.0 GB", text)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--documents", "0"], "--documents must be more than 0, not 0"),
        (["--documents", "-5"], "--documents must be more than 0, not -5"),
        (["--documents", "1.5"], "--documents must be a whole number"),
        (["--documents", "1e30"], "--documents must be a whole number up to 10,000 billion"),
        (["--documents", "many"], "--documents 'many' is not a number such as 5000000, 5M or 64GB"),
        (["--memory", "0GB"], "--memory must be more than 0"),
        (["--memory", "lots"], "--memory 'lots' is not a number"),
        (["--model", "nope"], "'nope' is not a model that can be loaded"),
        (["--model", "org/nope"], "the configuration of 'org/nope' is not on this machine"),
        (["--device", "h9000"], "--device must be one of h200, h100, a100, l40s, a10, l4, cpu, not 'h9000'"),
        (["--num-tokens", "6"], "--num-tokens of mini must be more than 0 and at most 5, not 6"),
        (["--utilisation", "1.5"], "--utilisation must be more than 0 and at most 1, not 1.5"),
        (["--utilisation", "nan"], "--utilisation must be more than 0"),
        (["--documents-per-second", "-1"], "--documents-per-second must be more than 0"),
        (["--text-bytes", "-1"], "--text-bytes must be more than 0"),
    ],
)
def test_bad_input_is_refused_in_one_line(words, message):
    result = run(*words)
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {message}")


@pytest.mark.parametrize("option", ["--tokens", "--gpus", "--num-tokens"])
def test_none_of_something_is_refused(option):
    result = run(option, 0)
    assert result.exit_code == 2
    assert option in result.stderr
