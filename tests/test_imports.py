import os
import subprocess
import sys
from pathlib import Path
from types import FunctionType

import pytest
from test_manifest import full_manifest, payload

import trimtab
from trimtab.cli import main
from trimtab.store.card import write_adapter

# Where this test's own trimtab lies, also when the path to it is relative.
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(trimtab.__file__).resolve().parents[1])}
HEAVY = (
    *("torch", "transformers", "peft", "bitsandbytes"),
    *("numpy", "pyarrow", "faiss", "matplotlib"),
)


def heavy_after(program: str, *, cwd: Path) -> list[str]:
    """Heavy packages that a fresh interpreter has loaded after a program."""
    report = f"import sys\n{program}\nprint(*(set({HEAVY}) & set(sys.modules)), file=sys.stderr)"
    words = [sys.executable, "-c", report]
    done = subprocess.run(
        words, capture_output=True, text=True, check=True, cwd=cwd, env=ENVIRONMENT
    )
    return done.stderr.split()


def running(*commands: list[str]) -> str:
    lines = ["from trimtab.cli import main"]
    for words in commands:
        lines += [
            "try:",
            f"    main({words})",
            "except SystemExit as end:",
            "    assert not end.code",
        ]
    return "\n".join(lines)


def test_the_package_is_light(tmp_path: Path) -> None:
    modules = ("errors", "config", "types", "vocab", "store.manifest", "store.card", "store.local")
    program = "\n".join(f"import trimtab.{name}" for name in (*modules, "store.files", "cli"))
    assert heavy_after(f"{program}\ntrimtab.show, trimtab.TuneConfig", cwd=tmp_path) == []


def test_help_list_show_and_cost_are_light(tmp_path: Path) -> None:
    write_adapter(payload(tmp_path / "zig.adapter"), full_manifest())
    names = ("tune", "record", "fit", "mount", "export", "generate", "evaluate", "cost", "serve")
    verbs = (*names, "compare", "show", "list", "key")
    commands = [["--help"], ["--version"], ["list"], ["show", "zig.adapter"]]
    commands += [[verb, "--help"] for verb in verbs] + [["hosts", "probe", "--help"]]
    commands += [["key", "one", "--keys", "keys.json"]]
    commands += [["cost", "--host-params", "70e9", "--small-params", "7e9", "--tokens", "1e6"]]
    assert heavy_after(running(*commands), cwd=tmp_path) == []


def test_only_what_needs_four_bits_imports_what_makes_them(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    program = "import trimtab.tune, trimtab.generate, trimtab.evaluate"
    found = heavy_after(program, cwd=tmp_path)
    assert "peft" in found and "bitsandbytes" not in found
    assert "bitsandbytes" in heavy_after("import peft, trimtab.tune", cwd=tmp_path)


def test_a_verb_is_its_function_in_any_order_of_imports() -> None:
    from trimtab.show import ShowResult

    assert isinstance(trimtab.show, FunctionType)
    assert ShowResult.__module__ == "trimtab.show"
    from trimtab import show

    assert show is trimtab.show


@pytest.mark.parametrize("name", sorted(trimtab.__all__))
def test_every_public_name_exists(name: str) -> None:
    assert getattr(trimtab, name).__name__ == name


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = trimtab.nonsense  # pyright: ignore[reportAttributeAccessIssue]


def test_main_exits() -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
