"""Settings: what `autoregembed.json` may say, names of models, devices and dtypes, and the cost of an import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import SIZES, build_tokenizer, tiny_llama
from transformers import BertConfig, BertModel

from autoregembed_rag import AutoRegConfig, AutoRegEncoder, FrozenDecoder, loading


def test_a_config_reads_back_as_written(tmp_path: Path):
    config = AutoRegConfig(3, 100, "mean", "Où?", "Là.", "org/base")
    config.save(tmp_path)
    assert AutoRegConfig.load(tmp_path / "autoregembed.json") == config


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_compressed_tokens": 0}, "num_compressed_tokens must be at least 1, not 0"),
        ({"pooling": "max"}, "pooling must be one of flatten, mean, not 'max'"),
        ({"max_length": 5}, "max_length=5 leaves no room for text beside 5 compressed tokens"),
    ],
)
def test_a_setting_out_of_range_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        AutoRegConfig(**wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_compressed_tokens": "5"}, "num_compressed_tokens must be int, not str '5'"),
        ({"max_length": 512.0}, "max_length must be int, not float"),
        ({"query_instruction": None}, "query_instruction must be str, not NoneType"),
    ],
)
def test_a_setting_of_the_wrong_type_is_named(wrong, message):
    with pytest.raises(TypeError, match=message):
        AutoRegConfig(**wrong)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a JSON object of settings"),
        ("3", "not a JSON object of settings"),
        (json.dumps({"format_version": 2}), "format_version 2; .* reads 1: upgrade"),
        (json.dumps({}), "format_version None"),
        (json.dumps({"format_version": 1, "kk": 1}), r"unknown fields \['kk'\]; known are"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, content, message):
    file = tmp_path / "autoregembed.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        AutoRegConfig.load(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("model", ["nonsense", "org/nonsense", "/no/such/folder", "a/b/c/d", ""])
@pytest.mark.parametrize("kind", [AutoRegEncoder, FrozenDecoder])
def test_an_unknown_name_lists_what_would_work(kind, model, monkeypatch, tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").touch()
    (tmp_path / "README.md").touch()
    monkeypatch.setattr(loading, "BUNDLED", tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        kind.from_pretrained(model)
    for part in (repr(model), r"a bundled name ('tiny')", "the path of a folder", "a Hugging Face hub id"):
        assert part in str(caught.value)


def test_a_folder_that_holds_no_model_lists_what_would_work(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"a folder with config\.json"):
        AutoRegEncoder.from_pretrained(tmp_path)


def test_a_bundled_name_is_not_shadowed_by_a_folder_of_the_same_name(
    tiny_checkpoint: Path, tmp_path, monkeypatch
):
    monkeypatch.setattr(loading, "BUNDLED", tiny_checkpoint.parent)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").touch()
    monkeypatch.chdir(tmp_path)
    assert loading.resolve_folder("tiny") == tiny_checkpoint
    assert loading.resolve_folder("./tiny") == Path("tiny")
    assert loading.resolve_folder(Path("tiny")) == Path("tiny")


def test_a_dtype_is_a_name_or_a_torch_dtype():
    cpu = torch.device("cpu")
    assert loading.resolve_dtype("float32", cpu) == loading.resolve_dtype(torch.float32, cpu) == torch.float32
    assert loading.resolve_dtype("auto", cpu) in (torch.float32, torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"dtype must be 'auto', a torch\.dtype or its name .* not 'float31'"
    ):
        loading.resolve_dtype("float31", cpu)


def test_attention_is_sdpa_where_flash_attention_cannot_run(monkeypatch):
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: object())
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert loading.resolve_attention("auto", cpu, torch.bfloat16) == "sdpa"
    assert loading.resolve_attention("auto", cuda, torch.float32) == "sdpa"
    assert loading.resolve_attention("auto", cuda, torch.bfloat16) == "flash_attention_2"
    assert loading.resolve_attention("eager", cuda, torch.bfloat16) == "eager"
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    assert loading.resolve_attention("auto", cuda, torch.bfloat16) == "sdpa"


@pytest.mark.parametrize(
    ("device", "count", "message"),
    [
        ("foo", 0, "there is no device 'foo': give auto, cpu, cuda, cuda:1 or mps"),
        ("cuda", 0, "'cuda' cannot be used here, where PyTorch .* finds no GPU"),
        ("cuda:7", 2, "'cuda:7' cannot be used here: there are 2 GPUs, from cuda:0 to cuda:1"),
        ("mps", 0, "'mps' cannot be used here, where PyTorch finds no Apple GPU"),
    ],
)
def test_a_device_that_is_not_there_is_named(device, count, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for given in (device, torch.device(device)) if device != "foo" else (device,):
        with pytest.raises(ValueError, match=message):
            loading.resolve_device(given)


@pytest.mark.parametrize("k", [0, -2])
def test_an_encoder_has_a_compressed_token_at_least(k, tiny_base: Path):
    with pytest.raises(ValueError, match=f"num_compressed_tokens must be at least 1, not {k}"):
        AutoRegEncoder.from_base(tiny_base, k, device="cpu")


def test_a_dtype_reaches_the_model(tiny_checkpoint: Path, tiny_base: Path):
    half = AutoRegEncoder.from_pretrained(tiny_checkpoint, device="cpu", dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    assert half.encode(["text"]).dtype == "float32"
    assert AutoRegEncoder.from_base(tiny_base, device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16


def test_more_tokens_than_the_model_has_positions_are_refused(tiny_checkpoint: Path):
    with pytest.raises(ValueError, match="max_length=129 exceeds the 128 positions"):
        AutoRegEncoder.from_pretrained(tiny_checkpoint, max_length=129)


def test_an_instruction_that_fills_the_prompt_is_refused_at_loading(tiny_checkpoint: Path):
    with pytest.raises(ValueError, match="no room for text within max_length=16"):
        AutoRegEncoder.from_pretrained(tiny_checkpoint, max_length=16)


def test_a_model_that_reads_both_ways_is_refused(tmp_path: Path):
    tokenizer = build_tokenizer()
    sizes = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"BertModel is not causal.*decoder-only"):
        AutoRegEncoder.from_base(tmp_path, dtype="float32")


def test_weights_of_a_training_that_diverged_are_called_that(tiny_checkpoint: Path, tmp_path: Path):
    encoder = AutoRegEncoder.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32")
    with torch.no_grad():
        encoder.trainable().norm.weight.fill_(torch.inf)
    encoder.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"not finite.*diverged"):
        AutoRegEncoder.from_pretrained(tmp_path, device="cpu")


def test_a_vocabulary_with_holes_gets_rows_for_its_highest_ids(tmp_path: Path):
    tokenizer = build_tokenizer()
    model = tiny_llama(tokenizer)
    model.resize_token_embeddings(len(tokenizer) + 20)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    record = json.loads(file.read_text())
    # The last piece of the vocabulary moves 19 ids up; nothing takes the ids between.
    vocabulary = record["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    vocabulary[last] += 19
    file.write_text(json.dumps(record))
    encoder = AutoRegEncoder.from_base(tmp_path, 3, device="cpu", dtype="float32")
    assert len(encoder.tokenizer) < max(encoder.tokenizer.get_vocab().values()) + 1
    assert encoder.encode(["A quick fox."]).shape == (1, 96)


def test_the_package_imports_without_torch():
    code = (
        "import sys, autoregembed_rag, autoregembed_rag.config; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0  # noqa: S603


def test_the_package_names_what_it_offers():
    import autoregembed_rag

    assert {"AutoRegConfig", "AutoRegEncoder", "FrozenDecoder"} <= {*dir(autoregembed_rag)}
    with pytest.raises(AttributeError, match="has no attribute 'Nonsense'"):
        _ = autoregembed_rag.Nonsense


def test_int8_weights_are_near_the_full_ones_and_take_less_memory(tiny_checkpoint):
    pytest.importorskip("torchao")
    full = AutoRegEncoder.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32")
    small = AutoRegEncoder.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32", quantize="int8")
    texts = ["A quick fox.", "Vitamin C is found in oranges, lemons and green peppers."]
    assert ((full.encode(texts) * small.encode(texts)).sum(axis=1) >= 0.99).all()
    assert not np.array_equal(full.encode(texts), small.encode(texts))
    assert small.fingerprint == full.fingerprint, "an index of the one is searched by the other"
    weight = small.model.layers[0].mlp.up_proj.weight
    assert {part.dtype for part in (weight.qdata, full.model.layers[0].mlp.up_proj.weight)} == {
        torch.int8,
        torch.float32,
    }


def test_quantized_weights_are_neither_trained_nor_saved(tiny_checkpoint, tmp_path):
    pytest.importorskip("torchao")
    small = AutoRegEncoder.from_pretrained(tiny_checkpoint, device="cpu", quantize="int8")
    for call in (small.trainable, lambda: small.save_pretrained(tmp_path)):
        with pytest.raises(ValueError, match="load it without quantize"):
            call()


def test_an_unknown_quantization_is_refused_by_name(tiny_checkpoint):
    with pytest.raises(ValueError, match="quantize must be \"int8\" or None, not 'int4'"):
        AutoRegEncoder.from_pretrained(tiny_checkpoint, device="cpu", quantize="int4")
