"""Settings that make sense, an honest verdict, and the command that gives both."""

from __future__ import annotations

import pytest
from typer import Typer
from typer.testing import CliRunner

from autoregembed_rag.cli_finetune import finetune as command
from autoregembed_rag.finetuning.evaluation import Scores, compare
from autoregembed_rag.finetuning.planning import Plan
from autoregembed_rag.finetuning.report import FinetuneReport
from autoregembed_rag.finetuning.run import FinetuneArguments


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"minutes": "3"}, TypeError),
        ({"held_out": None}, TypeError),
        ({"blend": "half"}, TypeError),
        ({"max_tokens": 1.5}, TypeError),
        ({"lora": "8"}, TypeError),
        ({"minutes": float("inf")}, ValueError),
        ({"lora": 0}, ValueError),
        ({"max_tokens": 0}, ValueError),
        ({"seed": -1}, ValueError),
        ({"seed": 2**32}, ValueError),
    ],
)
def test_settings_are_checked_where_they_are_made(change, error):
    with pytest.raises(error, match=f"{next(iter(change))} must be"):
        FinetuneArguments(**change)


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
    assert "can never show a difference" not in str(even)
    few = report_of(low[:5], high[:5])
    assert not few.better
    assert "fewer than 6 held-out queries can never show a difference" in str(few)
    assert report_of(low[:6], high[:6]).better


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
    options += ["--stages", "contrast", "--rate-factor", "100000", "--held-out", "0.5"]
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
        (["--seed", "99999999999"], "seed must be at least 0 and below 2^32"),
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
