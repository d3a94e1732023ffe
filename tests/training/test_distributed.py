"""Two processes train as one: DDP and FSDP on the CPU against the same global batch in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from distributed_runs import COMPRESSION, RUNS, adapt, compress, load, losses, measure, settings
from safetensors.torch import load_file
from tiny_models import write_base

from autoregembed_rag import AutoRegEncoder, FrozenDecoder
from autoregembed_rag.training.arguments import CompressionArguments
from autoregembed_rag.training.compression import train_compression

WORKER = Path(__file__).with_name("distributed_runs.py")
CONFIGS = Path(str(files("autoregembed_rag.training"))) / "configs"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--config_file"]
EXACT = [name for name in RUNS if name != "bf16"]
Runs = dict[str, Path]


def start(what: str, command: list[str], base: Path, folder: Path) -> subprocess.Popen[str]:
    """Two workers; what they say goes to one pipe."""
    folder.mkdir()
    return subprocess.Popen(  # noqa: S603  # our own worker
        [*command, str(WORKER), what, str(base), str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The same small runs in one process, in two under DDP and in two under FSDP: their folders."""
    place = tmp_path_factory.mktemp("runs")
    base = write_base(place / "base")
    folders = {name: place / name for name in ("one", "ddp", "fsdp")}
    # Sharded state, which this changes in the shipped settings, is gathered all the same.
    sharded = ["--fsdp_state_dict_type", "SHARDED_STATE_DICT"]
    commands = {"ddp": TORCHRUN, "fsdp": [*ACCELERATE, str(CONFIGS / "fsdp.yaml"), *sharded]}
    workers = {name: start(name, command, base, folders[name]) for name, command in commands.items()}
    try:
        folders["one"].mkdir()
        for name, run in {**RUNS, "lora": adapt}.items():
            measure(name, run, base, folders["one"])
        for name, worker in workers.items():
            output, _ = worker.communicate(timeout=300)
            assert worker.returncode == 0, f"{name}: {output[-20000:]}"
    finally:
        for worker in workers.values():
            worker.kill()
    return {**folders, "base": base}


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / f"{name}-weights.safetensors")


def check_equal(first: Path, name: str, second: Path, other: str) -> None:
    """First loss to 3e-6 and first gradients to 1e-5, relative; weights after all steps to 1e-5."""
    steps = [losses(folder / run) for folder, run in ((first, name), (second, other))]
    assert len(steps[0]) == len(steps[1])
    assert steps[0][0] == pytest.approx(steps[1][0], rel=3e-6)
    expected, found = (
        load_file(folder / f"{run}-gradients.safetensors") for folder, run in ((first, name), (second, other))
    )
    assert expected.keys() == found.keys()
    for number, gradient in expected.items():
        assert (gradient - found[number]).norm() <= 1e-5 * gradient.norm(), f"gradient {number}"
    ends = weights(second, other)
    for key, tensor in weights(first, name).items():
        torch.testing.assert_close(ends[key], tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", EXACT)
def test_two_processes_equal_one_with_the_same_global_batch(runs, kind, name):
    """Targets and numbers of rows differ between the processes, and one has no row at all of some batches."""
    check_equal(runs["one"], name, runs[kind], name)


def test_accumulated_batches_equal_one_large_batch(runs):
    check_equal(runs["one"], "compression", runs["one"], "accumulated")


def test_the_runs_that_are_compared_move_the_weights(runs):
    start = load(runs["base"])[0].model.state_dict()
    for name in EXACT:
        end = weights(runs["one"], name)
        assert max(float((end[key] - start[key]).abs().max()) for key in end) > 1e-2, name


@pytest.mark.parametrize("name", RUNS)
def test_under_fsdp_every_gradient_is_split(runs, name):
    assert json.loads((runs["fsdp"] / f"{name}-0.json").read_text())["sharded"]
    assert not json.loads((runs["ddp"] / f"{name}-0.json").read_text())["sharded"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_gradients_are_float32_where_passes_are_bfloat16(runs, kind):
    first = [losses(runs[folder] / "bf16")[0] for folder in ("one", kind)]
    assert first[0] == pytest.approx(first[1], rel=2e-3)
    expected, found = (load_file(runs[folder] / "bf16-gradients.safetensors") for folder in ("one", kind))
    for number, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert (expected[number] - gradient).norm() < 0.1 * gradient.norm()
        if kind == "fsdp":
            assert not torch.equal(gradient, gradient.bfloat16().float()), "summed in bfloat16"


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_reference_scores_are_shared_among_the_processes(runs, kind):
    one = json.loads((runs["one"] / "sigmoid-0.json").read_text())["reference"]
    each = [json.loads((runs[kind] / f"sigmoid-{rank}.json").read_text())["reference"] for rank in (0, 1)]
    assert min(each) > 0
    assert sum(each) == one


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_run_of_two_processes_goes_on_bit_equal(runs, kind):
    """It broke off in the middle of its second epoch."""
    whole, broken = (weights(runs[kind], name) for name in ("whole", "broken"))
    assert all(torch.equal(whole[key], broken[key]) for key in whole)
    assert losses(runs[kind] / "whole") == losses(runs[kind] / "broken")


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_checkpoint_is_written_once_and_whole(runs, kind):
    optimizer = {"ddp": "optimizer.pt", "fsdp": "optimizer.bin"}[kind]
    left = json.loads((runs[kind] / "left.json").read_text())
    assert {Path(name).parent.name for name in left} == {"checkpoint-4"}
    assert {Path(name).name for name in left} == {
        "autoregembed.json",
        "complete.json",
        "config.json",
        "config_sentence_transformers.json",
        "model.safetensors",
        "modules.json",
        optimizer,
        "rng_state_0.pth",
        "rng_state_1.pth",
        "scheduler.pt",
        "tokenizer.json",
        "tokenizer_config.json",
        "trainer_state.json",
    }


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["compression", "sigmoid", "broken"])
def test_the_result_of_two_processes_loads_in_one(runs, kind, name):
    output = runs[kind] / name
    encoder = AutoRegEncoder.from_pretrained(output, device="cpu", dtype="float32")
    assert encoder.fingerprint in (output / "README.md").read_text()
    saved = weights(runs[kind], name)
    assert all(torch.equal(saved[key], tensor) for key, tensor in encoder.model.state_dict().items())
    decoder = FrozenDecoder.from_pretrained(output, device="cpu", dtype="float32")
    assert decoder.log_prob(encoder.compress(["lemon"]), ["lemon"])[0] < 0


def test_a_lora_adapter_trains_under_ddp(runs):
    check_equal(runs["one"], "lora", runs["ddp"], "lora")


def test_a_lora_adapter_is_refused_under_fsdp(runs):
    assert "train it under plain torchrun (DDP)" in (runs["fsdp"] / "refused.txt").read_text()


@pytest.mark.parametrize(
    ("setting", "value", "remedy"),
    [("FSDP_VERSION", "1", "fsdp_version to 2"), ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "to false")],
)
def test_settings_of_fsdp_that_would_train_wrongly_are_refused(
    setting, value, remedy, tiny_base, tmp_path, monkeypatch
):
    for name, said in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", setting: value}.items():
        monkeypatch.setenv(name, said)
    with pytest.raises(ValueError, match=remedy):
        compress(tiny_base, tmp_path / "out")


def test_where_one_process_fails_all_end(tiny_base, tmp_path):
    """The other waits for gradients that never come."""
    worker = start("nan", TORCHRUN, tiny_base, tmp_path / "nan")
    try:
        output, _ = worker.communicate(timeout=120)
    finally:
        worker.kill()
    assert worker.returncode != 0
    assert "FloatingPointError: the loss is not finite in step 3 for" in output
    assert not (tmp_path / "nan" / "out" / "training.json").exists()


def launched(config: str) -> dict[str, str]:
    """The environment in which `accelerate launch --config_file CONFIG` starts its processes."""
    command = ["--config_file", str(CONFIGS / config), "--num_processes", "4", "train.py"]
    arguments, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    assert arguments.num_processes == 4
    if not arguments.use_deepspeed:
        return prepare_multi_gpu_env(arguments)
    arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    return prepare_deepspeed_cmd_env(arguments)[1]


def test_every_shipped_config_is_one_that_accelerate_reads():
    """FSDP's is the one that the runs above were launched with."""
    assert {path.name for path in CONFIGS.iterdir()} == {
        "ddp.yaml",
        "deepspeed_zero2.yaml",
        "deepspeed_zero3.yaml",
        "fsdp.yaml",
    }
    assert not {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"} & launched("ddp.yaml").keys()
    assert launched("fsdp.yaml")["FSDP_VERSION"] == "2"


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeeds_configs_leave_to_the_training_arguments_what_those_decide(stage, monkeypatch):
    for name, value in launched(f"deepspeed_zero{stage}.yaml").items():
        if name.startswith("ACCELERATE_"):
            monkeypatch.setenv(name, value)
    plugin = DeepSpeedPlugin()
    plugin.set_mixed_precision(os.environ["ACCELERATE_MIXED_PRECISION"])
    config = plugin.deepspeed_config
    assert config["zero_optimization"]["stage"] == stage
    assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] == (stage == 3)
    assert config["bf16"]["enabled"]
    for name in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    ):
        assert config[name] == "auto", name
    assert not plugin.zero3_init_flag


def test_a_filler_never_reaches_the_loss(tiny_base, tmp_path, monkeypatch):
    """22 rows in batches of 8 under one process: no row is trained on twice in an epoch."""
    seen: list[int] = []
    encoder, decoder = load(tiny_base)
    target_ids = decoder.target_ids
    monkeypatch.setattr(decoder, "target_ids", lambda texts: seen.append(len(texts)) or target_ids(texts))
    arguments = CompressionArguments(**settings(max_steps=3))
    train_compression(encoder, decoder, COMPRESSION, tmp_path / "out", arguments)
    assert seen == [8, 8, 6]
