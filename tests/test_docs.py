"""The documentation says what is true: generated blocks, links, and the README's example."""

import re
from pathlib import Path

import pytest

from tools import generated_docs
from trimtab.metrics import Estimate
from trimtab.report import HostResult, Report

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_generated_blocks_are_as_the_code_and_the_recorded_run_say() -> None:
    old = [p.name for p, text in generated_docs.rendered().items() if p.read_text() != text]
    assert old == [], "run `make docs`"


def test_a_block_needs_both_its_marks_once() -> None:
    text = "a\n<!-- begin x -->\nold\n<!-- end x -->\nb\n"
    assert generated_docs.with_block(text, "x", "new\n\n").split("\n")[2:4] == [
        "new",
        "<!-- end x -->",
    ]
    for broken in ("nothing", text + text, text.replace("end", "END")):
        with pytest.raises(ValueError, match="block 'x'"):
            generated_docs.with_block(broken, "x", "new")


def test_a_table_of_figures_shows_errors_and_changes() -> None:
    figures = {"host": Estimate(2.0, 0.1), "head": Estimate(1.9, 0.05)}
    result = HostResult("H", "S", figures, {"host": Estimate(1.0, 0.1)}, {}, 100)
    said = generated_docs.figures(Report("Zig", (result,), {}, {}))
    assert "| host | 2.000 ± 0.100 |  | 1.000 ± 0.100 |  |" in said
    assert "| head | 1.900 ± 0.050 | -5.0 % |  |  |" in said
    assert "bench/results/demo.json" in said


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        # Addresses of sources are not asked for: tests run without a network.
        if not target.startswith("https://"):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_the_readme_is_short() -> None:
    assert (ROOT / "README.md").read_text().count("\n") <= 120


def test_the_readme_example_runs(tmp_path: Path, monkeypatch, capsys) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for real, tiny in (
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "tiny:llama?vocab=bpe"),
        ("google/gemma-3-270m", "tiny:gemma3"),
        ('out="recording")', 'out="recording", general=("general/*.txt",))'),
    ):
        assert real in code
        code = code.replace(real, tiny)
    for folder, name in (("src/a", "b.zig"), ("general", "c.txt")):
        (tmp_path / folder).mkdir(parents=True)
        for number in range(4):
            lines = (f"const {folder[:3]}{number}{line} = {line};\n" for line in range(60))
            (tmp_path / folder / f"{number}{name}").write_text("".join(lines))
    (tmp_path / "src" / "main.zig").write_text("const mine = 1;\n" * 9)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "home"))
    # Compiled under its own name, so that an error points to the README.
    exec(compile(code, "README.md", "exec"), {})
    assert "shared token strings" in capsys.readouterr().out
