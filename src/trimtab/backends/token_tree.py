"""Token sequences that share beginnings, run through a model as one tree."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache

from trimtab.backends.cache_layers import GrowingCache, JointCache, Room
from trimtab.backends.hf import HFModel
from trimtab.backends.llamacpp.model import EngineModel
from trimtab.backends.llamacpp.trees import Line
from trimtab.backends.prefix import common_length
from trimtab.backends.tree_masks import masks_of

JOINT_TOKENS = 4_096
"""Tokens of several trees, those in caches too, that a pass attends to at most: their keys and
values are copied for it, and each new token is compared with all of them."""


@dataclass
class TokenTree:
    """Token sequences that share beginnings, each token once.

    Attributes:
        tokens: Token of each node; parents come before their children.
        parents: Parent of each node, -1 for the first token of a sequence.
        depths: Tokens before each node in its sequence.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    _children: dict[tuple[int, int], int] = field(default_factory=dict)
    # Tokens of the first sequence, a line: its nodes need no look-up.
    _first: int = 0

    def add(self, sequence: Sequence[int]) -> int:
        """Add a sequence; the node of its last token."""
        if not self.tokens:
            self._first = len(sequence)
            self.tokens, self.depths = list(sequence), list(range(self._first))
            self.parents = list(range(-1, self._first - 1))
        shared = common_length(self.tokens[: self._first], sequence)
        node = shared - 1
        for depth, token in enumerate(sequence[shared:], start=shared):
            child = self.child(node, token)
            if child is None:
                child = self._children[node, token] = len(self.tokens)
                self.tokens.append(token)
                self.parents.append(node)
                self.depths.append(depth)
            node = child
        return node

    def child(self, node: int, token: int) -> int | None:
        """The node of a token that follows a node, where the tree has it."""
        after = node + 1
        if after < self._first and self.tokens[after] == token:
            return after
        return self._children.get((node, token))

    def line(self, node: int) -> list[int]:
        """Nodes from the first token of a sequence to this one."""
        first, others = self.parted(node)
        return [*range(first), *others]

    def parted(self, node: int) -> tuple[int, list[int]]:
        """A node's line: how many nodes of the first sequence, and which others after them."""
        others = []
        while node >= self._first:
            others.append(node)
            node = self.parents[node]
        return node + 1, others[::-1]

    def trunk(self) -> int:
        """Number of nodes before the first that does not follow the one before: a line."""
        for node in range(self._first, len(self.parents)):
            if self.parents[node] != node - 1:
                return self.parents[node] + 1
        return len(self.tokens)

    def visible(self, first: int = 0) -> Tensor:
        """Which nodes each node from `first` on may attend to: itself and its ancestors.

        Args:
            first: At most the trunk's length.

        Returns:
            Shape [nodes - first, nodes].
        """
        nodes, trunk = len(self.tokens), self.trunk()
        seen = torch.zeros(nodes - first, nodes, dtype=torch.bool)
        seen[: trunk - first, :trunk] = torch.ones(trunk - first, trunk, dtype=torch.bool).tril(
            first
        )
        for node in range(trunk, nodes):
            parent, row = self.parents[node], seen[node - first]
            if parent >= first:
                row |= seen[parent - first]
            else:
                row[: parent + 1] = True
            row[node] = True
        return seen


@dataclass
class ModelCache:
    """Keys and values of the last tree, and what its sequences shared.

    Attributes:
        tokens: The tokens of the tree's trunk.
        cache: Keys and values of all its nodes, until the next tree is run.
        states: Final hidden states of `tokens`, of all copies one after the other, shape
            [tokens, copies * hidden]; none where only lines are run.
        line: What a model outside torch, which keeps keys and values itself, has read.
    """

    tokens: list[int] = field(default_factory=list)
    cache: GrowingCache = field(default_factory=GrowingCache)
    states: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    line: Line = field(default_factory=Line)
    _room: Room = field(default_factory=lambda: Room(overwrites=False))

    def shared_with(self, tree: TokenTree) -> int:
        """Cut the cache to the tokens that begin the tree's trunk; how many they are."""
        trunk = tree.trunk()
        shared = common_length(self.tokens, tree.tokens[:trunk])
        # None where a pass was broken off.
        shared = min(shared, self.cache.get_seq_length())
        self.tokens = self.tokens[:shared]
        self.states = self.states[:shared]
        self.cut(shared)
        # A forward pass needs at least one token.
        if shared == len(tree.tokens):
            self.cut(shared - 1)
            self.tokens, self.states = self.tokens[:-1], self.states[:-1]
            shared -= 1
        return shared

    def keep(self, tree: TokenTree, states: Tensor) -> Tensor:
        """Keep the trunk's tokens and states.

        Returns:
            The states of all nodes, [nodes, hidden].
        """
        everything, trunk = self._room.put(self.states, states), tree.trunk()
        self.tokens, self.states = tree.tokens[:trunk], everything[:trunk]
        return everything

    def go_on(self, tokens: Sequence[int], states: Tensor) -> None:
        """Keep some more tokens of a line, whose keys and values the cache has already."""
        self.tokens = [*self.tokens, *tokens]
        self.states = self._room.put(self.states, states)

    def beside(self) -> "ModelCache":
        """Another that goes on from here by itself.

        Keys, values and states are the same tensors, until either of both goes on.
        """
        self._room = Room(overwrites=False)
        return ModelCache(list(self.tokens), self.cache.beside(), self.states)

    def cut(self, length: int) -> None:
        """Forget the keys and values of all but the first nodes."""
        # `crop` counts the tokens to remove, below zero.
        self.cache.crop(min(0, length - self.cache.get_seq_length()))


def run_tree(model: HFModel, tree: TokenTree, cached: ModelCache) -> Tensor:
    """Final hidden states of all nodes, shape [nodes, hidden].

    Args:
        model: Decoder-only.
        tree: The sequences.
        cached: Keeps what the sequences of this tree share, for the next tree that begins alike;
            and until then the keys and values of all nodes.
    """
    return run_trees(model, [(tree, cached)])[0]


def run_trees(
    model: HFModel, trees: Sequence[tuple[TokenTree, ModelCache]], *, copies: int = 1
) -> list[Tensor]:
    """As `run_tree` of each, with its own cache, in as few passes as memory allows.

    A pass over some tokens takes as long as reading the model's weights, for one tree as for many.

    Args:
        model: As given to `run_tree`.
        trees: The trees and their caches.
        copies: How often each token is read, in as many rows of a pass, which the model may treat
            unlike. A cache knows one number of copies only.

    Returns:
        For each tree the states of a node's copies one after the other, [nodes, copies * hidden].
    """
    if isinstance(model.model, EngineModel):
        return [_run_in_engine(model.model, tree, cached) for tree, cached in trees]
    states = _forward_all(model, _parts_of(trees), copies)
    return [cached.keep(tree, new) for (tree, cached), new in zip(trees, states, strict=True)]


def _run_in_engine(model: EngineModel, tree: TokenTree, cached: ModelCache) -> Tensor:
    """As `run_tree`; only nodes whose states are not known yet are asked for."""
    shared = common_length(cached.tokens, tree.tokens[: tree.trunk()])
    cached.tokens, cached.states = cached.tokens[:shared], cached.states[:shared]
    new = model.tree_states(tree, range(shared, len(tree.tokens)), cached.line)
    return cached.keep(tree, new)


def _parts_of(trees: Sequence[tuple[TokenTree, ModelCache]]) -> list["Part"]:
    """What is to be run of some trees, their caches cut to what they share with these."""
    parts = []
    for tree, cached in trees:
        past = cached.shared_with(tree)
        tokens, depths = tree.tokens[past:], tree.depths[past:]
        parts.append(Part(tokens, depths, tree.visible(past), cached.cache))
    return parts


def run_line(
    model: HFModel, tokens: Sequence[int], cached: ModelCache, *, copies: int = 1
) -> Tensor:
    """Final hidden state of a sequence's last token, as a tree of that alone.

    Args:
        model: Decoder-only.
        tokens: The sequence; at least one token.
        cached: As for `run_tree`, which may go on from here.
        copies: As for `run_trees`.

    Returns:
        Shape [copies * hidden].
    """
    if isinstance(model.model, EngineModel):
        tree = TokenTree()
        return model.model.tree_states(tree, [tree.add(tokens)], cached.line)[0]
    shared = common_length(cached.tokens, tokens[:-1])
    shared = min(shared, cached.cache.get_seq_length())
    cached.tokens, cached.states = cached.tokens[:shared], cached.states[:shared]
    cached.cut(shared)
    new, depths = list(tokens[shared:]), list(range(shared, len(tokens)))
    visible = torch.ones(len(new), len(tokens), dtype=torch.bool).tril(shared)
    [states] = _forward_all(model, [Part(new, depths, visible, cached.cache)], copies)
    cached.go_on(new, states)
    return states[-1]


Leaves = tuple[TokenTree, Sequence[tuple[int, int]], ModelCache]
"""A tree, nodes of it each with a token that follows, and what ran the tree last has left."""


def run_after(
    model: HFModel, tree: TokenTree, leaves: Sequence[tuple[int, int]], cached: ModelCache
) -> Tensor:
    """Final hidden states of tokens that each follow a node of a tree, shape [leaves, hidden].

    Args:
        model: As given to `run_tree`.
        tree: The tree that was run last.
        leaves: Node and token.
        cached: As `run_tree` has left it.

    Raises:
        ValueError: Another tree was run with it since.
    """
    return run_all_after(model, [(tree, leaves, cached)])[0]


def run_all_after(model: HFModel, trees: Sequence[Leaves], *, copies: int = 1) -> list[Tensor]:
    """As `run_after` of each, in as few passes as memory allows; copies as for `run_trees`."""
    if isinstance(model.model, EngineModel):
        return [_run_after_in_engine(model.model, *leaves) for leaves in trees]
    states = _forward_all(model, _parts_after(trees), copies)
    for tree, _, cached in trees:
        cached.cut(len(tree.tokens))
    return states


def _run_after_in_engine(
    model: EngineModel, tree: TokenTree, leaves: Sequence[tuple[int, int]], cached: ModelCache
) -> Tensor:
    """As `run_after`; an engine has forgotten the branches and reads those of the leaves again."""
    again = TokenTree()
    ends = [
        again.add([*(tree.tokens[above] for above in tree.line(node)), token])
        for node, token in leaves
    ]
    asked = sorted(set(ends))
    states = model.tree_states(again, asked, cached.line)
    return states[[asked.index(end) for end in ends]]


def _parts_after(trees: Sequence[Leaves]) -> list["Part"]:
    """What is to be run of tokens that follow nodes; errors as `run_after`."""
    parts = []
    for tree, leaves, cached in trees:
        nodes = len(tree.tokens)
        if cached.cache.get_seq_length() != nodes:
            raise ValueError(
                "another tree has been run since: only the last one can be gone on from"
            )
        visible = torch.zeros(len(leaves), nodes + len(leaves), dtype=torch.bool)
        for leaf, (node, _) in enumerate(leaves):
            first, others = tree.parted(node)
            visible[leaf, :first] = True
            visible[leaf, [*others, nodes + leaf]] = True
        depths = [tree.depths[node] + 1 for node, _ in leaves]
        parts.append(Part([token for _, token in leaves], depths, visible, cached.cache))
    return parts


@dataclass(frozen=True)
class Part:
    """New tokens of one tree.

    Attributes:
        tokens: The tokens.
        depths: Tokens before each in its sequence.
        visible: What each may attend to, shape [new, past + new].
        cache: Keys and values of those before, which gets those of the new ones.
    """

    tokens: Sequence[int]
    depths: Sequence[int]
    visible: Tensor
    cache: DynamicCache


def _forward_all(model: HFModel, parts: Sequence[Part], copies: int) -> list[Tensor]:
    """Final hidden states of each part's tokens, whose keys and values its cache gets."""
    found = list[Tensor]()
    while len(found) < len(parts):
        some, room = [parts[len(found)]], JOINT_TOKENS - parts[len(found)].visible.shape[1]
        for part in parts[len(found) + 1 :]:
            room -= part.visible.shape[1]
            if room < 0:
                break
            some.append(part)
        found += _forward_joint(model, some, copies)
    return found


def _forward_joint(model: HFModel, parts: Sequence[Part], copies: int) -> list[Tensor]:
    """One pass over the tokens of all parts, none of which attends to those of another."""
    sizes = [len(part.tokens) for part in parts]
    if len(parts) == 1:
        return [_forward(model, parts[0], copies)]
    visible = torch.block_diag(*(part.visible for part in parts))
    caches = [part.cache for part in parts]
    joint = JointCache(caches, sizes)
    tokens = [token for part in parts for token in part.tokens]
    depths = [depth for part in parts for depth in part.depths]
    states = _forward(model, Part(tokens, depths, visible, joint), copies)
    with ExitStack() as whole:
        for cache in caches:
            whole.enter_context(emptied_if_broken_off(cache))
        joint.deal_out()
    return list(states.split(sizes))


def _forward(model: HFModel, part: Part, copies: int) -> Tensor:
    with torch.no_grad(), emptied_if_broken_off(part.cache):
        states = model.model.base_model(
            input_ids=torch.tensor([list(part.tokens)] * copies, device=model.device),
            position_ids=torch.tensor([list(part.depths)] * copies, device=model.device),
            attention_mask=masks_of(model, part.visible, copies),
            past_key_values=part.cache,
            use_cache=True,
        ).last_hidden_state
    return states.transpose(0, 1).flatten(1)


@contextmanager
def emptied_if_broken_off(cache: DynamicCache) -> Iterator[None]:
    """Leave no cache of which some layers hold a token more than others, as after Ctrl-C."""
    with ExitStack() as if_broken_off:
        if_broken_off.callback(cache.layers.clear)
        yield
        if_broken_off.pop_all()
