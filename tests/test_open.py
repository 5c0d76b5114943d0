"""Opening models by name: what works, and what every kind of bad name or file says."""

import json
import time
from importlib.util import find_spec

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from saving import saved
from test_gguf import write_gguf
from transformers.utils import logging as transformers_logging

from trimtab.backends.open import open_head, open_model, resolve_dtype
from trimtab.errors import MissingDependencyError, ModelError


@pytest.fixture
def folder(tmp_path):
    return saved("tiny:llama?layers=1", tmp_path / "model")


def _refused(ref, finding):
    with pytest.raises(ModelError, match=finding) as caught:
        open_model(str(ref), dtype="float32")
    assert "tiny:" in caught.value.hint or "gguf" in caught.value.hint
    return caught.value


def test_a_folder_that_is_not_there(tmp_path):
    _refused(tmp_path / "nothing", "there is no file or folder")
    _refused("./nothing", "there is no file or folder")
    _refused("nothing.gguf", "there is no file or folder")


@pytest.mark.parametrize("address", ["http://127.0.0.1:8000/v1", "localhost:8000", "ftp://x"])
def test_an_address_is_no_model_and_is_told_how_an_api_is_named(address):
    with pytest.raises(ModelError, match="is an address") as caught:
        open_model(address)
    assert "--host openai:MODEL --api-url" in caught.value.hint


def test_an_empty_name():
    _refused("", "empty")


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"weights")
    _refused(tmp_path / "model.bin", "not a GGUF file")


def test_a_folder_without_configuration(folder):
    (folder / "config.json").unlink()
    _refused(folder, "no config.json")
    (folder / "small.gguf").write_bytes(b"")
    assert "small.gguf" in _refused(folder, "no config.json").hint


def test_a_folder_with_a_broken_configuration(folder):
    (folder / "config.json").write_text("{", encoding="utf-8")
    _refused(folder, "cannot be opened")


def test_a_folder_of_an_unknown_architecture(folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "frigate", "auto_map": {"AutoConfig": "frigate.Config"}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "frigate.py").write_text("raise SystemExit('code of a model ran')", encoding="utf-8")
    _refused(folder, "cannot be opened")


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    _refused(folder, "no weights")


def test_pickled_weights_are_not_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    _refused(folder, "no weights")


def test_a_cut_file_of_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    _refused(folder, "cannot be opened")


def test_weights_of_another_model(folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    deeper = config | {"num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps(deeper), encoding="utf-8")
    _refused(folder, "lacks 9 of its weights")
    wider = config | {"hidden_size": 128}
    (folder / "config.json").write_text(json.dumps(wider), encoding="utf-8")
    _refused(folder, "cannot be opened")


def test_a_folder_without_a_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    _refused(folder, "no tokenizer that can be read")


def test_a_broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    _refused(folder, "no tokenizer that can be read")


def test_the_hub_out_of_reach_says_so_at_once(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    started = time.monotonic()
    error = _refused("someone/something", "the hub cannot be reached")
    assert time.monotonic() - started < 20
    assert "local folder" in error.hint
    assert "GGUF file" in error.hint


def test_a_name_that_no_hub_can_have(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    _refused("no such model!", "there is no model")


def test_transformers_is_as_talkative_after_as_before():
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    with pytest.raises(ModelError):
        open_model("tiny:none")
    assert transformers_logging.get_verbosity() == level
    assert transformers_logging.is_progress_bar_enabled() == bars


def test_opening_says_nothing(folder, capfd):
    open_model(str(folder))
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_arithmetic():
    assert resolve_dtype("float32") == torch.float32
    assert resolve_dtype("bfloat16") == torch.bfloat16
    assert resolve_dtype("auto") in (torch.float32, torch.bfloat16)
    assert open_model("tiny:gpt2", dtype="bfloat16").model.dtype == torch.bfloat16


def test_a_device_map_gives_the_same_logits(folder):
    ids = torch.tensor([[1, 2, 3]])
    plain = open_model(str(folder), dtype="float32").logits(ids)
    for ref in (str(folder), "tiny:llama?layers=1"):
        placed = open_model(ref, dtype="float32", device_map="cpu")
        assert torch.equal(placed.logits(ids), plain)


@pytest.mark.parametrize("ref", ["tiny:llama", "folder"])
@pytest.mark.parametrize("place", ["cuda", "cuda:7", "nowhere"])
def test_a_device_that_is_not_there(folder, ref: str, place: str) -> None:
    with pytest.raises(ModelError, match=f"there is no device '{place}' here"):
        open_model(str(folder) if ref == "folder" else ref, device_map=place)


def test_a_toy_model_goes_where_it_is_to() -> None:
    with pytest.raises(ModelError, match="was offloaded to disk"):
        open_model("tiny:llama?layers=1", device_map="meta")


@pytest.mark.parametrize(
    "ref", ["tiny:llama?layers=1", "tiny:qwen3?tied=0", "tiny:gemma2?tied=1", "tiny:gpt2?layers=1"]
)
def test_a_head_alone_is_that_of_the_whole_model(ref, tmp_path):
    saved(ref, tmp_path)
    whole = open_model(str(tmp_path), dtype="float32")
    alone = open_head(str(tmp_path), dtype="float32")
    for name, value in vars(whole.unembedding).items():
        other = getattr(alone.unembedding, name)
        assert torch.equal(other, value) if isinstance(value, torch.Tensor) else other == value
    assert alone.vocabulary == whole.vocabulary and alone.fingerprint == whole.fingerprint
    assert (alone.source, alone.model.dtype) == (whole.source, whole.model.dtype)
    assert all(parameter.is_meta for parameter in alone.model.base_model.parameters())


def test_a_head_that_is_not_in_the_checkpoint(folder):
    path = folder / "model.safetensors"
    found = load_file(path)
    save_file({name: found[name] for name in found if "layers" in name}, path)
    with pytest.raises(ModelError, match="there is no weight of the head"):
        open_head(str(folder), dtype="float32")


def test_a_host_in_llama_cpp_is_a_host_alone():
    ref = "llamacpp:model.gguf"
    with pytest.raises(ModelError, match=r"weights are needed in torch.*hosts of mount") as caught:
        open_model(ref)
    assert caught.value.hint == "give the file itself: model.gguf"
    with pytest.raises(ModelError, match="chooses its devices itself"):
        open_model(ref, engines=True, device_map="auto")
    with pytest.raises(ModelError, match=r"there is no file model\.gguf"):
        open_model(ref, engines=True)


@pytest.mark.skipif(find_spec("llama_cpp") is not None, reason="llama-cpp-python is installed")
def test_a_host_in_llama_cpp_says_what_to_install(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", open_model("tiny:llama?vocab=bpe", dtype="float32"))
    with pytest.raises(MissingDependencyError) as caught:
        open_model(f"llamacpp:{tmp_path / 'tiny.gguf'}", engines=True)
    assert "pip install 'trimtab[llamacpp]'" in caught.value.hint
