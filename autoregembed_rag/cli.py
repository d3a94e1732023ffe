"""The `autoregembed` command. Heavy imports wait until a command runs, so that --help is instant."""

from __future__ import annotations

import typer

from .cli_encode import EncodeCommand, encode
from .cli_explain import explain
from .cli_finetune import finetune
from .cli_index import index, search
from .cli_mine import mine
from .cli_plan import plan
from .cli_push import push
from .cli_train import train

app = typer.Typer(
    help="Train and use AutoRegEmbed text embedders.", no_args_is_help=True, pretty_exceptions_enable=False
)
app.add_typer(train, name="train")
app.add_typer(index, name="index")
app.command(cls=EncodeCommand)(encode)
app.command()(search)
app.command()(explain)
app.command()(mine)
app.command()(finetune)
app.command()(push)
app.command()(plan)
