"""What a run is about to do: steps and rows within a time, and doubts that are said beforehand."""

from dataclasses import replace

import pytest

from autoregembed_rag.finetuning.planning import Plan, Speed, StagePlan, plan_stage, plan_stages, share_out
from autoregembed_rag.finetuning.run import FinetuneArguments
from autoregembed_rag.training.arguments import CompressionArguments


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


def test_time_is_shared_so_that_the_modest_get_all_they_want():
    assert share_out({"a": 10, "b": 100, "c": 100}, 70) == {"a": 10, "b": 30, "c": 30}
    assert share_out({"a": 10}, 70) == {"a": 10}


def test_a_short_time_goes_to_the_stage_that_trains_what_is_searched_by():
    stages = FinetuneArguments().stages
    longer = {name: replace(s, batch_size=4, max_steps=1000, epochs=1000) for name, s in stages.items()}
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


@pytest.mark.parametrize(
    ("queries", "minutes", "doubts"),
    [
        (6, None, []),
        (5, None, ["can never show a difference"]),
        (6, 2, []),
        (6, 1, ["1 minutes do not suffice"]),
        (1, 0.5, ["0.5 minutes do not suffice", "can never show a difference"]),
    ],
)
def test_a_plan_doubts_too_little_time_and_too_few_queries(queries, minutes, doubts):
    stage = StagePlan("contrast", 10, 1, 90.0)
    text = str(Plan("documents", {"held-out queries": queries}, (stage,), 5.0, minutes))
    lines = text.split("estimated time: 95 s")[1].split("\n")[1:]
    assert len(lines) == len(doubts)
    assert all(doubt in line for doubt, line in zip(doubts, lines, strict=True))
