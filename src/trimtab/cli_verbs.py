"""Commands that are made of configurations: one a verb, its options those of its fields.

One rule makes all command lines. What a verb works on is an argument (`_ARGUMENTS`): the user's own
text or prompts where the verb starts from them, else the folder of the verb before, and for mount,
export and evaluate the host after it. Every other field is an option of the field's name
(`max_tokens` -> `--max-tokens`), with the field's docstring as its help. A field of many values is
repeated (`--stop A --stop B`); where its values come from a closed list, commas do too
(`--carriers head,memory`). `--config FILE` gives any fields by name in TOML or JSON; what the
command line says wins.
"""

import inspect
import reprlib
import types
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from trimtab import config
from trimtab.cli_errors import CUT_SHORT, reported, write
from trimtab.cli_summaries import OF_HOSTS
from trimtab.config.reading import read_values
from trimtab.errors import InputError
from trimtab.progress import Display

if TYPE_CHECKING:
    from trimtab.generate import GenerateResult

CONFIGS: dict[str, type[config.Config]] = {
    "tune": config.TuneConfig,
    "record": config.RecordConfig,
    "fit": config.FitConfig,
    "append": config.AppendConfig,
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
    "append": ("adapter", "data"),
    "mount": ("adapter", "host"),
    "export": ("adapter", "host"),
    "generate": ("prompt",),
    "evaluate": ("adapter", "host"),
    "cost": (),
    "serve": ("host",),
    "compare": ("data",),
    "probe": ("host",),
}
_WITH_JSON = ("cost",)
"""Verbs whose result can be printed as JSON."""
_CONFIG_FILE = "config"
_AS_JSON = "json"


def _run(verb: str, given: dict[str, Any]) -> None:
    """Build the verb's configuration, run the verb, print what it says."""
    with reported():
        as_json = bool(given.pop(_AS_JSON, False))
        settings = configured(verb, given)
        display = Display()
        # Imported here, not above: verbs load torch, which --help must not wait for.
        with display.waiting("loading PyTorch and what reads models"):
            function = getattr(import_module(f"trimtab.{verb}"), verb)
        if isinstance(settings, config.GenerateConfig):
            result = stream(function, settings, display)
            if result.is_cut_short:
                # Whoever takes the text from here must not take a part for the whole.
                raise typer.Exit(CUT_SHORT)
            return
        heard: dict[str, Any] = {}
        if isinstance(settings, config.ProbeConfig):
            heard["on_note"] = lambda note: typer.echo(note, err=True)
        result = function(settings, progress=display.progress, **heard)
        summary = getattr(result, "as_json" if as_json else "summary", None)
        if callable(summary):
            write(f"{summary()}\n")


def stream(
    function: "Callable[..., GenerateResult]", settings: config.GenerateConfig, display: Display
) -> "GenerateResult":
    """Print one continuation as it comes; several of them one after another at the end.

    Returns:
        What the function returned.
    """
    texts, is_line_open = ["" for _ in settings.prompt], False

    def on_text(index: int, text: str) -> None:
        nonlocal is_line_open
        display.hush()
        texts[index] += text
        if len(texts) == 1:
            write(text)
            is_line_open = not text.endswith("\n")

    def end_line() -> None:
        nonlocal is_line_open
        write("\n" if is_line_open else "")
        is_line_open = False

    def on_note(note: str) -> None:
        end_line()
        typer.echo(note, err=True)

    result = function(settings, progress=display.progress, on_text=on_text, on_note=on_note)
    if len(texts) == 1:
        is_line_open |= not texts[0]
        end_line()
        return result
    for number, text in enumerate(texts, start=1):
        write(f"== {number} of {len(texts)}\n{text}\n")
    return result


def configured(verb: str, given: dict[str, Any]) -> config.Config:
    """Make a verb's configuration of what the command line and --config give.

    Raises:
        InputError: Something is missing or wrong.
    """
    cls = CONFIGS[verb]
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
                f"--config gives {field!r}, which `trimtab {words_of(verb)}` does not have"
            )
        else:
            message = problem["msg"].removeprefix("Value error, ")
            found = f" (found {reprlib.repr(problem['input'])})" if field else ""
            lines.append(f"{where}: {message}{found}" if where else message)
    return InputError("\n".join(lines), hint=f"see `trimtab {words_of(verb)} --help`")


def words_of(verb: str) -> str:
    """What a user types for a verb."""
    return f"hosts {verb}" if verb in OF_HOSTS else verb


def _shown_name(verb: str, field: str) -> str:
    if field in _ARGUMENTS[verb]:
        return field.upper()
    return f"--{field.replace('_', '-')}" if field else ""


def command(verb: str) -> Callable[..., None]:
    """Make the function of a subcommand, whose signature is the verb's configuration."""

    def run(**given: Any) -> None:
        _run(verb, given)

    cls = CONFIGS[verb]
    arguments = [(name, cls.model_fields[name]) for name in _ARGUMENTS[verb]]
    options = [pair for pair in cls.model_fields.items() if pair not in arguments]
    options.sort(key=lambda pair: not pair[1].is_required())
    parameters = [_parameter(name, field, argument=True) for name, field in arguments]
    parameters += [_parameter(name, field, argument=False) for name, field in options]
    parameters += [_json_parameter()] if verb in _WITH_JSON else []
    parameters.append(_config_parameter())
    run.__name__ = verb
    run.__doc__ = inspect.cleandoc(cls.__doc__ or "")
    run.__dict__["__signature__"] = inspect.Signature(parameters)
    return run


def _parameter(name: str, field: FieldInfo, *, argument: bool) -> inspect.Parameter:
    # Nothing is required of typer and every default is None, "not given": values may come from
    # --config, and pydantic alone decides what is missing or wrong.
    if argument:
        shape = typer.Argument(
            metavar=name.upper(), help=field.description or "", show_default=False
        )
    else:
        flag = f"--{name.replace('_', '-')}"
        shape = typer.Option(
            f"{flag}/--no-{flag[2:]}" if _plain_type(field) is bool else flag,
            help=(field.description or "") + _remark(field),
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
