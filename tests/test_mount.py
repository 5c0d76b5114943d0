"""Mounting a real tiny adapter on hosts of several families and tokenizers."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from saving import saved
from test_fit import DOMAIN, SMALL, fitted, recorded, tuned, write_texts

from trimtab.align.strings import Strings
from trimtab.backends.hf import HFModel
from trimtab.backends.open import open_head, open_model
from trimtab.carriers.memory import (
    VALUE_BYTES,
    Memory,
    contexts_before,
    documents_of,
    lay_out,
)
from trimtab.carriers.recall import Answer
from trimtab.config import MountConfig
from trimtab.errors import AdapterError
from trimtab.mount import is_kept, mount, mount_with_control
from trimtab.steering import proposals
from trimtab.steering.mounted import Mounted
from trimtab.steering.proposals import followed, propose
from trimtab.steering.seat import following
from trimtab.store.adapter import read_head
from trimtab.store.files import write_json
from trimtab.store.home import trimtab_home
from trimtab.store.manifest import read_manifest

HOST = "tiny:qwen3?hidden=32"
FAMILIES = [
    "tiny:llama?vocab=bpe",
    "tiny:qwen3?tied=0",
    "tiny:gemma2?vocab=bpe&hidden=32",
    "tiny:gemma3",
    "tiny:gpt2?vocab=bpe",
    "tiny:t5",
]


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recorded(tuned(write_texts(tmp_path_factory.mktemp("texts")), "full"))


@pytest.fixture(scope="module")
def adapter(recording: Path) -> Path:
    options = {"values": "soft", "learning_rate": 1e-2, "epochs": 4}
    return fitted(recording, recording.parent / "adapter", **options).folder


@pytest.fixture(scope="module")
def hard_adapter(recording: Path) -> Path:
    return fitted(recording, recording.parent / "hard", carriers=("memory",)).folder


@pytest.fixture(scope="module")
def host_adapter(recording: Path) -> Path:
    options = {"host": HOST, "carriers": ("head",), "dtype": "float32"}
    return fitted(recording, recording.parent / "hostfit", **options).folder


@pytest.fixture(scope="module")
def host() -> HFModel:
    return open_model(HOST, dtype="float32")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "home"))
    return trimtab_home()


def mounted_on(host: HFModel, adapter: Path, **options: object) -> Mounted:
    config = {"adapter": adapter, "host": host.ref, "dtype": "float32", **options}
    return mount(MountConfig.model_validate(config), host=host)


def unrunnable(ref: str) -> HFModel:
    """A host whose forward pass fails; vocabulary and unembedding can still be read."""
    host = open_model(ref, dtype="float32")

    def refuse(*_: object) -> None:
        raise AssertionError("the host was run")

    host.model.base_model.register_forward_pre_hook(refuse)
    return host


def same(one: Mounted, two: Mounted) -> bool:
    assert one.head and two.head and one.memory and two.memory
    pairs = [
        (one.state_map.matrix, two.state_map.matrix),
        (one.head.reading.matrix, two.head.reading.matrix),
        (one.head.reading.bias, two.head.reading.bias),
        (one.head.rows, two.head.rows),
        (one.memory.reading.matrix, two.memory.reading.matrix),
        (one.memory.reading.bias, two.memory.reading.bias),
        (one.memory.values, two.memory.values),
        (one.memory.shares, two.memory.shares),
    ]
    numbers = [(m.state_map.r_squared, m.paired_positions) for m in (one, two)]
    return all(torch.equal(a, b) for a, b in pairs) and numbers[0] == numbers[1]


@pytest.mark.parametrize("ref", FAMILIES)
def test_any_family_can_be_a_host(ref: str, adapter: Path) -> None:
    host = open_model(ref, dtype="float32")
    mounted = mounted_on(host, adapter)
    assert mounted.head and mounted.memory and mounted.state_map.shared_tokens >= 256
    states = host.hidden(torch.tensor([host.context_ids() + host.encode(DOMAIN)]))[0]
    shift = mounted.head.shift(states)
    assert shift.shape == (len(states), len(host.vocabulary)) and shift.isfinite().all()
    text = mounted.memory.memory.text
    before = contexts_before(text, torch.full((len(states),), 40))
    probs = mounted.memory.ask(states, before).probs(len(host.vocabulary))
    total = probs.sum(-1)
    assert (total > 0.4).all() and (total <= 1 + 1e-5).all()


def test_what_is_wrong_with_an_adapter_is_said_before_its_host_is_opened(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="is no folder"):
        mount(MountConfig(adapter=tmp_path / "nowhere", host=str(tmp_path / "no model either")))


def test_without_moments_the_host_is_not_run(adapter: Path, host: HFModel) -> None:
    still = unrunnable(HOST)
    with pytest.raises(AssertionError, match="the host was run"):
        mounted_on(still, adapter)
    mounted = mounted_on(still, adapter, moments=False)
    assert mounted.paired_positions == 0 and mounted.head and mounted.memory
    file = read_head(adapter).head
    state = torch.randn(32)
    expected = file.down @ (mounted.state_map.matrix @ state - file.mean)
    torch.testing.assert_close(mounted.head.reading(state), expected)


def test_seats_behind_a_preamble_are_not_kept_for_the_bare_host(
    adapter: Path, host: HFModel, home: Path
) -> None:
    plain = mounted_on(host, adapter)
    reading = mounted_on(replace(host, preamble=tuple(host.encode(DOMAIN))), adapter)
    assert not same(reading, plain) and same(mounted_on(host, adapter), plain)
    assert len(list((home / "mounts").iterdir())) == 1


def test_a_second_mount_is_read_back_without_running_the_host(
    adapter: Path, host: HFModel, home: Path
) -> None:
    first = mounted_on(host, adapter)
    assert len(list((home / "mounts").iterdir())) == 1
    assert same(first, mounted_on(unrunnable(HOST), adapter))
    # The same seats, whoever names the carriers.
    assert same(first, mounted_on(unrunnable(HOST), adapter, carriers=("head", "memory")))
    assert same(first, mounted_on(host, adapter, cache=False))


def test_other_settings_and_hosts_have_their_own_seats(
    adapter: Path, host: HFModel, home: Path
) -> None:
    first = mounted_on(host, adapter)
    assert not same(first, mounted_on(host, adapter, ridge=0.5))
    assert not same(first, mounted_on(open_model(f"{HOST}&seed=1", dtype="float32"), adapter))
    assert not same(first, mounted_on(host, adapter, shuffle=True))
    assert len(list((home / "mounts").iterdir())) == 4


@pytest.mark.parametrize("content", [b"", b"not a tensor file", "cut", "lacking"])
def test_broken_seats_are_made_anew(
    content: bytes | str, adapter: Path, host: HFModel, home: Path
) -> None:
    first = mounted_on(host, adapter)
    (kept,) = (home / "mounts").iterdir()
    good = kept.read_bytes()
    if content == "cut":
        content = good[:-10]
    elif content == "lacking":
        content = good.replace(b'"numbers"', b'"numberz"')
    assert isinstance(content, bytes)
    kept.write_bytes(content)
    assert same(first, mounted_on(host, adapter))
    assert kept.read_bytes() == good


def test_the_hosts_pass_over_the_probe_text_is_made_once(
    adapter: Path, host: HFModel, home: Path
) -> None:
    first = mounted_on(host, adapter)
    (kept,) = (home / "probes").iterdir()
    # Other seats on the same host, without running it.
    other = mounted_on(unrunnable(HOST), adapter, ridge=0.5)
    assert not same(first, other)
    assert same(other, mounted_on(host, adapter, ridge=0.5, cache=False))
    kept.write_bytes(b"broken")
    assert not same(first, mounted_on(host, adapter, ridge=0.25))
    assert len(kept.read_bytes()) > 100 and len(list((home / "probes").iterdir())) == 1


def test_nothing_is_kept_without_a_cache(adapter: Path, host: HFModel, home: Path) -> None:
    mounted_on(host, adapter, cache=False)
    assert not (home / "mounts").exists() and not (home / "probes").exists()


def test_a_poor_fit_is_said_in_plain_words(host: HFModel, tmp_path: Path) -> None:
    # Eight features cannot tell as many tokens apart as the text has.
    narrow = tuned(write_texts(tmp_path), "full", model="tiny:llama?hidden=8&vocab=bpe")
    mounted = mounted_on(host, fitted(recorded(narrow), tmp_path / "a").folder)
    assert mounted.state_map.r_squared < 0.5
    poor, uncalibrated, few = mounted.warnings
    assert uncalibrated.startswith("the map is not calibrated")
    own = mounted_on(host, mounted.folder, host_keys=True, carriers=("memory",))
    assert own.warnings == ()
    assert "head and memory will help little here" in poor
    assert poor.startswith("the vocabularies explain only") and "%" in poor
    assert few == "only 256 token strings are shared: the map is rough"
    said = mounted.summary()
    assert f"warning: {poor}" in said and "256 shared token strings, anchor R^2" in said


def test_on_the_small_model_itself_the_map_is_exact(adapter: Path) -> None:
    small = open_model(SMALL, dtype="float32")
    mounted = mounted_on(small, adapter, moments=False, ridge=1e-6)
    assert mounted.state_map.r_squared > 0.99
    torch.testing.assert_close(mounted.state_map.matrix, torch.eye(48), atol=0.05, rtol=0)
    assert all("explain only" not in warning for warning in mounted.warnings)


def test_the_control_differs_and_costs_no_second_pass(adapter: Path, host: HFModel) -> None:
    runs = []
    hook = host.model.base_model.register_forward_hook(lambda *_: runs.append(1))
    config = MountConfig(adapter=adapter, host=HOST)
    mounted, control = mount_with_control(config, host)
    hook.remove()
    assert len(runs) == len(mounted.probe_documents)
    assert mounted.head and control.head
    assert not torch.equal(mounted.head.reading.matrix, control.head.reading.matrix)


@pytest.mark.parametrize("carriers", [("head",), ("memory",), ("head", "memory")])
def test_only_the_carriers_asked_for_are_seated(
    carriers: tuple[str, ...], adapter: Path, host: HFModel
) -> None:
    mounted = mounted_on(host, adapter, carriers=carriers)
    assert (mounted.head is not None, mounted.memory is not None) == (
        "head" in carriers,
        "memory" in carriers,
    )
    with pytest.raises(AdapterError, match="does not carry expert"):
        mounted_on(host, adapter, carriers=("expert",))


def test_a_head_fitted_on_the_host_is_seated_without_map_or_warning(host_adapter: Path) -> None:
    mounted = mounted_on(unrunnable(HOST), host_adapter)
    assert mounted.head and mounted.warnings == ()
    head = read_head(host_adapter).head
    host = open_model(HOST, dtype="float32")
    state = torch.randn(5, 32)
    expected = head.shift(state) @ host.unembedding.weight.detach().T
    text = [bool(part) for part in host.vocabulary.token_bytes]
    shift = mounted.head.shift(state)
    torch.testing.assert_close(shift[:, text], expected[:, text], atol=1e-4, rtol=1e-4)
    assert (shift[:, [not part for part in text]] == 0).all()
    _, control = mount_with_control(MountConfig(adapter=host_adapter, host=HOST), host)
    assert control.head is None


def test_a_hosts_name_without_its_fingerprints_is_no_manifest(host_adapter: Path) -> None:
    told = read_manifest(host_adapter).model_dump(mode="json")
    told["carriers"]["head"]["host_vocabulary_sha256"] = None
    write_json(host_adapter / "manifest.json", told)
    with pytest.raises(AdapterError, match="both its fingerprints"):
        read_manifest(host_adapter)


def test_a_hard_entry_proposes_the_first_token_of_what_followed(
    hard_adapter: Path, host: HFModel
) -> None:
    mounted = mounted_on(open_model("tiny:llama?vocab=bpe"), hard_adapter)
    assert mounted.memory and mounted.memory.values.shape[1] == 1
    assert (mounted.memory.shares == 1).all()
    memory = mounted.memory.memory
    raw = memory.text.numpy().tobytes()
    strings = open_model("tiny:llama?vocab=bpe").vocabulary.token_bytes
    for position, value in zip(
        memory.positions.tolist(), mounted.memory.values[:, 0].tolist(), strict=True
    ):
        assert raw[position:].startswith(strings[value] or b"?")


def soft_memory(text: bytes, strings: list[bytes], probs: list[float]) -> Memory:
    raw = bytes(16) + text + bytes(16)
    return Memory(
        keys=torch.ones(1, 2),
        projection=torch.eye(2),
        mean=torch.zeros(2),
        text=torch.frombuffer(bytearray(raw), dtype=torch.uint8),
        positions=torch.tensor([16]),
        soft_ids=torch.arange(len(strings), dtype=torch.int32)[None],
        soft_probs=torch.tensor([probs]),
        soft_strings=tuple(strings),
    )


def test_a_soft_entry_is_a_distribution_over_the_hosts_tokens() -> None:
    host = open_model("tiny:llama?vocab=bpe")
    ids = host.vocabulary.ids_by_bytes
    assert b" the" in ids and b" ship" not in ids
    memory = soft_memory(
        b" the tab", [b" t", b" the", b" ship", b"", b"\xff"], [0.3, 0.3, 0.2, 0.1, 0.1]
    )
    after = following(memory, host)
    assert after.tolist() == [ids[b" the"]]
    said = propose(memory, after, Strings(host.vocabulary))
    dense: dict[int, float] = {}
    for value, share in zip(said.values[0].tolist(), said.shares[0].tolist(), strict=True):
        dense[value] = dense.get(value, 0.0) + share
    longest = max((s for s in ids if b" ship".startswith(s)), key=len)
    expected = {ids[b" the"]: 0.5 + 0.3, ids[longest]: 0.1, -1: 0.05, ids[b"\xff"]: 0.05}
    assert dense == pytest.approx(expected)


def test_what_followed_ends_with_its_document() -> None:
    memory = soft_memory(b"ab", [b"a"], [1.0])
    assert [block.tolist() for block in followed(memory)] == [[b"ab"]]
    long = soft_memory(b"x" * 100, [b"a"], [1.0])
    assert [block.tolist() for block in followed(long)] == [[b"x" * VALUE_BYTES]]


@pytest.mark.parametrize("block", [2, 7, 1_000])
@pytest.mark.parametrize("prefix_space", [False, True])
def test_what_followed_many_entries_is_what_each_would_say(
    block: int, prefix_space: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proposals, "BLOCK_ENTRIES", block)
    host = open_model("tiny:llama?vocab=bpe")
    host = replace(host, vocabulary=replace(host.vocabulary, prefix_space=prefix_space))
    texts = [" the häll the hull, the häll".encode(), b"\xc3", 40 * b"the hull ", b"a\0 b"]
    text, starts = lay_out(texts)
    ends = [(start, start + len(one)) for start, one in zip(starts, texts, strict=True)]
    positions = torch.tensor([p for first, last in ends for p in range(first, last + 1)])
    memory = replace(soft_memory(b"", [b"a"], [1.0]), text=text, positions=positions)
    raw, expected = text.numpy().tobytes(), []
    for position in positions.tolist():
        after = raw[position : position + VALUE_BYTES].split(b"\0")[0]
        if prefix_space:
            expected.append(host.strings.longest_token(after))
        else:
            ids = host.encode(after.decode("utf-8", "ignore")) if after else []
            expected.append(ids[0] if ids else -1)
    assert following(memory, host).tolist() == expected
    assert {-1} < set(expected)
    empty = replace(memory, positions=positions[:0])
    assert following(empty, host).shape == (0,)


def test_a_host_that_reads_the_text_itself_makes_keys_of_its_own_states(
    adapter: Path, host: HFModel
) -> None:
    mounted = mounted_on(host, adapter, host_keys=True)
    assert mounted.memory and mounted.memory.is_own
    memory, raw = mounted.memory.memory, mounted.memory.memory.text.numpy().tobytes()
    places = {}
    for document, start in zip(*documents_of(memory.text), strict=True):
        ids = host.encode(document.decode())
        read = host.hidden(torch.tensor([host.context_ids() + ids]))[0, len(host.context_ids()) :]
        end = start
        for token_id, next_id, state in zip(ids, ids[1:], read, strict=False):
            end += len(host.vocabulary.token_bytes[token_id] or b"")
            places[end] = (next_id, state)
    assert memory.positions.tolist() == sorted(places)
    states = torch.stack([places[end][1] for end in memory.positions.tolist()]).detach()
    expected = torch.nn.functional.normalize((states - memory.mean) @ memory.projection.T, dim=-1)
    torch.testing.assert_close(memory.keys.float(), expected, atol=2e-2, rtol=0)
    for value, end in zip(mounted.memory.values[:, 0].tolist(), memory.positions, strict=True):
        assert value == places[int(end)][0]
        assert raw[int(end) :].startswith(host.vocabulary.token_bytes[value] or b"?")
    # A state that the host was in before finds itself, with full trust in the state.
    before = contexts_before(memory.text, memory.positions[:9])
    answer = mounted.memory.ask(states[:9], before)
    assert answer.found.entries[:, 0].tolist() == list(range(9))


def test_what_is_kept_of_a_host_is_not_believed_of_another_body(
    adapter: Path, host: HFModel, tmp_path: Path
) -> None:
    live = deepcopy(host.model)
    live.save_pretrained(tmp_path / "host")
    host.tokenizer.save_pretrained(tmp_path / "host")
    config = MountConfig(adapter=adapter, host=str(tmp_path / "host"), dtype="float32")
    first, again = mount(config), mount(config)
    assert first.memory and again.memory
    assert torch.equal(first.memory.reading.matrix, again.memory.reading.matrix)
    with torch.no_grad():
        for name, weight in live.named_parameters():
            if "layers" in name and weight.dim() == 2:
                weight.mul_(1.5)
    live.save_pretrained(tmp_path / "host")
    other = mount(config)
    assert other.memory and other.state_map.r_squared == first.state_map.r_squared
    assert not torch.equal(other.memory.reading.matrix, first.memory.reading.matrix)
    # A model that was changed in memory is not known by any file.
    kept = set((trimtab_home() / "mounts").iterdir())
    mount(config, host=replace(host, source=None))
    assert set((trimtab_home() / "mounts").iterdir()) == kept


def test_keys_of_the_host_are_kept_and_can_be_shuffled(adapter: Path, host: HFModel) -> None:
    config = MountConfig(adapter=adapter, host=HOST, host_keys=True, carriers=("memory",))
    first, control = mount_with_control(config, host)
    again = mount(config, host=host)
    assert first.memory and again.memory and control.memory and again.memory.is_own
    assert torch.equal(first.memory.memory.keys, again.memory.memory.keys)
    assert torch.equal(first.memory.values, again.memory.values)
    assert not torch.equal(control.memory.memory.keys, first.memory.memory.keys)
    assert torch.equal(control.memory.values, first.memory.values)


@pytest.fixture
def by_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memories of any size are searched by lists, all of which are looked into."""
    for module in ("carriers.search", "store.index"):
        monkeypatch.setattr(f"trimtab.{module}.LISTED_ENTRIES", 1)
    monkeypatch.setattr("trimtab.carriers.search.PROBED_SHARE", 1)


def asked(mounted: Mounted, host: HFModel) -> Answer:
    assert mounted.memory
    states = host.hidden(torch.tensor([host.encode(DOMAIN)]))[0][:9].detach()
    text = mounted.memory.memory.text
    return mounted.memory.ask(states, contexts_before(text, 30 + torch.arange(9)))


@pytest.mark.usefixtures("by_lists")
def test_the_search_over_a_memory_is_kept_for_all_hosts(
    hard_adapter: Path, host: HFModel, home: Path
) -> None:
    in_ram = mounted_on(host, hard_adapter, cache=False)
    assert not (home / "indexes").exists()
    first = mounted_on(host, hard_adapter)
    (kept,) = (home / "indexes").iterdir()
    good, stamp = kept.read_bytes(), kept.stat().st_mtime_ns
    again = mounted_on(unrunnable(HOST), hard_adapter)
    mounted_on(open_model(f"{HOST}&seed=1", dtype="float32"), hard_adapter)
    mounted_on(host, hard_adapter, shuffle=True)
    assert list((home / "indexes").iterdir()) == [kept] and kept.stat().st_mtime_ns == stamp
    expected = asked(in_ram, host)
    for mounted in (first, again):
        answer = asked(mounted, host)
        assert torch.equal(answer.found.entries, expected.found.entries)
        assert torch.equal(answer.found.weights, expected.found.weights)
    kept.write_bytes(good[: len(good) // 2])
    assert torch.equal(asked(mounted_on(host, hard_adapter), host).values, expected.values)
    assert kept.read_bytes() == good


@pytest.mark.usefixtures("by_lists")
def test_keys_of_the_host_have_a_search_of_their_own(
    hard_adapter: Path, host: HFModel, home: Path
) -> None:
    mounted_on(host, hard_adapter)
    assert len(list((home / "indexes").iterdir())) == 1
    own = mounted_on(host, hard_adapter, host_keys=True)
    assert len(list((home / "indexes").iterdir())) == 2
    again = mounted_on(host, hard_adapter, host_keys=True)
    in_ram = mounted_on(host, hard_adapter, host_keys=True, cache=False)
    mounted_on(replace(host, source=None), hard_adapter, host_keys=True)
    assert len(list((home / "indexes").iterdir())) == 2
    expected = asked(in_ram, host).found
    for mounted in (own, again):
        assert torch.equal(asked(mounted, host).found.entries, expected.entries)


def test_a_soft_gate_reads_all_proposals(adapter: Path, host: HFModel) -> None:
    mounted = mounted_on(host, adapter)
    assert mounted.memory
    states = host.hidden(torch.tensor([host.encode(DOMAIN)]))[0][:3]
    answer = mounted.memory.ask(
        states, contexts_before(mounted.memory.memory.text, torch.tensor([30, 40, 50]))
    )
    logprobs = host.unembedding.logits(states).detach().log_softmax(-1)
    features = answer.gate_features(logprobs)
    probs = answer.probs(logprobs.shape[1])
    torch.testing.assert_close(features[:, 3], probs.amax(-1))
    overlap = (probs * logprobs.exp()).sum(-1)
    torch.testing.assert_close(features[:, 4], (overlap + 1e-4).log())
    assert ((answer.values >= 0).sum() > answer.values[..., 0].numel()).item()


def test_a_seat_that_is_kept_needs_the_head_alone(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "home"))
    ref = str(saved("tiny:gemma2?hidden=32&seed=4", tmp_path / "host"))
    config = MountConfig(adapter=adapter, host=ref, dtype="float32")
    alone = open_head(ref, dtype="float32")
    assert not is_kept(config, alone)
    whole = mount(config)
    assert is_kept(config, alone)
    again = mount(config, host=alone)
    assert again.head and whole.head and again.memory and whole.memory
    torch.testing.assert_close(again.head.rows, whole.head.rows)
    torch.testing.assert_close(again.head.reading.matrix, whole.head.reading.matrix)
    assert torch.equal(again.memory.values, whole.memory.values)
