"""Expert and reference over the same trees of tokens: in one pass where they share their weights.

A pass over few tokens takes as long as reading the model's weights from memory. The expert is the
reference with a LoRA beside its weights, so one pass serves both, the LoRA added to the expert's
tokens alone.
"""

from collections.abc import Sequence

from torch import Tensor

from trimtab.backends.pair import Pair, PairStates
from trimtab.backends.reading import PairCaches
from trimtab.backends.token_tree import (
    JOINT_TOKENS,
    PROBE,
    Leaves,
    ModelCache,
    Part,
    TokenTree,
    forward_all,
    forward_joint,
    is_near,
    parts_after,
    parts_of,
    run_tree,
)
from trimtab.errors import TrimtabError

FEW_TOKENS = 16
"""New tokens of each model up to which one pass serves both: with more of them a pass takes its
time for computing, which one pass does not spare, and attends to more than it must."""

Trees = Sequence[tuple[TokenTree, PairCaches]]


def run_pair(pair: Pair, trees: Trees) -> list[PairStates]:
    """Final hidden states of all nodes of some trees, each two tensors of shape [nodes, hidden].

    Args:
        pair: Expert and reference.
        trees: The sequences, and what both models keep of the last trees that began alike.
    """
    reference = [(tree, caches.reference) for tree, caches in trees]
    expert = [(tree, caches.expert) for tree, caches in trees]
    each = [*reference, *expert]
    states = _run(pair, parts_of(reference), parts_of(expert))
    kept = [cached.keep(tree, new) for (tree, cached), new in zip(each, states, strict=True)]
    return list(map(PairStates, kept[: len(trees)], kept[len(trees) :]))


def run_pair_after(
    pair: Pair, trees: Sequence[tuple[TokenTree, Sequence[tuple[int, int]], PairCaches]]
) -> list[PairStates]:
    """Final hidden states of tokens that each follow a node of a tree that both models ran last.

    Args:
        pair: Expert and reference.
        trees: Each tree, nodes of it each with a token that follows, and what both have left.

    Returns:
        For each tree two tensors of shape [leaves, hidden].
    """
    reference: list[Leaves] = [(tree, leaves, kept.reference) for tree, leaves, kept in trees]
    expert: list[Leaves] = [(tree, leaves, kept.expert) for tree, leaves, kept in trees]
    states = _run(pair, parts_after(reference), parts_after(expert))
    for tree, _, cached in [*reference, *expert]:
        cached.cut(len(tree.tokens))
    return list(map(PairStates, states[: len(trees)], states[len(trees) :]))


def _run(pair: Pair, reference: Sequence[Part], expert: Sequence[Part]) -> list[Tensor]:
    """Final hidden states of the reference's parts, then of the expert's."""
    if _is_for_one_pass(pair, reference, expert):
        return _one_pass(pair, reference, expert)
    ours = forward_all(pair.reference, reference)
    with pair.as_expert() as model:
        return [*ours, *forward_all(model, expert)]


def _is_for_one_pass(pair: Pair, reference: Sequence[Part], expert: Sequence[Part]) -> bool:
    attended = sum(part.visible.shape[1] for part in (*reference, *expert))
    few = max(sum(len(part.tokens) for part in parts) for parts in (reference, expert))
    return 0 < few <= FEW_TOKENS and attended <= JOINT_TOKENS and serves_both(pair)


def _one_pass(pair: Pair, reference: Sequence[Part], expert: Sequence[Part]) -> list[Tensor]:
    tokens = [sum(len(part.tokens) for part in parts) for parts in (reference, expert)]
    with pair.as_both(*tokens) as model:
        return forward_joint(model, [*reference, *expert])


def serves_both(pair: Pair) -> bool:
    """Whether one pass gives what two give, which is tried once for a pair.

    Where layers are given tokens in another form than all in their order, as the experts of a
    mixture are, it does not.
    """
    if pair.serves_both is None:
        pair.serves_both = pair.shares_weights and _agrees(pair)
    return pair.serves_both


def _agrees(pair: Pair) -> bool:
    tree = TokenTree()
    tree.add(PROBE)
    alone = [run_tree(pair.reference, tree, ModelCache())]
    with pair.as_expert() as model:
        alone.append(run_tree(model, tree, ModelCache()))
    caches = PairCaches()
    parts = parts_of([(tree, caches.reference)]), parts_of([(tree, caches.expert)])
    try:
        together = _one_pass(pair, *parts)
    except (RuntimeError, ValueError, TypeError, IndexError, TrimtabError):
        # Layers that are given tokens in another form fail in many ways.
        return False
    return all(is_near(ours, plain) for ours, plain in zip(together, alone, strict=True))
