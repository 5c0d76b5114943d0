"""Expert and reference over the same trees of tokens: in one pass where they share their weights.

A pass over few tokens takes as long as reading the model's weights from memory. The expert is the
reference with a LoRA beside its weights, so one pass over two rows serves both, the LoRA added to
the second.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.backends.lean import make_lean, make_usual
from trimtab.backends.pair import Pair, PairStates
from trimtab.backends.reading import LiveReading, PairCaches
from trimtab.backends.token_tree import (
    Leaves,
    ModelCache,
    TokenTree,
    run_all_after,
    run_line,
    run_tree,
    run_trees,
)
from trimtab.backends.tree_check import PROBE, check_tree, is_about, is_near
from trimtab.errors import TrimtabError

Trees = Sequence[tuple[TokenTree, PairCaches]]


def run_pair(pair: Pair, trees: Trees) -> list[PairStates]:
    """Final hidden states of all nodes of some trees, each two tensors of shape [nodes, hidden].

    Args:
        pair: Expert and reference.
        trees: The sequences, and what both models keep of the last trees that began alike.
    """
    if serves_both(pair):
        return _run_both(pair, [(tree, caches.both) for tree, caches in trees])
    reference = run_trees(pair.reference, [(tree, caches.reference) for tree, caches in trees])
    with pair.as_expert() as model:
        expert = run_trees(model, [(tree, caches.expert) for tree, caches in trees])
    return list(map(PairStates, reference, expert))


def _run_both(pair: Pair, trees: Sequence[tuple[TokenTree, ModelCache]]) -> list[PairStates]:
    with pair.as_both() as model:
        states = run_trees(model, trees, copies=2)
    return [_parted(some) for some in states]


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
    if serves_both(pair):
        with pair.as_both() as model:
            after = [(tree, leaves, caches.both) for tree, leaves, caches in trees]
            return [_parted(some) for some in run_all_after(model, after, copies=2)]
    reference: list[Leaves] = [(tree, leaves, caches.reference) for tree, leaves, caches in trees]
    expert: list[Leaves] = [(tree, leaves, caches.expert) for tree, leaves, caches in trees]
    ours = run_all_after(pair.reference, reference)
    with pair.as_expert() as model:
        return list(map(PairStates, ours, run_all_after(model, expert)))


def states_after(
    pair: Pair, readings: Sequence[LiveReading], leaves: Sequence[Sequence[tuple[int, int]]]
) -> PairStates:
    """Final hidden states of tokens that follow nodes of what both models read last.

    Those that a tree has, as where a text that is known goes on so, are not run again.

    Args:
        pair: Expert and reference.
        readings: What they read.
        leaves: Of each reading some nodes, each with a token that follows; one at least in all.

    Returns:
        Two tensors of shape [all leaves, hidden].
    """
    unread = [
        [leaf for leaf in some if reading.tree.child(*leaf) is None]
        for reading, some in zip(readings, leaves, strict=True)
    ]
    trees = [(one.tree, some, one.caches) for one, some in zip(readings, unread, strict=True)]
    ran = run_pair_after(pair, [tree for tree in trees if tree[1]])
    rows = iter([row for states in ran for row in zip(*states, strict=True)])
    found = list[tuple[Tensor, Tensor]]()
    for reading, some in zip(readings, leaves, strict=True):
        for leaf in some:
            child = reading.tree.child(*leaf)
            known = reading.states
            found.append(
                next(rows) if child is None else (known.reference[child], known.expert[child])
            )
    return PairStates(*map(torch.stack, zip(*found, strict=True)))


def run_expert_line(pair: Pair, tokens: Sequence[int], caches: PairCaches) -> Tensor:
    """The expert's final hidden state of a sequence's last token, shape [hidden].

    Where one pass serves both, the reference reads the sequence too, which costs next to nothing,
    and has read it when it is asked.

    Args:
        pair: Expert and reference.
        tokens: The sequence; at least one token.
        caches: As for `run_pair`, which may go on from here.
    """
    if serves_both(pair):
        with pair.as_both() as model:
            return _parted(run_line(model, tokens, caches.both, copies=2)).expert
    with pair.as_expert() as model:
        return run_line(model, tokens, caches.expert)


def _parted(states: Tensor) -> PairStates:
    return PairStates(*states.chunk(2, -1))


def serves_both(pair: Pair) -> bool:
    """Whether one pass gives what two give, which is tried once for a pair.

    Where layers are given tokens in another form than two rows of them, as the experts of a
    mixture are, it does not.
    """
    if pair.serves_both is None:
        pair.serves_both = pair.shares_weights and _agrees(pair)
    return pair.serves_both


def prepare(pair: Pair) -> None:
    """Make sure, once for a pair, that it reads texts as trees, and let it do so quickly.

    Raises:
        ModelError: It cannot: see `check_tree`.
    """
    if pair.reads_trees:
        return
    check_tree(pair.reference)
    # In this order: both checks compare a model with itself up to rounding, and in bfloat16 other
    # operations round otherwise by more than they allow.
    both = serves_both(pair)
    pair.reads_trees = True
    if both:
        _make_lean(pair)


def _make_lean(pair: Pair) -> None:
    """Let passes of the reference and of both take fewer operations, if these do the same."""
    tree = TokenTree()
    tree.add(PROBE)
    usual = run_tree(pair.reference, tree, ModelCache())
    if not make_lean(pair.reference.model):
        return
    lean = run_tree(pair.reference, tree, ModelCache())
    if not is_about(lean, usual):
        make_usual(pair.reference.model)


def _agrees(pair: Pair) -> bool:
    tree = TokenTree()
    tree.add(PROBE)
    alone = [run_tree(pair.reference, tree, ModelCache())]
    with pair.as_expert(briefly=True) as model:
        alone.append(run_tree(model, tree, ModelCache()))
    try:
        [together] = _run_both(pair, [(tree, ModelCache())])
    except (RuntimeError, ValueError, TypeError, IndexError, TrimtabError):
        # Layers that are given tokens in another form fail in many ways.
        return False
    return all(is_near(ours, plain) for ours, plain in zip(together, alone, strict=True))
