"""Move outliers from activations, which share one scale, into weights, which have one a channel.

`x W = (x / s) (s W)`: each input channel of a linear layer is divided by `s`, its column of the
weight multiplied, with `s_c = max|x_c|^a / max|W_c|^(1 - a)`. The division goes into the layer norm
in front, if the linear layers are its only readers, else it is one multiplication, which runtimes
fuse with the quantisation behind it. Xiao et al., "SmoothQuant" (arXiv 2211.10438).
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from laconic.core.progress import Progress
from laconic.program.normalize import base_name
from laconic.program.program import Program
from laconic.solvers.quantization.weight_sites import WeightSite
from laconic.statistics.collect import collect
from laconic.statistics.min_max import MinMax

_SPREAD = 2.0  # largest channel over median channel: below it there is nothing to gain
_LINEAR = ("linear", "addmm", "mm", "matmul")


def smooth(
    program: Program,
    sites: Sequence[WeightSite],
    batches: Iterable[Sequence[Tensor]],
    strength: float,
    progress: Progress,
) -> list[str]:
    """Smooth the inputs of linear layers on sequences, where their channels differ much.

    The program is changed, its function is not (up to rounding).

    Args:
        program: shapes propagated; a clone of the caller's.
        sites: the weights that may change.
        batches: flat calibration inputs.
        strength: `a` above: 0 moves everything into activations, 1 into weights.
        progress: of the calibration pass.

    Returns:
        Names of the nodes whose values were smoothed.
    """
    groups = linear_readers(sites)
    found = collect(
        program,
        batches,
        {node: (node.name, "output", MinMax(-1)) for node in groups},
        progress,
    ) if groups else {}  # fmt: skip
    smoothed: list[str] = []
    for node, members in groups.items():
        statistic = found[node]
        assert isinstance(statistic, MinMax)
        largest = torch.maximum(statistic.maximum.abs(), statistic.minimum.abs()).double()
        if largest.max() < _SPREAD * largest.median():
            continue
        factors = _factors(program, largest, members, strength)
        _divide(program, node, [user for user, _ in members], factors)
        for site in {site.name: site for _, site in members}.values():
            weight = program.tensor(site.name)
            scaled = weight.detach().double() * _columns(factors, site).to(weight.device)
            program.set_tensor(site.name, scaled.to(weight.dtype))
        smoothed.append(node.name)
    program.recompile()
    return smoothed


def linear_readers(sites: Sequence[WeightSite]) -> dict[fx.Node, list[tuple[fx.Node, WeightSite]]]:
    """Tensor → the linear layers that read it; only weights with one such operator."""
    found: dict[fx.Node, list[tuple[fx.Node, WeightSite]]] = {}
    for site in sites:
        if site.axis is None:
            continue
        node = site.operators[0]
        weight: Any = site.holders[0].meta.get("shape", ())
        if len(site.operators) > 1 or base_name(node) not in _LINEAR or len(weight) != 2:
            continue
        source: Any = node.args[1] if base_name(node) == "addmm" else node.args[0]
        shape = source.meta.get("shape", ())
        if len(shape) >= 3 and source.op == "call_function":
            found.setdefault(source, []).append((node, site))
    return found


def _columns(values: Tensor, site: WeightSite) -> Tensor:
    """`[in]` along the input axis of a weight matrix."""
    return values[:, None] if site.axis else values[None]


def _factors(
    program: Program,
    largest: Tensor,
    members: Sequence[tuple[fx.Node, WeightSite]],
    strength: float,
) -> Tensor:
    weights = [program.tensor(site.name).detach().abs() for _, site in members]
    columns = [
        weight.amax(site.axis or 0) for weight, (_, site) in zip(weights, members, strict=True)
    ]
    weight = torch.stack(columns).amax(0).double().cpu()
    floor = 1e-5 * float(largest.max())
    factors = largest.clamp(min=floor) ** strength
    factors = factors / weight.clamp(min=1e-5 * float(weight.max()) + 1e-30) ** (1 - strength)
    return factors / factors.log().mean().exp()


def _divide(program: Program, node: fx.Node, users: Sequence[fx.Node], factors: Tensor) -> None:
    """Divide the last axis of `node` by `factors`, for `users` only."""
    own = all(user in users for user in node.users)
    if own and base_name(node) == "layer_norm" and scale_norm(program, node, factors):
        return
    dtype = node.meta["dtype"]
    device = next(iter(program.state_dict().values())).device
    held = program.add_tensor(f"smoothing.{node.name}", (1 / factors).to(device, dtype))
    with program.graph.inserting_after(node):
        side = program.graph.get_attr(held)
    with program.graph.inserting_after(side):
        made = program.graph.call_function(torch.ops.aten.mul.Tensor, (node, side))
    side.meta = {"origin": node.meta.get("origin", ""), "dtype": dtype,
                 "shape": tuple(factors.shape)}  # fmt: skip
    made.meta = dict(node.meta)
    for user in users:
        user.replace_input_with(node, made)


def scale_norm(program: Program, node: fx.Node, factors: Tensor) -> bool:
    """Put the division into a layer norm's weight and bias; False where they are not its own."""
    sides: list[str] = []
    for side in node.args[2:4]:
        if not isinstance(side, fx.Node) or side.op != "get_attr" or len(side.users) > 1:
            return False
        if str(side.target) in program.aliases.values():
            return False
        sides.append(str(side.target))
    if len(sides) < 2:
        return False
    for name in sides:
        old = program.tensor(name)
        program.set_tensor(name, (old.detach().double() / factors.to(old.device)).to(old.dtype))
    return True
