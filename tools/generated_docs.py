"""Fill the generated blocks of the documentation: options of the verbs, and recorded figures.

`python -m tools.generated_docs` rewrites them; with --check it only says whether they are right.
A block stands between `<!-- begin NAME -->` and `<!-- end NAME -->`.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer
from pydantic.fields import FieldInfo

from bench.compatibility import table as compatibility
from bench.speed import table as speed
from bench.transfer import table as transfer
from tools import cost_tables
from trimtab import cli, config
from trimtab.cli_summaries import VERBS
from trimtab.metrics import Estimate
from trimtab.report import HostResult, Report, read_report
from trimtab.report.values import ordered

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "bench" / "results" / "demo.json"
PAGES = {"probe": "hosts"}
"""Pages of verbs that are called otherwise."""
NO_COMPATIBILITY = "Not measured yet: `python -m bench.compatibility` does."
NO_TRANSFER = "No run has been recorded yet: `make bench` measures these figures."
NO_SPEED = "Not measured yet: `make bench-speed` does."
NO_RESULT = "No run has been recorded yet: `make demo` measures these figures on your machine."


def main() -> None:
    """Rewrite or check all blocks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if one is old")
    given = parser.parse_args()
    old = [path for path, text in rendered().items() if path.read_text(encoding="utf-8") != text]
    for path in old:
        print(f"{'old' if given.check else 'written'}: {path.relative_to(ROOT)}")
        if not given.check:
            path.write_text(rendered()[path], encoding="utf-8")
    sys.exit(1 if given.check and old else 0)


def rendered() -> dict[Path, str]:
    """Content of each page as it should be."""
    verbs = (*VERBS, *PAGES)
    blocks = {
        ROOT / "docs" / f"{PAGES.get(verb, verb)}.md": {"options": options_table(verb)}
        for verb in verbs
    }
    blocks[ROOT / "docs" / "vllm.md"] = {"options": settings_table(config.PluginConfig)}
    report = read_report(RESULT) if RESULT.is_file() else None
    blocks[ROOT / "README.md"] = {"figures": figures(report)}
    recorded = ROOT / transfer.RESULTS
    found = transfer.table(recorded) if recorded.is_file() else NO_TRANSFER
    blocks[ROOT / "docs" / "results.md"] = {"transfer": found}
    measured = ROOT / compatibility.RESULTS
    found = compatibility.table(measured) if measured.is_file() else NO_COMPATIBILITY
    blocks[ROOT / "docs" / "compatibility.md"] = {"compatibility": found}
    recorded = ROOT / speed.RESULTS
    found = speed.table(recorded, speed.RESULTS.as_posix()) if recorded.is_file() else NO_SPEED
    blocks[ROOT / "docs" / "speed.md"] = {"speed": found}
    blocks[ROOT / "docs" / "cost.md"] |= cost_tables.blocks()
    return {path: with_blocks(path, contents) for path, contents in blocks.items()}


def with_blocks(path: Path, contents: Mapping[str, str]) -> str:
    """A page with each of its blocks filled."""
    text = path.read_text(encoding="utf-8")
    for name, content in contents.items():
        text = with_block(text, name, content)
    return text


def with_block(text: str, name: str, content: str) -> str:
    """Put content between the marks of a block.

    Raises:
        ValueError: The text does not have both marks of the block, in their order, once.
    """
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed) or begin in rest or end in after:
        raise ValueError(f"expected one block {name!r}")
    return f"{before}{begin}{content.rstrip()}\n{end}{after}"


def options_table(verb: str) -> str:
    """Table of a verb's arguments and options: command line, Python field, default, meaning."""
    group: Any = typer.main.get_command(cli.command_line())
    command = group.commands.get(verb) or group.commands["hosts"].commands[verb]
    names = {p.name: p.param_type_name for p in command.params}
    fields = getattr(config, f"{verb.title()}Config").model_fields
    lines = ["| command line | Python | default | meaning |", "|---|---|---|---|"]
    for name, field in sorted(fields.items(), key=lambda pair: names[pair[0]] != "argument"):
        flag = name.upper() if names[name] == "argument" else f"--{name.replace('_', '-')}"
        lines.append(f"| `{flag}` | `{name}` | {described(field)} |")
    return "\n".join(lines)


def settings_table(cls: type[config.Config]) -> str:
    """Table of a configuration that only a file gives: name, default, meaning."""
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    lines += [f"| `{name}` | {described(field)} |" for name, field in cls.model_fields.items()]
    return "\n".join(lines)


def described(field: FieldInfo) -> str:
    """The last two cells of a row: default and meaning."""
    default = "needed" if field.is_required() else shown_default(field.default)
    meaning = " ".join((field.description or "").split()).replace("|", "\\|")
    return f"{default} | {meaning}"


def shown_default(value: object) -> str:
    """A default as a reader would write it."""
    if value is None or value == ():
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{','.join(value) if isinstance(value, tuple) else value}`"


def figures(report: Report | None) -> str:
    """Tables of a recorded run, one a host."""
    if report is None:
        return NO_RESULT
    source = f"Recorded run: `{RESULT.relative_to(ROOT).as_posix()}`."
    return "\n\n".join([*(host_table(result) for result in report.hosts), source])


def host_table(result: HostResult) -> str:
    """Bits per byte of a host's rows with standard errors, and their change against the host."""
    lines = [
        f"{result.host}, steered by {result.small}; bits per byte, lower is better:",
        "",
        "| row | domain text | against host | general text | against host |",
        "|---|---|---|---|---|",
    ]
    for row in ordered(result.domain):
        cells = [*shown(row, result.domain, result.domain_change)]
        cells += shown(row, result.general, result.general_change)
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(
    row: str, figures: Mapping[str, Estimate], paired: Mapping[str, Estimate]
) -> tuple[str, str]:
    """A row's figure and its change against the host, each with its standard error."""
    if row not in figures:
        return "", ""
    figure, host = figures[row], figures["host"]
    change = ""
    if row != "host":
        error = f" ± {100 * paired[row].stderr / host.mean:.1f}" if row in paired else ""
        change = f"{100 * (figure.mean / host.mean - 1):+.1f}{error} %"
    return f"{figure.mean:.3f} ± {figure.stderr:.3f}", change


if __name__ == "__main__":
    main()
