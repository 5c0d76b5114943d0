"""Size budgets and the direction of imports. A raised limit needs a line here, with its reason."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "trimtab"
FILES = sorted(SOURCE.rglob("*.py"))
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 6
ALLOWED_LARGER: dict[str, str] = {}
"""module:function (or module) -> the reason why it may exceed a budget."""

# Each layer may import itself and the layers above it in this list, never one below.
LAYERS: tuple[tuple[str, ...], ...] = (
    (
        "errors",
        "behind",
        "config",
        "few_rows",
        "light_peft",
        "machine",
        "processes",
        "types",
        "vocab",
        "unembedding",
    ),
    (
        "acceptance",
        "align",
        "anchors",
        "blend",
        "calibration",
        "compact",
        "costing",
        "encoding",
        "foretelling",
        "losses",
        "metrics",
        "rice",
        "stored_states",
    ),
    ("carriers", "store", "text"),
    ("backends",),
    ("soft_targets", "steering", "tuning"),
    ("fitting", "hosted"),
    ("exporting", "report"),
    ("lmeval",),
    (
        "tune",
        "record",
        "fit",
        "append",
        "mount",
        "generate",
        "evaluate",
        "evaluator",
        "compare",
        "comparing",
        "cost",
        "export",
        "probe",
        "serving",
        "show",
    ),
    ("serve", "vllm"),
    (
        "cli",
        "cli_errors",
        "cli_summaries",
        "cli_verbs",
        "progress",
        "server",
        "__main__",
        "__init__",
    ),
)
MEET_ONLY_IN_FILES = {"tune", "record", "fit", "append", "mount"}


def module_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def layer_of(module: str) -> int:
    top = module.split(".")[0]
    found = [number for number, names in enumerate(LAYERS) if top in names]
    assert found, f"module {module} has no layer yet: put it into LAYERS in {Path(__file__).name}"
    return found[0]


def imported(tree: ast.AST) -> Iterator[str]:
    """Trimtab's modules that a file imports anywhere, also inside functions, without the prefix."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            base = node.module or ""
            names = (
                [f"trimtab.{alias.name}" for alias in node.names] if base == "trimtab" else [base]
            )
        else:
            continue
        for name in names:
            if name.startswith("trimtab."):
                yield name.removeprefix("trimtab.")


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_sizes(path: Path) -> None:
    text, module = path.read_text(), module_of(path)
    too_large = []
    if text.count("\n") > MAX_FILE_LINES:
        too_large.append(module)
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        count = sum(argument.arg not in ("self", "cls") for argument in arguments)
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if lines > MAX_FUNCTION_LINES or count > MAX_PARAMETERS:
            too_large.append(f"{module}:{node.name}")
    assert [name for name in too_large if name not in ALLOWED_LARGER] == []


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_go_one_way(path: Path) -> None:
    module = module_of(path)
    for target in imported(ast.parse(path.read_text())):
        assert layer_of(target) <= layer_of(module), f"{module} imports {target}, which is above it"
        pair = {module.split(".")[0], target.split(".")[0]}
        assert not (len(pair) == 2 and pair <= MEET_ONLY_IN_FILES), f"{module} imports {target}"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_nothing_unpickles_and_no_remote_code(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            assert not names & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("torch.load", "torch.save", "eval", "exec"), called
            for keyword in node.keywords:
                trusts = (
                    keyword.arg == "trust_remote_code" and ast.unparse(keyword.value) != "False"
                )
                assert not trusts, f"line {node.lineno}"


def test_the_import_rule_sees_an_upward_import() -> None:
    tree = ast.parse("def f():\n from trimtab import tune\n import trimtab.backends.hf\n import os")
    assert list(imported(tree)) == ["tune", "backends.hf"]
    assert layer_of("tune") > layer_of("backends.hf") > layer_of("store.files")
