"""Models of published sizes with random weights, where the real ones are not at hand.

How long a pass takes does not depend on what the weights say; how many drafted tokens stand does.
So rows whose speed follows from what the models know are not measured with these.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen2Config

from trimtab.backends.hf import HFModel, adopt_model
from trimtab.backends.open import one_device, resolve_dtype
from trimtab.store.files import replace_directory

SCHEME = "random:"
"""What the name of such a model begins with."""

SHAPES: Mapping[str, Mapping[str, Any]] = {
    name: {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": inner,
        "tie_word_embeddings": tied,
        "vocab_size": 151_936,
    }
    for name, hidden, layers, heads, groups, inner, tied in (
        ("qwen2.5-0.5b", 896, 24, 14, 2, 4_864, True),
        ("qwen2.5-1.5b", 1_536, 28, 12, 2, 8_960, True),
        ("qwen2.5-7b", 3_584, 28, 28, 4, 18_944, False),
        ("qwen2.5-32b", 5_120, 64, 40, 8, 27_648, False),
    )
}
"""Sizes as the models' own config.json give them (arXiv:2412.15115, table 1), but for the rows that
fill up the larger models' vocabularies: all have one vocabulary."""


def random_model(name: str) -> PreTrainedModel:
    """A model with random weights on the first accelerator, or the CPU, in its arithmetic."""
    config = Qwen2Config(bos_token_id=None, eos_token_id=None, **SHAPES[name])
    with torch.device(one_device()):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=resolve_dtype("auto"))
    return model.eval()


def random_host(name: str, tokenizer: Path) -> HFModel:
    """Such a model in memory alone, with the tokenizer that lies in a folder."""
    return adopt_model(SCHEME + name, random_model(name), AutoTokenizer.from_pretrained(tokenizer))


def random_folder(name: str, tokenizer: Path, folder: Path) -> Path:
    """Such a model as a folder that `open_model` takes, made once."""
    if not (folder / "config.json").is_file():
        with replace_directory(folder) as made:
            random_model(name).save_pretrained(made)
            AutoTokenizer.from_pretrained(tokenizer).save_pretrained(made)
    return folder
