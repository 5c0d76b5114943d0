"""The speed bench: every row runs and is kept, and its parts do what they say they measure."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from saving import saved
from torch.utils.flop_counter import FlopCounterMode

from bench.speed import results, run, shapes, text
from bench.speed.decoding import Tally, ratio
from bench.speed.lockstep import ProxyModels, proxy_tuned
from bench.speed.material import grown
from bench.speed.models import Models, shared_copy, with_lora
from bench.speed.results import Outcome, check_machine, keep
from bench.speed.roofline import Peaks, Size, Work, counted
from bench.speed.rows import PAIRS, ROWS, Settings
from bench.speed.run import Asked, measure
from bench.speed.stages import Stages
from bench.speed.table import RESULTS, details_path, table
from bench.speed.timing import Clock, Figure, Stopwatch
from trimtab.backends.open import open_model
from trimtab.carriers.memory import Memory
from trimtab.errors import InputError
from trimtab.progress import Display
from trimtab.store.files import read_json, write_json

TINY = "tiny:llama?vocab=bpe"
LEAST = Settings(
    repetitions=2,
    prompts=1,
    prompt_tokens=16,
    new_tokens=5,
    draft_tokens=3,
    tune_tokens=512,
    record_tokens=1_024,
    general_tokens=640,
    row_tokens=512,
    anchors=256,
    memory_entries=3_000,
    fit_tokens=600,
    lora_steps=1,
)
PEAKS = Peaks(1e9, 1e10)
HERE = {
    "processor": "p",
    "threads": 1,
    "dtype": "float32",
    "peak_bytes_per_sec": 1e9,
    "peak_flops_per_sec": 1e10,
}


def test_sizes_alone_can_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "home"))
    tokenizer = saved(TINY, tmp_path / "tokenizer")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 600}
    wide = sizes | {"hidden_size": 48, "tie_word_embeddings": False}
    monkeypatch.setattr(shapes, "SHAPES", {"qwen2.5-0.5b": sizes, "qwen2.5-7b": wide})
    pair = replace(PAIRS["7b"], tokenizer=tokenizer)
    found: dict[str, Outcome] = {}
    asked = Asked(("head", "live-plain", "lockstep-proxy"), pair, LEAST, tmp_path, Display())
    measure(asked, found.update, quick=True)
    assert set(found) == set(asked.rows)
    assert all(outcome.figure.low > 0 for outcome in found.values())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all that the rows of the tiny pair need is made once."""
    return tmp_path_factory.mktemp("made")


@pytest.fixture
def asked(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asked:
    """All rows of the tiny pair, with little text and a home of the test's own."""
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "home"))
    modules = {name: path for name, path in text._python_files().items() if name < "c"}
    monkeypatch.setattr(text, "_python_files", lambda: modules)
    monkeypatch.setattr(text, "TEST_FILES", 2)
    return Asked(list(ROWS), PAIRS["tiny"], LEAST, made, Display(Console(quiet=True)))


def test_every_row_runs_is_kept_and_shown(asked: Asked, tmp_path: Path, monkeypatch) -> None:
    # What it takes to start Python is measured elsewhere.
    monkeypatch.setattr(run, "cli_help", lambda: Figure(2.0, 1.5, 2.5))
    out = tmp_path / "speed.json"
    measure(asked, lambda found: keep(out, HERE, found), quick=True)
    found, details = read_json(out, ""), read_json(details_path(out), "")["rows"]
    assert found.keys() == {"schema", "machine", "rows"} and found["rows"].keys() == ROWS.keys()
    for name, row in found["rows"].items():
        assert row.keys() == {"value", "low", "high", "unit"}
        assert 0 < row["low"] <= row["value"] <= row["high"] and row["unit"] == ROWS[name].unit
    assert details["assisted"]["same_text_as_host"]
    assert details["live-speculative"]["same_text_as_plain"]
    for name in ("head", "live-plain", "lockstep-proxy", "peft-lora"):
        assert details[name]["passes_per_token"]["host"] == 1
    assert details["live-plain"]["passes_per_token"]["pair"] == 1
    assert details["mount"]["probe_sec"] > 0
    repetitions = {name: one["repetitions"] for name, one in details.items()}
    assert repetitions == dict.fromkeys(ROWS, 2) | {"fit": 1, "cli-help": 7}
    shown = table(out, "results/speed.json")
    assert shown.endswith("File: `results/speed.json`.")
    assert all(f"| {name} |" in shown for name in ROWS)
    assert "as fast as lock-step proxy tuning" in shown and "the bare host: " in shown


def test_rows_are_merged_and_machines_are_not(tmp_path: Path) -> None:
    out, once = tmp_path / "speed.json", Figure(1.0, 0.9, 1.1)
    keep(out, HERE, {"head": Outcome(once, "qwen", "", once, 3)})
    keep(out, HERE, {"fit": Outcome(once, "qwen", "", once, 1, Work(1e9, 1e10))})
    rows = read_json(out, "")["rows"]
    assert rows["head"] == asdict(once) | {"unit": "time ratio"} and rows["fit"]["unit"] == "sec"
    assert read_json(details_path(out), "")["rows"]["fit"]["least_sec"] == 1.0
    check_machine(out, HERE)
    with pytest.raises(InputError, match="threads 1"):
        check_machine(out, HERE | {"threads": 2})
    assert details_path(RESULTS).name == "speed-details.json"
    assert set(results.machine(PEAKS, "float32")) > set(HERE)


SLOWER = HERE | {"peak_bytes_per_sec": 5e8, "peak_flops_per_sec": 5e9}


def test_a_row_keeps_the_machine_that_it_met(tmp_path: Path) -> None:
    out, once = tmp_path / "speed.json", Figure(1.0, 0.9, 1.1)
    host = {"host_must_move_bytes": 1e9, "host_must_compute_flops": 1e9, "host_sec_per_token": 2.0}
    keep(out, HERE, {"head": Outcome(once, "qwen", "", once, 3, Work(1e9, 1e9), host)})
    assert "Peaks: 1.0 GB/s of a matrix times a vector, 10 GFLOP/s of a matrix product. " in table(
        out
    )
    keep(out, SLOWER, {"cli-help": Outcome(once, "", "", once, 7)})
    details = read_json(details_path(out), "")["rows"]
    assert (details["head"]["machine"], details["cli-help"]["machine"]) == (HERE, SLOWER)
    shown = table(out)
    assert "the bare host: 1,000 MB a token, 2000 ms, 50% of the roofline" in shown
    assert "10 GFLOP/s of a matrix product (head); 0.5 GB/s" in shown
    assert f"| 100% | {details['head']['date']} |" in shown


def test_rows_that_do_not_name_their_machine_are_of_the_files(tmp_path: Path) -> None:
    out, once = tmp_path / "speed.json", Figure(1.0, 0.9, 1.1)
    keep(out, HERE, {"head": Outcome(once, "qwen", "", once, 2, Work(1e9, 1e9))})
    details = read_json(details_path(out), "")
    del details["rows"]["head"]["machine"], details["rows"]["head"]["repetitions"]
    write_json(details_path(out), details)
    assert "Peaks: 1.0 GB/s of a matrix times a vector, 10 GFLOP/s" in table(out)
    # As many repetitions as are usual are believed of it.
    assert keep(out, SLOWER, {"head": Outcome(once, "qwen", "", once, 2)}) == {"head": 3}
    keep(out, SLOWER, {"cli-help": Outcome(once, "", "", once, 7)})
    assert read_json(details_path(out), "")["rows"]["head"]["machine"] == HERE


def test_a_row_gives_way_to_none_that_was_measured_less(tmp_path: Path) -> None:
    out = tmp_path / "speed.json"

    def kept(value: float, repetitions: int, name: str = "head") -> float:
        figure = Figure(value, value, value)
        keep(out, HERE, {name: Outcome(figure, "qwen", "", figure, repetitions)})
        return read_json(out, "")["rows"]["head"]["value"]

    assert [kept(1.0, 1), kept(2.0, 3), kept(3.0, 1), kept(4.0, 3)] == [1.0, 2.0, 2.0, 4.0]
    before = out.read_bytes()
    # As after the first of more repetitions, where a run may be ended.
    assert keep(
        out, SLOWER, {"head": Outcome(Figure(5.0, 5.0, 5.0), "", "", Figure(5.0, 5.0, 5.0), 1)}
    ) == {"head": 3}
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("low", "value", "high", "expected"),
    [
        (0.9, 1.0, 1.02, "at most 1.02: met |"),
        (0.9, 1.0, 1.03, "at most 1.02: met within noise |"),
        (1.0, 1.03, 1.04, "at most 1.02: **missed** within noise |"),
        (1.03, 1.04, 1.05, "at most 1.02: **missed** |"),
    ],
)
def test_a_goal_within_the_spread_is_said_to_be(
    low: float, value: float, high: float, expected: str, tmp_path: Path
) -> None:
    out, figure = tmp_path / "speed.json", Figure(value, low, high)
    keep(out, HERE, {"head": Outcome(figure, "qwen", "", figure, 3)})
    assert expected in table(out)


def test_plain_steering_has_a_bound_by_bytes_and_one_by_time(tmp_path: Path) -> None:
    out, figure = tmp_path / "speed.json", Figure(1.8, 1.75, 1.85)
    more = {"host_must_move_bytes": 100.0, "small_over_host": 0.4, "host_must_compute_flops": 1.0}
    more |= {"host_sec_per_token": 1.0}
    keep(out, HERE, {"live-plain": Outcome(figure, "qwen", "", figure, 3, Work(130.0, 1.0), more)})
    shown = table(out)
    assert "by the bytes that must be moved 0.30, so 1.68: **missed**;" in shown
    assert "by its time, overhead included 0.40, so 1.89: met\n" in shown


def test_mounting_leaves_the_users_home_alone(asked: Asked, tmp_path: Path) -> None:
    models = Models(asked.material(asked.pair, quick=True))
    others = tmp_path / "home" / "mounts" / "another-process"

    def mounts_too(_module: object, _given: object) -> None:
        others.mkdir(parents=True, exist_ok=True)

    trunk: Any = models.host.model.base_model
    trunk.register_forward_pre_hook(mounts_too)
    figure, probe_sec = Stages(models, tmp_path / "scratch").mount
    assert figure.low > 0 and probe_sec > 0
    assert list(others.parent.iterdir()) == [others]


def test_what_is_made_of_another_source_has_another_name(asked: Asked) -> None:
    models = Models(asked.material(asked.pair, quick=True))
    material = models.material
    sources = material.adapter / "manifest.json", material.recording / "recording.json"
    before = material.large_adapter(models.small), material.long_recording(models.small)
    kept = [source.read_bytes() for source in sources]
    for source, data in zip(sources, kept, strict=True):
        source.write_bytes(data + b"\n")
    after = material.large_adapter(models.small), material.long_recording(models.small)
    for source, data in zip(sources, kept, strict=True):
        source.write_bytes(data)
    assert not set(before) & set(after)
    assert before == (material.large_adapter(models.small), material.long_recording(models.small))


def test_a_lora_beside_the_host_is_in_the_hosts_arithmetic() -> None:
    model = with_lora(open_model(TINY, dtype="bfloat16").model)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_lock_step_is_what_three_models_say_without_caches() -> None:
    host, expert, antiexpert = (open_model(f"{TINY}&seed={seed}").model for seed in (1, 2, 3))
    prompt = torch.tensor([[5, 9, 60, 61]])
    clock = Clock()
    found = proxy_tuned(
        ProxyModels(host, expert, antiexpert), prompt, 8, clock, alpha=0.7, banned=[9]
    )
    ids = prompt
    for _ in range(8):
        with torch.no_grad():
            said = [model(input_ids=ids).logits[0, -1] for model in (host, expert, antiexpert)]
        logits = said[0] + 0.7 * (said[1] - said[2])
        logits[9] = -torch.inf
        ids = torch.cat([ids, logits.argmax()[None, None]], 1)
    assert torch.equal(found, ids) and clock.tokens == 7


def test_a_pass_is_counted_with_all_its_weights() -> None:
    model = open_model(f"{TINY}&tied=0").model
    size, ids = Size.of(model), torch.arange(10, 42)[None]
    # Whose products torch counts.
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids)
    norms = sum(weight.numel() for name, weight in model.named_parameters() if "norm" in name)
    ours = size.passes(1, 32, 32).flops - 2 * 32 * norms
    assert ours == pytest.approx(counter.get_total_flops(), rel=1e-3)
    everything = sum(weight.numel() for weight in model.parameters())
    assert size.weights == everything - model.get_input_embeddings().weight.numel()
    tied = open_model(f"{TINY}&tied=1").model
    assert Size.of(tied).weights == sum(weight.numel() for weight in tied.parameters())
    assert Work(1e9, 1e9).least_sec(PEAKS) == 1.0 and Work(1.0, 1e10).least_sec(PEAKS) == 1.0


def test_passes_are_counted_while_they_count() -> None:
    model, counts = open_model(TINY).model, [False]
    with counted({"host": model}, lambda: counts[0]) as found:
        model(input_ids=torch.tensor([[5, 6, 7]]))
        counts[0] = True
        model(input_ids=torch.tensor([[5, 6]]))
    model(input_ids=torch.tensor([[5, 6]]))
    assert (found["host"].passes, found["host"].tokens) == (1, 2)


def test_a_shared_copy_has_the_same_weights_and_modules_of_its_own() -> None:
    model = open_model(TINY).model
    other = shared_copy(model)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert all(ours is theirs for ours, theirs in pairs)
    assert not set(model.modules()) & set(other.modules())


def test_a_grown_memory_points_to_what_followed() -> None:
    small = open_model(TINY)
    keys = torch.nn.functional.normalize(torch.randn(7, 8), dim=-1).half()
    memory = Memory(keys, torch.eye(8), torch.zeros(8), torch.zeros(32), torch.full((7,), 16))
    large = grown(memory, small, PAIRS["tiny"], 500)
    assert len(large) == len(large.positions) == 500
    assert torch.allclose(large.keys.float().norm(dim=-1), torch.ones(500), atol=1e-3)
    document = next(text.endless("python"))[1]
    ids = small.encode(document)
    raw = large.text.numpy().tobytes()
    for entry in (0, 3, 200):
        after = raw[large.positions[entry] :]
        assert after.startswith(small.vocabulary.token_bytes[ids[entry + 1]] or b"?")


def test_clocks_and_figures() -> None:
    clock = Clock()
    assert not clock.has_begun
    for count in (5, 2, 1, 3):
        clock.put(torch.zeros(count))
    assert clock.tokens == 4 and clock.has_begun and clock.sec >= 0 and clock.first_sec > 0
    at_once = Clock()
    at_once.put(torch.zeros(5)), at_once.put(torch.zeros(4))
    assert at_once.tokens == 4 and at_once.sec == at_once.first_sec > 0
    watch = Stopwatch()
    with watch.progress("work", 3) as advance:
        advance(1), advance(1), advance(1)
    assert len(watch.steps_sec("work")) == 2 and watch.sec("work") > 0 == watch.sec("other")
    found = Figure.of([2.0, 4.0, 3.0])
    assert found == Figure(3.0, 2.0, 4.0)
    assert found.over(Figure(2.0, 1.0, 4.0)) == Figure(1.5, 0.5, 4.0)
    assert found.plus(found) == found.times(2) == Figure(6.0, 4.0, 8.0)
    # Each repetition is compared with its own.
    assert ratio(Tally([2.0, 9.0, 2.0]), Tally([1.0, 3.0, 2.0])) == Figure(2.0, 1.0, 3.0)
