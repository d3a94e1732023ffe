"""Both stages on a tiny Llama: what they minimise, what they change, what they save, how they go on."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from doomed_runs import broken_off

from autoregembed_rag import AutoRegEncoder, FrozenDecoder
from autoregembed_rag.training.alignment import train_alignment
from autoregembed_rag.training.arguments import AlignmentArguments, CompressionArguments
from autoregembed_rag.training.compression import train_compression
from autoregembed_rag.training.data import AlignmentRow, CompressionRow
from autoregembed_rag.training.reference import Pair, ReferenceStore
from autoregembed_rag.training.stage import read_record
from autoregembed_rag.training.trainer import StageTrainer

WORDS = ["fox", "dog", "river", "bank", "text", "vector", "answer", "question", "lemon", "green"]
WORDS += ["hundred", "passage", "reader", "model"]
COMPRESSION = [
    CompressionRow(f"The {a} and the {b}.", "Say it again.", f"The {a} and the {b}." * (1 + i % 3))
    for i, (a, b) in enumerate(zip(WORDS, reversed(WORDS), strict=True))
][:12]
ALIGNMENT = [
    AlignmentRow(f"Where is the {a}?", f"The {a} is near the {b}.", (f"No {a} here, only a {b}.",))
    for a, b in zip(WORDS, WORDS[3:], strict=False)
][:8]


@pytest.fixture
def pair(tiny_base: Path) -> tuple[AutoRegEncoder, FrozenDecoder]:
    """An untrained encoder and its decoder, in float32."""
    encoder = AutoRegEncoder.from_base(tiny_base, 3, device="cpu", dtype="float32")
    return encoder, FrozenDecoder.from_pretrained(tiny_base, device="cpu", dtype="float32")


def compression_arguments(**changes) -> CompressionArguments:
    settings = {"learning_rate": 3e-3, "batch_size": 4, "epochs": 1, "bf16": False, "logging_steps": 1}
    return CompressionArguments(**{**settings, **changes})


def alignment_arguments(**changes) -> AlignmentArguments:
    settings = {"learning_rate": 1e-3, "batch_size": 4, "epochs": 1, "bf16": False, "logging_steps": 1}
    return AlignmentArguments(**{**settings, **changes})


def positive(row: AlignmentRow) -> str:
    return row.pos


def negative(row: AlignmentRow) -> str:
    return row.neg[0]


def logged_losses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Every loss that Trainer logs from here on."""
    losses: list[float] = []
    log = StageTrainer.log

    def listen(self, logs, *args, **kwargs):
        losses.extend([float(logs["loss"])] if "loss" in logs else [])
        return log(self, logs, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "log", listen)
    return losses


def mean_target_log_prob(encoder, decoder, rows) -> float:
    """-L_IC by the public scoring function."""
    total = tokens = 0.0
    for row in rows:
        e = encoder.compress([row.context], row.instruction)
        total += float(decoder.log_prob(e, [row.output])[0])
        tokens += len(decoder.target_ids([row.output])[0])
    return total / tokens


def test_compression_minimises_the_mean_over_target_tokens(pair, tmp_path, monkeypatch):
    encoder, decoder = pair
    losses = logged_losses(monkeypatch)
    before = mean_target_log_prob(encoder, decoder, COMPRESSION)
    arguments = compression_arguments(batch_size=12, epochs=12)
    train_compression(encoder, decoder, COMPRESSION, tmp_path / "out", arguments)
    assert losses[0] == pytest.approx(-before, rel=1e-4)
    after = mean_target_log_prob(encoder, decoder, COMPRESSION)
    assert after > before + 0.3


def test_accumulated_batches_weigh_every_token_the_same(tiny_base, tmp_path):
    """Four batches of three with targets of different lengths move the weights as one batch of twelve does."""
    ends = []
    for name, size, accumulated in (("one", 12, 1), ("four", 3, 4)):
        encoder = AutoRegEncoder.from_base(tiny_base, 3, device="cpu", dtype="float32")
        decoder = FrozenDecoder.from_pretrained(tiny_base, device="cpu", dtype="float32")
        arguments = compression_arguments(
            batch_size=size, gradient_accumulation_steps=accumulated, max_steps=1, warmup_ratio=0.0
        )
        train_compression(encoder, decoder, COMPRESSION, tmp_path / name, arguments)
        ends.append(torch.cat([p.detach().flatten() for p in encoder.model.parameters()]))
    start = AutoRegEncoder.from_base(tiny_base, 3, device="cpu", dtype="float32")
    moved = ends[0] - torch.cat([p.detach().flatten() for p in start.model.parameters()])
    assert moved.abs().max() > 1e-3
    # Adam's first step is the sign of the gradient: entries near 0 may flip, the rest must agree.
    assert ((ends[0] - ends[1]).abs() < 1e-5).float().mean() > 0.99


def test_the_decoder_stays_frozen_and_in_eval_mode(pair, tmp_path):
    encoder, decoder = pair
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    modes = []
    handle = decoder.model.base_model.register_forward_hook(lambda module, *_: modes.append(module.training))
    train_compression(encoder, decoder, COMPRESSION, tmp_path / "c", compression_arguments())
    train_alignment(encoder, decoder, ALIGNMENT, tmp_path / "a", alignment_arguments())
    handle.remove()
    assert modes
    assert not any(modes)
    assert all(torch.equal(before[name], tensor) for name, tensor in decoder.state_dict().items())
    assert all(parameter.grad is None for parameter in decoder.parameters())


def test_a_trained_checkpoint_is_the_encoder_alone_and_loads(pair, tmp_path, tiny_base):
    encoder, decoder = pair
    output = tmp_path / "out"
    train_compression(encoder, decoder, COMPRESSION, output, compression_arguments(save_steps=1))
    assert sorted(file.name for file in output.iterdir()) == [
        "README.md",
        "autoregembed.json",
        "config.json",
        "config_sentence_transformers.json",
        "model.safetensors",
        "modules.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    ]
    loaded = AutoRegEncoder.from_pretrained(output, device="cpu", dtype="float32")
    texts = ["The fox is near the river.", "lemon"]
    np.testing.assert_array_equal(loaded.encode_documents(texts), encoder.encode_documents(texts))
    untrained = AutoRegEncoder.from_base(tiny_base, 3, device="cpu", dtype="float32")
    assert np.abs(loaded.encode_documents(texts) - untrained.encode_documents(texts)).max() > 1e-3
    assert loaded.fingerprint == encoder.fingerprint != untrained.fingerprint
    decoder = FrozenDecoder.from_pretrained(output, device="cpu", dtype="float32")
    assert np.isfinite(decoder.log_prob(loaded.compress(texts), texts)).all()


def test_alignment_starts_at_the_loss_that_equation_2_gives(pair, tmp_path, monkeypatch):
    """With model = reference every S2 is -1/2, so the first loss follows from the public log-probabilities."""
    encoder, decoder = pair
    losses = logged_losses(monkeypatch)
    queries, positives = [row.query for row in ALIGNMENT], [row.pos for row in ALIGNMENT]
    gap = np.abs(
        decoder.log_prob(encoder.compress(queries, "next"), positives)
        - decoder.log_prob(encoder.compress(positives, "self"), positives)
    ).astype(float)
    s1 = -1 / (1 + np.exp(-0.1 * gap))
    expected = np.mean(
        [-math.log(math.exp(s / 0.1) / (math.exp(s / 0.1) + math.exp(-0.5 / 0.1))) for s in s1]
    )
    train_alignment(encoder, decoder, ALIGNMENT, tmp_path / "a", alignment_arguments(batch_size=8))
    assert losses[0] == pytest.approx(float(expected), rel=1e-4)


def test_alignment_lowers_its_loss(pair, tmp_path, monkeypatch):
    encoder, decoder = pair
    losses = logged_losses(monkeypatch)
    train_alignment(encoder, decoder, ALIGNMENT, tmp_path / "a", alignment_arguments(batch_size=8, epochs=10))
    assert losses[-1] < losses[0] - 0.1


def test_each_text_is_encoded_once_per_step(pair, tmp_path, monkeypatch):
    """A step over B rows is one encoder pass over 2 B prompts, however many negatives there are."""
    encoder, decoder = pair
    negatives = ("No such thing.", "Nor this.", "Not at all.")
    # Half the rows share one query, half of those their positive too.
    rows = [AlignmentRow(row.query, row.pos, negatives) for row in ALIGNMENT]
    rows[1:4] = [AlignmentRow(rows[0].query, row.pos, negatives) for row in (rows[0], *rows[2:4])]
    sizes: dict[str, list[int]] = {"encoder": [], "decoder": []}
    count = lambda name, key: lambda _, __, kwargs, ___: sizes[name].append(len(kwargs[key]))  # noqa: E731
    step = StageTrainer.training_step

    def counting(self, *args, **kwargs):
        hooks = [
            encoder.model.register_forward_hook(count("encoder", "input_ids"), with_kwargs=True),
            decoder.model.base_model.register_forward_hook(
                count("decoder", "inputs_embeds"), with_kwargs=True
            ),
        ]
        loss = step(self, *args, **kwargs)
        for hook in hooks:
            hook.remove()
        return loss

    monkeypatch.setattr(StageTrainer, "training_step", counting)
    train_alignment(
        encoder, decoder, rows, tmp_path / "a", alignment_arguments(num_negatives=3, batch_size=8)
    )
    # 5 queries and 7 positives; for every query 3 negatives, for every (query, positive) two pairs.
    assert sum(sizes["encoder"]) == 5 + 7
    assert sum(sizes["decoder"]) == 5 * 3 + 7 * 2


def test_reference_scores_are_the_starting_models_log_probabilities(pair, tmp_path, monkeypatch):
    encoder, decoder = pair
    e = encoder.compress([row.query for row in ALIGNMENT], "next")
    expected = [decoder.log_prob(e, [getter(row) for row in ALIGNMENT]) for getter in (positive, negative)]
    broken_off(
        monkeypatch, 0, lambda: train_alignment(encoder, decoder, ALIGNMENT, tmp_path, alignment_arguments())
    )
    key = repr([encoder.fingerprint, "torch.float32", decoder.fingerprint, "torch.float32", False, False])
    store = ReferenceStore(tmp_path / "reference", key)
    for getter, scores in zip((positive, negative), expected, strict=True):
        found = store.scores([Pair(row.query, getter(row)) for row in ALIGNMENT])
        np.testing.assert_allclose(found.numpy(), scores, rtol=1e-5)


def test_reference_scores_are_computed_once_for_every_pair(pair, tmp_path, monkeypatch):
    """A run that was interrupted computes what is missing; rows in another order or new ones are found by content."""
    encoder, decoder = pair
    added: list[int] = []
    add = ReferenceStore.add
    monkeypatch.setattr(
        ReferenceStore,
        "add",
        lambda self, pairs, scores: added.append(len(pairs)) or add(self, pairs, scores),
    )
    train = lambda rows: broken_off(  # noqa: E731
        monkeypatch, 0, lambda: train_alignment(encoder, decoder, rows, tmp_path, alignment_arguments())
    )
    train(ALIGNMENT[:5])
    assert sum(added) == 5 * 2
    train([*reversed(ALIGNMENT)])
    assert sum(added) == 8 * 2
    with torch.no_grad():
        encoder.trainable().get_input_embeddings().weight.mul_(1.01)
    train(ALIGNMENT)
    assert sum(added) == 2 * 8 * 2, "another model reads none of them"


def test_what_cannot_be_trained_is_refused_before_training(pair, tmp_path, tiny_checkpoint):
    encoder, decoder = pair
    with pytest.raises(ValueError, match="no rows"):
        train_compression(encoder, decoder, [], tmp_path / "x")
    with pytest.raises(ValueError, match="no rows"):
        train_alignment(encoder, decoder, [], tmp_path / "x")
    with pytest.raises(ValueError, match="row 2: the instruction leaves no room"):
        rows = [COMPRESSION[0], CompressionRow("text", "word " * 500, "text")]
        train_compression(encoder, decoder, rows, tmp_path / "x")
    with pytest.raises(ValueError, match="learning_rate must be above 0, not -1"):
        compression_arguments(learning_rate=-1)
    with pytest.raises(ValueError, match="beta must be above 0"):
        alignment_arguments(beta=0)
    assert not (tmp_path / "x").exists()


def rates(output: Path) -> list[float]:
    return [entry["learning_rate"] for entry in read_record(output)["losses"]]


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_every_step_trains_at_a_rate_above_0(name, pair, tmp_path):
    """Warm-up is a straight line from 0, which is left out, to the peak; then all is as Trainer has it."""
    encoder, decoder = pair
    arguments = compression_arguments(max_steps=8, warmup_ratio=0.3, lr_scheduler=name, learning_rate=1.0e-3)
    train_compression(encoder, decoder, COMPRESSION, tmp_path / "out", arguments)
    decay = {"cosine": lambda x: (1 + math.cos(math.pi * x)) / 2, "linear": lambda x: 1 - x}[name]
    expected = [0.25, 0.5, 0.75, *(decay(step / 5) for step in range(5))]
    assert rates(tmp_path / "out") == pytest.approx([1e-3 * share for share in expected])


def test_one_step_trains(pair, tmp_path):
    encoder, decoder = pair
    before = encoder.fingerprint
    train_compression(encoder, decoder, COMPRESSION, tmp_path / "out", compression_arguments(max_steps=1))
    assert encoder.fingerprint != before
    assert rates(tmp_path / "out") == [1.5e-3]


def test_reports_that_cannot_be_made_are_refused_before_training(pair, tmp_path):
    for report_to in ("wandb", "nonsense"):
        with pytest.raises(ValueError, match=f"report_to='{report_to}' is not installed.*one of none, all"):
            train_compression(
                *pair, COMPRESSION, tmp_path / "out", compression_arguments(report_to=report_to)
            )


def test_texts_that_training_cuts_are_counted_once_in_a_warning(pair, tmp_path, caplog):
    encoder, decoder = pair
    room = encoder.prompts.max_text_tokens(encoder.config.document_instruction)
    fitting, long = (" a" * count for count in (room, room + 1))
    assert encoder.count_tokens(fitting) == room
    rows = [AlignmentRow("Where?", long), AlignmentRow("What?", fitting), AlignmentRow("Who?", long)]
    train_alignment(encoder, decoder, rows, tmp_path / "out", alignment_arguments(epochs=2))
    assert caplog.text.count("texts were cut") == 1
    assert "1 texts were cut to fit into prompts of 128 tokens" in caplog.text


@pytest.mark.filterwarnings("error::FutureWarning")
def test_activations_are_recomputed_without_a_warning(pair, tmp_path):
    encoder, decoder = pair
    arguments = compression_arguments(max_steps=1, gradient_checkpointing=True)
    train_compression(encoder, decoder, COMPRESSION, tmp_path / "out", arguments)


def test_without_accelerate_the_error_says_what_to_install(monkeypatch):
    name = "autoregembed_rag.training.trainer"
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r'pip install "autoregembed-rag\[train\]"'):
        importlib.import_module(name)


def test_running_out_of_memory_says_what_to_lower(pair, tmp_path, monkeypatch):
    encoder, decoder = pair
    monkeypatch.setattr(decoder, "target_log_probs", lambda *_: torch.empty(10**16))
    with pytest.raises(
        MemoryError, match=r"out of memory in step 1 .*: lower batch_size and raise gradient_acc"
    ):
        train_compression(encoder, decoder, COMPRESSION, tmp_path / "out", compression_arguments())
