"""The main job between two small models that were trained apart, and the adapter it leaves."""

import json
import os
import random
import shutil
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trimtab.backends.open import open_model
from trimtab.cli import main
from trimtab.config import EvaluateConfig, FitConfig, MountConfig, RecordConfig, TuneConfig
from trimtab.evaluate import evaluate, first_documents
from trimtab.fit import fit
from trimtab.metrics import Estimate
from trimtab.mount import mount
from trimtab.record import record
from trimtab.report import perplexity
from trimtab.store.files import sha256_file
from trimtab.store.manifest import read_manifest
from trimtab.tune import tune

ROWS = ("host", "state", "head", "memory", "head-shuffled", "memory-shuffled")
SEED = 0
WORDS = "billing ledger mail search login media quota audit export report stock order".split()
KINDS = "api worker cron proxy".split()


def deployments(seed: int, count: int = 60) -> list[str]:
    """Files of one invented configuration language about one invented company's services."""
    rng = random.Random(seed)
    services = {
        f"{word}-{kind}": (
            rng.randrange(7000, 9999),
            rng.choice([1, 2, 3, 5]),
            rng.choice(["128Mi", "256Mi", "512Mi"]),
            ", ".join(rng.sample(WORDS, 2)),
        )
        for word in WORDS
        for kind in rng.sample(KINDS, 2)
    }
    documents = []
    for _ in range(count):
        text = f"#! deploy/2\nstage {rng.choice(['dev', 'test', 'live'])}-{rng.randrange(100)}\n\n"
        for name in rng.sample(sorted(services), 3):
            port, replicas, memory, needs = services[name]
            text += (
                f"service {name} {{\n\tlisten    => :{port};\n\treplicas  => {replicas};\n"
                f"\tmemory    => {memory};\n\tneeds     => [{needs}];\n"
                f"\tprobe     => http(/{name.partition('-')[0]}/ready, every"
                f" {rng.choice([5, 10, 30])}s);\n}}\n\n"
            )
        documents.append(text)
    return documents


def pretrained(ref: str, folder: Path) -> str:
    """A weak language model of general text."""
    settings = TuneConfig(
        model=ref, data=(str(files("trimtab") / "data" / "probe"),), out=folder, method="full",
        learning_rate=6e-3, epochs=3, window_tokens=128, batch_windows=8, validations=1,
        dtype="float32", seed=SEED,
    )  # fmt: skip
    tune(settings)
    return str(folder / "model")


@dataclass(frozen=True)
class Job:
    """What the main job left: the adapter, the host, and the measurement."""

    adapter: Path
    host: str
    report: Path
    bits_per_byte: dict[str, Estimate]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("job")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIMTAB_HOME", str(folder / "home"))
        small = pretrained(f"tiny:llama?hidden=48&seed={SEED}&vocab=bpe", folder / "small")
        host = pretrained(f"tiny:qwen3?hidden=64&seed={SEED + 1}&vocab=bpe", folder / "host")
        for number, text in enumerate(deployments(SEED)):
            side = folder / ("test" if number % 6 == 5 else "train")
            side.mkdir(exist_ok=True)
            (side / f"{number}.deploy").write_text(text)
        _adapt(small, folder)
        result = evaluate(
            EvaluateConfig(
                adapter=folder / "adapter", host=host, data=(str(folder / "test"),), rows=ROWS,
                out=folder / "report", max_tokens=3000, dtype="float32", seed=SEED,
            )
        )  # fmt: skip
    measured = dict(result.report.hosts[0].domain)
    return Job(folder / "adapter", host, folder / "report", measured)


def _adapt(small: str, folder: Path) -> None:
    tuning = TuneConfig(
        model=small, data=(str(folder / "train"),), out=folder / "expert", learning_rate=5e-3,
        epochs=5, window_tokens=128, dtype="float32", against=(str(folder / "test"),), seed=SEED,
    )  # fmt: skip
    tune(tuning)
    probe = files("trimtab") / "data" / "probe"
    general = (str(probe / "*-1[78]*"), str(probe / "python-[a-j]*"))
    record(
        RecordConfig(
            expert=folder / "expert", out=folder / "recording", general=general, dtype="float32"
        )
    )
    settings = FitConfig(
        recording=folder / "recording", out=folder / "adapter", rank=16, key_size=32, seed=SEED
    )
    fit(settings)


def test_the_first_documents_have_the_figures_that_they_have_alone(
    job: Job, tmp_path: Path
) -> None:
    asked = {
        "adapter": job.adapter, "host": job.host, "data": (str(job.report.parent / "test"),),
        "document_tokens": 150, "dtype": "float32", "seed": SEED,
    }  # fmt: skip
    wide = {**asked, "rows": ("head", "memory", "head-shuffled"), "max_tokens": 900}
    whole = evaluate(EvaluateConfig.model_validate({**wide, "out": tmp_path / "whole"}))
    less = {**asked, "rows": ("memory",), "max_tokens": 450}
    few = evaluate(EvaluateConfig.model_validate({**less, "out": tmp_path / "few"}))
    [alone], documents = few.report.hosts, len(few.scored[""])
    assert (documents, len(whole.scored[""])) == (3, 6)
    found = first_documents(whole, documents, seed=SEED)
    assert (found.test_bytes, found.test_tokens) == (alone.test_bytes, alone.test_tokens)
    for row, figure in alone.domain.items():
        assert found.domain[row].mean == pytest.approx(figure.mean, rel=1e-4)
        assert found.domain[row].stderr == pytest.approx(figure.stderr, rel=1e-3)
        assert perplexity(found)[row].mean == pytest.approx(perplexity(alone)[row].mean, rel=1e-3)
    assert not found.general


def test_several_processes_score_what_one_does(job: Job, tmp_path: Path) -> None:
    test = (str(job.adapter.parent / "test"),)
    settings = EvaluateConfig(
        adapter=job.adapter, host=job.host, data=test, rows=ROWS, out=tmp_path / "report",
        max_tokens=3000, dtype="float32", seed=SEED, processes=3,
    )  # fmt: skip
    found, before = (
        evaluate(settings).report.hosts[0].domain,
        len(os.listdir(job.report / "scores")),
    )
    assert {row: estimate.mean for row, estimate in found.items()} == pytest.approx(
        {row: estimate.mean for row, estimate in job.bits_per_byte.items()}, rel=1e-5
    )
    assert len(os.listdir(tmp_path / "report" / "scores")) == before > 1


@pytest.mark.parametrize("carrier", ["head", "memory"])
@pytest.mark.parametrize("control", ["host", "{carrier}-shuffled"])
def test_a_carrier_beats_the_bare_host_and_a_shuffled_map(
    carrier: str, control: str, job: Job
) -> None:
    found, other = job.bits_per_byte[carrier], job.bits_per_byte[control.format(carrier=carrier)]
    assert found.mean + 4 * max(found.stderr, other.stderr) < other.mean


def test_states_find_what_a_shuffled_map_does_not(job: Job) -> None:
    """The shuffled memory is searched by state alone, so that only the map differs."""
    state, shuffled = (job.bits_per_byte[row] for row in ("state", "memory-shuffled"))
    assert state.mean + 4 * max(state.stderr, shuffled.stderr) < shuffled.mean
    assert state.mean < job.bits_per_byte["host"].mean


def test_the_report_says_what_was_measured(job: Job) -> None:
    report = json.loads((job.report / "report.json").read_text())
    [measured] = report["hosts"]
    assert report["schema"] == 1 and measured["host"] == job.host
    assert set(measured["domain_bits_per_byte"]) == set(ROWS)
    for row, estimate in job.bits_per_byte.items():
        assert measured["domain_bits_per_byte"][row]["mean"] == pytest.approx(estimate.mean)


def test_an_adapter_that_was_moved_is_the_same(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "else" / "where"
    shutil.copytree(job.adapter, moved)
    manifest = read_manifest(moved)
    present = {p.relative_to(moved).as_posix() for p in moved.rglob("*") if p.is_file()}
    assert present == {"manifest.json", *manifest.files}
    for path, entry in manifest.files.items():
        assert sha256_file(moved / path) == entry.sha256
    here, there = (
        mount(MountConfig(adapter=folder, host=job.host, cache=False, dtype="float32"))
        for folder in (job.adapter, moved)
    )
    assert here.summary() == there.summary() and here.state_map.shared_tokens > 200
    with pytest.raises(SystemExit) as end:
        main(["show", str(moved)])
    shown = capsys.readouterr().out
    assert not end.value.code
    for word in ("head", "memory", "expert", "Contains training text"):
        assert word in shown


def spacing_host(folder: Path) -> str:
    """A random host whose tokenizer puts a space before a text, as Llama 2's does."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    tokens += [chr(code) for code in range(33, 127)]
    model = BPE(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=[],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    backend.add_special_tokens(tokens[:3])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=len(tokens), num_attention_heads=2, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def test_a_space_that_the_tokenizer_puts_first_is_no_part_of_the_scored_text(
    job: Job, tmp_path: Path
) -> None:
    host = spacing_host(tmp_path / "host")
    text = deployments(SEED + 5, 1)[0]
    (tmp_path / "a.deploy").write_text(text)
    result = evaluate(
        EvaluateConfig(
            adapter=job.adapter, host=host, data=(str(tmp_path / "a.deploy"),), rows=("bytes",),
            out=tmp_path / "report", dtype="float32",
        )
    )  # fmt: skip
    [kept] = result.scored[""]
    vocabulary = open_model(host).vocabulary
    assert vocabulary.prefix_space
    spelled = b"".join(vocabulary.token_bytes[i] or b"" for i in kept.on_host.token_ids)
    # The first token, which nothing comes before, is the space and what it was put before.
    assert text.encode().endswith(spelled) and len(text) - len(spelled) <= 1


def test_small_models_read_a_text_beside_the_host_as_by_themselves(
    job: Job, tmp_path: Path
) -> None:
    (tmp_path / "a.deploy").write_text(deployments(SEED + 6, 1)[0])
    found = {}
    # Beside the host they run for the row `live`, and elsewhere for themselves alone.
    for rows in (("expert", "reference"), ("expert", "reference", "live")):
        result = evaluate(
            EvaluateConfig(
                adapter=job.adapter, host=job.host, data=(str(tmp_path / "a.deploy"),), rows=rows,
                out=tmp_path / str(len(rows)), dtype="float32", window_tokens=2048,
            )
        )  # fmt: skip
        [found[len(rows)]] = result.scored[""]
    assert found[2].on_host.own is None and found[3].on_host.own is not None
    for row in ("expert", "reference"):
        ours, theirs = found[3].small[row], found[2].small[row]
        assert ours.scored_bytes == theirs.scored_bytes
        assert ours.nll_nats == pytest.approx(theirs.nll_nats, rel=1e-5)
    assert found[2].small["expert"].nll_nats < 0.9 * found[2].small["reference"].nll_nats
