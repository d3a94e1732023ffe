"""The training benchmark: the plain passes that it compares with, its count of operations, and a run end to end."""

import json
import random

import numpy as np
import pytest
import torch
from transformers import logging as transformers_logging
from typer.testing import CliRunner

pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

from torch.utils.flop_counter import FlopCounterMode

from autoregembed_rag import AutoRegEncoder, FrozenDecoder
from autoregembed_rag.losses import conditional_distribution_alignment_loss
from autoregembed_rag.passes import compressed_states
from autoregembed_rag.training.data import AlignmentRow, CompressionRow
from benchmarks import train
from benchmarks.plain_training import PlainPasses
from benchmarks.training_steps import OURS, PLAIN, Job

TRIPLETS = [
    AlignmentRow("A fox jumps over a dog.", "An animal jumps.", ("The river sleeps all day long.",)),
    AlignmentRow("Where is vitamin C?", "In oranges, lemons and green peppers.", ("In stones.",)),
]
CONTEXTS = [
    CompressionRow("The quick brown fox jumps over the lazy dog.", "Who jumps?", "A fox."),
    CompressionRow("Vitamin C is found in oranges.", "Say this again.", "Vitamin C is found in oranges."),
]
BETA, TEMPERATURE = 0.1, 0.1


@pytest.fixture
def pair(tiny_base):
    """An encoder to train and its decoder, in float32."""
    encoder = AutoRegEncoder.from_base(tiny_base, device="cpu", dtype="float32")
    return encoder, FrozenDecoder.from_pretrained(tiny_base, device="cpu", dtype="float32")


@pytest.fixture
def quiet():
    """The command line quietens transformers; other tests may want to hear it."""
    verbosity = transformers_logging.get_verbosity()
    yield
    transformers_logging.set_verbosity(verbosity)
    transformers_logging.enable_progress_bar()


def run(*arguments):
    return CliRunner().invoke(train.app, [str(argument) for argument in arguments])


def count(module):
    """A list that grows by one with every call of `module`."""
    calls = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def alignment_loss(passes, reference=None):
    reference = passes.reference(TRIPLETS) if reference is None else reference
    return passes.alignment_loss(TRIPLETS, reference, beta=BETA, temperature=TEMPERATURE)


def test_the_plain_alignment_step_makes_three_encoder_and_three_decoder_passes_with_whole_logits(pair):
    encoder, decoder = pair
    passes = PlainPasses(encoder, decoder)
    reference = passes.reference(TRIPLETS)
    encoded, decoded, logits = count(encoder.model), count(decoder.model), []
    decoder.model.get_output_embeddings().register_forward_hook(lambda _, __, out: logits.append(out.shape))
    alignment_loss(passes, reference)
    assert (len(encoded), len(decoded)) == (3, 3)
    k, vocabulary = encoder.num_compressed_tokens, decoder.model.config.vocab_size
    texts = ([row.pos for row in TRIPLETS], [row.neg[0] for row in TRIPLETS], [row.pos for row in TRIPLETS])
    assert [tuple(shape) for shape in logits] == [
        (2, k + max(map(len, decoder.target_ids(column))), vocabulary) for column in texts
    ]
    passes.compression_loss(CONTEXTS)
    assert (len(encoded), len(decoded)) == (4, 4)


def test_the_plain_losses_are_the_papers(pair):
    encoder, decoder = pair

    def scored(texts, instruction, targets):
        return torch.from_numpy(decoder.log_prob(encoder.compress(texts, instruction), targets))

    queries, positives = [row.query for row in TRIPLETS], [row.pos for row in TRIPLETS]
    query_pos = scored(queries, "next", positives)
    query_neg = scored(queries, "next", [row.neg[0] for row in TRIPLETS])[:, None]
    reference = torch.tensor([[-20.0, -31.0], [-15.5, -8.0]])
    expected = conditional_distribution_alignment_loss(
        query_pos,
        scored(positives, "self", positives),
        query_neg,
        reference[:, 0],
        reference[:, 1:],
        beta=BETA,
        temperature=TEMPERATURE,
    )
    log_probs = [scored([row.context], row.instruction, [row.output]) for row in CONTEXTS]
    tokens = sum(map(len, decoder.target_ids([row.output for row in CONTEXTS])))
    passes = PlainPasses(encoder, decoder)
    assert alignment_loss(passes, reference).item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(passes.reference(TRIPLETS), torch.cat([query_pos[:, None], query_neg], dim=1))
    assert passes.compression_loss(CONTEXTS).item() == pytest.approx(
        -sum(log_probs).item() / tokens, rel=1e-5
    )


def test_plain_checkpointing_computes_the_layers_of_both_models_again_and_the_same_gradient(tiny_base):
    gradients, calls = [], []
    for checkpointing in (False, True):
        encoder = AutoRegEncoder.from_base(tiny_base, device="cpu", dtype="float32")
        decoder = FrozenDecoder.from_pretrained(tiny_base, device="cpu", dtype="float32")
        passes = PlainPasses(encoder, decoder, checkpointing=checkpointing)
        reference = passes.reference(TRIPLETS)
        bodies = (encoder.model, decoder.model.base_model)
        counted = [count(body.layers[0].mlp) for body in bodies]
        alignment_loss(passes, reference).backward()
        calls.append([len(made) for made in counted])
        gradients.append(encoder.model.get_input_embeddings().weight.grad)
        assert all(weight.grad is None for weight in decoder.model.parameters())
    assert calls == [[3, 3], [6, 6]]
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1])


def test_the_least_operations_are_those_that_pytorch_counts_where_nothing_is_padded(tiny_base):
    encoder = AutoRegEncoder.from_base(tiny_base, device="cpu", dtype="float32", attn_implementation="eager")
    decoder = FrozenDecoder.from_pretrained(
        tiny_base, device="cpu", dtype="float32", attn_implementation="eager"
    )
    row = CONTEXTS[0]
    prompt = torch.tensor(encoder.prompts.build([row.context], row.instruction).ids)
    target = torch.tensor(decoder.target_ids([row.output]))
    lm, k = decoder.model, encoder.num_compressed_tokens
    with FlopCounterMode(display=False) as counter:
        states = compressed_states(encoder.trainable(), prompt, torch.tensor([prompt.shape[1]]), k)
        read = torch.cat([states, lm.get_input_embeddings()(target[:, :-1])], dim=1)
        predicting = lm.base_model(inputs_embeds=read).last_hidden_state[:, -target.shape[1] :]
        lm.get_output_embeddings()(predicting).sum().backward()
    least = train.least_operations(encoder, decoder, "compression", [row])
    # What PyTorch counts looks to the right too, which attention need not, and the encoder's last layer at all tokens.
    of_one_layer = 3 * 2 * 32
    to_the_right = of_one_layer * (prompt.shape[1] ** 2 + 2 * read.shape[1] ** 2)
    not_read = of_one_layer * 2 * (prompt.shape[1] - k) * prompt.shape[1]
    assert least + to_the_right + not_read == pytest.approx(counter.get_total_flops(), rel=0.01)
    both = train.least_operations(encoder, decoder, "compression", CONTEXTS)
    assert both == least + train.least_operations(encoder, decoder, "compression", CONTEXTS[1:])


def test_a_step_needs_the_query_once_and_the_positive_after_both(pair):
    encoder, decoder = pair
    row = TRIPLETS[0]
    prompts, targets = train.texts_of(encoder, decoder, "alignment", [row])
    config = encoder.config
    assert prompts == [
        *encoder.prompts.build([row.query], config.query_instruction).ids,
        *encoder.prompts.build([row.pos], config.document_instruction).ids,
    ]
    assert targets == decoder.target_ids([row.pos, row.pos, row.neg[0]])


def test_results_that_do_not_agree_are_an_error(tmp_path):
    job = Job(OURS, "alignment", False, tmp_path, (), 1, "cpu", False, 1)

    def steps(loss, norm):
        return {
            OURS: [{"loss": 0.7, "gradient norm": 2.0}, {"loss": loss, "gradient norm": norm}],
            PLAIN: [{"loss": 0.7, "gradient norm": 2.0}] * 2,
        }

    found = train.agreement(job, steps(0.70001, 2.0))
    assert found["loss"]["greatest relative difference"] == pytest.approx(1e-5 / 0.7)
    for loss, norm, name in ((0.71, 2.0, "loss"), (float("nan"), 2.0, "loss"), (0.7, 2.1, "gradient norm")):
        with pytest.raises(RuntimeError, match=f"do not compute the same: {name}"):
            train.agreement(job, steps(loss, norm))


def test_rows_are_snli_triplets_of_the_corpus_and_generated_without_one(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    sources = [
        {"query": f"query {i}", "pos": f"positive {i}", "neg": [f"negative {i}"], "source": "SNLI-dev/test"}
        for i in range(6)
    ]
    others = [
        {**sources[0], "neg": []},
        {**sources[0], "source": "another"},
        {**sources[0], "neg": [sources[0]["pos"]]},
    ]
    text = "".join(json.dumps(row) + "\n" for row in [*others, *sources])
    (tmp_path / "pairs.jsonl.zst").write_bytes(zstandard.compress(text.encode()))
    source, rows = train.read_rows(tmp_path, "alignment", 6, seed=0)
    assert source == "pairs.jsonl.zst, SNLI"
    assert {row.query for row in rows} == {row["query"] for row in sources}
    assert all(row.neg == (row.query.replace("query", "negative"),) for row in rows)
    source, rows = train.read_rows(tmp_path, "compression", 40, seed=0)
    assert source == "generated, as compress.jsonl.zst is missing"
    assert rows == train.read_rows(tmp_path, "compression", 40, seed=0)[1]
    assert rows != train.read_rows(tmp_path, "compression", 40, seed=1)[1]
    lengths = [len(train.generated_row("alignment", random.Random(i)).query) for i in range(200)]
    assert 55 < np.median(lengths) < 80


def test_an_unknown_shape_or_stage_is_refused_in_one_line():
    for option, value in (("--shape", "7b"), ("--stage", "pretraining")):
        result = run(option, value)
        assert result.exit_code == 2
        assert result.stderr.count("error:") == 1
        assert value in result.stderr


def test_a_run_lets_both_take_turns_over_the_same_batches_and_writes_json_table_and_png(tmp_path, quiet):
    options = ("--shape", "tiny", "--stage", "alignment", "--no-checkpointing", "--no-bf16", "--steps", 2)
    result = run(*options, "--corpus", tmp_path, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert record["precision"] == "float32"
    found = record["configurations"]["alignment"]
    losses, norms = found["agreement"]["loss"], found["agreement"]["gradient norm"]
    # Three batches, one of them to warm up, and each another: equal losses are no accident.
    assert len(set(losses[OURS])) == 3
    assert losses[OURS] == pytest.approx(losses[PLAIN], rel=1e-4)
    assert norms[OURS] == pytest.approx(norms[PLAIN], rel=1e-3)
    step = found["measures"]["step"]
    own, other = step["rounds"][OURS], step["rounds"][PLAIN]
    assert (len(own), len(other)) == (2, 2)
    assert step["ratios"][PLAIN] == pytest.approx((other[0] / own[0] + other[1] / own[1]) / 2)
    share = found["least operations"] / record["matmul peak"] / step["medians"][OURS]
    assert found["share of matmul peak"][OURS] == pytest.approx(share)
    for system, peak in found["measures"].get("peak memory", {"medians": {}})["medians"].items():
        assert peak >= found["measures"]["memory of loaded models"]["medians"][system] > 0
    written = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert "| alignment |" in written
    assert record["command"] in written
    assert "Matmul peak here" in result.output
    assert (tmp_path / "out" / "results.png").read_bytes().startswith(b"\x89PNG")
