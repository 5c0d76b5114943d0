"""Who decided a token: distances and parts against slow sums, lines against `splitlines`."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimtab.anchors import Reading
from trimtab.backends.hf import HFModel
from trimtab.backends.open import open_model
from trimtab.carriers.gate import GATE_FEATURES
from trimtab.carriers.memory import Memory, lay_out, sources_of, whitening
from trimtab.carriers.recall import MountedMemory
from trimtab.carriers.search import build_index
from trimtab.carriers.sources import Sources, place_of, travelling_names
from trimtab.steering.explain import (
    AFTER_BYTES,
    BEFORE_BYTES,
    DECIDERS,
    Voice,
    explain,
    moved_nats,
    neighbour,
    parts,
)
from trimtab.steering.predictors import Rows, Steering, predicted
from trimtab.steering.rows import base_of, families, prior_of, with_memory
from trimtab.steering.seat import following
from trimtab.store.adapter_schema import Blend

BLEND = Blend()
MEMORY = families(BLEND)["memory"]
DOCUMENTS = [
    b"The keel turns the hull.\nThe sail turns the mast.\n\nThe tide turns.",
    b"",
    "Das Ruder dreht das Schiff, äöü.\nUnd dann nichts.".encode(),
]
SOURCES = ("ships/keel.txt", "ships/empty.txt", "ruder.txt")


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def memory(*, named: bool = True) -> Memory:
    text, starts = lay_out(DOCUMENTS)
    positions = torch.cat(
        [torch.arange(s + bool(d), s + len(d)) for s, d in zip(starts, DOCUMENTS, strict=True)]
    )
    states = draw(len(positions), 10, seed=1)
    projection, mean = whitening(states, 6)
    keys = torch.nn.functional.normalize((states - mean) @ projection.T, dim=-1).half()
    # Wide open: it is to decide.
    gate = (6.0, *(0.0 for _ in GATE_FEATURES[1:]))
    sources = Sources(SOURCES, tuple(starts)) if named else None
    return Memory(keys, projection, mean, text, positions, gate, gate, gate, sources=sources)


def test_distance_is_the_sum_over_all_tokens() -> None:
    host, steered = (draw(50, seed=seed).log_softmax(-1) for seed in (3, 4))
    slow = sum(math.exp(q) * (q - p) for p, q in zip(host.tolist(), steered.tolist(), strict=True))
    assert moved_nats(host, steered) == pytest.approx(slow, rel=1e-5)
    assert moved_nats(host, host) == 0.0


def test_distance_by_hand_and_where_a_token_became_impossible() -> None:
    even = torch.tensor([0.5, 0.5]).log()
    assert moved_nats(even, torch.tensor([1.0, 0.0]).log()) == pytest.approx(math.log(2))


@settings(deadline=None)
@given(st.lists(st.floats(-20, 20), min_size=2, max_size=9), st.integers(0, 9))
def test_distance_is_never_negative(logits: list[float], seed: int) -> None:
    host = torch.tensor(logits).log_softmax(-1)
    assert moved_nats(host, draw(len(logits), seed=seed).log_softmax(-1)) >= 0.0


def test_every_predictor_of_a_generation_comes_from_the_host() -> None:
    for names in map(families(BLEND).__getitem__, ("head+memory", "all", "live+memory")):
        for name in names:
            steps = []
            while (made := base_of(name, BLEND)) is not None:
                name, carrier = made
                steps.append(carrier)
            assert name == "host" and len(steps) <= 2
    assert base_of("head+memory-2", BLEND) == ("head", "memory")
    assert base_of("mean+memory", BLEND) == ("mean", "memory")
    assert base_of("lean", BLEND) == ("host", "expert")
    with pytest.raises(ValueError, match="no predictor"):
        base_of("proxy", BLEND)


def test_parts_by_hand() -> None:
    # The head lifts 0.2 to 0.5; the memory lifts that to 0.8.
    probs = {"host": 0.2, "head": 0.5, "head+memory": 0.8}
    logprobs = {name: math.log(prob) for name, prob in probs.items()}
    found = parts(logprobs, {"head+memory": 1.0}, BLEND)
    assert found == pytest.approx({"host": 0.2, "head": 0.3, "memory": 0.3, "expert": 0.0})
    # The memory halves what the head says: host and head lose alike.
    logprobs["head+memory"] = math.log(0.25)
    found = parts(logprobs, {"host": 0.5, "head+memory": 0.5}, BLEND)
    assert found == pytest.approx({"host": 0.15, "head": 0.075, "memory": 0.0, "expert": 0.0})
    # What the expert rules out is the host's loss alone.
    found = parts({"host": math.log(0.4), "lean": math.log(0.1)}, {"lean": 1.0}, BLEND)
    assert found == pytest.approx({"host": 0.1, "head": 0.0, "memory": 0.0, "expert": 0.0})


@settings(deadline=None)
@given(st.integers(0, 10_000))
def test_parts_sum_to_the_tokens_probability(seed: int) -> None:
    names = dict.fromkeys((*families(BLEND)["all"], "head", "mean"))
    logprobs = dict(zip(names, (-draw(len(names), seed=seed).abs()).tolist(), strict=True))
    members = families(BLEND)["all"]
    weights = dict(zip(members, prior_of(members, BLEND).tolist(), strict=True))
    found = parts(logprobs, weights, BLEND)
    whole = sum(weight * math.exp(logprobs[name]) for name, weight in weights.items())
    assert sum(found.values()) == pytest.approx(whole, rel=1e-5)
    assert all(part >= 0 for part in found.values()) and tuple(found) == DECIDERS


def test_lines_are_those_of_the_documents() -> None:
    whole = memory()
    text, starts = whole.text, sources_of(whole).starts
    for start, document, name in zip(starts, DOCUMENTS, SOURCES, strict=True):
        for offset in range(1, len(document)):
            place = place_of(sources_of(whole), text, start + offset)
            # The line in which a character lies is the number of lines up to it.
            line = len((document[:offset] + b"x").splitlines())
            assert (place.source, place.line, place.start) == (name, line, start)


def test_unnamed_documents_are_numbered() -> None:
    found = sources_of(memory(named=False))
    assert found.names == ("document 1", "document 2")
    assert found.starts == (sources_of(memory()).starts[0], sources_of(memory()).starts[2])


def test_a_neighbour_is_cut_out_of_its_document() -> None:
    whole = memory()
    for entry, position in enumerate(whole.positions.tolist()):
        found = neighbour(whole, entry, 0.5)
        document = DOCUMENTS[SOURCES.index(found.source)]
        offset = position - sources_of(whole).starts[SOURCES.index(found.source)]
        before = document[max(0, offset - BEFORE_BYTES) : offset]
        after = document[offset : offset + AFTER_BYTES]
        assert found.before == before.decode("utf-8", "ignore")
        assert found.after == after.decode("utf-8", "ignore")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["src/std/fmt.zig", "src/std/c/x.zig"], ["fmt.zig", "c/x.zig"]),
        (["/home/ann/notes.txt"], ["notes.txt"]),
        (["/home/ann/a/x.txt", "/data/b/y.txt"], ["x.txt", "y.txt"]),
        (["/home/ann/x.txt", "y.txt", "../z.txt"], ["x.txt", "y.txt", "z.txt"]),
        (["~/x.txt", "b/y.txt"], ["x.txt", "b/y.txt"]),
        (["C:\\texts\\x.txt", "b/y.txt"], ["x.txt", "b/y.txt"]),
        (["a/b.jsonl:3", "a/b.jsonl:4"], ["b.jsonl:3", "b.jsonl:4"]),
        (["a/x", "a/x/y"], ["x", "x/y"]),
        (["x"], ["x"]),
        ([], []),
    ],
)
def test_names_leave_the_machine_behind(names: list[str], expected: list[str]) -> None:
    assert list(travelling_names(names)) == expected


@pytest.fixture(scope="module")
def host() -> HFModel:
    return open_model("tiny:llama?hidden=16", dtype="float32")


def seated(host: HFModel, whole: Memory) -> MountedMemory:
    values = following(whole, host)[:, None]
    reading = Reading(draw(6, 16, seed=7), torch.zeros(6))
    return MountedMemory(whole, build_index(whole), reading, values, torch.ones(values.shape))


def voice_of(host: HFModel, rows: Rows, *, trust: float = 1.0) -> tuple[Voice, Tensor]:
    """A memory that is asked, and the mixture that it makes of the host's distribution."""
    mounted = seated(host, memory())
    found = predicted(Steering(("memory",), memories={"memory": mounted}), rows)
    prior = prior_of(MEMORY, BLEND)
    stacked = torch.stack([found.logprobs[name] for name in MEMORY])
    mixed = torch.logsumexp(stacked + prior.log()[:, None, None], 0)
    weights = {name: trust * w for name, w in zip(MEMORY, prior.tolist(), strict=True)}
    voice = Voice(BLEND, weights, found, len(rows.contexts) - 1, mounted.memory)
    return voice, found.field.everywhere(mixed)


def test_a_memory_that_knows_the_text_decides_and_shows_where_it_stands(host: HFModel) -> None:
    contexts = (b"nothing", b"The keel turns the hull.\nThe sail turns th")
    hidden = draw(2, 16, seed=9)
    rows = Rows(host.unembedding.logits(hidden).float().detach(), hidden, contexts)
    voice, steered = voice_of(host, rows)
    before = rows.logits[1].log_softmax(-1)
    token_id = host.encode("e")[0]

    def spell(token_id: int) -> str:
        return (host.vocabulary.token_bytes[token_id] or b"?").decode("utf-8", "replace")

    found = explain(token_id, "e", (before, steered[1]), [voice], spell)
    assert found.by == "memory"
    assert found.moved_nats == pytest.approx(
        float(torch.nn.functional.kl_div(before, steered[1], log_target=True, reduction="sum")),
        rel=1e-4,
    )
    top = found.neighbours[0]
    assert (top.source, top.line) == ("ships/keel.txt", 2)
    assert top.before.endswith("The sail turns th") and top.after.startswith("e mast.\n")
    assert [n.weight for n in found.neighbours] == sorted(
        (n.weight for n in found.neighbours), reverse=True
    )
    assert found.after[0][0] == "e" and found.after[0][1] == pytest.approx(
        float(steered[1].exp().max()), rel=1e-4
    )
    assert [text for text, _ in found.before] == [spell(i) for i in before.topk(5).indices.tolist()]
    # What it has and what JSON has are the same.
    assert json.loads(json.dumps(found.as_json()))["neighbours"][0]["line"] == 2
    # The same without its text: a server may be told to keep it.
    silent = explain(token_id, "e", (before, steered[1]), [replace(voice, memory=None)], spell)
    assert silent == replace(found, neighbours=())


def test_the_memorys_part_is_what_it_adds(host: HFModel) -> None:
    hidden = draw(1, 16, seed=9)
    rows = Rows(host.unembedding.logits(hidden).float().detach(), hidden, (b"The keel turns th",))
    voice, steered = voice_of(host, rows)
    token_id = host.encode("e")[0]
    probs = {
        name: math.exp(float(voice.found.field.of_tokens(said, torch.tensor([token_id]))[0]))
        for name, said in voice.found.logprobs.items()
    }
    logprobs = {name: math.log(prob) for name, prob in probs.items()}
    found = parts(logprobs, voice.weights, BLEND)
    added = sum(
        voice.weights[name] * max(0.0, probs[name] - probs["host"])
        for name in with_memory("host", BLEND)
    )
    assert found["memory"] == pytest.approx(added)
    assert sum(found.values()) == pytest.approx(float(steered[0, token_id].exp()), rel=1e-4)


def test_the_host_alone_decides_where_nothing_steers(host: HFModel) -> None:
    logprobs = draw(len(host.vocabulary), seed=2).log_softmax(-1)
    found = explain(3, "x", (logprobs, logprobs), [], str)
    assert (found.by, found.moved_nats, found.neighbours) == ("host", 0.0, ())
    assert found.before == found.after and len(found.before) == 5


def test_of_two_memories_the_trusted_one_is_heard_first(host: HFModel) -> None:
    hidden = draw(1, 16, seed=9)
    rows = Rows(host.unembedding.logits(hidden).float().detach(), hidden, (b"The keel turns th",))
    voice, steered = voice_of(host, rows, trust=0.9)
    other, _ = voice_of(host, rows, trust=0.1)
    assert other.memory
    names = tuple(f"other {name}" for name in SOURCES)
    sources = replace(sources_of(other.memory), names=names)
    other = replace(other, memory=replace(other.memory, sources=sources))
    before = rows.logits[0].log_softmax(-1)
    found = explain(host.encode("e")[0], "e", (before, steered[0]), [other, voice], str)
    alone = explain(host.encode("e")[0], "e", (before, steered[0]), [voice], str)
    assert not found.neighbours[0].source.startswith("other")
    assert found.neighbours[0].weight == pytest.approx(0.9 * alone.neighbours[0].weight)
