"""The per-layer table: the original's weights beside what became of them."""

from collections.abc import Sequence

from torch import fx

from laconic.engine.result import Layer
from laconic.forms.affine import Affine
from laconic.forms.levels import Levels
from laconic.program.cost import NodeCost, cost
from laconic.program.freezing import form_of
from laconic.program.program import DEQUANTIZE, FAKE_LEVELS, FAKES, STORED, Program

_FORMS = (DEQUANTIZE, *FAKES, *STORED)


def layers(original: Program, compressed: Program) -> list[Layer]:
    """One row per operator of the original that holds a weight; matched by the weight's name."""
    before = {_main(row): row for row in cost(original).rows if row.tensors}
    after = {_main(row): row for row in cost(compressed).rows if row.tensors}
    rows: list[Layer] = []
    for name, old in before.items():
        new = after.get(name)
        rows.append(
            Layer(
                name=name,
                operator=short(old.operator),
                shape_before=tuple(original.tensor(name).shape),
                shape_after=None if new is None else tuple(compressed.tensor(name).shape),
                macs_before=old.macs,
                macs_after=0 if new is None else new.macs,
                bytes_before=old.bytes,
                bytes_after=0 if new is None else stored_bytes(compressed, new.tensors),
                form="" if new is None else form(compressed, name),
            )
        )
    return rows


def short(operator: str) -> str:
    """`aten.conv2d.default` as people say it: conv2d."""
    return operator.removeprefix("aten.").removesuffix(".default")


def form(program: Program, name: str) -> str:
    """How a tensor is written down: "dense float32", "affine 8 bit" ..."""
    user = _form_user(program, name)
    if user is None:
        return f"dense {str(program.tensor(name).dtype).removeprefix('torch.')}"
    if user.target in STORED or user.target is FAKE_LEVELS:
        held = form_of(program, name)
        if isinstance(held, Levels):
            return f"{held.name} levels"
        count = next(reversed(held.tensors().values())).shape
        words = {"codebook": f"codebook of {count[-1]}", "basis": "shared basis",
                 "vectors": f"{count[0]} vectors of {count[-1]}",
                 "hashed": f"{count[0]} hashed buckets"}  # fmt: skip
        return words[held.kind]
    if user.target is DEQUANTIZE:
        held = form_of(program, name)
        if isinstance(held, Affine):
            return f"affine {(held.qmax - held.qmin).bit_length()} bit"
        return f"affine {8 * program.tensor(name).element_size()} bit"
    low, high = user.args[4:6]
    if isinstance(low, int) and isinstance(high, int):
        return f"affine {(high - low).bit_length()} bit"
    return "affine"


def stored_bytes(program: Program, names: Sequence[str]) -> int:
    """Bytes of tensors as they will be stored: codes of a byte where a form stands before them."""
    total = 0
    for name in names:
        tensor, user = program.tensor(name), _form_user(program, name)
        coded = user is not None and user.target in FAKES
        total += tensor.numel() * (1 if coded else tensor.element_size())
    return total


def _form_user(program: Program, name: str) -> fx.Node | None:
    """The decode node that reads a tensor as its values, if there is one."""
    for node in program.graph.nodes:
        if node.op == "get_attr" and node.target == name:
            for user in node.users:
                if user.target in _FORMS and user.args[0] is node:
                    return user
    return None


def _main(row: NodeCost) -> str:
    """The tensor that names an operator: its weight."""
    named = [name for name in row.tensors if name.rsplit(".", 1)[-1] == "weight"]
    return (named or list(row.tensors))[0]
