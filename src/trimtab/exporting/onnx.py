"""The head and its mixture with the bare host as an ONNX graph over states and logits."""

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import MissingDependencyError
from trimtab.exporting.linear import Shift
from trimtab.store.storage_errors import storage_errors

GRAPH_NAME = "head.onnx"
"""File of the graph."""

OPSET = 17
"""Of ONNX 1.12 (2022): every runtime of today has all of it."""

IR_VERSION = 8
"""Of ONNX 1.12 as well; a newer one is refused by older runtimes."""

_LOWEST = -1e30
"""Stands for a row's largest log-probability where all predictors forbid a token."""


def write_graph(path: Path, shift: Shift, strength: float) -> None:
    """Write the graph: steered_logits = logits + strength (up down h + offset), and a mixture.

    Inputs are `hidden` [n, hidden], `logits` [n, vocab] (the host's own, cap and scale included),
    `trust` [n] and, optional, `strength` (a number). Outputs are `steered_logits` and `logprobs` =
    log((1 - trust) softmax(logits) + trust softmax(steered_logits)), both [n, vocab]; all float32.

    Args:
        path: File to write.
        shift: The head's at strength 1.
        strength: The default of the input.

    Raises:
        MissingDependencyError: onnx is not installed.
        StorageError: The file cannot be written.
    """
    onnx = _onnx()
    model = onnx.helper.make_model(
        _graph(onnx.helper, onnx.TensorProto.FLOAT, onnx.numpy_helper, shift, strength),
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="trimtab",
    )
    onnx.checker.check_model(model)
    with storage_errors(path):
        onnx.save(model, str(path))


def read_graph(path: Path) -> Callable[[Mapping[str, Tensor]], tuple[Tensor, Tensor]]:
    """Read a graph back and run it with ONNX's own reference evaluator.

    Args:
        path: What `write_graph` wrote.

    Returns:
        From inputs by name to steered logits and log-probabilities.

    Raises:
        MissingDependencyError: onnx is not installed.
    """
    _onnx()
    evaluator = import_module("onnx.reference").ReferenceEvaluator(str(path))

    def run(inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        steered, logprobs = evaluator.run(["steered_logits", "logprobs"], arrays)
        return torch.from_numpy(steered), torch.from_numpy(logprobs)

    return run


def _onnx() -> Any:
    try:
        return import_module("onnx")
    except ImportError as error:
        raise MissingDependencyError(
            "--to onnx needs the package onnx, which is not installed",
            hint="pip install 'trimtab[onnx]'",
        ) from error


def _graph(helper: Any, real: int, arrays: Any, shift: Shift, strength: float) -> Any:
    vocabulary, hidden = shift.up.shape[0], shift.down.shape[1]
    inputs = {"hidden": ["n", hidden], "logits": ["n", vocabulary], "trust": ["n"], "strength": []}
    outputs = {"steered_logits": ["n", vocabulary], "logprobs": ["n", vocabulary]}
    constants = {
        "down": shift.down.T.contiguous().numpy(),
        "up": shift.up.T.contiguous().numpy(),
        "offset": shift.offset.numpy(),
        "strength": np.float32(strength),
        "one": np.float32(1),
        "lowest": np.float32(_LOWEST),
        "last_axis": np.array([1], np.int64),
    }
    return helper.make_graph(
        [helper.make_node(kind, into, [out], **how) for kind, into, out, how in _STEPS],
        "trimtab_head",
        [helper.make_tensor_value_info(name, real, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, real, shape) for name, shape in outputs.items()],
        [arrays.from_array(np.asarray(value), name) for name, value in constants.items()],
    )


# The mixture is computed as log(exp(a - m) + exp(b - m)) + m, so that no tail underflows.
_STEPS: tuple[tuple[str, list[str], str, dict[str, int]], ...] = (
    ("MatMul", ["hidden", "down"], "features", {}),
    ("MatMul", ["features", "up"], "linear", {}),
    ("Add", ["linear", "offset"], "shift", {}),
    ("Mul", ["shift", "strength"], "followed", {}),
    ("Add", ["logits", "followed"], "steered_logits", {}),
    ("LogSoftmax", ["logits"], "host_logprobs", {"axis": -1}),
    ("LogSoftmax", ["steered_logits"], "head_logprobs", {"axis": -1}),
    ("Unsqueeze", ["trust", "last_axis"], "head_share", {}),
    ("Sub", ["one", "head_share"], "host_share", {}),
    ("Log", ["head_share"], "head_log_share", {}),
    ("Log", ["host_share"], "host_log_share", {}),
    ("Add", ["host_logprobs", "host_log_share"], "host_part", {}),
    ("Add", ["head_logprobs", "head_log_share"], "head_part", {}),
    ("Max", ["host_part", "head_part", "lowest"], "largest", {}),
    ("Sub", ["host_part", "largest"], "host_below", {}),
    ("Sub", ["head_part", "largest"], "head_below", {}),
    ("Exp", ["host_below"], "host_ratio", {}),
    ("Exp", ["head_below"], "head_ratio", {}),
    ("Add", ["host_ratio", "head_ratio"], "ratios", {}),
    ("Log", ["ratios"], "above", {}),
    ("Add", ["largest", "above"], "logprobs", {}),
)
