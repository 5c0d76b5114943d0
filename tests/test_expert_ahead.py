"""What the expert expects of tokens to come, from a copy in bfloat16, against the expert itself."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pair_passes import FAMILIES, pair_of
from transformers import DynamicCache

from trimtab.backends.cache_layers import Layer, layers_of
from trimtab.backends.expert_ahead import FEW_UNREAD, ExpertAhead, copied_bytes
from trimtab.backends.open import open_model
from trimtab.backends.pair import Pair
from trimtab.backends.pair_passes import run_pair
from trimtab.backends.reading import PairCaches
from trimtab.backends.token_tree import TokenTree

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("loras")


def read(pair: Pair, text: list[int], caches: PairCaches) -> None:
    tree = TokenTree()
    tree.add(text)
    run_pair(pair, [(tree, caches)])


def is_near(ours: torch.Tensor, exact: torch.Tensor) -> bool:
    # Eight bits of each number, through a few layers.
    return float((ours - exact).abs().max()) <= 0.05 * float(exact.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_is_the_expert_and_leaves_the_pair_as_it_was(family: str, folder: Path) -> None:
    pair = pair_of(family, folder)
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    before = pair.reference.logits(ids), pair.expert_logits(ids)
    copy, light = pair.expert_copy(torch.float32), pair.expert_copy(torch.bfloat16)
    torch.testing.assert_close(copy.logits(ids), before[1], atol=1e-5, rtol=1e-4)
    assert is_near(light.logits(ids).float(), before[1])
    assert {weight.dtype for weight in light.model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        for weight in copy.model.parameters():
            weight.zero_()
    assert torch.equal(pair.reference.logits(ids), before[0])
    assert torch.equal(pair.expert_logits(ids), before[1])


@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(3, 200), min_size=1, max_size=12),
            st.lists(st.integers(3, 200), max_size=3),
            st.integers(0, 12),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_drafts_of_a_growing_text(
    folder: Path, steps: list[tuple[list[int], list[int], int]]
) -> None:
    pair = pair_of("llama", folder)
    ahead, caches, text = ExpertAhead(pair), PairCaches(), list[int]()
    for more, drafted, back in steps:
        # What was written before may stand no more, as after a draft that was refused.
        text = [*text[: max(0, len(text) - back)], *more]
        read(pair, text, caches)
        for count in range(len(drafted) + 1):
            tokens = [*text, *drafted[:count]]
            exact = pair.expert_logits(torch.tensor([tokens]))[0, -1]
            found = ahead.logits_after(tokens, caches)
            fresh = PairCaches()
            read(pair, text, fresh)
            anew = ExpertAhead(pair).logits_after(tokens, fresh)
            assert float((found - anew).abs().max()) <= 0.03 * float(exact.abs().max())
            # A byte's steps are as fine for a row's largest weight as for its smallest: how much of
            # a random row they round away has no bound that is worth much, but little of its shape.
            assert float(torch.corrcoef(torch.stack([found, exact]))[0, 1]) >= 0.98
            assert float((found - exact).norm()) <= 0.2 * float(exact.norm())


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_copy_keeps_one_head_of_small_numbers(family: str, folder: Path) -> None:
    pair = pair_of(family, folder)
    has_own = not pair.reference.model.config.tie_word_embeddings
    light = ExpertAhead(pair).light
    assert light is not None and light.head is not None
    assert light.head.weight.shape == pair.reference.unembedding.weight.shape
    kept = {
        id(one): one.numel() * one.element_size()
        for model in (light.model.model, light.head)
        for one in [*model.parameters(), *model.buffers()]
        # Scales and what rotates keys are small, and counted as nothing.
        if one.dim() == 2
    }
    norms = sum(2 * one.numel() for one in light.model.model.parameters() if one.dim() == 1)
    assert sum(kept.values()) + norms == copied_bytes(pair.reference)
    assert has_own == (family == "llama")


def test_a_text_that_was_not_read_is_read_by_the_pair(folder: Path) -> None:
    pair = pair_of("llama", folder)
    ahead, caches, tokens = ExpertAhead(pair), PairCaches(), list(range(3, 5 + FEW_UNREAD))
    exact = pair.expert_logits(torch.tensor([tokens]))[0, -1]
    torch.testing.assert_close(ahead.logits_after(tokens, caches), exact, atol=1e-5, rtol=1e-4)
    assert caches.both.tokens == tokens


@pytest.mark.parametrize("what", ["large", "far", "broken"])
def test_without_a_good_copy_the_expert_itself_drafts(
    what: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = pair_of("llama", folder)
    copied = pair.expert_copy(torch.bfloat16)
    if what == "large":
        monkeypatch.setattr("trimtab.backends.expert_ahead.MOST_COPIED_BYTES", 1_000)
    elif what == "far":
        torch.nn.init.normal_(copied.model.get_input_embeddings().weight)
    else:
        # As a family that adds float32 numbers of its own to the embeddings.
        copied.model.base_model.norm.float()
        copied.model.base_model.layers[0].mlp.up_proj.float()
    monkeypatch.setattr(pair, "expert_copy", lambda _: copied)
    ahead, tokens = ExpertAhead(pair), [3, 4, 5]
    assert ahead.light is None
    exact = pair.expert_logits(torch.tensor([tokens]))[0, -1]
    ours = ahead.logits_after(tokens, PairCaches())
    torch.testing.assert_close(ours, exact, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("ahead_too", [False, True])
def test_a_pass_that_is_broken_off_leaves_nothing_behind(ahead_too: bool, folder: Path) -> None:
    pair = pair_of("llama", folder)
    ahead, caches, text = ExpertAhead(pair), PairCaches(), list(range(3, 12))
    read(pair, text, caches)
    ahead.logits_after([*text, 20], caches)
    model = (ahead.light.model if ahead_too else pair.reference).model
    last = model.base_model.layers[-1].mlp.down_proj

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    handle = last.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        if ahead_too:
            ahead.logits_after([*text, 20, 21], caches)
        else:
            read(pair, [*text, 20, 21], caches)
    handle.remove()
    tokens = [*text, 20, 22]
    exact = pair.expert_logits(torch.tensor([tokens]))[0, -1]
    assert is_near(ahead.logits_after(tokens, caches), exact)
    read(pair, tokens, caches)
    assert is_near(
        ahead.logits_after([*tokens, 9], caches),
        pair.expert_logits(torch.tensor([[*tokens, 9]]))[0, -1],
    )


def test_taking_what_is_exact_may_be_broken_off(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = pair_of("llama", folder)
    ahead, caches, text = ExpertAhead(pair), PairCaches(), list(range(3, 12))
    read(pair, text[:5], caches)
    ahead.logits_after([*text[:5], 20], caches)
    read(pair, text, caches)

    def broken_off(cache: DynamicCache) -> Iterator[Layer]:
        yield layers_of(cache)[0]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("trimtab.backends.expert_ahead.layers_of", broken_off)
        ahead.logits_after([*text, 20], caches)
    exact = pair.expert_logits(torch.tensor([[*text, 20]]))[0, -1]
    assert is_near(ahead.logits_after([*text, 20], caches), exact)


def test_two_models_draft_as_they_are() -> None:
    pair = Pair(*(open_model(f"tiny:llama?seed={n}", dtype="float32") for n in (1, 2)))
    exact = pair.expert_logits(torch.tensor([[3, 4, 5]]))[0, -1]
    ours = ExpertAhead(pair).logits_after([3, 4, 5], PairCaches())
    torch.testing.assert_close(ours, exact, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="weights of its own"):
        pair.expert_copy(torch.bfloat16)
