"""Tuning lowers the held-out loss, ends the same however often it is killed, says no clearly."""

import json
import math
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from children import started
from safetensors import safe_open
from safetensors.torch import load_file
from saving import saved

from trimtab.backends.chat import chat_renderer
from trimtab.backends.hf import HFModel
from trimtab.backends.open import open_model
from trimtab.backends.pair import Pair, open_pair
from trimtab.config import TuneConfig
from trimtab.errors import InputError, ModelError, NumericalError
from trimtab.losses import masked_cross_entropy_nats
from trimtab.store.expert import EXPERT_NAME, RUN_NAME, TRAIN_NAME, read_expert
from trimtab.text.corpus import load_documents
from trimtab.tune import tune
from trimtab.tuning.training_text import held_out_windows, training_windows
from trimtab.types import Progress

GOLDEN = Path(__file__).parent / "golden" / "expert_v1.json"
LLAMA = "tiny:llama?hidden=32&layers=1"
GPT2 = "tiny:gpt2?hidden=32&layers=1"
LINE = "pub fn add{n}(a: u32, b: u32) u32 {{ return a + b * {n}; }}\n"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for n in range(8):
        (folder / f"{n}.zig").write_text("".join(LINE.format(n=10 * n + i) for i in range(6)))
    return folder


def configuration(corpus: Path, out: Path, **changes: object) -> TuneConfig:
    settings: dict[str, object] = {
        "model": LLAMA,
        "data": (str(corpus),),
        "out": out,
        "learning_rate": 0.02,
        "window_tokens": 32,
        "batch_windows": 8,
        "validation_tokens": 256,
        "dtype": "float32",
    }
    return TuneConfig.model_validate(settings | changes)


@pytest.fixture(scope="module")
def lora(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> TuneConfig:
    config = configuration(corpus, tmp_path_factory.mktemp("lora") / "expert")
    tune(config)
    return config


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but expert.json, whose config names the folder."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != EXPERT_NAME)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def stopped_after(calls: int, label_start: str = "tuning") -> Progress:
    """A progress display at which the user presses Ctrl-C."""
    left: float = calls

    @contextmanager
    def open_display(label: str, total: int) -> Iterator[Callable[[int], None]]:
        def advance(_: int) -> None:
            nonlocal left
            left -= label.startswith(label_start)
            if left < 0:
                raise KeyboardInterrupt

        yield advance

    return open_display


def noting(labels: list[str]) -> Progress:
    """A progress display that keeps what it was to show."""

    @contextmanager
    def open_display(label: str, total: int) -> Iterator[Callable[[int], None]]:
        labels.append(label)
        yield lambda _: None

    return open_display


def held_out_loss(model: HFModel, config: TuneConfig) -> float:
    windows = held_out_windows(config, model)
    assert windows is not None
    with torch.no_grad():
        logits = model.model(
            input_ids=windows.token_ids, position_ids=windows.position_ids, use_cache=False
        ).logits
    counted = windows.counted[:, 1:]
    nats = masked_cross_entropy_nats(logits[:, :-1], windows.token_ids[:, 1:], counted)
    return nats.item() / int(counted.sum())


def test_the_loss_falls_and_the_files_hold_what_was_measured(lora: TuneConfig) -> None:
    manifest = read_expert(lora.out)
    held_out = manifest.held_out
    assert held_out is not None
    assert held_out.nats_per_token_after < held_out.nats_per_token_before - 0.2
    assert held_out.nats_per_token_after == min(held_out.nats_per_token)
    ratio = held_out.bits_per_byte_after / held_out.nats_per_token_after
    assert ratio == pytest.approx(held_out.tokens / held_out.bytes / math.log(2))
    pair = open_pair(lora.out, dtype="float32")
    assert held_out_loss(pair.reference, lora) == pytest.approx(held_out.nats_per_token[0], 1e-5)
    with pair.as_expert() as expert:
        found = held_out_loss(expert, lora)
    assert found == pytest.approx(held_out.nats_per_token_after, rel=1e-5)


def test_the_folder_is_whole_and_says_what_it_holds(lora: TuneConfig) -> None:
    names = {"train.jsonl", "held_out.jsonl"}
    lora_names = {"lora/adapter_config.json", "lora/adapter_model.safetensors"}
    assert set(contents(lora.out)) == names | lora_names
    manifest = read_expert(lora.out)
    assert set(manifest.files) == names | lora_names
    assert manifest.contains_text and manifest.config == lora
    assert (manifest.documents.train, manifest.documents.held_out) == (7, 1)


def test_lora_leaves_head_and_embeddings_alone(lora: TuneConfig) -> None:
    weights = load_file(lora.out / "lora" / "adapter_model.safetensors")
    assert all(".layers.0." in name and "lora_" in name for name in weights)
    assert any(tensor.any() for name, tensor in weights.items() if "lora_B" in name)
    base = open_model(LLAMA, dtype="float32")
    pair = open_pair(lora.out, dtype="float32")
    ids = torch.arange(20)[None]
    with pair.as_expert() as expert:
        assert not torch.equal(expert.logits(ids), base.logits(ids))
        assert torch.equal(expert.unembedding.weight, base.unembedding.weight)
    assert torch.equal(pair.reference.logits(ids), base.logits(ids))


def test_a_finished_folder_is_returned_as_it_is(lora: TuneConfig) -> None:
    before = {path: path.stat().st_mtime_ns for path in lora.out.rglob("*") if path.is_file()}
    again = tune(lora.model_copy(update={"checkpoint_every_sec": 5.0}))
    assert {p: p.stat().st_mtime_ns for p in lora.out.rglob("*") if p.is_file()} == before
    assert "bits per byte" in again.summary() and again.steps == read_expert(lora.out).steps


def test_a_full_expert_opens_and_has_moved(corpus: Path, tmp_path: Path) -> None:
    config = configuration(corpus, tmp_path / "expert", method="full", learning_rate=0.003)
    result = tune(config)
    assert result.held_out is not None
    pair = open_pair(config.out, dtype="float32")
    assert isinstance(pair, Pair)
    assert not torch.equal(pair.reference_unembedding.weight, pair.expert_unembedding.weight)
    with pair.as_expert() as expert:
        found = held_out_loss(expert, config)
    assert found == pytest.approx(result.held_out.nats_per_token_after, rel=1e-5)
    assert found < result.held_out.nats_per_token_before - 0.3


@pytest.mark.parametrize(
    ("model", "method", "dtype"),
    [(GPT2, "lora", "float32"), (LLAMA, "full", "float32"), (LLAMA, "lora", "bfloat16")],
)
def test_interrupted_runs_end_with_the_same_bytes(
    corpus: Path, tmp_path: Path, model: str, method: str, dtype: str
) -> None:
    changes = {"model": model, "method": method, "dtype": dtype, "checkpoint_every_sec": 0}
    whole = configuration(corpus, tmp_path / "whole", **changes, max_tokens=2000)
    tune(whole)
    parts = configuration(corpus, tmp_path / "parts", **changes, max_tokens=2000)
    for calls in (0, 3, 2):
        with pytest.raises(KeyboardInterrupt):
            tune(parts, progress=stopped_after(calls))
    labels: list[str] = []
    tune(parts, progress=noting(labels))
    assert "tuning, going on (tokens)" in labels
    assert contents(parts.out) == contents(whole.out)
    other = configuration(corpus, tmp_path / "other", **changes, max_tokens=2000, seed=1)
    tune(other)
    assert contents(other.out) != contents(whole.out)


def test_kill_nine_then_the_same_command_ends_with_the_same_bytes(
    corpus: Path, lora: TuneConfig, tmp_path: Path
) -> None:
    killed = lora.model_copy(update={"out": tmp_path / "killed", "checkpoint_every_sec": 0.0})
    process = started(tune, killed)
    checkpoint = killed.out / "checkpoint" / "state.safetensors"
    deadline = time.monotonic() + 60
    while not checkpoint.exists() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert checkpoint.exists() and not (killed.out / EXPERT_NAME).exists()
    tune(killed)
    assert contents(killed.out) == contents(lora.out)


def test_training_that_does_not_help_keeps_the_base(corpus: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh abcdefgh\n" * 90 + "13579 97531 13579\n" * 10)
    config = configuration(
        corpus, tmp_path / "expert", data=(str(text),), learning_rate=0.05, epochs=3
    )
    result = tune(config)
    assert result.held_out is not None
    assert result.held_out.nats_per_token_after == result.held_out.nats_per_token_before
    assert "did not help" in result.summary()
    assert len(result.held_out.nats_per_token) == 1 + config.patience
    weights = load_file(config.out / "lora" / "adapter_model.safetensors")
    assert not any(tensor.any() for name, tensor in weights.items() if "lora_B" in name)


def test_eaft_learns_and_its_validation_is_the_cross_entropy(
    corpus: Path, lora: TuneConfig, tmp_path: Path
) -> None:
    config = configuration(corpus, tmp_path / "expert", loss="eaft")
    tune(config)
    manifest, plain = read_expert(config.out), read_expert(lora.out).held_out
    assert (manifest.config.loss, manifest.config.eaft_alpha) == ("eaft", 1.0)
    assert plain is not None and manifest.held_out is not None
    nats = manifest.held_out.nats_per_token
    assert nats[0] == plain.nats_per_token[0]
    assert min(nats) < nats[0] - 0.2 and nats[1:] != plain.nats_per_token[1:]
    with open_pair(config.out, dtype="float32").as_expert() as expert:
        assert held_out_loss(expert, config) == pytest.approx(min(nats), rel=1e-5)


def test_eaft_with_alpha_nought_ends_with_the_bytes_of_the_cross_entropy(
    corpus: Path, lora: TuneConfig, tmp_path: Path
) -> None:
    config = configuration(corpus, tmp_path / "expert", loss="eaft", eaft_alpha=0)
    tune(config)
    assert contents(config.out) == contents(lora.out)


def test_without_held_out_text_all_steps_are_taken(corpus: Path, tmp_path: Path) -> None:
    config = configuration(corpus, tmp_path / "expert", held_out=0, max_tokens=600, epochs=2)
    result = tune(config)
    assert result.held_out is None and result.steps == 2 * 3
    assert "bits" not in result.summary()


def test_loss_counts_the_completions_and_their_end(tmp_path: Path) -> None:
    records = [
        {"prompt": f"{n} plus é {n} is ", "completion": f"{2 * n}, näturally"} for n in range(9)
    ]
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = configuration(tmp_path, tmp_path / "expert", data=(str(path),), held_out=0)
    tune(config)
    model = open_model(LLAMA)
    assert _counted_text(model, config) == sorted(record["completion"] for record in records)


def test_loss_of_a_chat_counts_the_assistants_turns(tmp_path: Path) -> None:
    def messages(n: int) -> list[dict[str, str]]:
        return [
            {"role": "system", "content": "7"},
            {"role": "user", "content": f"{n} + 7?"},
            {"role": "assistant", "content": f"{n + 7}"},
            {"role": "user", "content": "why, <eos> or not?"},
            {"role": "assistant", "content": " 7 is 7 "},
        ]

    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"messages": messages(n)}) + "\n" for n in range(9)))
    config = configuration(tmp_path, tmp_path / "expert", data=(str(path),), held_out=0)
    tune(config)
    model = open_model(LLAMA)
    replies = [reply for n in range(9) for reply in (f"{n + 7}", "7 is 7 ")]
    assert _counted_text(model, config) == sorted(replies)
    text, spans = chat_renderer(model)(messages(0))
    assert [text[a:b] for a, b in spans] == ["7<eos>", "7 is 7 <eos>"]


def _counted_text(model: HFModel, config: TuneConfig) -> list[str]:
    windows = training_windows(config, model)
    counted = model.tokenizer.decode(windows.token_ids[windows.counted].tolist())
    return sorted(counted.removesuffix("<eos>").split("<eos>"))


def test_a_limit_takes_excerpts_from_all_over_the_text(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for n in range(5):
        (corpus / f"{n}.txt").write_text("".join(f"{n}:{line:03d};\n" for line in range(200)))
    config = configuration(corpus, tmp_path / "expert", held_out=0, max_tokens=3500)
    tune(config)
    model = open_model(LLAMA)
    everything = config.model_copy(update={"max_tokens": None})
    some, whole = (training_windows(c, model) for c in (config, everything))
    assert 3500 < int(some.counted.sum()) < 3500 + 400 < int(whole.counted.sum())
    texts = [model.tokenizer.decode(w.token_ids[w.counted].tolist()) for w in (some, whole)]
    lines = re.findall(r"\d:\d{3};", texts[0])
    assert {line[0] for line in lines} == set("01234")
    assert len(lines) == len(set(lines)) < len(re.findall(r"\d:\d{3};", texts[1]))
    assert texts[1].count("<eos>") == 5 > texts[0].count("<eos>")


def test_near_duplicates_of_test_files_are_not_trained_on(corpus: Path, tmp_path: Path) -> None:
    test = tmp_path / "test.zig"
    test.write_text((corpus / "3.zig").read_text() + "// the end\n")
    config = configuration(
        corpus, tmp_path / "expert", against=(str(test),), held_out=0, max_tokens=300
    )
    tune(config)
    assert read_expert(config.out).documents.near_duplicates == 1
    assert "add31(" not in (config.out / "train.jsonl").read_text()
    everything = configuration(corpus, tmp_path / "none", against=(str(corpus),))
    with pytest.raises(InputError, match="all 8 training documents are near-duplicates"):
        tune(everything)


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_checkpoint(
    tmp_path: Path,
) -> None:
    model = open_model(GPT2, dtype="float32")
    with torch.no_grad():
        model.model.get_parameter("transformer.wpe.weight")[30] = math.inf
    broken, corpus = tmp_path / "broken", tmp_path / "corpus"
    saved(model, broken)
    corpus.mkdir()
    for n in range(20):
        (corpus / f"{n}.txt").write_text("a text of 24 characters.")
    # Only this one reaches the position that is broken.
    (corpus / "long.txt").write_text("a text of more than thirty characters.")
    changes = {"model": str(broken), "checkpoint_every_sec": 0, "batch_windows": 1, "held_out": 0}
    config = configuration(corpus, tmp_path / "expert", **changes, seed=1)
    with pytest.raises(NumericalError, match=r"at step (\d+) of \d+, at learning rate") as failure:
        tune(config)
    step = int(failure.value.message.partition("at step ")[2].split()[0])
    assert step > 1 and "--learning-rate" in failure.value.hint
    with safe_open(config.out / "checkpoint" / "state.safetensors", framework="pt") as state:
        assert json.loads(state.metadata()["state"])["step"] == step - 1
    with pytest.raises(NumericalError, match=f"at step {step} of"):
        tune(config)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"window_tokens": 4096}, InputError, "positions for 2048"),
        ({"window_tokens": 2048}, InputError, r"has \d+ tokens, expected at least one window of"),
        ({"model": "tiny:t5"}, ModelError, "only causal models"),
        ({"model": "tiny:none"}, ModelError, "no toy model"),
        ({"data": ("no-such-file.txt",)}, InputError, "no-such-file"),
    ],
)
def test_bad_input_is_refused(
    corpus: Path,
    tmp_path: Path,
    changes: dict[str, object],
    error: type[Exception],
    message: str,
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    shutil.copy(corpus / "0.zig", small)
    with pytest.raises(error, match=message):
        tune(configuration(small, tmp_path / "expert", **changes))


def test_another_run_in_the_same_folder_is_refused(
    corpus: Path, lora: TuneConfig, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="rank is 3, was 16"):
        tune(lora.model_copy(update={"rank": 3}))
    moved = tmp_path / "corpus"
    shutil.copytree(corpus, moved)
    config = configuration(moved, tmp_path / "expert", checkpoint_every_sec=0)
    with pytest.raises(KeyboardInterrupt):
        tune(config, progress=stopped_after(1))
    with pytest.raises(InputError, match="seed is 4, was 0"):
        tune(config.model_copy(update={"seed": 4}))
    (moved / "0.zig").write_text("other text\n")
    with pytest.raises(InputError, match="the text in data is not the text"):
        tune(config)


def test_a_run_goes_on_where_its_text_has_been_moved(
    corpus: Path, lora: TuneConfig, tmp_path: Path
) -> None:
    config = lora.model_copy(update={"out": tmp_path / "expert", "checkpoint_every_sec": 0.0})
    with pytest.raises(KeyboardInterrupt):
        tune(config, progress=stopped_after(2))
    shutil.copytree(corpus, tmp_path / "moved")
    tune(config.model_copy(update={"data": (str(tmp_path / "moved"),)}))
    assert contents(config.out / "lora") == contents(lora.out / "lora")
    both = (load_documents(out / TRAIN_NAME) for out in (config.out, lora.out))
    resumed, at_once = ([one.text for one in documents] for documents in both)
    assert resumed == at_once


def test_runs_from_before_the_loss_was_a_choice_go_on_as_cross_entropy(
    corpus: Path, lora: TuneConfig, tmp_path: Path
) -> None:
    (tmp_path / EXPERT_NAME).write_bytes(GOLDEN.read_bytes())
    assert read_expert(tmp_path, verify=False).config.loss == "cross-entropy"
    config = lora.model_copy(update={"out": tmp_path / "expert", "checkpoint_every_sec": 0.0})
    with pytest.raises(KeyboardInterrupt):
        tune(config, progress=stopped_after(2))
    run = json.loads((config.out / RUN_NAME).read_text())
    del run["config"]["loss"], run["config"]["eaft_alpha"]
    (config.out / RUN_NAME).write_text(json.dumps(run))
    with pytest.raises(InputError, match="loss is 'eaft', was 'cross-entropy'"):
        tune(config.model_copy(update={"loss": "eaft"}))
    tune(config)
    assert contents(config.out) == contents(lora.out)


def test_a_run_that_never_trained_can_begin_with_other_settings(
    corpus: Path, tmp_path: Path
) -> None:
    config = configuration(corpus, tmp_path / "expert", window_tokens=2000, max_tokens=300)
    with pytest.raises(InputError, match="expected at least one window of 2000"):
        tune(config.model_copy(update={"data": (str(corpus / "0.zig"),)}))
    assert tune(config.model_copy(update={"window_tokens": 32})).steps == 2


def test_a_folder_with_other_things_is_left_alone(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match=r"other things \(thesis.txt\)"):
        tune(configuration(corpus, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def _change_a_byte(folder: Path) -> None:
    path = folder / "lora" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _edit(key: str, value: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        manifest = json.loads((folder / EXPERT_NAME).read_text())
        (folder / EXPERT_NAME).write_text(json.dumps(manifest | {key: value}))

    return edit


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_change_a_byte, "adapter_model.safetensors was changed"),
        (lambda folder: (folder / "train.jsonl").unlink(), "lacks train.jsonl"),
        (lambda folder: (folder / EXPERT_NAME).unlink(), "holds no expert"),
        (_edit("version", 2), "format version 2, this trimtab reads up to 1"),
        (_edit("colour", "red"), "colour"),
    ],
)
def test_a_harmed_expert_is_refused(
    lora: TuneConfig, tmp_path: Path, harm: Callable[[Path], object], message: str
) -> None:
    folder = tmp_path / "expert"
    shutil.copytree(lora.out, folder)
    assert read_expert(folder).method == "lora"
    harm(folder)
    with pytest.raises(InputError, match=message):
        read_expert(folder)
