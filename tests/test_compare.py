"""The comparison of methods, end to end on tiny models, and its figures against slow references."""

import itertools
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trimtab.backends.beginnings import MIN_DOCUMENT_BYTES
from trimtab.backends.open import open_model
from trimtab.cli import main
from trimtab.compare import CompareResult, _put_together, compare
from trimtab.comparing.bench import model_key
from trimtab.comparing.budget import Budget, NotRun, seconds_of
from trimtab.comparing.figures import (
    ENOUGH,
    SURE,
    MethodFigures,
    figures_of,
    pareto,
    ranked,
    share_ahead,
)
from trimtab.comparing.page import page
from trimtab.comparing.questions import Question, Task, metric, read_questions
from trimtab.comparing.run import ORDER
from trimtab.comparing.scoring import TIMED_TOKENS, Subject, timed_use
from trimtab.comparing.sizes import shape_of
from trimtab.comparing.split import split_data
from trimtab.comparing.table import markdown, terminal_table
from trimtab.comparing.values import MethodResult, Step, TextScore
from trimtab.comparing.words import verdict
from trimtab.config import CompareConfig, EvaluateConfig, FitConfig
from trimtab.costing.flops import (
    COMPARED,
    HeadFit,
    head_fit_flops,
    hidden_flops,
    lora_params,
    lora_training_flops,
)
from trimtab.errors import InputError
from trimtab.evaluate import evaluate
from trimtab.metrics import Estimate
from trimtab.report.plots import Point, scatter_svg
from trimtab.store.recording_schema import read_recording_manifest
from trimtab.text.corpus import load_documents
from trimtab.types import Advance, Document, silent

RANK, EPOCHS = (FitConfig.model_fields[name].default for name in ("rank", "epochs"))
SMALL, HOST = "tiny:llama?hidden=32", "tiny:qwen3?vocab=bpe&hidden=32"
WORDS = "keel rudder tiller anchor hull mast sail rope winch buoy harbour tide".split()
CLASSES = {"hull": "keel rudder tiller", "rig": "mast sail rope", "port": "buoy harbour tide"}


def domain_text(seed: int) -> str:
    draw = random.Random(seed)
    return "".join(f"The {draw.choice(WORDS)} turns the {draw.choice(WORDS)}.\n" for _ in range(12))


def write_data(folder: Path) -> CompareConfig:
    for number in range(8):
        (folder / f"{number}.txt").write_text(domain_text(number))
    for name in ("one", "two", "three", "four"):
        (folder / f"{name}.md").write_text(f"Plain prose {name}, of nothing in particular. " * 5)
    draw = random.Random(0)
    lines = []
    for label, words in CLASSES.items():
        for _ in range(8):
            prompt = f"{draw.choice(words.split())} and {draw.choice(words.split())}:"
            lines.append(json.dumps({"prompt": prompt, "answer": f" {label}"}))
    (folder / "task.jsonl").write_text("\n".join(lines))
    return CompareConfig.model_validate(
        {
            "data": (str(folder / "*.txt"),),
            "small": SMALL,
            "host": HOST,
            "out": folder / "out",
            "task": folder / "task.jsonl",
            "general": (f"prose={folder}/*.md",),
            "test_tokens": 400,
            "window_tokens": 96,
            "context_tokens": 48,
            "few_shot_tokens": 24,
            "examples": 2,
            "train_window_tokens": 64,
            "budget": "1h",
            "dtype": "float32",
            "price": 3.6,
        }
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[CompareConfig, CompareResult]:
    folder = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIMTAB_HOME", str(folder / "home"))
        config = write_data(folder)
        return config, compare(config)


def test_each_recorded_token_is_read_by_those_who_are_asked_and_fitted_once(
    run: tuple[CompareConfig, CompareResult],
) -> None:
    config, found = run
    [path] = config.out.rglob("recording.json")
    recorded = read_recording_manifest(path.parent)
    [row] = [row for row in found.rows if row.name == "trimtab"]
    _, record, fit, _ = row.result.steps
    shape = shape_of(open_model(SMALL, dtype="float32"))
    train = recorded.splits["train"].tokens
    assert recorded.splits["general"].tokens
    assert record.flops == (recorded.tokens + train) * hidden_flops(shape, 256)
    # Predicted before anything is recorded, in tokens of the host.
    host = open_model(HOST, dtype="float32")
    [general] = path.parents[1].rglob("general.jsonl")
    texts = [json.loads(line)["text"] for line in general.read_text().splitlines()]
    texts += [d.text for d in load_documents(path.parents[1] / "expert" / "train.jsonl")]
    tokens = sum(len(host.encode(text)) for text in texts)
    head = HeadFit(tokens, shape.hidden, min(COMPARED, shape.vocab), RANK, EPOCHS)
    assert fit.flops == pytest.approx(head_fit_flops(head), rel=0.15)


def test_every_method_is_measured(
    run: tuple[CompareConfig, CompareResult],
) -> None:
    config, found = run
    rows = {row.name: row for row in found.rows}
    assert list(rows) == list(ORDER)
    report = json.loads((config.out / "comparison.json").read_text())
    for name, row in rows.items():
        told = report["methods"][name]
        kept = json.loads((config.out / told["file"]).read_text())
        assert kept["status"] == told["status"] == row.result.status
        assert row.result.status == "measured", row.result.reason
        assert row.result.use
        assert (
            bool(told["usd_per_million_tokens"]) == row.result.writes_text == (name != "embeddings")
        )
        assert set(row.task) == {"accuracy", "macro-F1"} and row.result.peak_bytes
        assert (row.domain is None) == (name == "embeddings")
        if row.domain is not None and name != "zero-shot":
            assert row.domain_change and row.general_change and row.domain_change.stderr > 0
    assert rows["trimtab"].result.artefact_bytes and rows["lora"].result.artefact_bytes
    for name, row in rows.items():
        trust = row.result.trust
        assert bool(trust) == (name in ("trimtab", "live", "all", "label-head"))
        assert not trust or (sum(trust.values()) == pytest.approx(1) and "host" in trust)
        assert report["methods"][name]["trust"] == trust
    steps = {name: [step.name for step in row.result.steps] for name, row in rows.items()}
    assert steps["trimtab"][:2] == steps["live"] == steps["label-head"][:2]
    assert steps["trimtab"][2:] == ["fit domain.adapter", "mount domain.adapter"]
    assert steps["label-head"][2:] == ["fit label-head.adapter", "mount label-head.adapter"]
    assert min(rows[name].result.flops for name in ("lora", "expert", "full", "trimtab")) > 0
    # The tuned small model's first step is one step, whose time all that use it share.
    assert rows["live"].result.steps[0] == rows["expert"].result.steps[0]
    # A LoRA over rounded weights is another one than over the host's own.
    assert (
        0.9 < ratio(rows["qlora"], rows["lora"]) < 1.1 and ratio(rows["qlora"], rows["lora"]) != 1
    )
    assert report["verdict"] == found.verdict
    page = (config.out / "comparison.html").read_text()
    assert page.count("<svg") == 2 and "http" not in page.replace("http://www.w3.org", "")
    for row in found.rows:
        assert row.name in (config.out / "comparison.md").read_text()
        assert row.name in found.summary()


def ratio(one: MethodFigures, other: MethodFigures) -> float:
    assert one.domain and other.domain
    return one.domain.mean / other.domain.mean


def test_a_method_that_cannot_be_run_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    found = compare(write_data(tmp_path).model_copy(update={"methods": ("zero-shot", "qlora")}))
    [_, row] = found.rows
    assert row.name == "qlora" and row.result.status == "estimated" and row.domain is None
    assert "bitsandbytes" in row.result.reason and "trimtab[qlora]" in row.result.reason
    assert row.result.is_sec_estimated and row.result.flops > 0
    assert "qlora" in found.verdict


def copied(
    run: tuple[CompareConfig, CompareResult], folder: Path, patch: pytest.MonkeyPatch
) -> tuple[CompareConfig, CompareResult]:
    """The comparison in a folder of the test's own, which goes on from what was found."""
    config, found = run
    patch.setenv("TRIMTAB_HOME", str(config.out.parent / "home"))
    shutil.copytree(config.out, folder / "out")
    return config.model_copy(update={"out": folder / "out"}), found


def test_a_training_that_is_done_is_told_as_it_was(
    run: tuple[CompareConfig, CompareResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, before = copied(run, tmp_path, monkeypatch)
    (config.out / "methods" / "qlora.json").unlink()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    again = config.model_copy(update={"budget": "0.01s", "methods": ("qlora",)})
    [late] = [row.result for row in compare(again).rows if row.name == "qlora"]
    [whole] = [row.result for row in before.rows if row.name == "qlora"]
    assert late.status == "estimated" and late.steps == whole.steps
    # What it was trained over is not needed any more.
    [found] = [
        row
        for row in compare(again.model_copy(update={"budget": "1h"})).rows
        if row.name == "qlora"
    ]
    assert found.result.status == "measured" and found.result.domain == whole.domain


def test_training_that_did_not_help_is_told(
    run: tuple[CompareConfig, CompareResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, before = copied(run, tmp_path, monkeypatch)
    path = config.out / "lora" / "expert.json"
    manifest = json.loads(path.read_text())
    manifest["held_out"]["nats_per_token_after"] = manifest["held_out"]["nats_per_token_before"]
    path.write_text(json.dumps(manifest))
    (config.out / "methods" / "lora.json").unlink()
    found = compare(config)
    notes = {row.name: row.result.note for row in found.rows}
    assert "training (lora) did not help" in notes["lora"]
    assert not any("did not help" in note for name, note in notes.items() if name != "lora")
    assert not any("did not help" in row.result.note for row in before.rows)
    assert "training (lora) did not help" in (config.out / "comparison.md").read_text()


def test_text_is_scored_as_evaluate_scores_it(
    run: tuple[CompareConfig, CompareResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, found = run
    monkeypatch.setenv("TRIMTAB_HOME", str(config.out.parent / "home"))
    evaluated = evaluate(
        EvaluateConfig(
            adapter=config.out / "domain.adapter",
            host=HOST,
            data=(str(config.out / "data" / "test.jsonl"),),
            rows=("host", "head+memory"),
            out=tmp_path / "report",
            max_tokens=config.test_tokens,
            window_tokens=config.window_tokens,
            stride_tokens=config.window_tokens // 2,
            dtype="float32",
        )
    )
    domain = evaluated.report.hosts[0].domain
    rows = {row.name: row for row in found.rows}
    for name, row in {"zero-shot": "host", "trimtab": "head+memory"}.items():
        ours = rows[name].domain
        assert ours and ours.mean == pytest.approx(domain[row].mean, rel=1e-6)
        assert ours.stderr == pytest.approx(domain[row].stderr, rel=1e-5)


def test_a_comparison_goes_on_where_it_was(
    run: tuple[CompareConfig, CompareResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, found = run
    monkeypatch.setenv("TRIMTAB_HOME", str(config.out.parent / "home"))
    kept = {path: path.read_bytes() for path in (config.out / "methods").iterdir()}
    # What is measured is kept, whatever the budget.
    again = compare(config.model_copy(update={"budget": "1s", "memory_gb": 1e-3}))
    assert [row.domain for row in again.rows] == [row.domain for row in found.rows]
    for path, content in kept.items():
        assert path.read_bytes() == content
    # Asked for a few, the others stand beside them as they were measured.
    few = compare(config.model_copy(update={"methods": ("lora",)}))
    assert [row.domain for row in few.rows] == [row.domain for row in found.rows]


def test_a_generation_is_timed_to_its_last_token() -> None:
    model = open_model(SMALL, dtype="float32")
    assert model.model.generation_config
    model.model.generation_config.eos_token_id = list(range(len(model.vocabulary.token_bytes)))
    assert model.end_ids
    use = timed_use(Subject(model), domain_text(0), silent)
    assert use.answer_tokens == TIMED_TOKENS and use.sec and use.cpu_sec
    assert use.sec_per_token < use.sec


def test_even_methods_are_told_and_the_cheaper_one_comes_first() -> None:
    task = Task("classes", tuple(Question("p", answer, ("a", "b")) for answer in "aaab" * 3))
    right = [0, 0, 0, 1] * 3
    rows = figures_of(
        [
            result("zero-shot", [80.0], answers=[1] * 12),
            result("lora", [80.0], 9.0, answers=right),
            result("embeddings", [80.0], 1.0, answers=right),
            result("trimtab", [80.0], answers=[0] * 12),
        ],
        task,
        seed=0,
    )
    assert [row.name for row in ranked(rows, "accuracy")][:2] == ["embeddings", "lora"]
    said = verdict(rows, task)
    assert "Exactly as good: lora." in said
    assert "The commonest class, given each time, would be right in 75.0 %." in said


@pytest.mark.parametrize(
    ("documents", "test_tokens", "document_tokens", "least", "most"),
    [
        (10, 512, None, 8, 10),  # An eighth each.
        (3, 512, None, 3, 3),  # A third each.
        (10, 512, 512, 1, 1),  # As asked.
        (10, 64, None, 2, 2),  # No shorter than what shows how a text goes on.
    ],
)
def test_the_test_text_is_shared_out_among_documents(
    documents: int,
    test_tokens: int,
    document_tokens: int | None,
    least: int,
    most: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "home"))
    for number in range(documents):
        text = "".join(domain_text(20 * number + part) for part in range(12))
        (tmp_path / f"{number}.test").write_text(text)
    config = write_data(tmp_path)
    given = {"test_tokens": test_tokens, "document_tokens": document_tokens, "task": None}
    given |= {"test": (str(tmp_path / "*.test"),), "methods": ("zero-shot",)}
    (row,) = compare(config.model_copy(update=given)).rows
    assert least <= len(row.result.domain) <= most
    host = open_model(HOST)
    scored = json.loads((config.out / "comparison.json").read_text())["data"]
    assert len(scored["scored"]["domain"]) == len(row.result.domain)
    # Scored tokens: all but a document's first.
    texts = [Path(name).read_text() for name in scored["scored"]["domain"]]
    per_byte = sum(map(len, map(host.encode, texts))) / sum(map(len, texts))
    tokens = per_byte * sum(score.bytes for score in row.result.domain)
    assert 0.7 * test_tokens < tokens < 1.2 * test_tokens


def test_a_model_is_what_it_is_wherever_it_lies(
    run: tuple[CompareConfig, CompareResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, found = run
    monkeypatch.setenv("TRIMTAB_HOME", str(config.out.parent / "home"))
    kept = {path: path.read_bytes() for path in (config.out / "steps").iterdir()}
    scheme, _, settings = HOST.partition("?")
    typed = f"{scheme}?{'&'.join(reversed(settings.split('&')))}"
    assert typed != HOST
    again = compare(config.model_copy(update={"host": typed, "budget": "1s"}))
    assert [row.domain for row in again.rows] == [row.domain for row in found.rows]
    for path, content in kept.items():
        assert path.read_bytes() == content
    # With another host its steps would be done in no time, and cost nothing.
    with pytest.raises(InputError, match="has learnt with other"):
        compare(config.model_copy(update={"host": "tiny:gemma3", "methods": ("trimtab",)}))


def test_any_training_is_told_from_the_model_that_it_began_with() -> None:
    model = open_model(SMALL)
    key = model_key(model)
    assert key == model_key(open_model(SMALL)) != model_key(open_model(HOST))
    inner = model.model.get_parameter("model.layers.0.mlp.up_proj.weight")
    before = inner.detach().clone()
    with torch.no_grad():
        inner.mul_(1.05)
    assert model_key(model) != key
    with torch.no_grad():
        inner.copy_(before)
    assert model_key(model) == key
    model.model.config.rms_norm_eps *= 2
    assert model_key(model) != key


def test_what_does_not_fit_is_estimated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "home"))
    config = write_data(tmp_path)
    methods = ("expert", "lora", "full")
    words = ["compare", *config.data, "--small", SMALL, "--host", HOST, "--out"]
    words += [str(config.out), "--methods", ",".join(methods), "--budget", "0.01s"]
    words += ["--test-tokens", "100", "--memory-gb", "0.001"]
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 0
    report = json.loads((config.out / "comparison.json").read_text())["methods"]
    assert report["zero-shot"]["status"] == "measured"
    for name in methods:
        told = report[name]
        assert told["status"] == "estimated" and told["device_sec_estimated"]
        assert told["device_sec"] > 0 and told["domain_bits_per_byte"] is None
        assert told["peak_bytes"] > 1e6 and told["peak_bytes_estimated"]
        assert "GB" in told["reason"]
    assert "~ estimated" in capsys.readouterr().out
    late = config.model_copy(update={"budget": "0.01s", "methods": ("expert",), "test_tokens": 100})
    (late,) = (row for row in compare(late).rows if row.name == "expert")
    assert "of the budget are left" in late.result.reason
    with pytest.raises(InputError, match="--budget soon"):
        compare(config.model_copy(update={"budget": "soon"}))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="other things"):
        compare(config.model_copy(update={"out": tmp_path / "other"}))


def test_all_methods_may_be_called_all() -> None:
    given = {"data": ("x",), "small": SMALL, "host": HOST, "out": "out"}
    asked = [("all",), ("live", "all")]
    found = [CompareConfig.model_validate(given | {"methods": one}).methods for one in asked]
    assert found == [(), ("live", "all")]


# The figures


def result(name: str, nats: list[float], sec: float = 0.0, **more: object) -> MethodResult:
    steps = (Step(name="work", flops=1.0, sec=sec),) if sec else ()
    texts = tuple(TextScore(nats=value, bytes=100) for value in nats)
    values = {"method": name, "key": "", "status": "measured", "domain": texts, "steps": steps}
    return MethodResult.model_validate({**values, "general": {"prose": texts[::-1]}, **more})


T = {"nats": 7.0, "bytes": 50}


def rows_of(*results: MethodResult) -> list[MethodFigures]:
    return figures_of(results, None, seed=0)


def test_the_share_ahead_is_that_of_resampled_documents() -> None:
    draw = random.Random(1)
    base = [draw.uniform(50, 90) for _ in range(7)]
    rows = rows_of(
        result("zero-shot", base), result("lora", [v + draw.uniform(-9, 6) for v in base])
    )
    drawn = np.random.default_rng(0).integers(0, 7, (1_000, 7))
    ahead = 0.0
    for sample in drawn:
        bare, lora = (sum(row.result.domain[i].nats for i in sample) for row in rows)
        ahead += 1.0 if lora < bare else 0.5 if lora == bare else 0.0
    share = share_ahead(rows[1], rows[0], "bits per byte", None)
    assert share == pytest.approx(ahead / 1_000)
    assert share + share_ahead(rows[0], rows[1], "bits per byte", None) == pytest.approx(1)
    assert share_ahead(rows[0], rows[0], "bits per byte", None) == 0.5


def test_one_document_makes_nothing_sure() -> None:
    rows = rows_of(result("zero-shot", [80.0]), result("lora", [40.0]), result("trimtab", [60.0]))
    assert share_ahead(rows[1], rows[0], "bits per byte", None) == 0.5
    said = verdict(rows, None)
    assert "but not surely better" in said and "one document" in said
    assert "is not to be told from it" in said and "no error known" in said
    for shown in (
        said,
        terminal_table(rows, None),
        markdown(rows, "Ways", said, None),
        page(rows, "Ways", said, (), None),
    ):
        assert "±" not in shown and "−50.0" in shown
    notes = [line for line in terminal_table(rows, None).splitlines() if "alone was scored" in line]
    assert [note.split(" one ")[0].strip() for note in notes] == [
        "Of domain text", "Of general text (prose)",
    ]  # fmt: skip
    assert "hoose" not in said
    two = rows_of(result("zero-shot", [80.0, 82.0]), result("lora", [40.0, 50.0]))
    assert "alone was scored" not in terminal_table(two, None)
    half = rows_of(result("zero-shot", [80.0, 82.0], general={"a": [T, T], "b": [T]}))
    assert "(b) one document alone" in terminal_table(half, None)


def test_few_documents_make_nothing_sure() -> None:
    base = [80.0, 82.0, 79.0, 85.0, 81.0]

    def said(documents: int) -> str:
        before = base[:documents]
        rows = rows_of(
            result("zero-shot", before),
            result("lora", [v - 20 for v in before], 9.0),
            result("trimtab", [v - 10 for v in before]),
        )
        return verdict(rows, None)

    # Two equal methods: all of four documents speak for the first with probability 1/16.
    assert 0.5**ENOUGH < 1 - SURE < 0.5 ** (ENOUGH - 1)
    assert "surely better than the host" in said(5) and "Choose lora" in said(5)
    assert "is worse than it, with 50 % of its gain" in said(5)
    for documents in (2, 4):
        unsure = said(documents)
        assert "100 % of resamples, but fewer than 5 documents tell the two apart" in unsure
        assert "but not surely better" in unsure and "hoose" not in unsure
        assert "behind, but not surely worse" in unsure and "its gain" not in unsure


def test_questions_that_tell_nothing_apart_make_nothing_sure() -> None:
    task = Task("choice", tuple(Question("?", "a", ("a", "b")) for _ in range(60)))

    def found(more: int) -> tuple[float, bool, str]:
        answers = [1] * 20 + [0] * 40
        better = [0] * more + answers[more:]
        results = [
            result("zero-shot", [80.0], answers=tuple(answers)),
            result("lora", [80.0], 9.0, answers=tuple(better)),
        ]
        bare, lora = figures_of(results, task, seed=0)
        said = verdict([bare, lora], task)
        return share_ahead(lora, bare, "accuracy", task), "Choose lora" in said, said

    share, is_chosen, said = found(4)
    assert share >= SURE and not is_chosen and "not surely better" in said
    assert "fewer than 5 questions tell the two apart" in said
    assert found(5)[1] and ", surely better" in found(5)[2]


def test_the_verdict_says_what_lora_does_to_general_text_and_what_is_faster() -> None:
    base, prose = [80.0, 82.0, 79.0, 85.0, 81.0], [70.0, 71.0, 75.0, 72.0]
    names = {"zero-shot": (0, 0, 1.0), "expert": (5, 2, 0.7), "lora": (6, 5, 1.4)}
    found = {"all": (9, -4, 3.0)} | names
    given = []
    for name, (less, more, took) in found.items():
        general = {"prose": [{"nats": v + more, "bytes": 100} for v in prose]}
        use = {"sec_per_token": took, "prompt_tokens": 9, "answer_tokens": 9, "peak_bytes": 9}
        given.append(result(name, [v - less for v in base], general=general, use=use))
    said = verdict(rows_of(*given), None)
    assert "On general text all is better than the host (−5.6 ± 0.0 % bits per byte)" in said
    assert "LoRA changes general text by +6.9 ± " in said
    assert "Where that matters more, lora (" in said and "1.4 times the host’s" in said
    assert "with 150 % of its gain" in said


@pytest.mark.parametrize("costs", [(196.0, 405.0), (3.0, 4.0), (1.0, 1.0), (2.0, 90_000.0)])
def test_a_cost_axis_has_numbers(costs: tuple[float, float]) -> None:
    named = enumerate((0.0, *costs))
    points = [Point(f"m{n}", cost, Estimate(1.0, 0.1), True) for n, cost in named]
    ticks = re.findall(r">([\d,]+)</text>", scatter_svg(points, ("cost", "b"), "p", log_x=True))
    numbers = [float(tick.replace(",", "")) for tick in ticks]
    assert 0 in numbers
    for cost in costs:
        assert any(cost / 10 <= number <= 10 * cost for number in numbers if number)


@given(st.lists(st.tuples(st.floats(1, 9), st.floats(0.1, 9)), min_size=1, max_size=6, unique=True))
@settings(max_examples=20, deadline=None)
def test_the_front_is_what_nothing_dominates(points: list[tuple[float, float]]) -> None:
    others = (result(f"m{n}", [nats, nats], sec) for n, (nats, sec) in enumerate(points))
    rows = rows_of(result("zero-shot", [10.0, 10.0]), *others)
    found = pareto(rows, "bits per byte", lambda row: row.result.sec)
    places = {row.name: (row.domain.mean, row.result.sec) for row in rows if row.domain}
    for name, (bits, sec) in places.items():
        beaten = any(b <= bits and s <= sec and (b, s) != (bits, sec) for b, s in places.values())
        twin = any(places[other] == (bits, sec) for other in found - {name})
        assert (name in found) == (not beaten) or twin


def test_macro_f1_and_accuracy_are_scikit_learns() -> None:
    f1_score = pytest.importorskip("sklearn.metrics").f1_score
    draw, classes = random.Random(3), ("a", "b", "c")
    questions = tuple(Question("?", draw.choice(classes), classes) for _ in range(40))
    answers = [draw.randrange(3) for _ in questions]
    task, drawn = Task("classes", questions), np.random.default_rng(0).integers(0, 40, (20, 40))
    ours = metric("macro-F1", task, answers, drawn)
    right = np.array([question.right for question in questions])
    for sample, value in zip(drawn, ours, strict=True):
        labels = np.unique(right[sample])
        theirs = f1_score(
            right[sample], np.array(answers)[sample], labels=labels, average="macro",
            zero_division=0.0,
        )  # fmt: skip
        assert value == pytest.approx(theirs)
    accuracy = metric("accuracy", task, answers, np.arange(40)[None])[0]
    assert accuracy == np.mean(right == np.array(answers))


def test_the_verdict_follows_from_the_figures() -> None:
    base = [80.0, 82.0, 79.0, 85.0, 81.0]
    better = [value - 8 for value in base]
    close = [value - 8 + 0.2 * (-1) ** n for n, value in enumerate(base)]
    rows = rows_of(
        result("zero-shot", base), result("trimtab", close, 10.0), result("lora", better, 600.0)
    )
    said = verdict(rows, None)
    assert said.startswith("Best on this data is LoRA on the host") and "surely better" in said
    assert "choose trimtab" in said and "10 s before use instead of 10 min" in said
    assert "is behind, but not surely worse than it" in said
    far = rows_of(
        result("zero-shot", base), result("trimtab", base, 10.0), result("lora", better, 600.0)
    )
    assert "Choose lora" in verdict(far, None) and "is worse than it" in verdict(far, None)
    nothing = rows_of(result("zero-shot", base), result("lora", [v + 1 for v in base], 600.0))
    assert verdict(nothing, None).startswith("Nothing that was measured is better")
    shown = terminal_table(nothing, 1.5).splitlines()
    # Each method has a line in the table of quality and one in that of cost, none of them cut.
    assert sum(line.split()[:1] == ["zero-shot"] for line in shown) == 2
    assert max(map(len, shown)) <= 120 and "…" not in "".join(shown)
    assert [row.name for row in ranked(nothing, "bits per byte")] == ["zero-shot", "lora"]
    # A prompt that is not surely better is no reason to leave the host as it is.
    unsure = [value + 3 * (-1) ** n - 0.7 for n, value in enumerate(base)]
    prompt = verdict(rows_of(result("zero-shot", base), result("few-shot", unsure)), None)
    assert "but not surely better" in prompt and "Choose the host as it is (zero-shot)" in prompt
    unmeasured = MethodResult(method="full", key="", status="estimated", reason="time")
    alone = verdict(rows_of(result("zero-shot", base), unmeasured), None)
    assert alone.startswith("Nothing was measured but the host as it is")
    assert alone.endswith(": full.") and "hoose zero" not in alone


def test_durations_and_budgets() -> None:
    assert [seconds_of(t) for t in ("90s", "20min", "1.5h", "1 d")] == [90, 1200, 5400, 86400]
    for wrong in ("20", "0min", "-1h", "an hour"):
        with pytest.raises(ValueError, match="for example 20min"):
            seconds_of(wrong)
    now = itertools.count(0, 10)
    budget = Budget(100, 5e9, reading=2.0, clock=lambda: float(next(now)))
    assert budget.training_sec(8) == 4 and budget.left_sec == 90
    budget.ask_for("little", 60)
    with pytest.raises(NotRun, match="much would take about 90 s, and 60 s"):
        budget.ask_for("much", 90)
    with pytest.raises(NotRun, match=r"6\.0 GB of memory, and it may have 5\.0 GB"):
        budget.ask_for_memory("it", 6e9)


def test_work_ends_when_its_pace_would_outlast_the_budget() -> None:
    now = [0.0]
    budget = Budget(100, 5e9, clock=lambda: now[0])
    seen: list[int] = []

    @contextmanager
    def shown(label: str, total: int) -> Iterator[Advance]:
        assert (label, total) == ("reading", 100)
        yield seen.append

    guarded = budget.guarded(shown, "reading it")
    with guarded("reading", 100) as advance:
        # What an earlier run has done is told at once, and says nothing of the pace.
        for sec, units in ((0, 40), (10, 10), (20, 10), (30, 20)):
            now[0] = sec
            advance(units)
    assert seen == [40, 10, 10, 20]
    with (
        pytest.raises(NotRun, match="the rest of reading it would take about 58 s, and 50 s of"),
        guarded("reading", 100) as advance,
    ):
        advance(10)
        now[0] = 50
        advance(23)
    with pytest.raises(NotRun, match="no time"), guarded("reading", 100) as advance:
        now[0] = 100
        advance(99)
    # The last unit is never too late, and nothing begins after the end.
    now[0] = 0
    with guarded("reading", 100) as advance:
        now[0] = 101
        advance(100)
    with pytest.raises(NotRun, match="no time"), guarded("reading", 100):
        raise AssertionError("it began")


def figures(folder: Path) -> dict[str, object]:
    """What a comparison found, without what its clock and its memory meter said."""
    told = json.loads((folder / "comparison.json").read_text())
    names = ("status", "domain_bits_per_byte", "general_bits_per_byte", "task", "training_flops")
    return {name: [row[n] for n in names] for name, row in told["methods"].items()}


@contextmanager
def emptied(folder: Path) -> Iterator[Path]:
    """Make room in a folder's place: what tune holds out follows from names, and so from it."""
    aside = folder.with_name("aside")
    folder.rename(aside)
    try:
        yield aside
    finally:
        shutil.rmtree(folder)
        aside.rename(folder)


def test_an_interrupted_comparison_finds_the_same(
    run: tuple[CompareConfig, CompareResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMTAB_HOME", str(run[0].out.parent / "home"))
    config = run[0].model_copy(update={"methods": ("trimtab", "lora")})
    left = 0

    @contextmanager
    def broken(label: str, total: int) -> Iterator[Advance]:
        def advance(units: int) -> None:
            nonlocal left
            left -= bool(units)
            if left < 0:
                raise KeyboardInterrupt

        del label, total
        yield advance

    with emptied(config.out) as aside:
        tries = 0
        for tries in range(1, 20):
            left = 20 * tries
            try:
                compare(config, progress=broken)
                break
            except KeyboardInterrupt:
                continue
        assert tries > 3
        whole, names = figures(aside), ("zero-shot", "trimtab", "lora")
        assert figures(config.out) == {name: whole[name] for name in names}
        assert not list((config.out / "methods").glob("*unfinished*"))


def test_a_killed_comparison_goes_on(
    run: tuple[CompareConfig, CompareResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMTAB_HOME", str(run[0].out.parent / "home"))
    config = run[0].model_copy(update={"methods": ("few-shot",)})
    words = [sys.executable, "-m", "trimtab", "compare", *config.data, "--methods", "few-shot"]
    for name in ("small", "host", "task", "test_tokens", "window_tokens", "context_tokens"):
        words += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    words += ["--few-shot-tokens", "24", "--examples", "2", "--train-window-tokens", "64"]
    words += ["--general", *config.general, "--dtype", "float32", "--out", str(config.out)]
    with emptied(config.out) as aside:
        result = config.out / "methods" / "zero-shot.json"
        begun = result.with_suffix(".unfinished.json")
        killed = subprocess.Popen(words, stderr=subprocess.DEVNULL)
        while not begun.is_file() and killed.poll() is None:
            time.sleep(0.01)
        killed.kill()
        assert killed.wait() == -signal.SIGKILL
        # On a busy machine the method may have come to its end before the signal came.
        if begun.is_file():
            kept = json.loads(begun.read_text())["texts"][""]
        else:
            kept = json.loads(result.read_text())["domain"]
        compare(config)
        whole = figures(aside)
        assert figures(config.out) == {name: whole[name] for name in ("zero-shot", "few-shot")}
        ours = json.loads(result.read_text())
        assert kept and ours["domain"][: len(kept)] == kept


def test_what_outlasts_the_budget_is_gone_on_with(
    run: tuple[CompareConfig, CompareResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMTAB_HOME", str(run[0].out.parent / "home"))
    shutil.copytree(run[0].out, tmp_path / "out")
    path = tmp_path / "out" / "methods" / "lora.json"
    result = json.loads(path.read_text())
    config = run[0].model_copy(update={"out": tmp_path / "out", "methods": ("lora",)})
    part = {"texts": {"": result["domain"][:1]}, "answers": [], "key": result["key"]}
    (path.parent / "lora.unfinished.json").write_text(json.dumps(part))
    path.unlink()
    short = config.model_copy(update={"budget": "0.01s"})
    found = {row.name: row for row in compare(short).rows}["lora"].result
    assert found.status == "estimated" and "budget" in found.reason
    # The training is done: what it took is known, and is not estimated.
    assert found.sec == MethodResult.model_validate(result).sec and not found.is_sec_estimated
    # What is missing is the timing alone: a short budget does not undo what was measured.
    path.write_text(json.dumps({**result, "use": None, "reason": "its use was not timed"}))
    assert {row.name: row for row in compare(short).rows}["lora"].result.status == "measured"
    whole = {row.name: row for row in compare(config).rows}["lora"].result
    assert whole.use and not whole.reason and whole.domain == run[1].rows[5].result.domain


def test_every_figure_follows_from_the_files(run: tuple[CompareConfig, CompareResult]) -> None:
    folder = run[0].out
    told = json.loads((folder / "comparison.json").read_text())
    lines = (folder / told["data"]["asked"]).read_text().splitlines()
    asked = [json.loads(line) for line in lines]
    classes = tuple(asked[0]["choices"])
    task = Task("classes", tuple(Question(q["prompt"], q["answer"], classes) for q in asked))
    results = [
        MethodResult.model_validate_json((folder / told["methods"][name]["file"]).read_text())
        for name in ORDER
    ]
    rows = {row.name: row for row in figures_of(results, task, seed=0)}
    for name, row in told["methods"].items():
        ours = rows[name]
        assert (ours.domain and asdict(ours.domain)) == row["domain_bits_per_byte"]
        assert {n: asdict(value) for n, value in ours.task.items()} == row["task"]
        steps = [json.loads((folder / path).read_text())["step"] for path in row["step_files"]]
        assert steps == row["steps"] or name == "embeddings"
        if row["domain_bits_per_byte"]:
            nats = sum(text.nats for text in ours.result.domain)
            size = sum(text.bytes for text in ours.result.domain)
            assert row["domain_bits_per_byte"]["mean"] == pytest.approx(nats / size / np.log(2))
            assert len(ours.result.domain) == len(told["data"]["scored"]["domain"])
    assert verdict(list(rows.values()), task) == told["verdict"]

    def held(adapter: str, *names: str) -> int:
        found = itertools.chain(*((folder / adapter).rglob(name) for name in names))
        return sum(path.stat().st_size for path in found)

    seat, head = "mount.safetensors", "head.safetensors"
    for name, size in {
        "trimtab": held("domain.adapter", seat, head, "memory/*"),
        "live": held("domain.adapter", "expert/*"),
        "all": held("domain.adapter", seat, head, "memory/*", "expert/*"),
        "label-head": held("label-head.adapter", seat, head),
    }.items():
        assert told["methods"][name]["artefact_bytes"] == size
    paper = (folder / "comparison.md").read_text()
    assert all(f"{a} ahead of {b}: {100 * share:.0f} %" in paper for a, b, share in told["better"])
    page = (folder / "comparison.html").read_text()
    assert all(row["file"] in page for row in told["methods"].values())


def test_text_with_a_source_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "home"))
    config = write_data(tmp_path)
    pair = json.dumps({"source": "Das Ruder.", "target": "The rudder turns the keel."})
    (tmp_path / "pairs.jsonl").write_text(f"{pair}\n" * 3)
    for name in ("data", "test", "general"):
        wrong = config.model_copy(update={name: (str(tmp_path / "pairs.jsonl"),)})
        with pytest.raises(InputError, match="has a source"):
            compare(wrong)


def test_questions_are_read_and_wrong_lines_named(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"

    def read(*lines: object) -> Task:
        path.write_text("\n".join(json.dumps(line) for line in lines))
        return read_questions(path)

    a, b = {"prompt": "1+1=", "answer": "2"}, {"prompt": "2+1=", "answer": "3"}
    assert read(a, b).kind == "text"
    named = read(a, b, a, b)
    assert named.kind == "classes" and named.questions[1].choices == ("2", "3")
    assert named.questions[1].right == 1
    assert read(a | {"choices": ["1", "2"]}).kind == "choice"
    for wrong, message in (
        ([a, {"prompt": "x"}], "line 2 of .* is no question"),
        ([a | {"choices": ["1", "3"]}], "one of its choices"),
        ([a | {"choices": ["2", "2"]}], "two choices or more, all different"),
        ([a | {"choices": ["2"]}], "two choices or more"),
        ([a | {"choices": "2"}], 'its "choices" are "2"'),
        ([a | {"answer": 0}], 'its "answer" is 0'),
        ([a | {"answer": ""}], 'its "answer" is ""'),
        ([{"question": "x", "answer": "y"}], 'its "prompt" is missing'),
        ([a, b | {"choices": ["3", "4"]}], "some have none"),
        ([7], "is no question"),
        ([a, a], "all 2 answers of .* are '2'"),
    ):
        with pytest.raises(InputError, match=message):
            read(*wrong)


@pytest.mark.parametrize("ref", [SMALL, HOST, "tiny:gemma2", "tiny:gpt2"])
def test_sizes_of_a_model_are_its_own(ref: str) -> None:
    model = open_model(ref, dtype="float32")
    shape = shape_of(model)
    assert shape.params == sum(weight.numel() for weight in model.model.parameters())
    assert (shape.vocab, shape.hidden) == tuple(model.unembedding.weight.shape)
    assert 3 * 2 * shape.matmul_params > lora_training_flops(shape, 0, 1)
    if "gpt2" not in ref:
        # GPT-2's layers are fused and not gated, which the cost model does not know.
        layers = [m for m in model.model.base_model.modules() if isinstance(m, nn.Linear)]
        assert lora_params(shape, 1) == sum(m.in_features + m.out_features for m in layers)


def test_the_verdict_says_if_the_simple_baseline_wins() -> None:
    task = Task("classes", tuple(Question("?", "ab"[n % 2], ("a", "b")) for n in range(20)))
    right, guess = tuple(n % 2 for n in range(20)), (0,) * 20
    results = [
        result("zero-shot", [80.0, 81.0], answers=guess),
        result("trimtab", [70.0, 71.0], 10.0, answers=guess),
        result("embeddings", [], 1.0, answers=right, general={}),
    ]
    said = verdict(figures_of(results, task, seed=0), task)
    assert "trimtab is even with the host as it is." in said
    assert "is better than trimtab (accuracy 50.0 ± " in said
    assert said.startswith("Best on this data is logistic regression")


def test_short_questions_are_scored_together() -> None:
    asked = [Document(str(n), f"{n} + {n} = {n + n}\n") for n in range(30)]
    joined = _put_together(asked)
    assert "".join(d.text for d in joined) == "".join(d.text for d in asked)
    assert all(len(d.text.encode()) >= MIN_DOCUMENT_BYTES for d in joined) and len(joined) > 2
    whole = [Document("a", "x" * 64), Document("b", "y" * 70)]
    assert _put_together(whole) == whole
    assert _put_together(asked[:1]) == asked[:1]


def test_questions_that_are_asked_are_not_learnt_from(tmp_path: Path) -> None:
    task = tmp_path / "task.jsonl"
    lines = [{"prompt": f"Say {n % 6} ", "answer": "ab"[n % 2]} for n in range(40)]
    lines += [{"prompt": f"Name {n} ", "answer": "ab"[n % 2]} for n in range(9)]
    task.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    config = CompareConfig(task=task, small=SMALL, host=HOST, out=tmp_path / "out")
    split = split_data(config)
    assert split.task is not None
    asked = {question.prompt for question in split.task.questions}
    assert split.examples and not asked & {question.prompt for question in split.examples}
    assert split.repeated == 49 - len(split.task.questions) - len(split.examples) > 0
    task.write_text("".join(f"{json.dumps(lines[0] | {'answer': a})}\n" for a in "ababab"))
    with pytest.raises(InputError, match="is asked too"):
        split_data(config)
