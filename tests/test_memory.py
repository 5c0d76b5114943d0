"""The memory: look-up against numpy, matches against slow loops, and a gate that knows noise."""

import math
from dataclasses import replace

import faiss
import numpy as np
import pytest
import torch
from joining import joined
from torch import Tensor

from trimtab.anchors import Reading
from trimtab.blend import mix
from trimtab.carriers.gate import GATE_FEATURES, fit_gate, gate_features, gate_probs
from trimtab.carriers.memory import (
    CONTEXT_BYTES,
    Memory,
    contexts_before,
    documents_of,
    lay_out,
    varies,
    whitening,
)
from trimtab.carriers.recall import Answer, MountedMemory
from trimtab.carriers.search import (
    BYTE_NEIGHBOURS,
    COMPARED_QUESTIONS,
    LISTED_ENTRIES,
    MAPPED_MATCH_WEIGHT,
    NEIGHBOURS,
    OWN_MATCH_WEIGHT,
    TEMPERATURE,
    Finds,
    Found,
    Index,
    build_index,
    byte_order,
    listed_keys,
    look_up,
    merged_byte_order,
    nearest_keys,
)

HIDDEN, KEY = 10, 6
DOCUMENTS = [b"the rudder turns the ship, ", b"", b"the trim tab turns the rudder", b"x" * 40]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def memory(copies: int = 1) -> Memory:
    text, starts = lay_out(DOCUMENTS * copies)
    positions = torch.cat(
        [torch.arange(s, s + len(d)) for s, d in zip(starts, DOCUMENTS * copies, strict=True)]
    )
    states = draw(len(positions), HIDDEN, seed=1) * torch.arange(1, HIDDEN + 1)
    projection, mean = whitening(states, KEY)
    keys = torch.nn.functional.normalize((states - mean) @ projection.T, dim=-1).half()
    return Memory(keys, projection, mean, text, positions)


def test_documents_lie_apart() -> None:
    text, starts = lay_out(DOCUMENTS)
    raw = text.numpy().tobytes()
    for start, document in zip(starts, DOCUMENTS, strict=True):
        assert raw[start - CONTEXT_BYTES : start] == bytes(CONTEXT_BYTES)
        assert raw[start : start + len(document)] == document
    assert raw.endswith(bytes(CONTEXT_BYTES))
    assert len(raw) == sum(map(len, DOCUMENTS)) + (len(DOCUMENTS) + 1) * CONTEXT_BYTES


def test_contexts_are_read_backwards() -> None:
    text, starts = lay_out(DOCUMENTS)
    raw = text.numpy().tobytes()
    positions = torch.tensor([starts[0], starts[0] + 3, starts[2] + 20])
    found = contexts_before(text, positions)
    for position, row in zip(positions.tolist(), found, strict=True):
        assert row.numpy().tobytes() == raw[position - CONTEXT_BYTES : position][::-1]


def test_a_laid_out_text_gives_its_documents_back() -> None:
    text, starts = lay_out(DOCUMENTS)
    documents, places = documents_of(text)
    assert documents == [document for document in DOCUMENTS if document]
    assert places == [start for start, doc in zip(starts, DOCUMENTS, strict=True) if doc]


def test_whitened_states_have_unit_covariance() -> None:
    states = draw(400, HIDDEN, seed=2) @ draw(HIDDEN, HIDDEN, seed=3) + 4
    projection, mean = whitening(states, KEY)
    features = (states - mean) @ projection.T
    torch.testing.assert_close(features.T @ features / 400, torch.eye(KEY), atol=1e-3, rtol=0)
    # The kept directions are those in which states vary most.
    lost = (states - mean) @ (torch.eye(HIDDEN) - projection.T @ torch.linalg.pinv(projection).T)
    variances = torch.linalg.eigvalsh((states - mean).T @ (states - mean) / 400)
    assert float((lost**2).sum()) / 400 == pytest.approx(
        float(variances[: HIDDEN - KEY].sum()), rel=1e-2
    )
    assert whitening(states, 99)[0].shape == (HIDDEN, HIDDEN)


@pytest.mark.parametrize("count", [0, 1, 5_000])
def test_states_that_do_not_differ_are_told_from_those_that_do(count: int) -> None:
    alike = draw(1, HIDDEN, seed=4).expand(count, HIDDEN)
    assert not varies(alike)
    # One number of one state, by as little as float16 can say.
    stored = alike[:1].half()
    other = stored.clone()
    other[:, 0] *= 1 + 2**-10
    assert varies(torch.cat([stored, other]).float()) == bool(count)


def slow_match(ours: bytes, theirs: bytes) -> int:
    count = 0
    # Zero bytes are the void before a text, which agrees with nothing.
    while count < CONTEXT_BYTES and ours[count] == theirs[count] != 0:
        count += 1
    return count


@pytest.mark.parametrize("finds", ["both", "state", "bytes"])
def test_look_up_against_brute_force(finds: Finds) -> None:
    entries = memory(copies=3)
    assert len(entries) > NEIGHBOURS
    states = draw(7, HIDDEN, seed=4)
    asked = contexts_before(entries.text, entries.positions[10:17])
    features = None if finds == "bytes" else entries.features(states)
    match_weight = torch.linspace(0.1, 1.3, 7)
    found = look_up(entries, build_index(entries), features, asked, match_weight, finds=finds)

    keys = entries.keys.float().numpy()
    raw = entries.text.numpy().tobytes()
    for row in range(7):
        question = entries.projection.numpy() @ (states[row] - entries.mean).numpy()
        cosines = keys @ (question / np.linalg.norm(question))
        before = [raw[p - CONTEXT_BYTES : p][::-1] for p in entries.positions.tolist()]
        matches = np.array([slow_match(b, asked[row].numpy().tobytes()) for b in before])
        nearest = set(np.argsort(-cosines)[:NEIGHBOURS].tolist())
        sizes = {"both": [NEIGHBOURS, BYTE_NEIGHBOURS], "state": [NEIGHBOURS]}
        parts = found.entries[row].split(sizes.get(finds, [BYTE_NEIGHBOURS]))
        if finds != "bytes":
            assert set(parts[0].tolist()) == nearest
        if finds != "state":
            longest = sorted(matches.tolist(), reverse=True)[:BYTE_NEIGHBOURS]
            alike = parts[-1].tolist()
            assert sorted(matches[alike].tolist(), reverse=True) == longest
            assert len(set(alike)) == BYTE_NEIGHBOURS
        assert found.matched_bytes[row].tolist() == matches[found.entries[row].tolist()].tolist()
        # Once each, however often it was found.
        shares = {}
        for entry, share in zip(found.entries[row].tolist(), found.weights[row], strict=True):
            shares[entry] = shares.get(entry, 0.0) + float(share)
        scores = {
            e: float(match_weight[row]) * matches[e] + (finds != "bytes") * cosines[e] / TEMPERATURE
            for e in shares
        }
        total = sum(math.exp(score) for score in scores.values())
        for entry, score in scores.items():
            assert shares[entry] == pytest.approx(math.exp(score) / total, rel=1e-3, abs=1e-7)


def test_questions_are_compared_in_parts_as_at_once() -> None:
    keys, questions = (
        torch.nn.functional.normalize(draw(*shape, seed=seed), dim=-1)
        for shape, seed in (((500, KEY), 1), ((2 * COMPARED_QUESTIONS + 3, KEY), 2))
    )
    entries, cosines = nearest_keys(keys, questions, 5)
    expected = (questions @ keys.T).topk(5)
    assert torch.equal(entries, expected.indices)
    torch.testing.assert_close(cosines, expected.values)


def test_a_small_memory_gives_all_its_entries() -> None:
    entries = memory()
    entries = replace(entries, keys=entries.keys[:3], positions=entries.positions[:3])
    asked = torch.zeros(2, CONTEXT_BYTES, dtype=torch.uint8)
    weight = torch.full((2,), MAPPED_MATCH_WEIGHT)
    found = look_up(entries, build_index(entries), draw(2, KEY, seed=5), asked, weight)
    assert sorted(found.entries[0, :3].tolist()) == [0, 1, 2]
    torch.testing.assert_close(found.weights.sum(1), torch.ones(2))
    assert float(found.weights[:, 3:].sum()) == 0


def repeated(following: bytes, times: int) -> Memory:
    """A memory of one context, said so many times, and of what followed each."""
    context = b"in the same words"
    text, starts = lay_out([(context + following) * times])
    positions = starts[0] + torch.arange(1, times + 1) * (len(context) + 1) - 1
    keys = torch.nn.functional.normalize(draw(times, KEY, seed=8), dim=-1).half()
    return Memory(keys, torch.eye(KEY), torch.zeros(KEY), text, positions)


@pytest.mark.parametrize("times", [10, 64, 65, 200])
def test_appended_text_is_found_among_many_equal_contexts(times: int) -> None:
    old, new = repeated(b"o", times), repeated(b"n", 3)
    whole = joined(old, [new])
    index = build_index(whole)
    asked = contexts_before(whole.text, whole.positions[-1:])
    weight = torch.full((1,), MAPPED_MATCH_WEIGHT)
    found = look_up(whole, index, None, asked, weight, finds="bytes")
    entries = found.entries[0].tolist()
    assert len(set(entries)) == min(BYTE_NEIGHBOURS, times + 3)
    assert {0, times + 2} <= set(entries)
    assert (found.matched_bytes == CONTEXT_BYTES).all()
    said = [chr(int(whole.text[whole.positions[entry]])) for entry in entries]
    assert said.count("n") / len(said) == pytest.approx(3 / (times + 3), abs=1 / len(said))
    grown = Index(index.keys, *merged_byte_order(whole, *byte_order(old)))
    again = look_up(whole, grown, None, asked, weight, finds="bytes")
    assert torch.equal(again.entries, found.entries)


def test_a_large_memory_is_searched_by_lists_and_loses_little() -> None:
    generator = torch.Generator().manual_seed(6)
    document = torch.randint(32, 127, (LISTED_ENTRIES,), generator=generator, dtype=torch.uint8)
    text, starts = lay_out([document.numpy().tobytes()])
    # States come in groups, as those of a text do.
    groups = draw(600, 24, seed=7)[torch.randint(600, (LISTED_ENTRIES,), generator=generator)]
    keys = torch.nn.functional.normalize(groups + 0.7 * draw(LISTED_ENTRIES, 24, seed=8), dim=-1)
    positions = starts[0] + torch.arange(LISTED_ENTRIES)
    entries = Memory(keys.half(), torch.eye(24), torch.zeros(24), text, positions)
    index = build_index(entries)
    assert isinstance(index.keys, faiss.IndexIVF)
    assert index.keys.ntotal == LISTED_ENTRIES
    asked = groups[:200] + 0.7 * draw(200, 24, seed=9)
    weight, before = torch.full((200,), MAPPED_MATCH_WEIGHT), contexts_before(text, positions[:200])
    found = look_up(entries, index, asked, before, weight, finds="state")

    cosines = torch.nn.functional.normalize(asked, dim=-1) @ entries.keys.float().T
    nearest = cosines.topk(NEIGHBOURS)
    shares = (nearest.values / TEMPERATURE).softmax(-1)
    is_found = (nearest.indices[:, :, None] == found.entries[:, None]).any(-1)
    assert float((shares * is_found).sum(1).mean()) > 0.95
    # What is found has its exact cosine, whichever list it lay in.
    scores = cosines.gather(1, found.entries) / TEMPERATURE
    matched = weight[:, None] * found.matched_bytes
    torch.testing.assert_close(found.weights, (scores + matched).softmax(-1), rtol=5e-3, atol=1e-5)
    again = look_up(entries, build_index(entries), asked, before, weight, finds="state")
    assert torch.equal(again.entries, found.entries)


def hand_made() -> tuple[Found, Tensor, Tensor]:
    """Two questions with three neighbours over a vocabulary of four tokens."""
    weights = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1]])
    matched = torch.tensor([[16, 4, 0], [0, 0, 0]])
    found = Found(torch.tensor([[0, 1, 2], [2, 1, 0]]), weights, matched)
    values = torch.tensor([[2, 3, 2], [-1, 1, -1]])
    logprobs = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]]).log()
    return found, values, logprobs


def test_gate_features_by_hand() -> None:
    found, values, logprobs = hand_made()
    features = gate_features(found, values, logprobs)
    first = [
        1.0,
        1.0,
        (0.5 * 16 + 0.3 * 4) / 16,
        0.7,
        math.log(0.5 * 0.3 + 0.3 * 0.4 + 0.2 * 0.3 + 1e-4),
        -sum(p * math.log(p) for p in (0.1, 0.2, 0.3, 0.4)),
        math.log(0.4),
    ]
    second = [1.0, 0.0, 0.0, 0.3, math.log(0.3 * 0.25 + 1e-4), math.log(4), math.log(0.25)]
    assert features.shape[1] == len(GATE_FEATURES)
    assert features[0].tolist() == pytest.approx(first, abs=1e-5)
    assert features[1].tolist() == pytest.approx(second, abs=1e-5)


def test_the_memorys_distribution_by_hand() -> None:
    found, _, _ = hand_made()
    values = torch.tensor([[[2, 3], [3, -1], [2, 0]], [[-1, -1], [1, 1], [-1, -1]]])
    shares = torch.tensor([[[0.75, 0.25], [1.0, 0.5], [0.5, 0.5]]]).expand(2, 3, 2)
    probs = Answer(found, values, shares, torch.zeros(0)).probs(4)
    first = [0.2 * 0.5, 0.0, 0.5 * 0.75 + 0.2 * 0.5, 0.5 * 0.25 + 0.3]
    torch.testing.assert_close(probs, torch.tensor([first, [0, 0.3 * 1.5, 0, 0]]))
    for token in range(4):
        alone = Answer(found, values, shares, torch.zeros(0)).prob_of(torch.tensor([token, token]))
        torch.testing.assert_close(alone, probs[:, token])


def test_relabelled_answers_drop_what_has_no_place() -> None:
    found, values, _ = hand_made()
    answer = Answer(found, values[..., None], torch.ones(2, 3, 1), torch.zeros(0))
    place = torch.tensor([-1, 0, 1, -1])
    local = answer.relabelled(place)
    assert local.values[..., 0].tolist() == [[1, -1, 1], [-1, 0, -1]]
    torch.testing.assert_close(local.probs(2), answer.probs(4)[:, [1, 2]])


def test_a_mounted_memory_remembers_its_own_states() -> None:
    gate = (-1.0, 3.0, 1.0, 0.5, 0.5, 0.1, 0.0)
    entries = replace(memory(), gate=gate)
    values = entries.text[entries.positions].long()[:, None]
    reading = Reading(entries.projection, -entries.projection @ entries.mean)
    mounted = MountedMemory(
        entries, build_index(entries), reading, values, torch.ones(len(values), 1)
    )
    states = entries.mean + entries.keys[:5].float() @ torch.linalg.pinv(entries.projection).T
    answer = mounted.ask(states, contexts_before(entries.text, entries.positions[:5]))
    assert answer.found.entries[:, 0].tolist() == [0, 1, 2, 3, 4]
    probs = answer.probs(256)
    torch.testing.assert_close(probs.sum(1), torch.ones(5))
    assert probs.argmax(1).tolist() == values[:5, 0].tolist()

    steered = draw(5, 256, seed=8).log_softmax(-1)
    opened, wider = answer.gates(steered, (0.0, 1.5))
    assert (wider > opened).all()
    oracle = gate_probs(gate_features(answer.found, answer.values[..., 0], steered), gate)
    assert torch.equal(opened, oracle)
    mixed = mix(steered, probs.log(), opened[:, None])
    torch.testing.assert_close(mixed.exp().sum(1), torch.ones(5))


def test_a_part_of_a_memory_answers_as_if_the_rest_had_never_been() -> None:
    entries = replace(
        memory(),
        gate=(0.0,) * len(GATE_FEATURES),
        soft_ids=torch.arange(len(memory()))[:, None],
        soft_probs=torch.ones(len(memory()), 1),
    )
    values = entries.text[entries.positions].long()[:, None]
    reading = Reading(draw(KEY, 7, seed=23), draw(KEY, seed=24))
    shares = torch.rand(values.shape, generator=torch.Generator().manual_seed(2))
    whole = MountedMemory(entries, build_index(entries), reading, values, shares)
    # Fewer than are found: every entry is, and those that stay keep their proportions.
    kept = torch.arange(len(entries)) % 3 > 0
    hidden, asked = draw(4, 7, seed=25), contexts_before(entries.text, entries.positions[3:7])
    answer, part = whole.ask(hidden, asked), whole.only(kept).ask(hidden, asked)
    weights = torch.zeros(4, len(entries)).scatter_add(
        1, answer.found.entries, answer.found.weights
    )
    weights = weights * kept / (weights * kept).sum(1, keepdim=True)
    slow = torch.zeros(4, 256).index_add(1, values[:, 0], weights * shares[:, 0])
    torch.testing.assert_close(part.probs(256), slow)


def noisy_memory(documents: int) -> tuple[Memory, Tensor]:
    """A memory in which hardly two entries are alike, and each entry's document."""
    generator = torch.Generator().manual_seed(30)
    texts = torch.randint(97, 100, (documents, 40), generator=generator, dtype=torch.uint8)
    text, starts = lay_out([row.numpy().tobytes() for row in texts])
    positions = (torch.tensor(starts)[:, None] + torch.arange(40)).flatten()
    keys = torch.nn.functional.normalize(draw(len(positions), KEY, seed=31), dim=-1).half()
    owner = torch.arange(documents).repeat_interleave(40)
    return Memory(keys, torch.eye(KEY), torch.zeros(KEY), text, positions), owner


def rebuilt(whole: MountedMemory, kept: Tensor) -> MountedMemory:
    """The slow way: a memory of these entries alone, with searches of its own."""
    few = replace(
        whole.memory, keys=whole.memory.keys[kept], positions=whole.memory.positions[kept]
    )
    values, shares = whole.values[kept], whole.shares[kept]
    return replace(whole, memory=few, index=build_index(few), values=values, shares=shares)


@pytest.mark.parametrize("finds", ["both", "state", "bytes"])
@pytest.mark.parametrize("are_listed", [False, True])
def test_what_is_left_out_is_passed_over_as_by_a_memory_made_anew(
    finds: Finds, are_listed: bool
) -> None:
    entries, owner = noisy_memory(20)
    index = build_index(entries)
    if are_listed:
        lists = listed_keys(entries.keys)
        assert lists.nprobe < lists.nlist
        # Looking into all lists is exact.
        lists.nprobe = lists.nlist
        index = replace(index, keys=lists)
    entries = replace(entries, gate=(0.0,) * len(GATE_FEATURES))
    entries = replace(entries, bytes_gate=entries.gate)
    values = entries.text[entries.positions].long()[:, None]
    reading = Reading(draw(KEY, 7, seed=32), draw(KEY, seed=33))
    whole = MountedMemory(entries, index, reading, values, torch.ones(values.shape), finds)
    hidden, asked = draw(40, 7, seed=34), contexts_before(entries.text, entries.positions[:40])
    first, both = owner != 0, (owner != 0) & (owner < 15)
    few = owner == 19
    for kept, found in (
        (first, whole.only(first)),
        (both, whole.only(first).only(owner < 15)),
        (few, whole.only(few)),
    ):
        answer, slow = found.ask(hidden, asked), rebuilt(whole, kept).ask(hidden, asked)
        torch.testing.assert_close(answer.probs(256), slow.probs(256), rtol=1e-3, atol=1e-5)
        assert bool(kept[answer.found.entries].all())
        assert torch.equal(answer.found.matched_bytes.amax(1), slow.found.matched_bytes.amax(1))
    # Its own document is what it would have found.
    assert not torch.allclose(whole.ask(hidden, asked).probs(256), slow.probs(256))
    nothing = whole.only(first).only(owner == 0).ask(hidden, asked)
    assert float(nothing.probs(256).sum()) == 0


def test_lists_that_hold_too_few_are_left_for_all() -> None:
    entries, owner = noisy_memory(30)
    index = replace(build_index(entries), keys=listed_keys(entries.keys))
    assert isinstance(index.keys, faiss.IndexIVF) and index.keys.nprobe < index.keys.nlist
    weight = torch.full((20,), MAPPED_MATCH_WEIGHT)
    asked = contexts_before(entries.text, entries.positions[:20])
    found = look_up(
        entries, index.only(owner == 3), draw(20, KEY, seed=35), asked, weight, finds="state"
    )
    assert [sorted(row) for row in found.entries.tolist()] == [list(range(120, 160))] * 20
    torch.testing.assert_close(found.weights.sum(1), torch.ones(20))


def test_who_asks_decides_how_bytes_count_and_which_gate_opens() -> None:
    gates = [tuple(draw(len(GATE_FEATURES), seed=seed).tolist()) for seed in (20, 21, 22)]
    entries = replace(memory(), gate=gates[0], own_gate=gates[1], bytes_gate=gates[2])
    reading = Reading(draw(KEY, 7, seed=23), draw(KEY, seed=24))
    values = entries.text[entries.positions].long()[:, None]
    mapped = MountedMemory(
        entries, build_index(entries), reading, values, torch.ones(len(values), 1)
    )
    hidden, small = draw(4, 7, seed=25), draw(4, HIDDEN, seed=26)
    asked = contexts_before(entries.text, entries.positions[3:7])
    some = [None, small[1], None, small[3]]
    features = reading(hidden)
    features[1::2] = entries.features(small)[1::2]
    own, other = OWN_MATCH_WEIGHT, MAPPED_MATCH_WEIGHT
    cases = [
        (mapped, (), reading(hidden), [other] * 4, [0] * 4),
        (mapped, some, features, [other, own, other, own], [0, 1, 0, 1]),
        (replace(mapped, is_own=True), some, reading(hidden), [own] * 4, [1] * 4),
        (replace(mapped, finds="bytes"), (), None, [other] * 4, [2] * 4),
    ]
    for mounted, given, read, weights, chosen in cases:
        answer = mounted.ask(hidden, asked, given)
        found = look_up(
            entries, mounted.index, read, asked, torch.tensor(weights), finds=mounted.finds
        )
        assert torch.equal(answer.found.entries, found.entries)
        torch.testing.assert_close(answer.found.weights, found.weights)
        torch.testing.assert_close(answer.gate, torch.tensor([gates[n] for n in chosen]))
    plain = replace(mapped, memory=replace(entries, own_gate=(), bytes_gate=()), is_own=True)
    torch.testing.assert_close(plain.ask(hidden, asked).gate, torch.tensor([gates[0]] * 4))


def gate_data(count: int, right: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features of which only the second tells when the memory is right."""
    features = draw(count, len(GATE_FEATURES), seed=seed)
    features[:, 0] = 1
    features[:, 1] = right.float()
    logprob = torch.full((count,), math.log(0.05))
    memory_logprob = torch.where(right, math.log(0.9), -math.inf)
    return features, logprob, memory_logprob


def test_the_gate_opens_where_the_memory_is_right() -> None:
    right = torch.arange(800) % 2 == 0
    features, logprob, memory_logprob = gate_data(800, right, seed=6)
    gate = fit_gate(features, logprob, memory_logprob, torch.full((800,), 1 / 800))
    opened = gate_probs(features, gate)
    assert opened[right].min() > 0.8
    assert opened[~right].max() < 0.2


def test_the_gate_is_closed_to_noise_and_open_to_an_oracle() -> None:
    nothing = torch.zeros(400, dtype=torch.bool)
    weight = torch.full((400,), 1 / 400)
    noise = gate_data(400, nothing, seed=7)
    assert gate_probs(noise[0], fit_gate(*noise, weight)).max() < 0.05
    oracle = gate_data(400, ~nothing, seed=7)
    assert gate_probs(oracle[0], fit_gate(*oracle, weight)).min() > 0.9


def test_the_gate_reaches_the_best_constant() -> None:
    # Right by chance three times in ten: the best gate is a constant found by a fine grid.
    right = torch.rand(2000, generator=torch.Generator().manual_seed(9)) < 0.3
    features, logprob, memory_logprob = gate_data(2000, right, seed=9)
    features[:, 1] = 0.0
    weight = torch.full((2000,), 1 / 2000)
    opened = gate_probs(features, fit_gate(features, logprob, memory_logprob, weight, decay=1.0))
    grid = torch.linspace(0.001, 0.999, 999)
    share = right.float().mean()
    gain = share * (0.95 * 0 + 0.05 * (1 - grid) + 0.9 * grid).log()
    gain = gain + (1 - share) * (0.05 * (1 - grid)).log()
    assert float(opened.mean()) == pytest.approx(float(grid[gain.argmax()]), abs=0.02)


def test_heavier_positions_rule_the_gate() -> None:
    right = torch.arange(400) % 2 == 0
    features, logprob, memory_logprob = gate_data(400, right, seed=10)
    features[:, 1] = 0.0
    means = []
    for share in (0.1, 0.9):
        weight = torch.where(right, share, 1 - share) / 200
        gate = fit_gate(features, logprob, memory_logprob, weight, decay=1.0)
        means.append(float(gate_probs(features, gate).mean()))
    assert means[0] < 0.1 and means[1] > 0.8
