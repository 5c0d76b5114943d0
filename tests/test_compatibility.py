"""Families that only the table of compatibility knows: sliding windows, experts, states, ALiBi."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from saving import saved

from bench.compatibility import families, measure, table
from trimtab.backends.hf import HFModel, adopt_model
from trimtab.backends.live import Live
from trimtab.backends.padding import check_padding
from trimtab.backends.pair import Pair
from trimtab.backends.token_tree import ModelCache, TokenTree, run_after, run_tree
from trimtab.backends.tree_check import check_tree
from trimtab.config import TuneConfig
from trimtab.errors import ModelError
from trimtab.tune import tune

BY_TYPE = {family.model_type: family for family in families.FAMILIES}
LONG = [40 + 3 * n for n in range(2 * families.WINDOW_TOKENS)]


def made(model_type: str) -> HFModel:
    model = families.family_model(BY_TYPE[model_type])
    return adopt_model(model_type, model, families.family_tokenizer())


@pytest.mark.parametrize("model_type", ["mistral", "gemma3_text", "mixtral", "gpt_oss", "opt"])
def test_a_tree_longer_than_a_sliding_window_is_read_as_each_sequence_alone(
    model_type: str,
) -> None:
    model = made(model_type)
    check_tree(model)
    cached = ModelCache()
    for begin in (LONG[: families.WINDOW_TOKENS + 1], LONG):
        tree = TokenTree()
        sequences = [[*begin, 33, 34, 35], [*begin, 33, 36], [*begin, 37]]
        ends = [tree.add(sequence) for sequence in sequences]
        states = run_tree(model, tree, cached)
        leaf = run_after(model, tree, [(ends[1], 50)], cached)[0]
        found = [*states[ends], leaf]
        for sequence, state in zip([*sequences, [*sequences[1], 50]], found, strict=True):
            alone = model.hidden(torch.tensor([sequence]))[0, -1]
            torch.testing.assert_close(state, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model_type", ["bloom", "mamba", "mpt"])
def test_a_small_model_that_reads_no_tree_is_refused(model_type: str) -> None:
    model = made(model_type)
    with pytest.raises(ModelError, match="cannot read several texts as one tree") as caught:
        Live(Pair(model, model), model)
    assert "--carriers head,memory" in caught.value.hint


@pytest.mark.parametrize("model_type", ["mamba", "qwen3_moe"])
def test_a_model_that_takes_no_lora_is_refused(model_type: str, tmp_path: Path) -> None:
    saved(made(model_type), tmp_path / "model")
    (tmp_path / "text.txt").write_text(measure.TEXT * 12)
    settings: dict[str, Any] = {"model": str(tmp_path / "model"), "out": tmp_path / "expert"}
    settings |= {"data": (str(tmp_path / "text.txt"),), "held_out": 0, "dtype": "float32"}
    with pytest.raises(ModelError, match="cannot take a LoRA") as caught:
        tune(TuneConfig.model_validate(settings | {"window_tokens": 32}))
    assert "--method full" in caught.value.hint


def test_a_cell_says_what_was_found(tmp_path: Path) -> None:
    def fails() -> float:
        raise KeyError("x")

    def refuses() -> float:
        raise ModelError("Some model is odd", hint="take another")

    cells = {"logits": measure._cell(lambda: 2e-6), "head": measure._cell(fails)}
    cells |= {"memory": measure._cell(refuses)}
    found = {name: vars(cell) for name, cell in cells.items()}
    row = {"name": "Some model", "model_type": "some", "cells": found}
    packages = {"torch": "1", "transformers": "2"}
    path = tmp_path / "found.json"
    path.write_text(json.dumps({"date": "2026-11-26", "packages": packages, "rows": [row]}))
    shown = table.table(path)
    assert "| Some model (`some`) | 2e-06 | **failed** (1) | refused (2) |" in shown
    assert "2. the model is odd" in shown


@pytest.mark.parametrize("model_type", ["rwkv", "minimax"])
def test_a_host_that_reads_padding_takes_one_prompt_at_a_time(model_type: str) -> None:
    host = made(model_type)
    with pytest.raises(ModelError, match="its layers read the padding") as caught:
        check_padding(host, [LONG, LONG[:5]])
    assert "one prompt at a time" in caught.value.hint
    check_padding(host, [LONG, LONG])
    check_padding(host, [LONG])


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "mamba", "bloom", "marian", "t5"])
def test_a_host_that_masks_padding_takes_prompts_of_any_lengths(model_type: str) -> None:
    check_padding(made(model_type), [LONG, LONG[:5], LONG[:1]])
    check_padding(made(model_type), [LONG[:2], LONG[:1]])
