"""Token sequences that share beginnings, read by llama.cpp as one tree.

A token of a batch may belong to several of llama.cpp's sequences. So each branch is a sequence, and
what branches share is read once. What a row of a generation has read up to its first branch, its
line, stays there for the next tree that begins alike; branches are forgotten.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, final

import numpy as np
from numpy.typing import NDArray

from trimtab.backends.llamacpp.engine import Context, Engine, Token
from trimtab.backends.llamacpp.library import MAX_ROWS
from trimtab.backends.prefix import common_length

LINES = 64
"""Sequences of llama.cpp that are kept for rows; the others are for branches."""

MIN_CELLS, KEPT_CELLS = 2_048, 8_192
"""Tokens with keys and values: at first, and up to where lines that were not used for longest make
room before more memory is taken."""


Read = tuple[int, Sequence[int]]
"""A node to be read, and the sequences that it belongs to."""


class Tree(Protocol):
    """Token sequences that share beginnings, as `token_tree.TokenTree` keeps them."""

    tokens: list[int]
    parents: list[int]
    depths: list[int]

    def line(self, node: int) -> list[int]:
        """Nodes from the first token of a sequence to this one."""
        ...

    def trunk(self) -> int:
        """Number of nodes before the first that does not follow the one before."""
        ...


@final
@dataclass(eq=False)
class Line:
    """What a row has read: its tokens, as far as llama.cpp still holds their keys and values.

    Attributes:
        tokens: The tokens.
        number: Of the sequence in llama.cpp; None for none.
        used: When it was read last, counted in trees.
    """

    tokens: list[int] = field(default_factory=list)
    number: int | None = None
    used: int = 0


@final
class TreeReader:
    """A model in llama.cpp that reads trees."""

    def __init__(self, engine: Engine) -> None:
        """Take an engine; keys and values of trees are apart from those of its rows."""
        self._engine = engine
        self._context: Context | None = None
        self._lines: list[Line] = []
        self._trees = 0

    def read(self, tree: Tree, wanted: Sequence[int], line: Line) -> NDArray[np.float32]:
        """Read a tree and keep its line.

        Args:
            tree: At least one token.
            wanted: Nodes whose final hidden states are asked for, ascending.
            line: What the row has read; whatever of it does not begin this tree is forgotten.

        Returns:
            Shape [wanted, hidden].

        Raises:
            ModelError: llama.cpp fails, or has no room.
        """
        try:
            return self._read(tree, wanted, line)
        except BaseException:
            # What a pass that was broken off has left is not known.
            self._forget_all()
            raise

    def _read(self, tree: Tree, wanted: Sequence[int], line: Line) -> NDArray[np.float32]:
        context = self._ready(tree, line)
        assert line.number is not None
        trunk = _trunk(tree)
        first = min(wanted, default=trunk)
        begin = min(common_length(line.tokens, tree.tokens[:trunk]), first)
        context.cut(line.number, begin)
        line.tokens = tree.tokens[:begin]
        states = np.zeros((len(wanted), self._engine.hidden_size), np.float32)
        place = {node: number for number, node in enumerate(wanted)}
        for number, leaves in enumerate(_grouped(_leaves(tree, trunk), MAX_ROWS - LINES)):
            self._branch(context, line.number, len(leaves))
            nodes = [*_own(tree, trunk, begin, line.number, leaves, is_first=number == 0)]
            self._read_some(context, tree, nodes, place, states)
            line.tokens = tree.tokens[:trunk]
            for branch in range(len(leaves)):
                context.cut(LINES + branch, 0)
        return states

    def _branch(self, context: Context, line: int, branches: int) -> None:
        for branch in range(branches):
            context.copy(line, LINES + branch)

    def _read_some(
        self,
        context: Context,
        tree: Tree,
        nodes: Sequence[Read],
        place: dict[int, int],
        states: NDArray[np.float32],
    ) -> None:
        """Read nodes, a batch at a time, and put down the states of those that are wanted."""
        size = self._engine.batch_tokens
        for first in range(0, len(nodes), size):
            some = nodes[first : first + size]
            tokens = [
                Token(tree.tokens[node], tree.depths[node], sequences, asked=node in place)
                for node, sequences in some
            ]
            self._engine.decode(context, tokens)
            for number, ((node, _), token) in enumerate(zip(some, tokens, strict=True)):
                if token.asked:
                    states[place.pop(node)] = context.state(number, states.shape[1])

    def _ready(self, tree: Tree, line: Line) -> Context:
        """A context with room for a tree, in which its line has a sequence of its own."""
        self._trees += 1
        line.used = self._trees
        if all(line is not known for known in self._lines):
            self._lines.append(line)
        self._make_room(len(self._lines) - LINES, line)
        others = sum(len(one.tokens) for one in self._lines if one is not line)
        needed = len(tree.tokens) + others
        context = self._context
        cells = 0 if context is None else context.row_tokens
        while needed > max(cells, KEPT_CELLS) and len(self._lines) > 1:
            needed -= self._make_room(1, line)
        if context is None or needed > cells:
            self._forget_all()
            self._context = context = None
            wanted = max(MIN_CELLS, 1 << (needed - 1).bit_length())
            self._context = context = self._engine.context(MAX_ROWS, wanted, shared=True)
            self._lines.append(line)
        if line.number is None:
            taken = {one.number for one in self._lines}
            line.number = next(number for number in range(LINES) if number not in taken)
        return context

    def _make_room(self, lines: int, wanted: Line) -> int:
        """Forget the lines that were not used for longest; how many tokens these were."""
        freed = 0
        for _ in range(lines):
            oldest = min((one for one in self._lines if one is not wanted), key=lambda o: o.used)
            freed += len(oldest.tokens)
            self._forget(oldest)
        return freed

    def _forget(self, line: Line) -> None:
        if self._context is not None and line.number is not None:
            self._context.cut(line.number, 0)
        line.tokens, line.number = [], None
        self._lines = [one for one in self._lines if one is not line]

    def _forget_all(self) -> None:
        for line in self._lines:
            line.tokens, line.number = [], None
        self._lines, self._context = [], None


def _trunk(tree: Tree) -> int:
    """How many nodes all sequences of a tree begin with."""
    line = tree.trunk()
    return min([line, *(parent + 1 for parent in tree.parents[line:])])


def _leaves(tree: Tree, trunk: int) -> list[int]:
    """The last nodes of all branches; none where the tree is one line."""
    inner = set(tree.parents)
    return [node for node in range(trunk, len(tree.tokens)) if node not in inner]


def _grouped(leaves: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Some leaves at a time; one group without any where there are none."""
    for first in range(0, max(1, len(leaves)), size):
        yield leaves[first : first + size]


def _own(
    tree: Tree, trunk: int, begin: int, line: int, leaves: Sequence[int], *, is_first: bool
) -> Iterator[Read]:
    """What is to be read of some leaves' branches, and of the line before, if they come first.

    A token of a batch sees what belongs to the first of its own sequences.
    """
    branches = [LINES + branch for branch in range(len(leaves))]
    if is_first:
        for node in range(begin, trunk):
            yield node, [line, *branches]
    through: dict[int, list[int]] = {}
    for branch, leaf in zip(branches, leaves, strict=True):
        for node in tree.line(leaf):
            if node >= trunk:
                through.setdefault(node, []).append(branch)
    for node in sorted(through):
        yield node, through[node]
