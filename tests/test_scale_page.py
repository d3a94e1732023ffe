"""The plans that docs/scale.md shows are what the command prints."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from autoregembed_rag.cli import app

PAGE = (Path(__file__).parents[1] / "docs" / "scale.md").read_text(encoding="utf-8")
SHOWN = re.findall(r"```text\n\$ autoregembed ([^\n]*)\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.mark.parametrize(("command", "shown"), SHOWN, ids=[command for command, _ in SHOWN])
def test_every_line_is_the_commands_own(command, shown):
    result = CliRunner().invoke(app, shlex.split(command))
    assert result.exit_code == 0, result.output
    printed = iter(result.stdout.splitlines())
    assert all(line in printed for line in shown.splitlines())  # in their order; some are left out


def test_there_are_plans_of_three_sizes():
    assert [re.search(r"--model (\S+)", command)[1] for command, _ in SHOWN] == [
        "mini",
        "mini",
        "qwen2.5-0.5b",
        "llama2-7b",
    ]
