"""The trimtab command: one subcommand per verb, generated from the verb's configuration.

Only the commands that a command line names are made in full (`cli_verbs`), so that `trimtab
--help` waits for no configuration.

Exit status: 0 done, 1 unexpected failure, 2 an error with a remedy, 130 stopped by Ctrl-C.
"""

import io
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli_errors import reported, write
from trimtab.cli_summaries import OF_HOSTS, VERBS
from trimtab.machine import share_cores, use_large_pages


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; never returns.

    Args:
        args: Words after the program's name (default: those of this process).
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that cannot show a character must not cost the user a finished run.
            stream.reconfigure(errors="backslashreplace")
    use_large_pages()
    share_cores()
    command_line(sys.argv[1:] if args is None else args)(args=args, prog_name="trimtab")


def command_line(named: Collection[str] | None = None) -> typer.Typer:
    """The command and its subcommands.

    Args:
        named: Words among which are the verbs that may be run or explained; of the others there
            is a name and a line. None makes all verbs in full.
    """
    app = typer.Typer(
        name="trimtab",
        help="Tune a small model once, and steer any larger model with it.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        # Boxes take longer to be drawn than all the rest of `trimtab --help`.
        rich_markup_mode=None,
    )
    app.callback()(_root)
    hosts = typer.Typer(
        help="Hosts, and what they let us see.", no_args_is_help=True, rich_markup_mode=None
    )
    app.add_typer(hosts, name="hosts")
    for group, verbs in ((app, VERBS), (hosts, OF_HOSTS)):
        for verb, summary in verbs.items():
            is_named = named is None or verb in named
            # Given as it is, for a summary of its own would be cut to a line.
            made = group.command(verb, short_help=summary)
            made(_in_full(verb) if is_named else _in_brief(summary))
    for name, function in (("show", _show), ("key", _key), ("list", _list)):
        app.command(name, short_help=function.__doc__)(function)
    return app


def _in_full(verb: str) -> Callable[..., None]:
    # Imported here, not above: configurations take longer to make than all the rest.
    from trimtab.cli_verbs import command

    return command(verb)


def _in_brief(summary: str) -> Callable[[], None]:
    def nothing() -> None:
        raise AssertionError("a verb that was not named was run")

    nothing.__doc__ = summary
    return nothing


def _say_version(wanted: bool) -> None:
    if wanted:
        from trimtab.store.files import package_versions

        write(f"trimtab {package_versions()['trimtab']}\n")
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_say_version, is_eager=True, help="Say the version."),
    ] = False,
) -> None:
    del version


def _show(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Adapter folder.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the manifest itself, as JSON.")
    ] = False,
) -> None:
    """Say what an adapter is, after checking every file of it."""
    with reported():
        # Imported here, as below: most commands need nothing of the others.
        from trimtab.show import show as show_adapter

        result = show_adapter(adapter)
        write(f"{result.manifest.model_dump_json(indent=1) if as_json else result.summary()}\n")


def _key(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is.")],
    keys: Annotated[Path, typer.Option("--keys", help="File of API keys (needed).")],
    admin: Annotated[
        bool, typer.Option("--admin", help="It may load and unload adapters.")
    ] = False,
    requests_per_minute: Annotated[
        int | None, typer.Option("--requests-per-minute", min=1, help="A limit of its own.")
    ] = None,
) -> None:
    """Make an API key for `trimtab serve`: the file keeps its hash, and it is shown once."""
    with reported():
        from trimtab.serving.keys import add_key

        made = add_key(keys, name, admin=admin, requests_per_minute=requests_per_minute)
        write(f"{made}\n")


def _list() -> None:
    """List installed adapters, and those in and below the current folder."""
    with reported():
        from trimtab.show import describe_list
        from trimtab.store.local import list_adapters

        write(f"{describe_list(list_adapters())}\n")
