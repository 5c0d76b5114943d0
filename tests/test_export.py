"""Exports of a real tiny adapter, loaded by the engines' own code and compared with ours."""

import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gguf import MODEL_ARCH_NAMES, GGUFReader
from peft import PeftModel
from saving import saved
from test_fit import DOMAIN, fitted, recorded, tuned, write_texts
from test_gguf import write_gguf
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Cohere2MoeConfig,
    CohereConfig,
    PhiConfig,
    PhimoeConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from trimtab.backends.hf import HFModel, adopt_model
from trimtab.backends.open import open_model
from trimtab.backends.tiny import parse_tiny, tiny_tokenizer
from trimtab.blend import mixture_logprobs
from trimtab.carriers.head import MountedHead
from trimtab.cli import main
from trimtab.config import ExportConfig, MountConfig
from trimtab.errors import AdapterError, InputError, MissingDependencyError, ModelError
from trimtab.export import ExportResult, export
from trimtab.exporting.fidelity import compare
from trimtab.exporting.linear import LORA_RANKS, Lora, constant_reading, shift_of
from trimtab.exporting.llamacpp import _ARCHITECTURES, read_lora, reads_output
from trimtab.exporting.peft import read_peft
from trimtab.exporting.readme import ExportRecord
from trimtab.mount import mount
from trimtab.store.files import sha256_file
from trimtab.types import Advance

HOSTS = [
    "tiny:llama?vocab=bpe&tied=1",
    "tiny:llama?vocab=bpe&tied=0",
    "tiny:qwen3?hidden=32&tied=1",
    "tiny:qwen3?hidden=32&tied=0",
    "tiny:gemma3",
    "tiny:gpt2?vocab=bpe",
    "tiny:t5",
]


TINY_SIZES: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "bos_token_id": 256, "eos_token_id": 257,
    "pad_token_id": 258,
}  # fmt: skip


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


def exported(adapter: Path, host: HFModel | str, out: Path, **options: object) -> Exported:
    host = open_model(host, dtype="float32") if isinstance(host, str) else host
    ref = host.ref
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
    return outputs(made, model).logits


def outputs(made: Exported, model: Any) -> Any:
    """What a model of transformers or of peft says to an export's tokens."""
    given = {"input_ids": made.token_ids}
    if made.host.is_encoder_decoder:
        given = {
            "input_ids": torch.tensor([[made.host.vocabulary.eos_id]]),
            "decoder_input_ids": made.token_ids,
        }
    with torch.no_grad():
        return model(**given, output_hidden_states=True)


def test_an_encoder_decoder_is_opened_by_the_readmes_own_lines(
    adapter: Path, tmp_path: Path
) -> None:
    ref = str(saved("tiny:t5", tmp_path / "t5"))
    made = exported(adapter, ref, tmp_path / "out", to="peft")
    readme = (tmp_path / "out" / "README.md").read_text()
    (lines,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(lines.replace("FOLDER", str(tmp_path / "out")), names)
    theirs = outputs(made, names["model"].eval()).logits
    torch.testing.assert_close(theirs, with_peft(made), atol=5e-5, rtol=1e-5)
    assert "sglang" not in readme.lower() and "vllm serve" not in readme
    (said,) = [note for note in made.result.record.notes if "vLLM" in note]
    assert "serves no encoder-decoder" in said and "with peft" in said
    assert "merged" not in said and "trimtab serve" not in said


@pytest.mark.parametrize("ref", [HOSTS[0], "tiny:gpt2?vocab=bpe", "tiny:t5"])
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


def saved_gpt2(folder: Path) -> str:
    """A tiny GPT-2 whose last LayerNorm has a bias, as trained ones have."""
    host = open_model("tiny:gpt2?vocab=bpe", dtype="float32")
    norm = host.model.transformer.ln_f
    generator = torch.Generator().manual_seed(0)
    norm.bias.data.normal_(0.2, 0.2, generator=generator)
    norm.weight.data.normal_(1.0, 0.1, generator=generator)
    host.model.save_pretrained(folder)
    host.tokenizer.save_pretrained(folder)
    return str(folder)


def test_behind_a_layer_norm_with_a_bias_the_constant_part_is_kept(
    adapter: Path, tmp_path: Path
) -> None:
    made = exported(adapter, saved_gpt2(tmp_path / "gpt2"), tmp_path / "out", to="peft")
    assert nats(made.logits, with_peft(made)) < 0.02 * nats(
        made.logits, made.host.logits(made.token_ids)
    )
    measured = made.result.measured
    assert measured.export.mean_kl_nats < 1e-3 * measured.offset.mean_kl_nats


def loaded(made: Exported) -> Tensor:
    """Logits of a merged checkpoint in plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(made.result.folder, dtype=torch.float32).eval()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is not embedding.weight and not model.config.tie_word_embeddings
    with torch.no_grad():
        return model(made.token_ids).logits


@pytest.mark.parametrize("ref", [HOSTS[0], HOSTS[3], "tiny:gemma3", "tiny:gpt2?vocab=bpe"])
def test_a_merged_checkpoint_in_plain_transformers(ref: str, adapter: Path, tmp_path: Path) -> None:
    made = exported(adapter, ref, tmp_path / "out", to="merged")
    before, tied = open_model(ref, dtype="float32"), made.host.model.config.tie_word_embeddings
    # The live host is as it was.
    assert tied == before.model.config.tie_word_embeddings
    assert torch.equal(made.host.unembedding.weight, before.unembedding.weight)
    assert made.host.model.get_output_embeddings().weight is made.host.unembedding.weight
    lora = exported(adapter, ref, tmp_path / "peft", to="peft")
    torch.testing.assert_close(loaded(made), with_peft(lora), atol=5e-5, rtol=1e-5)
    ours, theirs = made.result.measured.export, lora.result.measured.export
    assert ours.mean_kl_nats == pytest.approx(theirs.mean_kl_nats, rel=0.01, abs=1e-9)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_a_host_with_a_bias_of_its_own_is_merged_exactly(adapter: Path, tmp_path: Path) -> None:
    config = PhiConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, bos_token_id=256, eos_token_id=257, pad_token_id=258,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.lm_head.bias.data.normal_()
    model.save_pretrained(tmp_path / "phi")
    tiny_tokenizer(parse_tiny("tiny:llama?vocab=bpe")).save_pretrained(tmp_path / "phi")
    made = exported(adapter, str(tmp_path / "phi"), tmp_path / "out", to="merged")
    torch.testing.assert_close(loaded(made), made.logits, atol=5e-5, rtol=1e-5)
    assert made.result.record.notes == ()
    torch.testing.assert_close(made.host.model.lm_head.bias, model.lm_head.bias)


def test_an_onnx_graph_takes_what_the_readme_calls_the_state_of_a_scaled_t5(
    adapter: Path, tmp_path: Path
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'trimtab[onnx]'")
    made = exported(adapter, "tiny:t5", tmp_path / "out", to="onnx")
    assert made.host.model.config.scale_decoder_outputs and made.host.unembedding.scale == 0.125
    said = outputs(made, made.host.model)
    hidden = said.decoder_hidden_states[-1][0]
    graph = onnxruntime.InferenceSession(tmp_path / "out" / "head.onnx")
    given = {"hidden": hidden, "logits": said.logits[0], "trust": torch.ones(len(hidden))}
    found = graph.run(["steered_logits"], {name: of.numpy() for name, of in given.items()})[0]
    torch.testing.assert_close(torch.from_numpy(found), made.logits[0], atol=5e-5, rtol=1e-5)
    assert float((made.logits - said.logits).abs().max()) > 0.1
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "its decoder's last hidden state" in readme and "input of its head" not in readme


@pytest.mark.parametrize("ref", ["tiny:qwen3?hidden=32", "tiny:gemma2?hidden=32"])
def test_an_onnx_graph_steers_and_mixes(ref: str, adapter: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'trimtab[onnx]'")
    made = exported(adapter, ref, tmp_path / "out", to="onnx", strength=1.5)
    graph = onnxruntime.InferenceSession(tmp_path / "out" / "head.onnx")
    host = made.host.logits(made.token_ids)[0]
    hidden = made.host.hidden(made.token_ids)[0]
    host[:, 5] = -torch.inf
    for trust in (0.0, 0.3, 1.0):
        weights = torch.full((len(host),), trust)
        given = {"hidden": hidden, "logits": host, "trust": weights}
        steered, mixed = (
            torch.from_numpy(found)
            for found in graph.run(
                ["steered_logits", "logprobs"], {k: v.numpy() for k, v in given.items()}
            )
        )
        ours = made.logits[0].clone()
        ours[:, 5] = -torch.inf
        torch.testing.assert_close(steered, ours, atol=5e-5, rtol=1e-5)
        shares = torch.stack([1 - weights, weights])[..., None]
        expected = mixture_logprobs(torch.stack([host, ours]).log_softmax(-1), shares)
        torch.testing.assert_close(mixed, expected, atol=5e-5, rtol=1e-5)
    (plain,) = graph.run(
        ["steered_logits"],
        {k: v.numpy() for k, v in given.items()} | {"strength": torch.tensor(0.0).numpy()},
    )
    torch.testing.assert_close(torch.from_numpy(plain), host)
    assert made.result.measured.export.max_logprob_nats < 1e-4


class OtherHead(nn.Module):
    """A head that is no linear module, as a quantiser's may be."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden @ self.weight.T


def test_of_a_head_that_no_lora_can_name_onnx_is_what_is_offered(
    adapter: Path, tmp_path: Path
) -> None:
    pytest.importorskip("onnx", reason="pip install 'trimtab[onnx]'")
    host = open_model("tiny:llama?vocab=bpe", dtype="float32")
    host.model.lm_head = OtherHead(host.model.lm_head.weight)
    host = adopt_model(host.ref, host.model, host.tokenizer)
    for kind in ("peft", "merged"):
        with pytest.raises(ModelError, match="no linear module of its own") as refused:
            exported(adapter, host, tmp_path / kind, to=kind)
        assert refused.value.hint == "use --to onnx"
    made = exported(adapter, host, tmp_path / "onnx", to="onnx")
    assert made.result.measured.export.max_logprob_nats < 1e-4
    assert made.result.measured.head.mean_kl_nats > 1e-3


def test_without_onnx_the_user_is_told(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingDependencyError, match="needs the package onnx") as missing:
        exported(adapter, "tiny:qwen3", tmp_path / "out", to="onnx")
    assert "trimtab[onnx]" in missing.value.hint
    assert list(tmp_path.glob("out*")) == [] and list(tmp_path.glob(".out*")) == []


@pytest.mark.parametrize("kind", ["peft", "gguf", "merged"])
def test_logits_that_are_capped_after_the_head_are_refused(
    kind: str, adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="caps its logits at 30 after its head") as refused:
        exported(adapter, "tiny:gemma2?hidden=32", tmp_path / "out", to=kind)
    assert "--to onnx" in refused.value.hint and not (tmp_path / "out").exists()


def test_what_vllm_refuses_is_said(adapter: Path, tmp_path: Path) -> None:
    refused = {"tiny:gemma3": "gemma3_text", "tiny:gpt2?vocab=bpe": "gpt2"}
    for ref, family in refused.items():
        made = exported(adapter, ref, tmp_path / family, to="peft").result
        (said,) = [note for note in made.record.notes if note.startswith("vLLM")]
        assert f"takes no LoRA on the head of {family} models" in said and "--to merged" in said
        assert f"note: {said}" in made.summary()
        readme = (tmp_path / family / "README.md").read_text()
        assert "vllm serve" not in readme and "sglang" in readme
    phimoe = saved_model(PhimoeConfig(**TINY_SIZES, num_local_experts=2), tmp_path / "phimoe")
    for name, ref in (("HOST", HOSTS[0]), (phimoe, phimoe)):
        made = exported(adapter, ref, tmp_path / "taken" / Path(name).name, to="peft").result
        assert not any("vLLM" in note for note in made.record.notes)
        assert f"vllm serve {name} --enable-lora" in (made.folder / "README.md").read_text()


def test_where_llama_cpp_drops_the_head_of_a_merged_checkpoint_it_is_said(
    adapter: Path, tmp_path: Path
) -> None:
    gemma = exported(adapter, "tiny:gemma3", tmp_path / "gemma", to="merged").result
    assert any("llama.cpp's converter drops" in note for note in gemma.record.notes)
    readme = (tmp_path / "gemma" / "README.md").read_text()
    assert "vllm serve FOLDER" in readme and "convert_hf_to_gguf" not in readme


@pytest.mark.parametrize(
    "config",
    [
        CohereConfig(**TINY_SIZES, tie_word_embeddings=False),
        Cohere2MoeConfig(**TINY_SIZES, num_experts=2, tie_word_embeddings=False),
    ],
    ids=["cohere", "cohere2_moe"],
)
def test_where_vllm_drops_it_without_a_word_it_is_said(
    config: Any, adapter: Path, tmp_path: Path
) -> None:
    ref = saved_model(config, tmp_path / "host")
    cohere = exported(adapter, ref, tmp_path / "cohere", to="merged")
    assert any("drops it without a word" in note for note in cohere.result.record.notes)
    readme = (tmp_path / "cohere" / "README.md").read_text()
    assert "vllm serve" not in readme and "convert_hf_to_gguf" not in readme
    lora = exported(adapter, ref, tmp_path / "peft", to="peft")
    torch.testing.assert_close(loaded(cohere), with_peft(lora), atol=5e-5, rtol=1e-5)


def test_the_folder_says_what_it_is_and_is_never_replaced(adapter: Path, tmp_path: Path) -> None:
    ref = "tiny:qwen3?hidden=32"
    made = exported(adapter, ref, tmp_path / "out", to="peft", strength=0.5)
    record = ExportRecord.model_validate_json((tmp_path / "out/export.json").read_text())
    assert record == made.result.record
    assert record.adapter_sha256 == sha256_file(adapter / "manifest.json")
    assert record.head_sha256 == sha256_file(adapter / "head.safetensors")
    assert set(record.files) == {"adapter_config.json", "adapter_model.safetensors"}
    readme = (tmp_path / "out/README.md").read_text()
    for part in (
        record.adapter_sha256, record.head_sha256, record.host_unembedding_sha256, ref,
        "strength: `0.5`", f"--max-lora-rank {LORA_RANKS[1]}", "evidence weights", "its own terms",
        f"{record.fidelity['mean_kl_nats']:.3g}", "the memory and its gate", "Terms",
    ):  # fmt: skip
        assert part in readme, part
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(InputError, match="overwrites nothing"):
        exported(adapter, ref, tmp_path / "out", to="peft")
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="overwrites nothing"):
        exported(adapter, ref, tmp_path / "file", to="peft")


def test_of_two_exports_into_one_folder_one_is_refused_and_the_other_is_whole(
    adapter: Path, tmp_path: Path
) -> None:
    ref, out, refused = "tiny:qwen3?hidden=32", tmp_path / "out", list[str]()

    @contextmanager
    def while_writing(label: str, total: int) -> Iterator[Advance]:
        del total
        if label.startswith("writing"):
            with pytest.raises(InputError, match="another run is writing") as error:
                exported(adapter, ref, out, to="onnx")
            refused.append(error.value.hint)
        yield lambda _: None

    told = {"adapter": adapter, "host": ref, "out": out, "to": "peft", "dtype": "float32"}
    export(ExportConfig.model_validate(told), progress=while_writing)
    assert len(refused) == 1 and "choose another" in refused[0]
    assert {path.name for path in out.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "export.json",
    }  # fmt: skip


def test_an_adapter_without_a_head_has_nothing_to_export(adapter: Path, tmp_path: Path) -> None:
    recording = adapter.parent / "full-exact"
    memory = fitted(recording, tmp_path / "memory", carriers=("memory",)).folder
    with pytest.raises(AdapterError, match="carries memory, and only a head can be exported"):
        exported(memory, "tiny:qwen3", tmp_path / "out", to="peft")


def test_the_command_exports_and_says_how_exact(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", str(adapter), "tiny:qwen3?hidden=32", "--to", "peft", "--dtype", "float32"]
    with pytest.raises(SystemExit) as end:
        main([*words, "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert end.value.code == 0 and "against the mounted head: mean KL" in said
    assert (
        "note: the head shifts some logits by the same amount everywhere" in said
        and "left out: the memory" in said
    )
    with pytest.raises(SystemExit) as end:
        main([*words[:4], "onnx", "--lora-bias", "--out", str(tmp_path / "other")])
    assert end.value.code == 2 and "it needs to peft" in capsys.readouterr().err


def test_a_constant_reading_is_exact_where_one_exists_and_never_worse_than_none() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(300, 12, generator=generator)
    half = torch.arange(300) % 2
    free = constant_reading(states, half)
    assert free.rms_error == pytest.approx(1.0, abs=0.1)
    gain = torch.rand(12, generator=generator) + 0.5
    normed = (states - states.mean(-1, keepdim=True)) / states.std(-1, keepdim=True)
    bias = torch.rand(12, generator=generator)
    reading = constant_reading(normed * gain + bias, half)
    assert reading.rms_error < 0.02
    values = (normed * gain + bias) @ reading.row
    torch.testing.assert_close(values, torch.ones(300), atol=0.02, rtol=0)
    assert constant_reading(states[:1], half[:1]).row.isfinite().all()


def test_padding_changes_no_matrix() -> None:
    lora = Lora(torch.randn(9, 4), torch.randn(7, 9))
    padded = lora.padded()
    assert padded.rank == 16 and Lora(torch.randn(600, 2), torch.randn(3, 600)).padded().rank == 600
    torch.testing.assert_close(padded.lora_b @ padded.lora_a, lora.lora_b @ lora.lora_a)


def test_a_comparison_of_logits_against_its_definition() -> None:
    one, two = torch.randn(20, 9).double(), torch.randn(20, 9).double()
    found = compare(lambda h: one[h[:, 0].long()], lambda h: two[h[:, 0].long()],
                    torch.arange(20.0)[:, None])  # fmt: skip
    kl = F.kl_div(two.log_softmax(-1), one.softmax(-1), reduction="none").sum(-1)
    assert found.mean_kl_nats == pytest.approx(float(kl.mean()), rel=1e-5)
    assert found.max_kl_nats == pytest.approx(float(kl.max()), rel=1e-5)
    assert found.max_logprob_nats == pytest.approx(nats(one, two), rel=1e-5)
    assert found.same_top_share == float((one.argmax(-1) == two.argmax(-1)).double().mean())


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
    for kind, ref in (("gguf", "tiny:t5"), ("merged", "tiny:marian")):
        with pytest.raises(ModelError, match=f"encoder-decoder, which --to {kind} does not write"):
            exported(adapter, ref, tmp_path / "out", to=kind)
    assert not (tmp_path / "out").exists()


def saved_model(config: Any, folder: Path) -> str:
    """A tiny random model of a family that `tiny:` has not, with a byte tokenizer."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer(parse_tiny("tiny:llama?vocab=bpe")).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("kind", "arch"), [(CohereConfig, "command-r"), (Cohere2Config, "cohere2")]
)
def test_where_llama_cpp_takes_the_head_from_the_embedding_gguf_is_refused(
    kind: Any, arch: str, tied: bool, adapter: Path, tmp_path: Path
) -> None:
    ref = saved_model(kind(**TINY_SIZES, tie_word_embeddings=tied), tmp_path / "host")
    with pytest.raises(ModelError, match=f"from its embedding, as of every {arch} model") as said:
        exported(adapter, ref, tmp_path / "out", to="gguf")
    assert "--to peft or --to merged" in said.value.hint and not (tmp_path / "out").exists()
    made = exported(adapter, ref, tmp_path / "out", to="peft")
    assert made.host.unembedding.scale == 0.0625
    measured = made.result.measured.export.max_logprob_nats
    assert nats(with_peft(made), made.logits) < 2 * measured + 1e-4


def test_which_of_llama_cpps_architectures_have_an_output_matrix() -> None:
    without = {arch for arch in _ARCHITECTURES.values() if not reads_output(arch)}
    assert without == {"command-r", "cohere2", "gemma", "gemma2"}
    assert reads_output("of-a-later-llama.cpp")


def test_llama_cpps_names_of_architectures_are_those_of_its_own_list() -> None:
    assert set(_ARCHITECTURES.values()) <= set(MODEL_ARCH_NAMES.values())
    assert set(_ARCHITECTURES) <= set(CONFIG_MAPPING)
