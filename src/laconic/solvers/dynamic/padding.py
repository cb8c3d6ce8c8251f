"""Along which dimensions inputs may be padded without changing what comes out.

A batch may be padded with further samples if samples do not know of each other. Another dimension
may be padded if one input is a mask along it and hides what is added. Neither is believed: the
Program is run. What stands in the padding must not matter, bit for bit: what a mask hides has a
weight of exactly zero, and the operators see the same shapes. And padded and not padded have to
agree up to rounding, for a mean over the padded length changes without looking at the padding.
Fixed grids of activations act on each value alone; they are left out of the second comparison, in
which a value that rounds the other way would look like a difference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from laconic.core.errors import LaconicError, first_line
from laconic.measuring.parity import float_tolerance
from laconic.program.program import DYNAMIC_QUANTIZE, FAKES, Program
from laconic.program.specialize import dimensions, resized

BATCH = "batch"
_MORE = 3  # sizes in the comparison: the example's (at least this), and this much more
_REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, LaconicError)


@dataclass(frozen=True)
class Padding:
    """What may be padded.

    Attributes:
        masks: dimension that may be padded → the input that hides the padding; "" for the batch.
        refused: every other dynamic dimension → why not.
        outputs: for each output, its dimensions that grow with one that may be padded.
    """

    masks: Mapping[str, str]
    refused: Mapping[str, str] = field(default_factory=dict[str, str])
    outputs: tuple[Mapping[int, str], ...] = ()


class _Refused(Exception):
    """Why a dimension cannot be padded."""


def find_padding(program: Program, seed: int = 0) -> Padding:
    """Try every dynamic dimension of a Program; a few runs of it at the example's size."""
    draw = torch.Generator().manual_seed(seed)
    program = program.clone()
    program.recompile()
    smooth = _without_grids(program)
    masks: dict[str, str] = {}
    refused: dict[str, str] = {}
    outputs: list[dict[int, str]] = [{} for _ in range(_count(program))]
    for name in dimensions(program):
        try:
            mask = "" if name == BATCH else _mask_of(program, name)
            found = _compare(program, smooth, name, mask, draw)
        except _Refused as reason:
            refused[name] = str(reason)
            continue
        masks[name] = mask
        for held, dims in zip(outputs, found, strict=True):
            held |= dict.fromkeys(dims, name)
    return Padding(masks, refused, tuple(outputs))


def _count(program: Program) -> int:
    flat: tuple[object, ...] = program.output_node.args[0]  # type: ignore[assignment]
    return len(flat)


def _mask_of(program: Program, name: str) -> str:
    """The input that is a mask along dimension `name`."""
    carriers = [
        n.name for n in program.placeholders if name in program.dynamic.get(n.name, {}).values()
    ]
    found = [carrier for carrier in carriers if "mask" in carrier]
    if len(found) == 1 and len(carriers) > 1:
        return found[0]
    if not found:
        raise _Refused("no input is a mask along it, so padding would count: exact sizes only")
    raise _Refused(f"{', '.join(found)} cannot be told to hide it: exact sizes only")


def _compare(
    program: Program, smooth: Program, name: str, mask: str, draw: torch.Generator
) -> list[list[int]]:
    """Dimensions of each output that grow with `name`.

    Raises:
        _Refused: padding changes an output, or an output's size follows in another way.
    """
    sizes = {n: max(size, _MORE) for n, size in dimensions(program).items()}
    longer = sizes | {name: sizes[name] + _MORE}
    short, long = _inputs(program, sizes), _inputs(program, longer)
    first = _padded(program, short, long, name, mask, draw)
    other = _padded(program, short, long, name, mask, draw)
    try:
        with torch.no_grad():
            one, two = program.run_flat(*first), program.run_flat(*other)
            plain, wide = smooth.run_flat(*short), smooth.run_flat(*first)
    except _REFUSALS as error:
        raise _Refused(f"it cannot be run at other sizes: {first_line(error)}") from error
    tolerance = float_tolerance(smooth)
    grown: list[list[int]] = []
    for number, (want, padded) in enumerate(zip(plain, wide, strict=True)):
        dims = _grown(want, padded, sizes[name], number)
        cuts = [_cut(tensor, want, dims) for tensor in (one[number], two[number], padded)]
        if not torch.equal(cuts[0], cuts[1]):
            raise _Refused(f"what stands in the padding changes output {number}: exact sizes only")
        scale = float(want.abs().max()) if want.numel() else 0.0
        error = float((cuts[2].double() - want.double()).abs().max()) if want.numel() else 0.0
        if not error <= tolerance * scale:
            raise _Refused(
                f"padding changes output {number} by {error / (scale or 1):.1e} of its largest "
                f"value, rounding allows {tolerance:.1e}: exact sizes only"
            )
        grown.append(dims)
    return grown


def _inputs(program: Program, sizes: Mapping[str, int]) -> list[Tensor]:
    """The example at `sizes`, its masks hiding nothing."""
    named = zip(program.placeholders, resized(program, sizes), strict=True)
    return [torch.ones_like(tensor) if "mask" in node.name else tensor for node, tensor in named]


def _padded(
    program: Program, short: Sequence[Tensor], long: Sequence[Tensor], name: str, mask: str,
    draw: torch.Generator,
) -> list[Tensor]:  # fmt: skip
    """`short` with something else in what `long` has more: nothing where a mask is to hide it."""
    made: list[Tensor] = []
    for node, want, tensor in zip(program.placeholders, short, long, strict=True):
        tensor = tensor.clone()
        for dim, carried in program.dynamic.get(node.name, {}).items():
            if carried != name:
                continue
            size = want.shape[dim]
            rest = tensor.narrow(dim, size, tensor.shape[dim] - size)
            if "mask" not in node.name:
                rest.copy_(_noise(tensor, rest.shape, draw))
            elif node.name == mask:
                rest.zero_()
            tensor.narrow(dim, 0, size).copy_(want)
        made.append(tensor)
    return made


def _noise(like: Tensor, shape: Sequence[int], draw: torch.Generator) -> Tensor:
    """Values that the input could have: the same kind, the same range."""
    if like.dtype is torch.bool:
        return torch.randint(0, 2, tuple(shape), generator=draw).bool()
    if like.is_floating_point():
        return torch.randn(tuple(shape), generator=draw).to(like.dtype) * float(like.abs().max())
    low, high = int(like.min()), int(like.max())
    return torch.randint(low, high + 1, tuple(shape), generator=draw).to(like.dtype)


def _grown(short: Tensor, long: Tensor, size: int, number: int) -> list[int]:
    if short.ndim == long.ndim:
        pairs = list(enumerate(zip(short.shape, long.shape, strict=True)))
        dims = [dim for dim, (a, b) in pairs if a != b]
        if all(pair == (size, size + _MORE) for dim, pair in pairs if dim in dims):
            return dims
    raise _Refused(
        f"output {number} goes from {list(short.shape)} to {list(long.shape)}, which cannot be cut "
        "back: exact sizes only"
    )


def _cut(tensor: Tensor, want: Tensor, dims: Sequence[int]) -> Tensor:
    for dim in dims:
        tensor = tensor.narrow(dim, 0, want.shape[dim])
    return tensor


def _without_grids(program: Program) -> Program:
    """The Program without quantised activations."""
    made = program.clone()
    for node in list(made.graph.nodes):
        if node.target in (DYNAMIC_QUANTIZE, *FAKES) and node.all_input_nodes[0].op != "get_attr":
            node.replace_all_uses_with(node.all_input_nodes[0])
            made.graph.erase_node(node)
    made.graph.eliminate_dead_code()
    made.propagate()
    made.recompile()
    return made
