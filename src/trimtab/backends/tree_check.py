"""Whether a model reads texts as one tree, or several, as it reads each of them alone."""

import torch
from torch import Tensor

from trimtab.backends.hf import HFModel
from trimtab.backends.token_tree import ModelCache, TokenTree, run_after, run_tree, run_trees
from trimtab.errors import ModelError

PROBE = (3, 5, 7, 9, 11)
_PROBE = (PROBE, (3, 5, 7, 4), (3, 5, 8, 6, 10))
_PROBE_TOLERANCE = 2.0
"""Roots of the machine epsilon, times the largest state, by which a tree may differ from plain
passes: rounding in other shapes stays below, and a position or an ancestor too many is above."""


def check_tree(model: HFModel) -> None:
    """Make sure that a model reads texts as one tree, or several, as it reads each of them alone.

    Args:
        model: A small model, which is to run beside a host.

    Raises:
        ModelError: It cannot: it keeps a state in place of keys and values, or takes positions or
            a mask of its own.
    """
    alone = [model.hidden(torch.tensor([sequence]))[0] for sequence in _PROBE]
    tree, cached = TokenTree(), ModelCache()
    lines = [tree.line(tree.add(sequence)) for sequence in _PROBE]
    trees = [(TokenTree(), ModelCache()) for _ in _PROBE]
    try:
        states = run_tree(model, tree, cached)
        leaf = run_after(model, tree, [(lines[0][3], _PROBE[0][4])], cached)
        for end in (3, None):
            for (other, _), sequence in zip(trees, _PROBE, strict=True):
                other.add(sequence[:end])
            together = run_trees(model, trees)
    except Exception as error:
        # Families without such a cache or such a mask fail in many ways.
        raise _reads_no_tree(model) from error
    pairs = [(states[line], plain) for line, plain in zip(lines, alone, strict=True)]
    pairs += [(leaf[0], alone[0][4]), *zip(together, alone, strict=True)]
    if not all(is_near(ours, plain) for ours, plain in pairs):
        raise _reads_no_tree(model)


def is_near(ours: Tensor, plain: Tensor) -> bool:
    """Whether states differ by rounding alone: a position or an ancestor too many is more."""
    tolerance = _PROBE_TOLERANCE * torch.finfo(plain.dtype).eps ** 0.5 * float(plain.abs().max())
    return float((ours - plain).abs().max()) <= tolerance


FAR = 0.25
"""Share of the largest state by which other arithmetic may differ: rounding stays far below."""


def is_about(ours: Tensor, exact: Tensor) -> bool:
    """Whether states of other arithmetic, such as smaller numbers, are what they should be."""
    return float((ours - exact).abs().max()) <= FAR * float(exact.abs().max())


def _reads_no_tree(model: HFModel) -> ModelError:
    return ModelError(
        f"{model.ref} ({type(model.model).__name__}) cannot read several texts as one tree, so it"
        " cannot run beside a host: it has no keys and values that can be cut back, or no masks"
        " and positions that can be given to it",
        hint="use --carriers head,memory, or tune a small model of a family such as Llama, Qwen,"
        " Gemma or GPT-2",
    )
