"""Whole jobs through the command line: continuing, tuning on other formats, a fit that breaks."""

import json
import math
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from saving import saved
from test_bad_input import contents, refusal
from test_cli import run
from test_generate import HOST, PROMPTS, domain_text, made_adapter
from test_gguf import write_gguf

from trimtab.backends.open import open_model
from trimtab.backends.pair import open_pair
from trimtab.config import GenerateConfig
from trimtab.fit import UNFINISHED_NAME
from trimtab.generate import generate
from trimtab.store.expert import read_expert
from trimtab.store.files import sha256_file
from trimtab.store.recording import Recording
from trimtab.text.corpus import load_documents

SMALL = "tiny:llama?hidden=32&layers=1"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "home"))


@pytest.fixture
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_adapter(tmp_path_factory.getbasetemp())


def said(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What the command line writes on standard output when it succeeds, which it must."""
    capsys.readouterr()
    status = run(*(str(word) for word in words))
    shown = capsys.readouterr()
    assert status == 0, shown.err
    assert "Traceback" not in shown.err
    return shown.out


def test_generate_writes_what_the_function_gives(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    host = str(saved(HOST, tmp_path / "host"))
    settings = {"host": host, "dtype": "float32", "max_new_tokens": 24}

    def texts(*prompts: str, **more: object) -> tuple[str, ...]:
        return generate(GenerateConfig(prompt=prompts, **settings, **more)).texts

    [steered], [own] = texts(PROMPTS[0], adapter=adapter), texts(PROMPTS[0])
    assert steered != own
    options = ("--host", host, "--dtype", "float32", "--max-new-tokens", 24)
    words = ("generate", PROMPTS[0], *options)
    with_adapter = ("--adapter", adapter)
    written = said(capsys, *words, *with_adapter)
    assert written == (steered if steered.endswith("\n") else f"{steered}\n")
    alone = own if own.endswith("\n") else f"{own}\n"
    assert said(capsys, *words, *with_adapter, "--strength", 0) == alone
    assert said(capsys, *words) == alone
    # Several prompts are one batch, and each is told apart.
    one, two = texts(*PROMPTS[:2], adapter=adapter)
    both = said(capsys, "generate", *PROMPTS[:2], *options, *with_adapter)
    assert both == f"== 1 of 2\n{one}\n== 2 of 2\n{two}\n"


def write_records(folder: Path) -> None:
    """The same records as JSON lines and as Parquet: some of one column, some of two others."""
    records: list[dict[str, str]] = [{"text": domain_text(n)[:300]} for n in range(10)]
    records += [
        {"prompt": f"What turns part {n}?\n", "completion": domain_text(n)[:120]}
        for n in range(10, 16)
    ]
    lines = (json.dumps(record) for record in records)
    (folder / "data.jsonl").write_text("".join(f"{line}\n" for line in lines))
    table = {c: [r.get(c) for r in records] for c in ("text", "prompt", "completion")}
    pyarrow.parquet.write_table(pyarrow.table(table), folder / "data.parquet", row_group_size=4)


def tuned_on(
    data: Path, given: str, held_out: float, capsys: pytest.CaptureFixture[str]
) -> tuple[Path, str]:
    """Tune through options or a settings file; also what the command line said."""
    out = data.with_name(f"{data.suffix[1:]}-{held_out}")
    settings = {"model": SMALL, "window_tokens": 64, "held_out": held_out, "dtype": "float32"}
    if given == "options":
        words = [w for k, v in settings.items() for w in (f"--{k.replace('_', '-')}", v)]
        return out, said(capsys, "tune", data, "--out", out, *words)
    table = {"data": [str(data)], "out": str(out), **settings}
    path = out.with_suffix(".toml")
    path.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in table.items()))
    return out, said(capsys, "tune", "--config", path)


@pytest.mark.parametrize("given", ["options", "config"])
def test_tune_on_parquet_is_tune_on_json_lines(
    given: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_records(tmp_path)
    found = []
    # Which documents are held out follows from their names, so none are where files are compared.
    for name in ("data.parquet", "data.jsonl"):
        out, _ = tuned_on(tmp_path / name, given, 0.0, capsys)
        documents = load_documents(out / "train.jsonl")
        assert [d.name for d in documents] == [f"{tmp_path / name}:{n}" for n in range(1, 17)]
        texts = [(d.text, d.loss_spans) for d in documents]
        found.append((texts, contents(out / "lora")["adapter_model.safetensors"]))
    assert found[0] == found[1]
    out, shown = tuned_on(tmp_path / "data.parquet", given, 0.2, capsys)
    assert "bits per byte" in shown
    sides = [load_documents(out / f"{side}.jsonl") for side in ("train", "held_out")]
    assert [len(side) for side in sides] == [13, 3]
    texts = [(d.text, d.loss_spans) for side in sides for d in side]
    assert sorted(texts) == sorted(found[0][0])


def test_a_gguf_file_is_a_small_model_like_any_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, text, general = (tmp_path / n for n in ("tiny.gguf", "text", "general.md"))
    made = open_model("tiny:llama?vocab=bpe&hidden=32", dtype="float32")
    write_gguf(path, made)
    text.mkdir()
    for n in range(8):
        (text / f"{n}.txt").write_text(domain_text(n)[:400])
    general.write_text("Plain prose, about nothing in particular. " * 10)
    expert, recording, adapter = (tmp_path / n for n in ("expert", "recording", "adapter"))
    tuning = ("--model", path, "--window-tokens", 64, "--learning-rate", 0.01, "--epochs", 3)
    said(capsys, "tune", text, *tuning, "--out", expert, "--dtype", "float32", "--held-out", 0.25)
    assert read_expert(expert).base.ref == str(path)
    # What was unpacked may be gone by then.
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "another"))
    recording_words = ("--general", general, "--dtype", "float32")
    said(capsys, "record", expert, "--out", recording, *recording_words)
    check_recording_of_gguf(Recording.open(recording), expert, str(path))
    pair = open_pair(expert, dtype="float32")
    ids = torch.tensor([made.encode(domain_text(0)[:100])])
    torch.testing.assert_close(pair.reference_logits(ids), made.logits(ids), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(pair.expert_logits(ids), pair.reference_logits(ids), atol=1e-3)
    said(capsys, "fit", recording, "--out", adapter, "--rank", 4, "--key-size", 16, "--epochs", 1)
    words = ("generate", PROMPTS[0], "--host", HOST, "--adapter", adapter, "--max-new-tokens", 4)
    for carriers in ("head,memory", "head,memory,expert"):
        assert said(capsys, *words, "--carriers", carriers).endswith("\n")


def check_recording_of_gguf(recording: Recording, expert: Path, ref: str) -> None:
    assert recording.manifest.base.ref == ref
    pair = open_pair(expert, dtype="float32")
    rows = recording.read("train")
    for index, document in enumerate(load_documents(expert / "train.jsonl")):
        own = rows["document_index"] == index
        ids = pair.reference.encode(document.text)
        assert rows["token_ids"][own].tolist() == list(ids)
        states = pair.hidden(torch.tensor([ids]))
        for name, oracle in states._asdict().items():
            found = rows[f"{name}_hidden"][own].float()
            torch.testing.assert_close(found, oracle[0], atol=4e-3, rtol=2e-3)


def with_bad_value(recording: Path, row: int) -> None:
    """Put a number that is not finite where a shard holds a state, and vouch for it."""
    name = "train-00000.safetensors"
    with safe_open(recording / name, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(recording / name)
    tensors["reference_hidden"][row, 0] = math.nan
    save_file(tensors, recording / name, metadata=metadata)
    told = json.loads((recording / "recording.json").read_text())
    [shard] = [shard for shard in told["shards"] if shard["file"] == name]
    shard["sha256"] = sha256_file(recording / name)
    (recording / "recording.json").write_text(json.dumps(told))


def test_a_fit_whose_loss_is_not_finite_keeps_the_state_before(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, broken, out = (tmp_path / name for name in ("whole", "broken", "adapter"))
    # A text of one size on every machine, so that the bad value comes after the first step.
    text, general = tmp_path / "text.txt", adapter.parent / "one.md"
    text.write_text("\n".join(domain_text(n) for n in range(3)))
    said(capsys, "record", adapter.parent / "expert", "--data", text, "--out", whole,
         "--general", general, "--dtype", "float32")  # fmt: skip
    shutil.copytree(whole, broken)
    with_bad_value(broken, row=5)
    options = ("--out", out, "--rank", 4, "--key-size", 16, "--epochs", 2)
    words = ("fit", broken, *options, "--checkpoint-every-sec", 0)
    expected = "the head's loss is not a finite number"
    shown = refusal(capsys, *words)
    assert expected in shown and "--learning-rate" in shown and "record again" in shown
    assert contents(out).keys() == {UNFINISHED_NAME}
    with safe_open(out / UNFINISHED_NAME, framework="pt") as file:
        assert json.loads(file.metadata()["state"])["steps"] > 0
        assert all(file.get_tensor(name).isfinite().all() for name in file.keys())
    # The same command says so again and changes nothing; another recording begins anew.
    before = contents(out)
    assert expected in refusal(capsys, *words)
    assert contents(out) == before
    assert not list(tmp_path.glob(".adapter.*"))
    said(capsys, "fit", whole, *options)
    said(capsys, "fit", whole, "--out", tmp_path / "never-broken", *options[2:])
    name = "head.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "never-broken" / name).read_bytes()
    assert not (out / UNFINISHED_NAME).exists()
