"""The `farrier` command."""

import sys
from typing import Annotated

import typer

from farrier import __version__
from farrier.agent.commands import bench, build, convert, detect, inspect, serve, tune
from farrier.agent.console import errors_console
from farrier.targets.errors import FarrierError

app = typer.Typer(
    name="farrier",
    help="Fits this machine with its own LLM engine: detect, convert, build, serve.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("detect")(detect.detect_command)
app.command("convert")(convert.convert_command)
app.command("build")(build.build_command)
app.command("inspect")(inspect.inspect_command)
app.command("tune")(tune.tune_command)
app.command("serve")(serve.serve_command)
app.add_typer(bench.app, name="bench")


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"farrier {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option(help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: deliberate errors become one sentence and exit status 1, without a traceback unless --debug."""
    try:
        app()
    except FarrierError as error:
        if "--debug" in sys.argv[1:]:
            raise
        errors_console().print(f"farrier: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
