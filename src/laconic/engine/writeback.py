"""Write a result into the user's own model object, where no shape changed."""

from typing import Any

import torch
from torch import Tensor, fx, nn

from laconic.core.errors import SurgeryError
from laconic.forms import affine
from laconic.program.freezing import form_of
from laconic.program.members import alone
from laconic.program.program import (
    DEQUANTIZE,
    DYNAMIC_QUANTIZE,
    FAKE_LEVELS,
    FAKE_QUANTIZE,
    FAKES,
    STORED,
    Program,
)


def write_back(program: Program, model: nn.Module) -> list[str]:
    """Copy a Program's values into `model`, in place; nothing is written if anything fails.

    Weights behind a quantisation node are written as the values the Program computes with; of
    several models that are stored together it is the chosen one.

    Returns:
        what the model cannot express, one sentence each (quantised activations).

    Raises:
        SurgeryError: a tensor is missing (folded away) or has another shape (pruned).
    """
    program = alone(program)
    names = {program.aliases.get(name, name) for name, _ in program.tensors()}
    new: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        held = program.aliases.get(name, name)
        if held not in names:
            if name.endswith("num_batches_tracked"):
                continue
            raise SurgeryError(
                "is gone: a step folded or removed it",
                where=name,
                hint="use the Program itself (it is an nn.Module), or leave that step out",
            )
        value = values(program, held)
        if value.shape != tensor.shape:
            raise SurgeryError(
                f"has shape {tuple(value.shape)} in the result and {tuple(tensor.shape)} in the "
                "model",
                where=name,
                hint="only results that keep every shape can be written back",
            )
        new[name] = value
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name in new:
                tensor.data.copy_(new[name])
    return _unexpressed(program)


def values(program: Program, name: str) -> Tensor:
    """What the operators that read a stored tensor compute with."""
    tensor = program.tensor(name).detach()
    for node in program.graph.nodes:
        if node.op != "get_attr" or node.target != name:
            continue
        for user in node.users:
            if user.target is DEQUANTIZE and user.args[0] is node:
                scale, zero_point = (_fetch(program, arg) for arg in user.args[1:3])
                return affine.decode(tensor, scale, zero_point, _axis(user.args[3]))
            if user.target in STORED and user.args[0] is node:
                return form_of(program, name).decode()
            if user.target is FAKE_QUANTIZE and user.args[0] is node:
                scale, zero_point = (_fetch(program, arg) for arg in user.args[1:3])
                return FAKE_QUANTIZE(tensor, scale, zero_point, *user.args[3:])
            if user.target is FAKE_LEVELS and user.args[0] is node:
                return FAKE_LEVELS(tensor, _fetch(program, user.args[1]), *user.args[2:])
    return tensor


def _unexpressed(program: Program) -> list[str]:
    count = sum(
        1
        for node in program.graph.nodes
        if node.target in (DYNAMIC_QUANTIZE, *FAKES) and not _reads_tensor(node.args[0])
    )
    if not count:
        return []
    return [f"{count} activations are quantised in the result; the model computes them in float"]


def _reads_tensor(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr"


def _fetch(program: Program, node: Any) -> Tensor:
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        raise SurgeryError("a scale is computed, not stored", where=str(node))
    return program.tensor(str(node.target)).detach()


def _axis(value: object) -> int | None:
    return value if isinstance(value, int) else None
