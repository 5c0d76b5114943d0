"""Exports of a real tiny adapter, loaded by the engines' own code and compared with ours."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from test_fit import DOMAIN, fitted, recorded, tuned, write_texts
from torch import Tensor

from trimtab.backends.hf import HFModel
from trimtab.backends.open import open_model
from trimtab.carriers.head import MountedHead
from trimtab.config import ExportConfig, MountConfig
from trimtab.export import ExportResult, export
from trimtab.exporting.linear import LORA_RANKS, shift_of
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
