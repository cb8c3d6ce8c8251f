"""Take the mean error that quantisation gives a layer's outputs back out, through its bias.

* analytic: rounding moves the mean of the outputs by `(Ŵ - W) E[x]`, so `b += (W - Ŵ) E[x]` with
  the channel means of the layer's float input (Nagel et al., "Data-Free Quantization Through
  Weight Equalization and Bias Correction", arXiv 1906.04721, section 4.2);
* empirical: layer by layer, the mean output of the quantised program, all earlier layers corrected
  already, is brought to that of the float one. It also sees what activations lose by clipping. The
  spread of each output channel can be brought back with it, through the scales: what measuring
  batch norms anew does (Sun et al. 2019, "Hybrid 8-bit Floating Point Training"), also where they
  have been folded.

Means are what few outliers make them: a correction that takes the typical sample away from the
float network is taken back (`Guard`).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from laconic.core.progress import Progress
from laconic.program.normalize import base_name
from laconic.program.program import Program
from laconic.statistics.moments import Moments
from laconic.statistics.walk import Order, Walk

GUARDED = 32
"""Samples that say whether a correction helps."""
_WORSE = 4.0
_HARMLESS = 1e-3


def bias_axis(node: fx.Node) -> int:
    """Channel axis of a layer's output: 1 of a convolution, the last of a linear layer."""
    return 1 if base_name(node).startswith("conv") else -1


def has_bias(node: fx.Node) -> bool:
    """Whether the operator takes a bias as its argument 2."""
    return base_name(node).startswith("conv") or base_name(node) == "linear"


def mean_shift(node: fx.Node, difference: Tensor, mean: Tensor) -> Tensor:
    """`difference @ mean` for a layer: what a weight change moves its mean outputs by, float64.

    Args:
        node: a convolution (transposed or not) or a linear layer.
        difference: change of the weight, in its shape.
        mean: `[channels]` of the layer's input. Padding is not counted: near the border of an image
            the shift is smaller than this.
    """
    delta, mean = difference.double(), mean.double()
    if not base_name(node).startswith("conv"):
        return delta @ mean
    groups = _groups(node)
    taps = delta.flatten(2).sum(2)
    if _is_transposed(node):  # [in, out / groups]
        table = taps.reshape(groups, -1, taps.shape[1])
        return torch.einsum("gio,gi->go", table, mean.reshape(groups, -1)).flatten()
    table = taps.reshape(groups, -1, taps.shape[1])
    return torch.einsum("goi,gi->go", table, mean.reshape(groups, -1)).flatten()


def _is_transposed(node: fx.Node) -> bool:
    return base_name(node).startswith("conv_transpose") or (
        base_name(node) == "convolution" and bool(node.args[6])
    )


def _groups(node: fx.Node) -> int:
    place = 8 if base_name(node) == "convolution" else 6
    found: Any = node.args[place] if len(node.args) > place else 1
    return int(found)


def add_to_bias(program: Program, node: fx.Node, weight: str, change: Tensor) -> None:
    """Add `change` `[channels]` to a layer's bias; the bias is made if there is none.

    A bias that other nodes read as well is replaced by a copy of this layer's own.
    """
    held: Any = node.args[2] if len(node.args) > 2 else None
    if held is None:
        value = change.to(program.tensor(weight).dtype)
    elif held.op != "get_attr":
        return
    else:
        old = program.tensor(str(held.target)).detach()
        value = (old.double() + change.to(old.device)).to(old.dtype)
        if len(held.users) == 1 and str(held.target) not in program.aliases.values():
            program.set_tensor(str(held.target), value)
            return
    path, _, _ = weight.rpartition(".")
    bias = nn.Parameter(value.to(program.tensor(weight).device))
    name = program.add_tensor(f"{path}.bias" if path else "bias", bias)
    with program.graph.inserting_before(node):
        made = program.graph.get_attr(name)
    made.meta = {"origin": node.meta.get("origin", ""), "shape": tuple(value.shape),
                 "dtype": value.dtype}  # fmt: skip
    node.args = (*node.args[:2], made, *node.args[3:])


@torch.no_grad()
def correct_empirically(
    program: Program,
    layers: Sequence[tuple[fx.Node, str]],
    wanted: dict[str, Tensor],
    batches: Sequence[Sequence[Tensor]],
    progress: Progress,
    spread: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Bring every layer's mean output to the wanted one, front to back; the program is changed.

    Args:
        program: quantised.
        layers: (node, weight name), biases of their own.
        wanted: node name → float64 `[channels]`, the float program's mean outputs.
        batches: flat inputs, all held at once.
        progress: moved on by one a layer.
        spread: node name → float64 `[channels]`, wanted variances, of layers whose weights (output
            channels first) may be multiplied.

    Returns:
        weight → what its channels were multiplied by, float32 `[channels]`.
    """
    order = Order(program)
    walks = [Walk(program, batch, order) for batch in batches]
    found: dict[str, Tensor] = {}
    placed = sorted(layers, key=lambda layer: order.place[layer[0]])
    for node, weight in progress.track(placed, "correcting biases", len(placed)):
        seen = Moments(bias_axis(node))
        for walk in walks:
            walk.run(order.place[node])
            fork = walk.fork()
            fork.run(order.place[node] + 1, hold=[node])
            seen.update(fork.values[node])
        mean = seen.mean
        if spread and node.name in spread:
            factor = _widening(spread[node.name], seen.variance)
            held = program.tensor(weight).detach()
            found[weight] = factor.to(held)
            program.set_tensor(weight, held * found[weight].reshape(-1, *[1] * (held.ndim - 1)))
            bias = _stored_bias(program, node)
            fixed = bias[1].detach().double().cpu() if bias else 0.0
            mean = (mean - fixed) * factor + fixed
        add_to_bias(program, node, weight, wanted[node.name] - mean)
    return found


def _widening(wanted: Tensor, seen: Tensor) -> Tensor:
    """What brings deviations to the wanted ones: at least a half, and 1 where it would be two.

    A channel that hardly varies any more, or never did, says nothing.
    """
    factor = (wanted / seen.clamp(min=torch.finfo(torch.float64).tiny)).sqrt()
    return torch.where((factor - 1).abs() < 1, factor.clamp(min=0.5), torch.ones_like(factor))


class Guard:
    """What the biases of some layers were, and how far the network was from the float one."""

    def __init__(
        self,
        plain: Program,
        program: Program,
        layers: Sequence[tuple[fx.Node, str]],
        batches: Iterable[Sequence[Tensor]],
    ) -> None:
        """Look at a program before its biases are corrected.

        Args:
            plain: the float network.
            program: the same one quantised.
            layers: (node, weight name) of what will be corrected.
            batches: flat inputs of `GUARDED` samples or so.
        """
        self._plain, self._program = plain, program
        self._batches = list(batches)
        self._held = [(node, node.args, _stored_bias(program, node)) for node, _ in layers]
        self._distance = self._typical() if layers else 0.0

    def settle(self) -> list[str]:
        """Take the correction back if it made the typical sample worse; says so."""
        self._program.recompile()
        now = self._typical() if self._held else 0.0
        if now <= max(_WORSE * self._distance, _HARMLESS):
            return []
        for node, args, bias in self._held:
            node.args = args
            if bias is not None:
                self._program.set_tensor(*bias)
        self._program.graph.eliminate_dead_code()
        self._program.recompile()
        return [
            "biases stay uncorrected: outliers in the calibration data make means with which the "
            f"typical sample would be off by {now:.3g} of its outputs' energy"
        ]

    @torch.no_grad()
    def _typical(self) -> float:
        """Median over samples of the squared distance of the outputs, relative to their energy."""
        found: list[Tensor] = []
        for batch in self._batches:
            pairs = zip(
                self._plain.run_flat(*batch), self._program.run_flat(*batch), strict=True
            )  # fmt: skip
            for wanted, made in pairs:
                if wanted.is_floating_point() and wanted.ndim and wanted.numel():
                    rows = (
                        wanted.double().flatten(1) if wanted.ndim > 1 else wanted.double()[:, None]
                    )
                    off = (made.double().reshape(rows.shape) - rows).square().sum(1)
                    found.append(off / rows.square().sum(1).clamp(min=1e-30))
        return float(torch.cat(found).nanmedian()) if found else 0.0


def _stored_bias(program: Program, node: fx.Node) -> tuple[str, Tensor] | None:
    """Name and tensor of a layer's bias, if it has one."""
    held: Any = node.args[2] if len(node.args) > 2 else None
    if held is None or held.op != "get_attr":
        return None
    return str(held.target), program.tensor(str(held.target))
