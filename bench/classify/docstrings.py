"""Documentation of functions from the wheels of four Python packages, which are read, not run."""

import ast
import random
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from examples.demo.packages import opened_wheel
from trimtab.errors import InputError

MIN_CHARS, MAX_CHARS = 90, 260
"""Of a description: long enough to tell, and short enough for slow machines."""

_SKIPPED = re.compile(r"(^|/)(tests?|testing|benchmarks|conftest|externals|_?vendor\w*)(/|\.py$|_)")
_HEADING = re.compile(r"^(Parameters|Returns|Notes|Examples?|See Also|References|Explanation)\b")
_ROLE = re.compile(r":\w+:`~?([^`]*)`|``?([^`]*)``?")


@dataclass(frozen=True)
class Source:
    """A package whose functions are of one field.

    Attributes:
        requirement: Name and exact version.
        label: The field.
        names: Words that would give the package away; a description with one is left out.
    """

    requirement: str
    label: str
    names: tuple[str, ...]


SOURCES = (
    Source("networkx==3.6.1", "graphs", ("networkx", "nx.", "graph theory package")),
    Source("sympy==1.14.0", "algebra", ("sympy",)),
    Source("pandas==3.1.1", "tables", ("pandas", "pd.")),
    Source("scikit-learn==1.9.1", "learning", ("sklearn", "scikit")),
)
LICENCE = "NetworkX, SymPy, pandas, scikit-learn: BSD 3-Clause"
DOWNLOAD_MB = 30


def descriptions(source: Source, scratch: Path) -> list[str]:
    """First paragraphs of the package's documented public functions, in order, none twice."""
    instead = "check the network and pip's registry"
    found: dict[str, None] = {}
    with opened_wheel(source.requirement, scratch, instead=instead) as wheel:
        for text in _sources(wheel):
            found |= dict.fromkeys(_described(text, source))
    return list(found)


def _sources(wheel: zipfile.ZipFile) -> Iterator[str]:
    for name in sorted(wheel.namelist()):
        is_private = any(part.startswith("_") for part in PurePosixPath(name).parts[1:])
        if name.endswith(".py") and not _SKIPPED.search(name) and not is_private:
            yield wheel.read(name).decode("utf-8")


def _described(text: str, source: Source) -> Iterator[str]:
    try:
        tree = ast.parse(text)
    except SyntaxError:
        # Written for another version of Python than the one that runs this.
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        said = first_words(ast.get_docstring(node) or "")
        hidden = any(name in said.lower() for name in source.names)
        if MIN_CHARS <= len(said) <= MAX_CHARS and not hidden:
            yield said


def first_words(docstring: str) -> str:
    """A docstring's description as one line: what stands before its first section or example."""
    kept: list[str] = []
    for line in docstring.splitlines():
        if _HEADING.match(line.strip()) or line.lstrip().startswith((">>>", "..", "==", "--")):
            break
        kept.append(line.strip())
    plain = _ROLE.sub(lambda match: match[1] or match[2], " ".join(part for part in kept if part))
    if len(plain) <= MAX_CHARS:
        return plain
    # Whole sentences only: the first ones that fit.
    end = plain.rfind(". ", 0, MAX_CHARS)
    return plain[: end + 1] if end > 0 else ""


def questions(found: Mapping[str, list[str]], each: int, *, seed: int) -> list[dict[str, str]]:
    """As many of each field, shuffled, as lines of a task.

    Raises:
        InputError: A field has too few descriptions.
    """
    rng = random.Random(seed)
    lines: list[dict[str, str]] = []
    for label, texts in found.items():
        if len(texts) < each:
            raise InputError(
                f"{label} has {len(texts)} descriptions, expected at least {each}",
                hint="ask for fewer of each, with --each",
            )
        lines += [
            {"prompt": f"{text}\nField:", "answer": f" {label}"} for text in rng.sample(texts, each)
        ]
    rng.shuffle(lines)
    return lines
