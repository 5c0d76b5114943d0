"""The transfer suite on toy models: every step, its rows, and a second run that changes nothing."""

import json
import math
import re
import shutil
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.equal_experts import compared, next_tokens, shares, stopped
from bench.transfer.metrics import calibration_error, row_outcomes, row_tasks
from bench.transfer.pairs import Pair
from bench.transfer.results import add
from bench.transfer.steps import QUESTION_ROWS, STEPS
from bench.transfer.suite import Run, make_adapter
from bench.transfer.table import table
from trimtab.errors import InputError
from trimtab.metrics import DocumentScore
from trimtab.progress import Display
from trimtab.steering.kept import Kept, read_scores, write_scores
from trimtab.steering.scoring import RowScore, ScoredDocument
from trimtab.text.probe import probe_documents

WORDS = (
    "keel rudder tiller anchor hull mast bulwark mooring bowline harbour capstan topsail".split()
)


def sentences(seed: int, count: int = 30) -> str:
    draw = np.random.default_rng(seed)
    return "".join(
        f"The {WORDS[a]} turns the {WORDS[b]}.\n" for a, b in draw.integers(0, 12, (count, 2))
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    pair = Pair("toy", "tiny:llama?hidden=32", "tiny:qwen3?hidden=32&vocab=bpe")
    run = Run(pair, "toy", 0, tmp_path_factory.mktemp("run"), 10_000)
    counts = {"train": 6, "validation": 1, "test": 2, "general/prose": 2}
    for split, count in counts.items():
        (run.texts / split).mkdir(parents=True)
        for number in range(count):
            seed = 100 * len(split) + number
            text = sentences(seed) if "/" not in split else f"Plain prose {number}. " * 12
            (run.texts / split / f"{number}.txt").write_text(text)
    return run


@pytest.fixture(autouse=True)
def _few_general_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    # Every head, seat and expert reads all of them, a byte a token.
    monkeypatch.setattr(
        import_module("trimtab.record"), "probe_documents", lambda: probe_documents()[::8]
    )


OFFLINE = [step for name, step in STEPS.items() if not name.endswith("knowledge")]
"""All but those that fetch their questions."""


def test_every_step_fills_the_results(run: Run, tmp_path: Path) -> None:
    make_adapter(run, Display())
    key = {"pair": "toy", "domain": "toy", "seed": 0, "train_tokens": 1}
    path = tmp_path / "transfer.json"
    for step in OFFLINE:
        add(key, step(run, Display()), path)
    first = path.read_bytes()
    stored = json.loads(first)
    rows = stored["runs"][0]["rows"]
    assert {"host", "reference", "expert", "proxy", "proxy-0.5", "mixture", "prompt"} <= set(rows)
    assert {"bias", "bytes", "head", "memory", "head+memory", "live", "all"} <= set(rows)
    assert {"hostfit-head", "label-head", "lora-host", "lora-host+memory"} <= set(rows)
    assert {"temperature", "head-shuffled", "memory-shuffled"} <= set(rows)
    host, adapted = (rows[r]["domain_bits_per_byte"]["mean"] for r in ("host", "lora-host"))
    assert adapted < host
    for row in ("lora-host", "lora-host+memory", "prompt"):
        for kind in ("domain", "general"):
            own, bare = (rows[one][f"{kind}_bits_per_byte"]["mean"] for one in (row, "host"))
            assert rows[row][f"{kind}_change"]["mean"] == pytest.approx(own - bare)
        assert rows[row]["domain_change"]["stderr"] > 0
    assert rows["host"]["perplexity_change_percent"] == 0
    assert rows["lora-host"]["perplexity_change_percent"] < 0
    assert {*QUESTION_ROWS, "lora-host"} == set(stored["runs"][0]["tasks"]["right-word"])
    cells = stored["runs"][0]["cells"]
    assert set(cells["lora-host"]) == {"next-line", "next-token", "right-word"}
    assert set(cells["expert"]) == {"right-word"}
    shares = {row: f["mean"] for row, f in stored["runs"][0]["tasks"]["right-word"].items()}
    for rival, by_task in cells.items():
        found = by_task["right-word"]["difference_points"]
        assert found == pytest.approx(100 * (shares["all"] - shares[rival]))
    # Scores are kept: a second run reads them and finds the same.
    for step in OFFLINE:
        add(key, step(run, Display()), path)
    assert path.read_bytes() == first
    assert re.search(r"\| lora-host \|.*± .*\| 100 % \|", table(path))
    assert "all against lora-host, task by task" in table(path)


def test_an_expert_is_stopped_near_another_and_both_steer_one_host(
    run: Run, tmp_path: Path
) -> None:
    make_adapter(run, Display())
    small = Pair("toy", "tiny:llama?hidden=24", run.pair.host)
    same = replace(run, pair=small, base=tmp_path)
    shutil.copytree(run.texts, same.texts)
    found = compared(run, same, Display())
    rows = {name: expert["rows"] for name, expert in found["experts"].items()}
    goal, near = (rows[name]["expert"]["mean"] for name in ("other", "same"))
    reports = sorted((same.on_host / "scores" / "test").glob("trial-*/report.json"))
    trials = [
        json.loads(p.read_text())["hosts"][0]["domain_bits_per_byte"]["host"]["mean"]
        for p in reports
    ]
    assert len(trials) > 1
    assert near == pytest.approx(min(trials, key=lambda one: abs(one - goal)), rel=1e-3)
    assert rows["other"]["host"] == rows["same"]["host"]
    gains = [rows[n]["host"]["mean"] - rows[n]["live"]["mean"] for n in ("other", "same")]
    assert found["shares"]["live"]["other_gain_bits_per_byte"] == pytest.approx(gains[0])
    assert found["shares"]["live"]["share_percent"] == pytest.approx(100 * gains[0] / gains[1])
    with pytest.raises(InputError, match="untuned"):
        stopped(same, rows["same"]["reference"]["mean"] + 0.1, run.adapter, Display())


def test_trials_come_near_what_is_asked_where_a_loss_falls_with_the_logarithm() -> None:
    def bits(tokens: int) -> float:
        return 2.0 - 0.05 * math.log2(tokens)

    goal = bits(24_000)
    assert next_tokens({4_000: bits(4_000)}, goal) == 8_000
    assert next_tokens({64_000: bits(64_000)}, goal) == 32_000
    trials = {n: bits(n) for n in (8_000, 16_000, 64_000)}
    assert next_tokens(trials, goal) == pytest.approx(24_000, abs=1)


def test_half_a_gain_is_half_whatever_documents_are_drawn() -> None:
    def scores(*nats: float) -> list[DocumentScore]:
        return [DocumentScore(one, 100) for one in nats]

    steered = ("head", "memory", "head+memory", "live", "all")
    whole = {"host": scores(100, 200, 60)} | dict.fromkeys(steered, scores(80, 160, 50))
    half = {"host": scores(100, 200, 60)} | dict.fromkeys(steered, scores(90, 180, 55))
    found = shares(half, whole)["live"]
    assert found["share_percent"] == pytest.approx(50)
    assert found["stderr_percent"] == pytest.approx(0, abs=1e-9)


def kept(right: list[bool], sure: list[float]) -> Kept:
    ids = torch.arange(len(right))
    tops = torch.where(torch.tensor(right), ids, -1)
    row = RowScore(torch.zeros(len(right)), tops, torch.tensor(sure).log())
    document = ScoredDocument(tuple(ids.tolist()), (1,) * len(right), {"host": row})
    return Kept(document, {"expert": DocumentScore(1.5, 3)})


def test_lines_are_right_as_a_whole_and_the_first_is_left_out() -> None:
    token_bytes = [b"a", b"\n", b"b", b"c\n", b"d", b"\n", b"e"]
    scored = [kept([False, True, True, True, True, False, True], [0.5] * 7)]
    tasks = row_tasks(scored, row_outcomes(scored, token_bytes))
    assert tasks["next-line"]["host"].mean == pytest.approx(0.5)
    assert tasks["ece"]["host"].mean == pytest.approx(abs(5 / 7 - 0.5))


def test_calibration_error_against_a_slow_reference() -> None:
    draw = np.random.default_rng(0)
    probs = draw.uniform(size=500)
    items = np.stack([probs, draw.uniform(size=500) < probs**2], 1).astype(float)
    total = 0.0
    for number in range(15):
        low, high = number / 15, (number + 1) / 15
        chosen = [i for i in items if low <= i[0] < high]
        if chosen:
            gap = sum(i[1] for i in chosen) / len(chosen) - sum(i[0] for i in chosen) / len(chosen)
            total += len(chosen) / 500 * abs(gap)
    assert calibration_error(items) == pytest.approx(total)


def test_kept_scores_come_back(tmp_path: Path) -> None:
    scored = kept([True, False], [0.25, 0.5])
    write_scores(tmp_path / "a.safetensors", scored)
    found = read_scores(tmp_path / "a.safetensors")
    assert found and found.small == scored.small
    assert found.on_host.token_ids == (0, 1)
    assert found.on_host.rows["host"].top_logprobs.tolist() == pytest.approx(
        [math.log(0.25), math.log(0.5)]
    )
    (tmp_path / "a.safetensors").write_bytes(b"broken")
    assert read_scores(tmp_path / "a.safetensors") is None
    assert read_scores(tmp_path / "b.safetensors") is None
