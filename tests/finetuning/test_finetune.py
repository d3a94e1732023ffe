"""Fine-tuning on somebody's own corpus: one command, a plan first, work that is never lost, and an honest verdict."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer import Typer
from typer.testing import CliRunner

from autoregembed_rag import AutoRegEncoder, FrozenDecoder
from autoregembed_rag.cli_finetune import finetune as command
from autoregembed_rag.finetuning import run as module
from autoregembed_rag.finetuning.documents import Document, Section, read_documents
from autoregembed_rag.finetuning.evaluation import Scores, compare
from autoregembed_rag.finetuning.judged import Judged
from autoregembed_rag.finetuning.planning import Plan, Speed, StagePlan, plan_stage, plan_stages, share_out
from autoregembed_rag.finetuning.report import FinetuneReport
from autoregembed_rag.finetuning.run import FinetuneArguments, finetune
from autoregembed_rag.training.arguments import AlignmentArguments, CompressionArguments, ContrastArguments
from autoregembed_rag.training.trainer import StageTrainer

THINGS = [
    "fox",
    "dog",
    "river",
    "bank",
    "lemon",
    "pepper",
    "vector",
    "reader",
    "passage",
    "model",
    "answer",
    "jump",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Twelve Markdown files whose titles share words with their texts."""
    folder = tmp_path_factory.mktemp("notes")
    for i, thing in enumerate(THINGS):
        near = THINGS[(i + 1) % len(THINGS)]
        (folder / f"{thing}.md").write_text(
            f"# All about every {thing}\n\nNobody has yet seen a {thing} like this one here. "
            f"Sometimes people find a {thing} that is near the {near}.\n",
            encoding="utf-8",
        )
    return folder


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
    steps = []
    monkeypatch.setattr(StageTrainer, "training_step", lambda s, *a, **k: steps.append(1) or step(s, *a, **k))
    resumed = run(folder, tmp_path / "out", tiny_checkpoint)
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
    with pytest.raises(ValueError, match=r"other data or settings.*contrast"):
        run(folder, output, tiny_checkpoint, contrast=None)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "plan.json").write_text("{")
    with pytest.raises(ValueError, match=r"plan\.json is no record"):
        run(folder, tmp_path / "broken", tiny_checkpoint)
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not empty"):
        run(folder, tmp_path, tiny_checkpoint)
    with pytest.raises(ValueError, match="is a file"):
        run(folder, tmp_path / "thesis.txt", tiny_checkpoint)


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


def test_training_on_a_judged_corpus_in_memory(tiny_checkpoint, tmp_path):
    corpus = {thing: f"Here is a {thing} near the river bank, as one would hope." for thing in THINGS}
    queries = {thing: f"Where can one find the {thing}?" for thing in THINGS}
    judged = Judged(corpus, queries, {thing: {thing: 1} for thing in THINGS}, {})
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


def scores(values: list[float]) -> Scores:
    return Scores({str(i): value for i, value in enumerate(values)})


def report_of(before: list[float], after: list[float]) -> FinetuneReport:
    first, second = scores(before), scores(after)
    return FinetuneReport(first, second, compare(first, second), Plan("documents", {}, (), 1.0), {}, 1.0)


def test_only_a_better_model_is_called_better():
    low, high = [0.2] * 20, [0.8] * 20
    assert (report_of(low, high).verdict, report_of(low, high).better) == ("better", True)
    assert (report_of(high, low).verdict, report_of(high, low).better) == ("worse", False)
    even = report_of([0.2, 0.8] * 10, [0.8, 0.2] * 10)
    assert (even.verdict, even.better) == ("no difference that can be told", False)
    assert "to be preferred" not in str(report_of(low, high))
    assert all("to be preferred" in str(report) for report in (report_of(high, low), even))


@pytest.fixture(scope="module")
def app() -> Typer:
    app = Typer()
    app.command()(command)
    return app


def test_the_command_reports_a_broken_model_as_not_better(app, folder, tiny_checkpoint, tmp_path):
    options = [
        str(folder),
        "--output",
        str(tmp_path / "out"),
        "--model",
        str(tiny_checkpoint),
        "--device",
        "cpu",
    ]
    options += ["--stages", "contrast", "--rate-factor", "3000", "--held-out", "0.5"]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 3, result.output
    assert result.output.index("estimated time:") < result.output.index("nDCG@10 before:")
    assert "verdict: better" not in result.output
    assert "to be preferred" in result.output
    assert (tmp_path / "out" / "model.safetensors").exists(), "kept for inspection"


@pytest.mark.parametrize(("better", "code"), [(True, 0), (False, 3)])
def test_the_exit_code_says_whether_the_model_is_better(app, better, code, monkeypatch, tmp_path):
    low, high = [0.2] * 20, [0.8] * 20
    report = report_of(low, high) if better else report_of(high, low)
    monkeypatch.setattr("autoregembed_rag.finetuning.finetune", lambda *_, **__: report)
    result = CliRunner().invoke(app, [str(tmp_path), "--output", str(tmp_path / "out")])
    assert result.exit_code == code
    assert f"verdict: {'better' if better else 'worse'}" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stages", "contrast,warmup"], "no stage 'warmup'"),
        (["--minutes", "0"], "minutes must be above 0"),
        (["--held-out", "1"], "held_out must be between 0 and 1"),
        (["--rate-factor", "0"], "must be above 0"),
        (["--blend", "0"], "blend must be above 0"),
    ],
)
def test_the_command_refuses_what_makes_no_sense(app, options, message, folder, tiny_checkpoint, tmp_path):
    common = [str(folder), "--output", str(tmp_path / "out"), "--model", str(tiny_checkpoint)]
    result = CliRunner().invoke(app, [*common, *options])
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_a_stage_takes_all_epochs_or_what_its_time_allows():
    settings = CompressionArguments(batch_size=10, epochs=2)
    speed = Speed(step=2.0)
    assert plan_stage("c", 95, settings, speed) == StagePlan("c", 95, 20, 40.0)
    assert plan_stage("c", 95, settings, speed, budget=30) == StagePlan("c", 95, 15, 30.0)
    assert plan_stage("c", 95, settings, speed, budget=9) == StagePlan("c", 40, 4, 8.0)
    assert plan_stage("c", 95, settings, speed, budget=0).steps == 1
    assert plan_stage("c", 95, replace(settings, max_steps=7), speed, budget=30).steps == 7
    # What is done for every row before counts too, for no more rows than are read.
    assert plan_stage("c", 100, settings, Speed(2.0, 0.1), budget=12) == StagePlan("c", 40, 4, 12.0)
    assert plan_stage("c", 100, settings, Speed(2.0, 0.1), budget=36) == StagePlan("c", 100, 13, 36.0)


def test_a_checkpoint_is_written_every_few_minutes_or_more_often_if_asked():
    settings = CompressionArguments(save_steps=100)
    assert StagePlan("c", 10, 1000, 10_000.0).apply(settings).save_steps == 30
    assert StagePlan("c", 10, 1000, 1000.0).apply(settings).save_steps == 100
    assert StagePlan("c", 10, 2, 10_000.0).apply(settings).save_steps == 1
    assert StagePlan("c", 10, 2, 10.0).apply(replace(settings, save_steps=None)).save_steps is None


def test_one_of_several_processes_is_sent_elsewhere(folder, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process"):
        run(folder, tmp_path / "out", tiny_checkpoint)


def test_time_is_shared_so_that_the_modest_get_all_they_want():
    assert share_out({"a": 10, "b": 100, "c": 100}, 70) == {"a": 10, "b": 30, "c": 30}
    assert share_out({"a": 10}, 70) == {"a": 10}


def test_a_short_time_goes_to_the_stage_that_trains_what_is_searched_by():
    stages = arguments().stages
    longer = {name: replace(settings, max_steps=1000, epochs=1000) for name, settings in stages.items()}
    speeds = {name: Speed(1.0) for name in longer}
    rows = dict.fromkeys(longer, 4000)
    plan = plan_stages(rows, longer, speeds, budget=80)
    assert [(stage.name, stage.steps) for stage in plan] == [
        ("compression", 10),
        ("alignment", 10),
        ("contrast", 60),
    ]
    alone = plan_stages({"contrast": 4000}, {"contrast": longer["contrast"]}, speeds, budget=80)
    assert alone[0].steps == 80
    assert [stage.steps for stage in plan_stages(rows, longer, speeds, budget=None)] == [1000] * 3


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
