"""The trimtab command: one subcommand per verb, generated from the verb's configuration.

One rule makes all command lines. What a verb works on is an argument (`_ARGUMENTS`): the user's own
text or prompts where the verb starts from them, else the folder of the verb before, and for mount,
export and evaluate the host after it. Every other field is an option of the field's name
(`max_tokens` -> `--max-tokens`), with the field's docstring as its help. A field of many values is
repeated (`--stop A --stop B`); where its values come from a closed list, commas do too
(`--carriers head,memory`). `--config FILE` gives any fields by name in TOML or JSON; what the
command line says wins.

Exit status: 0 done, 1 unexpected failure, 2 an error with a remedy, 130 stopped by Ctrl-C.
"""

import inspect
import io
import os
import reprlib
import sys
import types
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from rich.markup import escape

from trimtab import config
from trimtab.cli_errors import reported
from trimtab.config.reading import read_values
from trimtab.errors import InputError
from trimtab.machine import use_large_pages
from trimtab.progress import Display
from trimtab.show import describe_list
from trimtab.show import show as show_adapter
from trimtab.store.files import package_versions
from trimtab.store.local import list_adapters

_CONFIGS: dict[str, type[config.Config]] = {
    "tune": config.TuneConfig,
    "record": config.RecordConfig,
    "fit": config.FitConfig,
    "mount": config.MountConfig,
    "export": config.ExportConfig,
    "generate": config.GenerateConfig,
    "evaluate": config.EvaluateConfig,
    "cost": config.CostConfig,
    "serve": config.ServeConfig,
    "compare": config.CompareConfig,
    "probe": config.ProbeConfig,
}
_ARGUMENTS = {
    "tune": ("data",),
    "record": ("expert",),
    "fit": ("recording",),
    "mount": ("adapter", "host"),
    "export": ("adapter", "host"),
    "generate": ("prompt",),
    "evaluate": ("adapter", "host"),
    "cost": (),
    "serve": ("host",),
    "compare": ("data",),
    "probe": ("host",),
}
_ABOUT_HOSTS = ("probe",)
"""Verbs of the group `hosts`."""
_WITH_JSON = ("cost",)
"""Verbs whose result can be printed as JSON."""
_CONFIG_FILE = "config"
_AS_JSON = "json"

app = typer.Typer(
    name="trimtab",
    help="Tune a small model once, and steer any larger model with it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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
    app(args=args, prog_name="trimtab")


def _say_version(wanted: bool) -> None:
    if wanted:
        _write(f"trimtab {package_versions()['trimtab']}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_say_version, is_eager=True, help="Say the version."),
    ] = False,
) -> None:
    del version


def _run(verb: str, given: dict[str, Any]) -> None:
    """Build the verb's configuration, run the verb, print what it says."""
    with reported():
        as_json = bool(given.pop(_AS_JSON, False))
        settings = _configured(verb, given)
        display = Display()
        # Imported here, not above: verbs load torch, which --help must not wait for.
        function = getattr(import_module(f"trimtab.{verb}"), verb)
        if isinstance(settings, config.GenerateConfig):
            _stream(function, settings, display)
            return
        result = function(settings, progress=display.progress)
        summary = getattr(result, "as_json" if as_json else "summary", None)
        if callable(summary):
            _write(f"{summary()}\n")


def _stream(
    function: Callable[..., object], settings: config.GenerateConfig, display: Display
) -> None:
    """Print one continuation as it comes; several of them one after another at the end."""
    texts = ["" for _ in settings.prompt]

    def on_text(index: int, text: str) -> None:
        display.hush()
        texts[index] += text
        if len(texts) == 1:
            _write(text)

    def on_note(note: str) -> None:
        typer.echo(note, err=True)

    function(settings, progress=display.progress, on_text=on_text, on_note=on_note)
    if len(texts) == 1:
        _write("" if texts[0].endswith("\n") else "\n")
        return
    for number, text in enumerate(texts, start=1):
        _write(f"== {number} of {len(texts)}\n{text}\n")


def _configured(verb: str, given: dict[str, Any]) -> config.Config:
    cls = _CONFIGS[verb]
    path = given.pop(_CONFIG_FILE)
    values = read_values(path, "--config") if path else {}
    for name, value in given.items():
        if value is not None:
            values[name] = _split(cls.model_fields[name], value)
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise _readable(error, verb) from error


def _split(field: FieldInfo, value: Any) -> Any:
    if isinstance(value, list) and _is_closed_list(field):
        return [word.strip() for part in value for word in part.split(",")]
    return value


def _readable(error: ValidationError, verb: str) -> InputError:
    lines = []
    for problem in error.errors(include_url=False):
        field = str(problem["loc"][0]) if problem["loc"] else ""
        where = _shown_name(verb, field)
        if problem["type"] == "missing":
            lines.append(f"{where} is needed")
        elif problem["type"] == "extra_forbidden":
            lines.append(
                f"--config gives {field!r}, which `trimtab {_words_of(verb)}` does not have"
            )
        else:
            message = problem["msg"].removeprefix("Value error, ")
            found = f" (found {reprlib.repr(problem['input'])})" if field else ""
            lines.append(f"{where}: {message}{found}" if where else message)
    return InputError("\n".join(lines), hint=f"see `trimtab {_words_of(verb)} --help`")


def _words_of(verb: str) -> str:
    return f"hosts {verb}" if verb in _ABOUT_HOSTS else verb


def _shown_name(verb: str, field: str) -> str:
    if field in _ARGUMENTS[verb]:
        return field.upper()
    return f"--{field.replace('_', '-')}" if field else ""


def _command(verb: str) -> Callable[..., None]:
    """Make the function of a subcommand, whose signature is the verb's configuration."""

    def command(**given: Any) -> None:
        _run(verb, given)

    cls = _CONFIGS[verb]
    arguments = [(name, cls.model_fields[name]) for name in _ARGUMENTS[verb]]
    options = [pair for pair in cls.model_fields.items() if pair not in arguments]
    options.sort(key=lambda pair: not pair[1].is_required())
    parameters = [_parameter(name, field, argument=True) for name, field in arguments]
    parameters += [_parameter(name, field, argument=False) for name, field in options]
    parameters += [_json_parameter()] if verb in _WITH_JSON else []
    parameters.append(_config_parameter())
    command.__name__ = verb
    command.__doc__ = escape(inspect.cleandoc(cls.__doc__ or ""))
    command.__dict__["__signature__"] = inspect.Signature(parameters)
    return command


def _parameter(name: str, field: FieldInfo, *, argument: bool) -> inspect.Parameter:
    # Nothing is required of typer and every default is None, "not given": values may come from
    # --config, and pydantic alone decides what is missing or wrong.
    if argument:
        shape = typer.Argument(
            metavar=name.upper(), help=escape(field.description or ""), show_default=False
        )
    else:
        flag = f"--{name.replace('_', '-')}"
        shape = typer.Option(
            f"{flag}/--no-{flag[2:]}" if _plain_type(field) is bool else flag,
            help=escape((field.description or "") + _remark(field)),
            metavar=_metavar(field),
            show_default=False,
        )
    kind: Any = list[str] if _is_many(field) else _plain_type(field)
    return _keyword(name, Annotated[kind | None, shape])


def _json_parameter() -> inspect.Parameter:
    shape = typer.Option("--json", help="Print the result as JSON.")
    return _keyword(_AS_JSON, Annotated[bool, shape], default=False)


def _config_parameter() -> inspect.Parameter:
    shape = typer.Option("--config", help="Settings by name, TOML or JSON; options win over it.")
    return _keyword(_CONFIG_FILE, Annotated[Path | None, shape])


def _keyword(name: str, annotation: Any, *, default: object = None) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def _plain_type(field: FieldInfo) -> Any:
    """Type of a field without its None."""
    if get_origin(field.annotation) in (Union, types.UnionType):
        return next(arg for arg in get_args(field.annotation) if arg is not types.NoneType)
    return field.annotation


def _is_many(field: FieldInfo) -> bool:
    return get_origin(_plain_type(field)) is tuple


def _is_closed_list(field: FieldInfo) -> bool:
    return _is_many(field) and get_origin(get_args(_plain_type(field))[0]) is Literal


def _metavar(field: FieldInfo) -> str | None:
    if _is_closed_list(field):
        return "names"
    return "text" if _is_many(field) else None


def _remark(field: FieldInfo) -> str:
    remark = " (repeatable)" if _is_many(field) else ""
    if _is_closed_list(field):
        remark = f" ({', '.join(get_args(get_args(_plain_type(field))[0]))}; several with commas)"
    if field.is_required():
        return f"{remark} (needed)"
    if field.default in (None, ()):
        return remark
    default = field.default
    if isinstance(default, bool):
        return f" [{'on' if default else 'off'}]"
    return f" [{','.join(default) if isinstance(default, tuple) else default}]"


def _write(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (head, less) has gone; what Python still flushes at exit has to go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None


_hosts = typer.Typer(help="Hosts, and what they let us see.", no_args_is_help=True)
app.add_typer(_hosts, name="hosts")
for _verb in _CONFIGS:
    (_hosts if _verb in _ABOUT_HOSTS else app).command(_verb)(_command(_verb))


@app.command("show")
def _show(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Adapter folder.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the manifest itself, as JSON.")
    ] = False,
) -> None:
    """Say what an adapter is, after checking every file of it."""
    with reported():
        result = show_adapter(adapter)
        _write(f"{result.manifest.model_dump_json(indent=1) if as_json else result.summary()}\n")


@app.command("key")
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
        # Imported here, not above: most commands need no keys.
        from trimtab.serving.keys import add_key

        made = add_key(keys, name, admin=admin, requests_per_minute=requests_per_minute)
        _write(f"{made}\n")


@app.command("list")
def _list() -> None:
    """List installed adapters, and those in and below the current folder."""
    with reported():
        _write(f"{describe_list(list_adapters())}\n")
