"""The source pair: the reference stays the base bit for bit, and hostile LoRA is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from trimtab.backends.hf import HFModel, ModelFingerprint
from trimtab.backends.open import open_model
from trimtab.backends.pair import Pair, open_pair_from
from trimtab.carriers.expert import WEIGHTS_NAME, attach_lora
from trimtab.errors import AdapterError, ModelError

BASE = "tiny:qwen3"
# PEFT asks transformers for a property that transformers 5 renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
IDS = torch.arange(40, 60)[None]


@pytest.fixture(scope="module")
def base() -> HFModel:
    return open_model(BASE, dtype="float32")


@pytest.fixture(scope="module")
def shared_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    get_peft_model(open_model(BASE, dtype="float32").model, config).save_pretrained(folder)
    return folder


@pytest.fixture
def lora(shared_lora: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shared_lora, tmp_path / "lora"))


def opened(lora: Path, base: HFModel, ref: str = BASE) -> Pair:
    return open_pair_from(ref, lora, fingerprint=base.fingerprint, dtype="float32")


def test_the_reference_is_the_base_bit_for_bit(base: HFModel, lora: Path) -> None:
    pair = opened(lora, base)
    states = pair.hidden(IDS)
    oracle = base.hidden(IDS)
    assert torch.equal(states.reference, oracle)
    assert not torch.allclose(states.expert, oracle, atol=1e-3)
    assert torch.equal(pair.reference.hidden(IDS), oracle)
    assert torch.equal(pair.reference_logits(IDS), base.logits(IDS))
    with pytest.raises(KeyboardInterrupt), pair.as_expert():
        raise KeyboardInterrupt
    assert torch.equal(pair.reference.hidden(IDS), oracle)
    assert pair.reference.fingerprint == base.fingerprint
    assert pair.expert_unembedding is pair.reference_unembedding


@pytest.mark.parametrize("merged", [True, False])
def test_the_expert_is_what_peft_makes_of_it(
    base: HFModel, lora: Path, merged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not merged:
        monkeypatch.setattr("trimtab.carriers.expert.MERGED_BYTES", 0)
    oracle = PeftModel.from_pretrained(open_model(BASE, dtype="float32").model, str(lora))
    with torch.inference_mode():
        beside = oracle(IDS).logits
        # PEFT's own way to add a LoRA to the weights.
        logits = oracle.merge_and_unload()(IDS).logits if merged else beside
    pair = opened(lora, base)
    assert torch.equal(pair.expert_logits(IDS), logits)
    with pair.as_expert() as expert:
        assert torch.equal(expert.logits(IDS), logits)
        found = expert.unembedding.logits(expert.hidden(IDS))
    torch.testing.assert_close(found, logits)
    torch.testing.assert_close(logits, beside)


def test_a_lora_goes_to_where_its_base_is(
    base: HFModel, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What PEFT finds on a machine with a GPU.
    monkeypatch.setattr("peft.peft_model.infer_device", lambda: "cuda")
    pair = opened(lora, base)
    assert {weight.device.type for weight in pair.reference.model.parameters()} == {"cpu"}


def test_another_base_is_refused(base: HFModel, lora: Path) -> None:
    with pytest.raises(ModelError, match="the unembedding of tiny:qwen3"):
        opened(lora, base, ref="tiny:qwen3?seed=5")
    with pytest.raises(ModelError, match="the vocabulary of tiny:qwen3"):
        opened(lora, base, ref="tiny:qwen3?vocab=bpe")
    wrong = ModelFingerprint(base.vocabulary.sha256, "0" * 64)
    with pytest.raises(ModelError, match="expected 000000000000"):
        open_pair_from(BASE, lora, fingerprint=wrong)


def test_two_models_need_one_vocabulary(base: HFModel) -> None:
    with pytest.raises(ModelError, match="different vocabularies"):
        Pair(base, open_model("tiny:qwen3?vocab=bpe"))


def settings(lora: Path, **change: object) -> None:
    path = lora / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def without_weight(lora: Path) -> None:
    weights = load_file(lora / WEIGHTS_NAME)
    weights.pop(next(iter(weights)))
    save_file(weights, lora / WEIGHTS_NAME)


def with_other_weight(lora: Path) -> None:
    weights = load_file(lora / WEIGHTS_NAME)
    save_file(weights | {"base_model.model.other": torch.zeros(1)}, lora / WEIGHTS_NAME)


def pickled(lora: Path) -> None:
    torch.save(load_file(lora / WEIGHTS_NAME), lora / "adapter_model.bin")
    (lora / WEIGHTS_NAME).unlink()


def cut_off(lora: Path) -> None:
    (lora / WEIGHTS_NAME).write_bytes((lora / WEIGHTS_NAME).read_bytes()[:-8])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lora: settings(lora, peft_type="IA3"), "'IA3', expected 'LORA'"),
        (lambda lora: settings(lora, modules_to_save=["lm_head"]), "modules_to_save"),
        (
            lambda lora: settings(lora, megatron_config={}, megatron_core="antigravity"),
            "megatron_config, megatron_core",
        ),
        (lambda lora: settings(lora, use_dora=True), "use_dora"),
        (lambda lora: settings(lora, colour="red"), "colour"),
        (lambda lora: settings(lora, r="many"), "cannot be used|does not fit"),
        (lambda lora: settings(lora, r=8), "does not fit"),
        (lambda lora: settings(lora, target_modules=["nothing"]), "does not fit"),
        (lambda lora: settings(lora, target_modules=["q_proj"]), "others"),
        (lambda lora: (lora / "adapter_config.json").unlink(), "cannot read"),
        (lambda lora: (lora / "adapter_config.json").write_text("{"), "not valid JSON"),
        (without_weight, "lacks 1 weights"),
        (with_other_weight, "has 1 others"),
        (pickled, "cannot read the LoRA's weights"),
        (cut_off, "cannot read the LoRA's weights"),
    ],
)
def test_a_lora_that_cannot_be_trusted_is_refused(
    lora: Path, change: Callable[[Path], object], message: str
) -> None:
    change(lora)
    with pytest.raises(AdapterError, match=message):
        attach_lora(open_model(BASE, dtype="float32").model, lora)


@pytest.mark.parametrize("part", ["lm_head", "embed_tokens"])
def test_a_lora_on_the_head_is_refused(part: str, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", part])
    wrapped = get_peft_model(open_model("tiny:llama", dtype="float32").model, config)
    wrapped.save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(AdapterError, match="changes the embeddings or the head"):
        attach_lora(open_model("tiny:llama", dtype="float32").model, tmp_path)
