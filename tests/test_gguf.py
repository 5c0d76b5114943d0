"""GGUF files: unpacked once, the same model afterwards; broken ones are refused."""

import json
import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from trimtab.backends.gguf import (
    UNEMBEDDING_NAME,
    PlainReader,
    converted_folder,
    described_folder,
)
from trimtab.backends.open import open_model
from trimtab.backends.tiny import parse_tiny, tiny_tokenizer
from trimtab.errors import ModelError
from trimtab.types import silent

_MODELS = Path(os.environ.get("TRIMTAB_TEST_MODELS", "build/models"))
_TINY = "tiny:llama?vocab=bpe&tied={tied}"
_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _gguf_name(name):
    fixed = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in fixed:
        return fixed[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_NAMES[rest.removesuffix('.weight')]}.weight"


def _rotary_order(weight, heads):
    """Rows of a query or key projection as llama.cpp interleaves them."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, model):
    """Write a tiny Llama as GGUF, independently of any converter."""
    config = model.model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    _write_tokenizer(writer)
    for name, weight in model.model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = weight.numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            values = _rotary_order(values, config.num_attention_heads)
        writer.add_tensor(_gguf_name(name), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_tokenizer(writer):
    backend = tiny_tokenizer(parse_tiny("tiny:llama?vocab=bpe")).backend_tokenizer
    described = json.loads(backend.to_str())["model"]
    tokens = sorted(described["vocab"], key=described["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in ("<bos>", "<eos>", "<pad>") else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in described["merges"]])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_pad_token_id(258)
    writer.add_add_bos_token(False)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.parametrize("tied", [0, 1])
def test_a_gguf_file_is_the_model_that_was_written(tmp_path, home, tied, capfd):
    made = open_model(_TINY.format(tied=tied), dtype="float32")
    write_gguf(tmp_path / "tiny.gguf", made)
    opened = open_model(str(tmp_path / "tiny.gguf"), dtype="float32")
    ids = torch.tensor([made.encode("pub fn add(a: i32, b: i32) <eos>")])
    torch.testing.assert_close(opened.logits(ids), made.logits(ids), rtol=1e-5, atol=1e-6)
    assert opened.vocabulary.token_bytes == made.vocabulary.token_bytes
    assert opened.fingerprint.unembedding_sha256 == made.fingerprint.unembedding_sha256
    assert opened.encode("return the values <eos>") == made.encode("return the values <eos>")
    assert opened.context_ids() == []
    head = opened.model.get_output_embeddings().weight
    assert (head is opened.model.get_input_embeddings().weight) is bool(tied)
    assert capfd.readouterr() == ("", "")
    assert len(list((home / "models").iterdir())) == 1


@pytest.mark.parametrize("order", [gguf.GGUFEndian.LITTLE, gguf.GGUFEndian.BIG])
def test_a_header_that_is_cut_at_once_is_gguf_s_own(tmp_path, order):
    writer = gguf.GGUFWriter(tmp_path / "lists.gguf", "llama", endianess=order)
    lists = [["", "ä", "three"], [0.5, -1.0], [True, False], [7], [-(2**30), 5]]
    for number, items in enumerate(lists):
        writer.add_array(f"list.{number}", items)
    writer.add_string("name", "many")
    writer.add_uint32("count", len(lists))
    _write_tokenizer(writer)
    writer.add_tensor("weight", np.arange(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, own = (reader(tmp_path / "lists.gguf") for reader in (PlainReader, gguf.GGUFReader))
    assert list(ours.fields) == list(own.fields)
    for name, field in own.fields.items():
        found = ours.fields[name]
        assert (found.offset, found.data, found.types) == (field.offset, field.data, field.types)
        assert [part.dtype for part in found.parts] == [part.dtype for part in field.parts]
        assert [part.tolist() for part in found.parts] == [part.tolist() for part in field.parts]
    assert [
        items for n, items in enumerate(lists) if ours.fields[f"list.{n}"].contents() != items
    ] == []
    np.testing.assert_array_equal(ours.tensors[0].data, own.tensors[0].data)


def test_a_second_opening_reads_what_the_first_unpacked(tmp_path, home):
    made = open_model(_TINY.format(tied=1), dtype="float32")
    path = tmp_path / "tiny.gguf"
    write_gguf(path, made)
    folder = converted_folder(path, silent)
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    path.rename(tmp_path / "renamed.gguf")
    assert converted_folder(tmp_path / "renamed.gguf", silent) == folder
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def test_spaces_before_a_digit_are_split_as_smollm_was_trained(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", open_model(_TINY.format(tied=1), dtype="float32"))
    opened = open_model(str(tmp_path / "tiny.gguf"), dtype="float32")
    spelled = [opened.vocabulary.token_bytes[i] for i in opened.encode("  32")]
    assert spelled == [b"  ", b"3", b"2"]


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04 not a model")
    with pytest.raises(ModelError, match="not a GGUF file: it begins with b'PK"):
        open_model(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("kept", [0.0005, 0.2, 0.9])
def test_a_cut_file_is_refused_and_leaves_nothing(tmp_path, home, kept):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, open_model(_TINY.format(tied=1), dtype="float32"))
    path.write_bytes(path.read_bytes()[: max(8, int(path.stat().st_size * kept))])
    with pytest.raises(ModelError, match="cannot be read"):
        open_model(str(path))
    assert not list((home / "models").iterdir())


def test_an_unknown_architecture_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "frigate.gguf", "frigate")
    writer.add_name("frigate")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"cannot be read.*frigate"):
        open_model(str(tmp_path / "frigate.gguf"))


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "gemma-3-270m"])
def test_real_files_reopen_tied_and_know_what_they_should(name, monkeypatch):
    path = _MODELS / name / "model.gguf"
    if not path.is_file():
        pytest.skip(f"no {path}: set TRIMTAB_TEST_MODELS to the folder of fetched models")
    monkeypatch.undo()
    model = open_model(str(path))
    assert model.unembedding.weight is model.model.get_input_embeddings().weight
    ids = torch.tensor([[*model.context_ids(), *model.encode("The capital of France is")]])
    best = int(model.logits(ids)[0, -1].topk(3).indices[0])
    assert model.vocabulary.token_bytes[best] in (b" Paris", b" the")


@pytest.mark.parametrize("tied", [0, 1])
def test_a_described_file_is_the_whole_one_without_its_body(tmp_path, tied):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, open_model(_TINY.format(tied=tied), dtype="float32"))
    whole, described = converted_folder(path, silent), described_folder(path, silent)
    opened = open_model(str(whole), dtype="float32")
    assert torch.equal(
        load_file(described / UNEMBEDDING_NAME)["weight"], opened.unembedding.weight.data
    )
    ours, theirs = (AutoConfig.from_pretrained(folder).to_dict() for folder in (described, whole))
    apart = ("_name_or_path", "architectures", "dtype", "transformers_version")
    assert {k: v for k, v in ours.items() if k not in apart} == {
        k: v for k, v in theirs.items() if k not in apart
    }
    name = "tokenizer.json"
    assert (described / name).read_bytes() == (whole / name).read_bytes()
    assert described_folder(path, silent) == described
    (tmp_path / "model.gguf").write_bytes(b"PK and more")
    with pytest.raises(ModelError, match="not a GGUF file"):
        described_folder(tmp_path / "model.gguf", silent)
