"""The ``lorafuse`` command: the groups of commands joined, and what their failures become."""

from __future__ import annotations

import gc
import sys
from typing import Annotated, Any

import typer

from engines.commands.bench import app as bench_app
from engines.commands.build import build
from engines.commands.bundle import app as bundle_app
from engines.commands.export import export
from engines.commands.merge import inspect, merge
from engines.commands.plan import plan
from engines.commands.run import run
from engines.commands.terminal import BAD_INPUT, DONE, print_error
from engines.commands.train import train
from engines.commands.verify import verify
from lora.errors import LorafuseError

HELP = """Ship LoRA-tuned models.

Example: lorafuse export MiniLM adapters/movies --task movies --out bundle"""
app = typer.Typer(name="lorafuse", add_completion=False, pretty_exceptions_enable=False, help=HELP)


def print_version(wanted: bool) -> None:
    """Print the installed version and end, where that was asked for."""
    if not wanted:
        return
    from importlib.metadata import version

    print(version("lorafuse"))
    raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What stands before a command."""


app.command()(train)
app.command()(merge)
app.command()(inspect)
app.command()(plan)
app.command()(export)
app.add_typer(bundle_app, name="bundle")
app.command()(build)
app.command()(verify)
app.command()(run)
app.add_typer(bench_app, name="bench")


def main() -> None:
    """Entry point: an expected failure is one line and exit status 3; a bug keeps its traceback."""
    usage_error: Any = typer.BadParameter.__base__  # typer keeps the class itself private
    try:
        status = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except usage_error as error:
        print_error(f"{error.format_message() or 'no command given'} (see lorafuse --help)")
        status = BAD_INPUT
    except LorafuseError as error:
        print_error(str(error))
        status = BAD_INPUT
    except typer.Abort:
        status = 130
    # A traced model leaves millions of objects; the interpreter's last collection would visit them all, for seconds.
    gc.freeze()
    raise SystemExit(status or DONE)
