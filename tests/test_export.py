"""Exports of a real tiny adapter, loaded by the engines' own code and compared with ours."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from gguf import MODEL_ARCH_NAMES, GGUFReader
from peft import PeftModel
from test_fit import DOMAIN, fitted, recorded, tuned, write_texts
from test_gguf import write_gguf
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from trimtab.backends.hf import HFModel
from trimtab.backends.open import open_model
from trimtab.carriers.head import MountedHead
from trimtab.config import ExportConfig, MountConfig
from trimtab.errors import ModelError
from trimtab.export import ExportResult, export
from trimtab.exporting.linear import LORA_RANKS, shift_of
from trimtab.exporting.llamacpp import _ARCHITECTURES, read_lora
from trimtab.exporting.peft import read_peft
from trimtab.mount import mount

HOSTS = [
    "tiny:llama?vocab=bpe&tied=1",
    "tiny:llama?vocab=bpe&tied=0",
    "tiny:qwen3?hidden=32&tied=1",
    "tiny:qwen3?hidden=32&tied=0",
    "tiny:gemma3",
    "tiny:gpt2?vocab=bpe",
    "tiny:t5",
]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recording = recorded(tuned(write_texts(tmp_path_factory.mktemp("texts")), "full"))
    options = {"learning_rate": 5e-2, "epochs": 20, "general_weight": 0.1}
    return fitted(recording, recording.parent / "adapter", **options).folder


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "home"))


@dataclass(frozen=True)
class Exported:
    """An export, its host, and the logits that it should give for some tokens."""

    result: ExportResult
    host: HFModel
    token_ids: Tensor
    logits: Tensor


def mounted_head(adapter: Path, host: HFModel) -> MountedHead:
    mounted = mount(MountConfig(adapter=adapter, host=host.ref, carriers=("head",)), host=host)
    assert mounted.head
    return mounted.head


def exported(adapter: Path, ref: str, out: Path, **options: object) -> Exported:
    host = open_model(ref, dtype="float32")
    told = {"adapter": adapter, "host": ref, "out": out, "dtype": "float32", **options}
    config = ExportConfig.model_validate(told)
    result = export(config, host=host)
    token_ids = torch.tensor([host.context_ids() + host.encode(DOMAIN)])
    shift = config.strength * mounted_head(adapter, host).shift(host.hidden(token_ids))
    return Exported(result, host, token_ids, host.logits(token_ids) + shift)


def nats(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference of a log-probability."""
    return float((ours.log_softmax(-1) - theirs.log_softmax(-1)).abs().max())


def with_peft(made: Exported) -> Tensor:
    """Logits of a fresh copy of the host under peft."""
    fresh = open_model(made.host.ref, dtype="float32")
    with warnings.catch_warnings():
        # peft says that tied heads and biases cannot be merged in place, and uses an old name.
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(fresh.model, str(made.result.folder)).eval()
    given = {"input_ids": made.token_ids}
    if fresh.is_encoder_decoder:
        given = {
            "input_ids": torch.tensor([[fresh.vocabulary.eos_id]]),
            "decoder_input_ids": made.token_ids,
        }
    with torch.no_grad():
        return model(**given).logits


@pytest.mark.parametrize("ref", HOSTS)
def test_peft_itself_gives_our_logits(ref: str, adapter: Path, tmp_path: Path) -> None:
    made = exported(adapter, ref, tmp_path / "out", to="peft", lora_bias=True)
    torch.testing.assert_close(with_peft(made), made.logits, atol=5e-5, rtol=1e-5)
    assert made.result.measured.export.max_logprob_nats < 1e-4
    assert made.result.measured.head.mean_kl_nats > 1e-3


@pytest.mark.parametrize("ref", HOSTS)
def test_without_a_bias_peft_gives_what_the_export_says(
    ref: str, adapter: Path, tmp_path: Path
) -> None:
    made = exported(adapter, ref, tmp_path / "out", to="peft", strength=0.5)
    theirs = with_peft(made)
    lora, bias = read_peft(tmp_path / "out", made.host)
    assert bias is None and lora.rank in LORA_RANKS and lora.lora_a[5:].count_nonzero() == 0
    # The offset, which is constant, is carried by a feature of the state that nearly is.
    mounted = mounted_head(adapter, made.host)
    shift = shift_of(mounted, 0.5)
    hidden = made.host.hidden(made.token_ids)
    carried = (hidden @ lora.lora_a[4])[..., None] * shift.offset
    expected = made.logits - shift.offset + carried
    torch.testing.assert_close(theirs, expected, atol=5e-5, rtol=1e-5)
    measured = made.result.measured
    assert measured.export.mean_kl_nats < 0.5 * measured.offset.mean_kl_nats
    (note, *_) = made.result.record.notes
    assert f"mean KL of {measured.export.mean_kl_nats:.2g} nats" in note


def tiny_file(path: Path, tied: int) -> Path:
    """A tiny Llama as a GGUF file."""
    write_gguf(path, open_model(f"tiny:llama?vocab=bpe&tied={tied}", dtype="float32"))
    return path


@pytest.mark.parametrize("tied", [0, 1])
def test_a_gguf_adapter_reads_back_as_the_shift(tied: int, adapter: Path, tmp_path: Path) -> None:
    path = tiny_file(tmp_path / "tiny.gguf", tied)
    made = exported(adapter, str(path), tmp_path / "out", to="gguf")
    fields = GGUFReader(str(tmp_path / "out" / "head.gguf")).fields
    told = {name: fields[name].contents() for name in fields if not name.startswith("GGUF.")}
    assert told.pop("general.name").startswith("trimtab head on")
    assert told == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 5.0,
    }
    lora = read_lora(tmp_path / "out" / "head.gguf")
    assert lora.lora_a.shape == (5, 64) and lora.lora_b.shape == (512, 5)
    shift = shift_of(mounted_head(adapter, made.host), 1.0)
    hidden = made.host.hidden(made.token_ids)
    added = hidden @ lora.lora_a.T @ lora.lora_b.T
    carried = (hidden @ lora.lora_a[4])[..., None] * shift.offset
    torch.testing.assert_close(added, shift(hidden) - shift.offset + carried, atol=5e-5, rtol=1e-5)
    assert (tmp_path / "out" / "host-untied.gguf").exists() is bool(tied)


def test_the_untied_copy_of_a_gguf_host_is_the_host(adapter: Path, tmp_path: Path) -> None:
    path = tiny_file(tmp_path / "tiny.gguf", 1)
    made = exported(adapter, str(path), tmp_path / "out", to="gguf")
    copy = tmp_path / "out" / "host-untied.gguf"
    old, new = (GGUFReader(str(file)) for file in (path, copy))
    assert [t.name for t in new.tensors] == [*(t.name for t in old.tensors), "output.weight"]
    for name in set(old.fields) - {"GGUF.tensor_count"}:
        assert new.fields[name].contents() == old.fields[name].contents(), name
    opened = open_model(str(copy), dtype="float32")
    head, embedding = opened.model.get_output_embeddings(), opened.model.get_input_embeddings()
    assert head.weight is not embedding.weight
    assert torch.equal(opened.logits(made.token_ids), made.host.logits(made.token_ids))
    assert "Use host-untied.gguf in it, not tiny.gguf" in (tmp_path / "out/README.md").read_text()


def test_gguf_without_an_output_matrix_or_a_known_family_is_refused(
    adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="shares its head with its embedding") as tied:
        exported(adapter, "tiny:qwen3?tied=1", tmp_path / "out", to="gguf")
    assert "convert_hf_to_gguf.py" in tied.value.hint
    with pytest.raises(ModelError, match="encoder-decoder"):
        exported(adapter, "tiny:t5", tmp_path / "out", to="gguf")
    assert not (tmp_path / "out").exists()


def test_llama_cpps_names_of_architectures_are_those_of_its_own_list() -> None:
    assert set(_ARCHITECTURES.values()) <= set(MODEL_ARCH_NAMES.values())
    assert set(_ARCHITECTURES) <= set(CONFIG_MAPPING)
