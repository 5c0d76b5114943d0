"""Choosing among candidates: the chosen one, the lines asked, and the figures, by oracles."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_generate import PROMPTS
from test_generate import adapter as adapter  # a fixture
from test_generate import host as host  # a fixture

from bench import rerank
from trimtab.backends.hf import HFModel
from trimtab.hosted import reranking
from trimtab.hosted.reranking import Judged, chosen, judged
from trimtab.steering.beside import open_beside
from trimtab.store.manifest import read_manifest
from trimtab.types import Document

ZIG = "".join(
    f"    const value_{i} = try reader.readAll(buffer[{i}..]);\n    // Remark {i} of some length\n"
    for i in range(12)
)


def test_lines_are_cut_out_of_the_last_two_thirds_of_a_file() -> None:
    lines = rerank.lines_of(Document("a.zig", ZIG), 3)
    assert len(lines) == 3 == len(set(lines))
    assert lines == rerank.lines_of(Document("a.zig", ZIG), 3)
    for line in lines:
        place = ZIG.index(line.prompt + line.rest + "\n") + len(line.prompt)
        assert place > len(ZIG) / 3
        assert line.rest.startswith(" ") and "//" not in line.prompt.rpartition("\n")[2]
        assert len(line.prompt) <= rerank.PROMPT_CHARS


def test_candidates_are_the_hosts_and_their_likelihood_its_own(
    adapter: Path, host: HFModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rerank, "MAX_TOKENS", 6)
    pair = open_beside(read_manifest(adapter), adapter, dtype="float32")
    line = rerank.Line("a", PROMPTS[0], " rudder")
    found = rerank.candidates(host, pair, line, seed=3)
    assert found == rerank.candidates(host, pair, line, seed=3)
    assert len(found) == rerank.CANDIDATES and len({one.text for one in found}) > 1
    tokens = rerank.sampled(host, line.prompt, 3)
    assert [text for text, _ in tokens] == [one.text for one in found]
    prompt = [*host.context_ids(), *host.encode(line.prompt)]
    compared = 0
    for one in found:
        ids = host.encode_following(one.text)
        # The oracle reads whole texts anew: only where these are cut as they were written.
        if len(ids) != 6 or not one.text:
            continue
        logprobs = host.logits(torch.tensor([[*prompt, *ids]]))[0].log_softmax(-1)
        own = sum(float(logprobs[len(prompt) + i - 1, token]) for i, token in enumerate(ids))
        assert one.host_nats == pytest.approx(own, abs=1e-3)
        compared += 1
    assert compared
    texts = [one.text for one in found]
    with pair.as_expert() as expert:
        by_expert = judged(expert, line.prompt, texts, None)
    by_reference = judged(pair.reference, line.prompt, texts, None)
    both = zip(by_expert, by_reference, strict=True)
    assert [one.judged for one in found] == [
        rerank.Judgement(e.nats, r.nats, e.size) for e, r in both
    ]
    assert by_expert != by_reference


def test_a_continuation_costs_what_its_parts_cost(adapter: Path) -> None:
    pair = open_beside(read_manifest(adapter), adapter, dtype="float32")
    ids = pair.reference.encode("The rudder turns the hull.")
    pieces = [pair.vocabulary.token_bytes[i] or b"" for i in ids]
    cut = len(ids) // 2
    first, rest = (b"".join(part).decode() for part in (pieces[:cut], pieces[cut:]))
    with pair.as_expert() as expert:
        whole, before = judged(expert, "", [first + rest, first], None)
        parts = [before, *judged(expert, first, [rest], None)]
        assert whole.size == sum(part.size for part in parts)
        assert whole.nats == pytest.approx(sum(part.nats for part in parts), abs=1e-3)
        assert judged(expert, "The", ["", " hull"], None)[0] == Judged(0.0, 0)


def test_a_tree_of_candidates_is_read_as_each_alone(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = open_beside(read_manifest(adapter), adapter, dtype="float32")
    texts = [" hull", " hull and the mast", "", " tide"]
    with pair.as_expert() as expert:
        tree = judged(expert, PROMPTS[0], texts, None)
        monkeypatch.setattr(reranking, "_reads_trees", lambda _: False)
        for ours, alone in zip(tree, judged(expert, PROMPTS[0], texts, None), strict=True):
            assert ours.size == alone.size
            assert ours.nats == pytest.approx(alone.nats, abs=1e-4)


def test_the_chosen_one_is_the_likeliest_a_byte() -> None:
    one = Judged(-2.0, 8)
    assert chosen([Judged(0.0, 0), replace(one, size=4), one, one]) == 2
    assert chosen([Judged(0.0, 0)] * 2) == 0


def test_figures_are_means_over_lines_and_errors_over_files() -> None:
    random = np.random.default_rng(0)
    files = [str(i // 3) for i in range(30)]
    base = random.random(30).tolist()
    better = [score + 0.25 for score in base]
    found = rerank.gained(files, {"random": base, "other": better}, "random")
    assert found["random"]["mean"] == pytest.approx(float(np.mean(base)), abs=1e-4)
    assert found["random"]["gain"] == 0 == found["random"]["gain_stderr"]
    # What both have in common cancels.
    assert found["other"]["gain"] == 0.25 and found["other"]["gain_stderr"] < 1e-6
    assert found["other"]["stderr"] == found["random"]["stderr"] > 0


def test_the_measures_know_equal_texts() -> None:
    assert rerank.similarity(" abc;", "abc; ") == 1.0 == rerank.is_exact(" abc;", "abc; ")
    assert rerank.similarity("ab", "ax") == 0.5 and not rerank.is_exact("ab", "ax")
    assert rerank.most_common([made("x"), made("y"), made(" y")]) == 1


def made(text: str) -> rerank.Candidate:
    return rerank.Candidate(text, -1.0, rerank.Judgement(-1.0, -2.0, len(text)))
