"""Fine-tuning on somebody's own corpus: one command, a plan first, work that is never lost, and an honest verdict."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from autoregembed_rag import AutoRegEncoder, FrozenDecoder
from autoregembed_rag.finetuning import run as module
from autoregembed_rag.finetuning.documents import Document, Section
from autoregembed_rag.finetuning.judged import Judged
from autoregembed_rag.finetuning.reading import read_documents
from autoregembed_rag.finetuning.report import FinetuneReport
from autoregembed_rag.finetuning.run import FinetuneArguments, finetune
from autoregembed_rag.training.arguments import AlignmentArguments, CompressionArguments, ContrastArguments
from autoregembed_rag.training.trainer import StageTrainer


def arguments(**changes) -> FinetuneArguments:
    """Short stages in float32, saved often, on passages of a size that the tiny model reads."""
    common = {"batch_size": 4, "bf16": False, "save_steps": 1, "max_steps": 2}
    return FinetuneArguments(
        **{
            "compression": CompressionArguments(**common),
            "alignment": AlignmentArguments(**common),
            "contrast": ContrastArguments(**common),
            "held_out": 0.3,
            **changes,
        }
    )


def run(folder: Path, output: Path, model: Path, **changes) -> FinetuneReport:
    return finetune(folder, output, model, arguments(**changes), device="cpu", announce=lambda _: None)


@pytest.fixture(scope="module")
def finished(folder, tiny_checkpoint, tmp_path_factory) -> tuple[Path, FinetuneReport, list[str]]:
    """(output, report, what was announced) of a whole run."""
    output = tmp_path_factory.mktemp("finished") / "out"
    said: list[str] = []
    report = finetune(folder, output, tiny_checkpoint, arguments(), device="cpu", announce=said.append)
    return output, report, said


def test_one_call_leaves_a_trained_checkpoint_with_its_decoder(finished, tiny_checkpoint):
    output, report, _ = finished
    start = AutoRegEncoder.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32")
    trained = AutoRegEncoder.from_pretrained(output, device="cpu", dtype="float32")
    texts = ["a fox near the river"]
    assert np.abs(trained.encode_queries(texts) - start.encode_queries(texts)).max() > 1e-6
    assert list(report.losses) == ["compression", "alignment", "contrast"]
    decoder = FrozenDecoder.from_pretrained(output, device="cpu", dtype="float32")
    original = FrozenDecoder.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32")
    assert decoder.fingerprint == original.fingerprint
    assert not (output / "stages").exists()


def test_each_stage_starts_where_the_one_before_it_ended(folder, tiny_checkpoint, tmp_path, monkeypatch):
    models: list[str] = []

    def listening(train):
        def listen(encoder, *rest):
            models.append(encoder.fingerprint)
            trained = train(encoder, *rest)
            models.append(trained.fingerprint)
            return trained

        return listen

    for name in ("train_compression", "train_alignment", "train_contrast"):
        monkeypatch.setattr(module, name, listening(getattr(module, name)))
    run(folder, tmp_path / "out", tiny_checkpoint, blend=1.0)
    first, second, third = models[::2]
    assert first == AutoRegEncoder.from_pretrained(tiny_checkpoint, device="cpu").fingerprint
    assert [second, third] == models[1:-1:2]
    assert models[-1] == AutoRegEncoder.from_pretrained(tmp_path / "out", device="cpu").fingerprint
    assert len(set(models)) == 4


def test_the_plan_comes_first_and_counts_what_was_found(finished):
    _, report, (plan,) = finished
    assert "documents: 12" in plan
    assert f"alignment rows: {report.plan.counts['alignment rows']}" in plan
    assert f"held-out queries: {report.comparison.queries}" in plan
    assert all(f"{name}: 2 steps" in plan for name in ("compression", "alignment", "contrast"))
    assert "estimated time:" in plan
    assert 0 < report.plan.evaluation < report.plan.seconds


def test_the_plan_is_announced_before_anything_is_trained(folder, tiny_checkpoint, tmp_path):
    def stop(plan: str) -> None:
        assert not (tmp_path / "out" / "stages").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(folder, tmp_path / "out", tiny_checkpoint, arguments(), device="cpu", announce=stop)


def test_loss_curves_are_a_picture_and_tensorboard_events(finished):
    output, report, _ = finished
    image = np.asarray(Image.open(output / "losses.png").convert("L"))
    assert image.std() > 5, "it is not blank"
    assert all([entry["step"] for entry in entries] == [1, 2] for entries in report.losses.values())
    for stage in ("compression", "alignment", "contrast"):
        assert any((output / "runs" / stage).rglob("events.out.tfevents.*"))


@pytest.mark.parametrize("change", ["replaced", "cut short", "deleted"])
def test_a_finished_run_whose_weights_are_others_by_now_is_no_result(
    finished, folder, tiny_checkpoint, tmp_path, change
):
    output, _, _ = finished
    shutil.copytree(output, tmp_path / "out")
    weights = tmp_path / "out" / "model.safetensors"
    if change == "replaced":
        shutil.copy(tiny_checkpoint / "model.safetensors", weights)
    elif change == "cut short":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        weights.unlink()
    with pytest.raises(ValueError, match=r"weights in .*out are not those that .*report\.json is about"):
        run(folder, tmp_path / "out", tiny_checkpoint)


@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        ("plan.json", '{"tasks": []}', "it has no 'run'"),
        ("plan.json", '{"run": {}, "plan": {"kind": "documents"}}', "stages"),
        ("plan.json", "{", "Expecting"),
        ("report.json", "{}", "it has no 'weights'"),
        ("report.json", '{"weights": "", "before": 1, "after": 2, "comparison": {}}', "missing"),
    ],
)
def test_a_strange_record_is_named(finished, folder, tiny_checkpoint, tmp_path, file, content, complaint):
    shutil.copytree(finished[0], tmp_path / "out")
    (tmp_path / "out" / file).write_text(content)
    message = rf"{file} is no record of a fine-tuning run \(.*{complaint}.*\): give another output folder"
    with pytest.raises(ValueError, match=message):
        run(folder, tmp_path / "out", tiny_checkpoint)


def test_the_report_is_kept_and_a_finished_run_returns_it(finished, folder, tiny_checkpoint, monkeypatch):
    output, report, _ = finished
    monkeypatch.setattr(StageTrainer, "train", lambda *_, **__: pytest.fail("trained again"))
    again = run(folder, output, tiny_checkpoint)
    assert again.comparison == report.comparison
    assert again.before == report.before
    assert json.loads((output / "report.json").read_text())["verdict"] == report.verdict


@pytest.mark.parametrize("stage", ["compression", "contrast"])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    stage, finished, folder, tiny_checkpoint, tmp_path, monkeypatch
):
    whole, report, _ = finished
    step = StageTrainer.training_step

    def breaking(self, *args, **kwargs):
        if Path(self.args.output_dir).name == stage and self.state.global_step == 1:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "training_step", breaking)
        with pytest.raises(KeyboardInterrupt):
            run(folder, tmp_path / "out", tiny_checkpoint)
    kept = tmp_path / "out" / "before.json"
    scores = dict.fromkeys(json.loads(kept.read_text()), 0.25)
    kept.write_text(json.dumps(scores))
    (tmp_path / "out" / ".saving-killed").mkdir()
    steps, said = [], []
    monkeypatch.setattr(StageTrainer, "training_step", lambda s, *a, **k: steps.append(1) or step(s, *a, **k))
    resumed = finetune(
        folder, tmp_path / "out", tiny_checkpoint, arguments(), device="cpu", announce=said.append
    )
    done = {"compression": 0, "contrast": 2}[stage]
    assert said[0] == f"going on with the run that {tmp_path / 'out'} holds: {done} of 3 stages are done"
    assert "estimated time:" in said[1]
    assert not list((tmp_path / "out").glob(".saving*"))
    assert len(steps) == {"compression": 5, "contrast": 1}[stage], "what was done is not done again"
    assert resumed.before.per_query == scores, "measured once for all calls"
    assert resumed.after == report.after
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (whole / name).read_bytes()


def test_a_run_of_other_settings_or_a_strangers_folder_is_refused(
    finished, folder, tiny_checkpoint, tmp_path
):
    output, _, _ = finished
    with pytest.raises(ValueError, match=r"other data or settings.*held_out 0.3 -> 0.4"):
        run(folder, output, tiny_checkpoint, held_out=0.4)
    with pytest.raises(ValueError, match=r"other data or settings \(contrast left out\)"):
        run(folder, output, tiny_checkpoint, contrast=None)
    rate = replace(arguments().contrast, learning_rate=1e-5)
    with pytest.raises(ValueError, match=r"settings \(contrast: learning_rate 0.0002 -> 1e-05\)"):
        run(folder, output, tiny_checkpoint, contrast=rate)
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not empty"):
        run(folder, tmp_path, tiny_checkpoint)
    with pytest.raises(ValueError, match="is a file"):
        run(folder, tmp_path / "thesis.txt", tiny_checkpoint)


@pytest.mark.parametrize(
    "change", [lambda s: {"a": 1}, lambda s: dict.fromkeys(s, 7), lambda s: dict.fromkeys(s)]
)
def test_scores_of_other_queries_are_refused_before_anything_is_trained(
    finished, folder, tiny_checkpoint, tmp_path, monkeypatch, change
):
    monkeypatch.setattr(StageTrainer, "train", lambda *_, **__: pytest.fail("trained"))
    shutil.copytree(finished[0], tmp_path / "out")
    (tmp_path / "out" / "report.json").unlink()
    before = tmp_path / "out" / "before.json"
    before.write_text(json.dumps(change(json.loads(before.read_text()))))
    with pytest.raises(ValueError, match=r"before\.json is no record of a fine-tuning run"):
        run(folder, tmp_path / "out", tiny_checkpoint)


@pytest.mark.parametrize(
    ("source", "error", "complaint"),
    [
        ("none", FileNotFoundError, "none does not exist"),
        ([{"text": "x"}], TypeError, r"document 1 is a dict: make a Document of it, .*plain_document"),
        (3, TypeError, "a path, a list of documents or a Judged is needed, not int"),
    ],
)
def test_a_source_that_is_none_leaves_no_folder(tiny_checkpoint, tmp_path, source, error, complaint):
    with pytest.raises(error, match=complaint):
        run(source, tmp_path / "out", tiny_checkpoint)
    assert not (tmp_path / "out").exists()


def test_two_runs_do_not_write_into_one_folder(folder, tiny_checkpoint, tmp_path):
    def second(_: str) -> None:
        run(folder, tmp_path / "out", tiny_checkpoint)

    with pytest.raises(OSError, match="another run is writing"):
        finetune(folder, tmp_path / "out", tiny_checkpoint, arguments(), device="cpu", announce=second)


def test_a_plain_language_model_becomes_an_encoder(folder, tiny_base, tmp_path):
    run(folder, tmp_path / "out", tiny_base, alignment=None, contrast=None)
    encoder = AutoRegEncoder.from_pretrained(tmp_path / "out", device="cpu")
    assert encoder.num_compressed_tokens == 5
    assert encoder.config.decoder == str(tiny_base)


def test_an_adapter_goes_through_all_stages_and_is_merged(folder, tiny_base, tmp_path):
    run(folder, tmp_path / "out", tiny_base, lora=2)
    assert not list((tmp_path / "out").glob("adapter*"))
    encoder = AutoRegEncoder.from_pretrained(tmp_path / "out", device="cpu", dtype="float32")
    start = AutoRegEncoder.from_base(tiny_base, device="cpu", dtype="float32")
    assert np.abs(encoder.encode_queries(["fox"]) - start.encode_queries(["fox"])).max() > 1e-6


@pytest.mark.parametrize(("model", "default"), [("tiny_checkpoint", 0.5), ("tiny_base", 1.0)])
def test_the_result_lies_between_the_weights_before_training_and_the_trained_ones(
    folder, tmp_path, model, default, request
):
    model = request.getfixturevalue(model)
    short = {"compression": None, "alignment": None}
    weights = {}
    for name, blend in (("all", 1.0), ("quarter", 0.25), ("default", None)):
        run(folder, tmp_path / name, model, blend=blend, **short)
        weights[name] = load_file(tmp_path / name / "model.safetensors")
    table = "embed_tokens.weight"
    load = AutoRegEncoder.from_pretrained if default < 1 else AutoRegEncoder.from_base
    before = load(model, device="cpu", dtype="float32").model.state_dict()[table]
    moved = weights["all"][table] - before
    assert moved.abs().max() > 1e-4
    torch.testing.assert_close(weights["quarter"][table], before + 0.25 * moved, rtol=0, atol=1e-7)
    torch.testing.assert_close(weights["default"][table], before + default * moved, rtol=0, atol=1e-7)


def test_a_bundled_decoder_comes_along_so_that_the_folder_can_move(
    folder, tiny_checkpoint, tmp_path, monkeypatch
):
    decoder = Path(AutoRegEncoder.from_pretrained(tiny_checkpoint, device="cpu").config.decoder)
    monkeypatch.setattr(module, "BUNDLED", decoder.parent)
    run(folder, tmp_path / "here", tiny_checkpoint, compression=None, alignment=None)
    moved = (tmp_path / "here").rename(tmp_path / "there")
    kept = Path(AutoRegEncoder.from_pretrained(moved, device="cpu").config.decoder)
    assert kept.parent == moved.resolve()
    fingerprints = [FrozenDecoder.from_pretrained(m, device="cpu").fingerprint for m in (moved, decoder)]
    assert fingerprints[0] == fingerprints[1]


def test_training_on_a_judged_corpus_in_memory(folder, tiny_checkpoint, tmp_path):
    things = sorted(file.stem for file in folder.iterdir())
    corpus = {thing: f"Here is a {thing} near the river bank, as one would hope." for thing in things}
    queries = {thing: f"Where can one find the {thing}?" for thing in things}
    judged = Judged(corpus, queries, {thing: {thing: 1} for thing in things}, {})
    report = run(judged, tmp_path / "out", tiny_checkpoint, compression=None, alignment=None)
    assert report.plan.kind == "beir"
    assert report.comparison.queries == 4


def test_documents_without_queries_are_refused(tiny_checkpoint, tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(ValueError, match="holds no documents"):
        run(tmp_path / "in", tmp_path / "out", tiny_checkpoint)
    (tmp_path / "in" / "one.txt").write_text("The only document there is, without any second sentence")
    with pytest.raises(ValueError, match="need two"):
        run(tmp_path / "in", tmp_path / "out", tiny_checkpoint)


def test_one_of_several_processes_is_sent_elsewhere(folder, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process"):
        run(folder, tmp_path / "out", tiny_checkpoint)


def test_a_short_time_makes_short_stages_of_fewer_rows(folder, tiny_checkpoint, tmp_path):
    settings = {"minutes": 1e-6, "compression": None, "alignment": None}
    report = run(folder, tmp_path / "out", tiny_checkpoint, **settings)
    (stage,) = report.plan.stages
    assert (stage.steps, stage.rows) == (1, 4)
    assert len(report.losses["contrast"]) == 1


def test_documents_may_be_given_in_memory(folder, tiny_checkpoint, tmp_path):
    documents = read_documents(folder)
    assert all(isinstance(document, Document) for document in documents)
    assert isinstance(documents[0].sections[0], Section)
    report = run(documents, tmp_path / "out", tiny_checkpoint, compression=None, alignment=None)
    assert report.plan.counts["documents"] == 12


def test_the_card_says_what_was_found_how_it_was_trained_and_what_came_of_it(finished, tiny_checkpoint):
    output, report, _ = finished
    card = (output / "README.md").read_text(encoding="utf-8")
    start = AutoRegEncoder.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32")
    c = report.comparison
    assert f"from the model with fingerprint `{start.fingerprint}`" in card
    assert "documents: 12" in card
    assert "held_out 0.3" in card
    assert "|  | compression | alignment | contrast |" in card
    assert "| max_steps | 2 | 2 | 2 |" in card
    assert f"nDCG@10 {c.before:.4f} and {c.after:.4f}" in card
    assert card.rstrip().splitlines()[-3].endswith(f": {report.verdict}.")
    (result,) = ModelCard(card).data.eval_results
    assert result.metric_value == round(c.after, 4)
    assert str(tiny_checkpoint) not in card


@pytest.mark.parametrize("change", [{"pooling": "mean"}, {"query_instruction": "Name the topic."}, {}])
def test_scores_stay_in_a_card_while_the_encoder_is_the_one_that_was_measured(change, finished, tmp_path):
    output, report, _ = finished
    assert AutoRegEncoder.from_pretrained(output, device="cpu").fingerprint == report.fingerprint
    AutoRegEncoder.from_pretrained(output, device="cpu", dtype="float32", **change).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| max_steps | 2 | 2 | 2 |" in card, "the weights were trained so, whatever the settings"
    assert ("## Scores" in card) == (not change)
    assert (ModelCard(card).data.eval_results is not None) == (not change)
