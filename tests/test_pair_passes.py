"""One pass for expert and reference, against a pass of each."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from test_speculative import passes
from torch import Tensor
from torch.nn import functional

from trimtab.backends.hf import HFModel
from trimtab.backends.open import open_model
from trimtab.backends.pair import Pair, PairStates, open_pair_from
from trimtab.backends.pair_passes import (
    run_expert_line,
    run_pair,
    run_pair_after,
    serves_both,
    states_after,
)
from trimtab.backends.reading import LiveReading, PairCaches
from trimtab.backends.token_tree import TokenTree

FAMILIES = ("llama", "qwen3", "gemma2", "gemma3", "gpt2")
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
_PAIRS: dict[tuple[str, torch.dtype], Pair] = {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("loras")


def pair_of(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Pair:
    """A pair whose expert is far from its reference."""
    if (family, dtype) not in _PAIRS:
        ref = f"tiny:{family}"
        base = open_model(ref, dtype="float32")
        config = LoraConfig(
            r=4,
            target_modules="all-linear",
            init_lora_weights=False,
            fan_in_fan_out=family == "gpt2",
        )
        torch.manual_seed(1)
        get_peft_model(base.model, config).save_pretrained(folder / family)
        pair = open_pair_from(ref, folder / family, fingerprint=base.fingerprint, dtype="float32")
        pair.reference.model.to(dtype)
        _PAIRS[family, dtype] = pair
    return _PAIRS[family, dtype]


def exact_pair_of(family: str, folder: Path) -> Pair:
    """The same in float64, where rounding is far below what any mistake makes of states."""
    return pair_of(family, folder, torch.float64)


def softmax_as_given(logits: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """As PyTorch's, but in float64 what comes in float64.

    transformers' own attention asks for float32, whose sums depend on how many rows a pass has.
    """
    wider = logits.dtype if logits.dtype == torch.float64 else dtype
    return torch.softmax(logits, dim, dtype=wider)


def run(pair: Pair, texts: list[list[list[int]]], *, together: bool) -> list[PairStates]:
    """States of rows that each grow from one text to the next, and of what follows them."""
    caches, found = [PairCaches() for _ in texts], []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pair, "serves_both", together)
        patched.setattr(functional, "softmax", softmax_as_given)
        for step in range(len(texts[0])):
            trees = [TokenTree() for _ in texts]
            ends = [tree.add(row[step]) for tree, row in zip(trees, texts, strict=True)]
            found += run_pair(pair, list(zip(trees, caches, strict=True)))
            leaves = [
                (tree, [(end, 5), (end, 9)], cached)
                for tree, end, cached in zip(trees, ends, caches, strict=True)
            ]
            found += run_pair_after(pair, leaves)
            # As an expert drafts, before the text is read in which the draft stands or not.
            ahead = [
                run_expert_line(pair, [*texts[0][step], *range(5, 5 + n)], caches[0])
                for n in (0, 2)
            ]
            found += [PairStates(one, one) for one in ahead]
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_one_pass_is_two(family: str, folder: Path) -> None:
    pair = exact_pair_of(family, folder)
    rows = [[list(range(3, 3 + n + row)) for n in (4, 5, 7)] for row in (0, 3)]
    for texts in (rows[:1], rows):
        assert serves_both(pair)
        with passes(pair.reference.model.base_model) as read:
            ours = run(pair, texts, together=True)
        assert len(read) == 4 * len(texts[0])
        for one, two in zip(ours, run(pair, texts, together=False), strict=True):
            torch.testing.assert_close(one.reference, two.reference, atol=1e-9, rtol=1e-9)
            torch.testing.assert_close(one.expert, two.expert, atol=1e-9, rtol=1e-9)
        assert not torch.allclose(ours[0].expert, ours[0].reference, atol=1e-2)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.lists(st.integers(3, 200), min_size=1, max_size=9), min_size=1, max_size=4))
def test_any_texts_of_a_row(folder: Path, texts: list[list[int]]) -> None:
    pair = exact_pair_of("llama", folder)
    ours, theirs = (run(pair, [texts], together=together) for together in (True, False))
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.expert, two.expert, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(one.reference, two.reference, atol=1e-9, rtol=1e-9)


def test_what_a_tree_has_is_not_run_again(folder: Path) -> None:
    pair, tree, caches = exact_pair_of("llama", folder), TokenTree(), PairCaches()
    end = tree.add([3, 4, 5, 6])
    states = run_pair(pair, [(tree, caches)])[0]
    reading = LiveReading(tree, [], [], [], states, caches)
    expected = run_pair_after(pair, [(tree, [(1, 5), (1, 9), (end, 5)], caches)])[0]
    with passes(pair.reference.model.base_model) as read:
        found = states_after(pair, [reading, reading], [[(1, 5), (1, 9), (end, 5)], []])
        again = states_after(pair, [reading], [[(1, 5)]])
    assert read == [2], "of three tokens that follow one is in the tree"
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)
    assert torch.equal(again.expert[0], states.expert[2])


def test_the_model_is_the_reference_again(folder: Path) -> None:
    pair = exact_pair_of("llama", folder)
    ids = torch.tensor([[3, 4, 5]])
    before = pair.reference.logits(ids)
    with pytest.raises(KeyboardInterrupt), pair.as_both():
        raise KeyboardInterrupt
    assert torch.equal(pair.reference.logits(ids), before)


def test_layers_that_see_tokens_otherwise_are_given_two_passes(folder: Path) -> None:
    ref = "tiny:llama?seed=3"
    base = open_model(ref, dtype="float32")
    get_peft_model(
        base.model, LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)
    ).save_pretrained(folder / "flat")
    fingerprint = open_model(ref, dtype="float32").fingerprint
    pair = open_pair_from(ref, folder / "flat", fingerprint=fingerprint, dtype="float32")
    # As a mixture of experts hands tokens on: without the text that they are of.
    for module in pair.reference.model.modules():
        if type(module).__name__ == "LlamaMLP":
            plain = module.forward
            vars(module)["forward"] = lambda x, plain=plain: plain(x.flatten(0, 1)).reshape(x.shape)
    assert not serves_both(pair)
    tree = TokenTree()
    tree.add([3, 4, 5])
    states = run_pair(pair, [(tree, PairCaches())])[0]
    torch.testing.assert_close(
        states.reference, pair.hidden(torch.tensor([[3, 4, 5]])).reference[0]
    )


def test_two_models_have_two_passes() -> None:
    models: list[HFModel] = [open_model(f"tiny:llama?seed={n}", dtype="float32") for n in (1, 2)]
    pair = Pair(*models)
    assert not serves_both(pair)
    with pytest.raises(ValueError, match="cannot share a pass"), pair.as_both():
        pass
