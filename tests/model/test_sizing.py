"""Operations of a prompt, and what is read of a model to plan with it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from autoregembed_rag import AutoRegEncoder
from autoregembed_rag.last_layer import restrict_last_layer
from autoregembed_rag.passes import compressed_states
from autoregembed_rag.sizing import DEVICES, SHAPES, Workload, plan_model

TOKENS, K = 40, 5
REPORTS = Path(__file__).parents[2] / "benchmarks" / "reports" / "encode"


@pytest.mark.parametrize("family", FAMILIES)
def test_operations_are_those_that_pytorch_counts(family):
    torch.manual_seed(0)
    _, model = FAMILIES[family]()
    body = model.base_model.eval()
    restrict_last_layer(body)
    ids = torch.randint(0, 100, (1, TOKENS))
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        compressed_states(body, ids, torch.tensor([TOKENS]), K)
    counted = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    work = Workload.of(body, body.config)
    assert counted.pop("aten.mm", 0) + counted.pop("aten.addmm", 0) == work.products(TOKENS, K)
    # PyTorch counts what a causal mask hides, too, which is half of each layer that is computed whole.
    hidden = replace(work, layers=work.layers - bool(work.last), last=0).attention(TOKENS, K)
    assert sum(counted.values()) == work.attention(TOKENS, K) + hidden
    assert counted


def test_only_a_configuration_is_read(tiny_checkpoint, tmp_path):
    whole = plan_model(str(tiny_checkpoint))
    for file in tiny_checkpoint.glob("*.json"):
        shutil.copy(file, tmp_path)
    assert not any(tmp_path.glob("*.safetensors"))
    assert plan_model(str(tmp_path)).workload == whole.workload
    encoder = AutoRegEncoder.from_pretrained(tiny_checkpoint)
    assert whole.workload.parameters == sum(p.numel() for p in encoder.model.parameters())
    assert whole.room == encoder.prompts.max_text_tokens(encoder.config.document_instruction)
    assert [whole.dimension(width) for width in whole.widths] == [32, 64, 96, 128, 160]
    assert (whole.dimension(5), whole.notes) == (encoder.dimension, ())


def test_mean_pooling_has_one_width(tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "mean")
    file = tmp_path / "mean" / "autoregembed.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pooling": "mean"}))
    planned = plan_model(str(tmp_path / "mean"))
    assert (planned.widths, planned.dimension(1), planned.k) == ([1], 32, 5)


def test_a_plain_language_model_is_planned_with_the_defaults_which_is_said(tiny_base):
    planned = plan_model(str(tiny_base))
    assert (planned.k, planned.config.max_length) == (5, 128)  # it has 128 positions
    assert "has no autoregembed.json: 5 compressed tokens" in planned.notes[0]


def test_a_hub_id_is_read_where_its_configuration_is_on_this_machine(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    LlamaConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96
    ).save_pretrained(snapshot)
    (tmp_path / "models--org--name" / "refs").mkdir()
    (tmp_path / "models--org--name" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    planned = plan_model("org/name")
    assert (planned.workload.hidden, planned.workload.layers) == (64, 3)
    assert "the instruction's tokens are those of mini's tokenizer" in planned.notes
    with pytest.raises(FileNotFoundError, match=r"'org/other' is not on this machine.*hf download org/other"):
        plan_model("org/other")


def test_what_is_no_model_is_refused_by_name(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"'nope' is not a model.*or a shape: 58m, qwen2.5-0.5b, llama2-7b"
    ):
        plan_model("nope")
    (tmp_path / "config.json").write_text('{"model_type": "never-heard-of"}')
    with pytest.raises(ValueError, match=r"config\.json does not describe a model that is known"):
        plan_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json does not describe a model that is known"):
        plan_model(str(tmp_path))


def test_shapes_are_those_of_the_benchmarks():
    pytest.importorskip("matplotlib")
    from benchmarks import shapes

    for name, config in SHAPES.items():
        found, wanted = config(), shapes.SHAPES[name]
        assert (found.hidden_size, found.num_hidden_layers, found.intermediate_size) == (
            wanted.hidden,
            wanted.layers,
            wanted.intermediate,
        )
        assert found.num_attention_heads == wanted.heads
        assert found.num_key_value_heads == (wanted.kv_heads or wanted.heads)
        assert found.vocab_size == wanted.vocabulary


def test_llama_2_7b_has_the_parameters_that_it_is_named_for():
    work = plan_model("llama2-7b").workload
    assert work.parameters + 32_000 * 4096 == 6_738_415_616  # with the head, as it is published
    assert work.matrices == 32 * (4 * 4096**2 + 3 * 4096 * 11008)


@pytest.mark.parametrize("model", ["mini", "58m", "qwen2.5-0.5b"])
def test_a_cpu_is_foretold_as_it_was_measured(model):
    report = json.loads((REPORTS / model / "results.json").read_text(encoding="utf-8"))
    found = report["texts"]["long"]
    work, tokens = plan_model(model).workload, round(found["tokens"] / found["texts"])
    cpu = DEVICES["cpu"]
    foretold = report["threads"] * cpu.peak * work.utilisation(cpu) / work.operations(tokens, K)
    assert found["measures"]["documents/s"]["medians"]["autoregembed-rag"] == pytest.approx(
        foretold, rel=0.35
    )
