"""Let what is left of a network make up for what was cut out of it, front to back.

Every linear map or convolution behind a cut is fitted anew by least squares: its inputs come from
the network compressed so far, its targets from the dense one (asymmetric form; ThiNet, He et al.
2017 "Channel pruning", Hubara et al. 2021). Where the output of the map is added to a residual
stream, the target is the dense *sum* less what the compressed stream already carries, so that every
block repairs the drift of those before it. A batch norm behind the map is rewritten to express the
fitted scale and bias with statistics that are true of its new input, so the result trains on well;
batch norms behind anything else are measured anew.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from laconic.core.progress import SILENT, Progress
from laconic.program.equations import operator_name
from laconic.program.program import Program
from laconic.solvers import least_squares
from laconic.solvers.least_squares import Fit
from laconic.solvers.recalibrate import Norm, norms, remeasure
from laconic.solvers.weights import obs_weights
from laconic.statistics.convoy import Convoy
from laconic.statistics.gram import Gram
from laconic.statistics.layers import Layer, layers, pick
from laconic.statistics.walk import Walk

Changes = Mapping[str, Mapping[int, Tensor]]
Hold = Callable[[Fit, Gram, bool, Tensor], Fit]
"""What a layer can hold of a fit: by the moments of its rows, its bias, and output scales."""

_SAFE = {
    "batch_norm", "view", "reshape", "flatten", "unflatten", "permute", "transpose", "t", "cat",
    "split", "split_with_sizes", "chunk", "unbind", "getitem", "slice", "select", "pad",
    "constant_pad_nd", "unsqueeze", "squeeze", "expand", "contiguous", "clone", "to", "dropout",
    "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "embedding",
}  # fmt: skip
_PASSING = {"dropout", "feature_dropout", "alpha_dropout", "contiguous", "clone"}


@dataclass(frozen=True)
class Place:
    """A layer to refit, and how its output reaches the node that is to equal the dense one.

    Attributes:
        layer: in the small program.
        anchor: node of the small program whose dense value is the target.
        norm: batch norm on the way, if any.
        other: what is added on the way, if anything.
    """

    layer: Layer
    anchor: fx.Node
    norm: Norm | None
    other: fx.Node | None


@dataclass
class Report:
    """What was done: relative squared error left at each refitted layer, and notes."""

    errors: dict[str, float] = field(default_factory=dict[str, float])
    ridges: dict[str, float] = field(default_factory=dict[str, float])
    recalibrated: list[str] = field(default_factory=list[str])
    notes: list[str] = field(default_factory=list[str])


@torch.no_grad()
def compensate(
    dense: Program,
    small: Program,
    changes: Changes,
    batches: Sequence[Sequence[Tensor]],
    *,
    refit: bool = True,
    consumers_only: bool = False,
    recalibrate: bool = True,
    seed: int = 0,
    progress: Progress = SILENT,
    holds: Mapping[str, Hold] | None = None,
) -> Report:
    """Refit and recalibrate `small` in place against `dense`.

    Args:
        dense: the program before the cut, in eval mode.
        small: what `surgery.cut(dense, ...)` gave: nodes of one name are each other's twins.
        changes: what it gave beside it: tensor → dimension → kept positions.
        batches: flat inputs, all under way at once in both programs.
        refit: fit weights behind the cut anew.
        consumers_only: of those, only the ones that lost input columns.
        recalibrate: measure batch norms that no refit rewrote.
        seed: of the choice of positions that serve as rows.
        progress: moved on by one for each layer.
        holds: weights that are replaced by what they can hold of a fit (a low rank, say).
    """
    report, holds = Report(), holds or {}
    drifted = drift(dense, small, changes, holds)
    twin = _twins(small, dense)
    places = _places(small, changes, drifted, consumers_only, report, holds, twin) if refit else []
    rewritten = {place.norm.node for place in places if place.norm is not None}
    loose = [
        norm
        for norm in norms(small)
        if recalibrate and norm.source in drifted and norm.node not in rewritten
    ]
    work = _Work(dense, small, changes, batches, seed, report, holds, twin)
    work.run(places, loose, progress)
    return report


@torch.no_grad()
def towards(
    dense: Program,
    small: Program,
    goals: Mapping[str, str],
    batches: Sequence[Sequence[Tensor]],
    *,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Report:
    """Refit `small`, from which whole layers are gone, in place against `dense`.

    Args:
        dense: the program before, in eval mode.
        small: another graph, whose nodes of `goals` have the shapes of their twins.
        goals: sums of `small` → the sums of `dense` that they are to equal; in both in graph order.
            What is added there is refitted where it is a linear map or a convolution.
        batches: flat inputs, all under way at once in both programs.
        seed: of the choice of positions that serve as rows.
        progress: moved on by one for each layer.
    """
    report, named = Report(), {node.name: node for node in dense.graph.nodes}
    places = [place for place in _free(small) if place.anchor.name in goals]
    rewritten = {place.norm.node for place in places if place.norm is not None}
    twin = {place.anchor: named[goals[place.anchor.name]] for place in places}
    work = _Work(dense, small, {}, batches, seed, report, {}, twin)
    order = work.behind.order.place
    first = min((order[place.layer.node] for place in places), default=len(order))
    loose = [n for n in norms(small) if n.node not in rewritten and order[n.node] > first]
    work.run(places, loose, progress)
    return report


def steerable(program: Program) -> set[fx.Node]:
    """Nodes that `towards` can bring to a goal: what a layer with weights of its own adds up to."""
    return {place.anchor for place in _free(program)}


class _Work:
    """Both convoys, and what is done where they stand."""

    def __init__(
        self,
        dense: Program,
        small: Program,
        changes: Changes,
        batches: Sequence[Sequence[Tensor]],
        seed: int,
        report: Report,
        holds: Mapping[str, Hold],
        twin: Mapping[fx.Node, fx.Node],
    ) -> None:
        self.small, self.changes, self.seed, self.report = small, changes, seed, report
        self.holds, self.twin = holds, twin
        self.ahead, self.behind = Convoy(dense, batches), Convoy(small, batches)
        self.fitted: set[fx.Node] = set()

    def run(self, places: Sequence[Place], loose: Sequence[Norm], progress: Progress) -> None:
        order = self.behind.order.place
        jobs: list[Place | Norm] = [*places, *loose]
        jobs.sort(key=lambda job: order[job.layer.node if isinstance(job, Place) else job.node])
        for job in progress.track(jobs, "compensating", len(jobs)):
            if isinstance(job, Place):
                self.refit(job, [other for other in places if other is not job])
            else:
                self.recalibrate(job)

    def recalibrate(self, norm: Norm) -> None:
        self.behind.before(norm.node)
        if norm.shared:
            self.report.notes.append(f"{norm.mean}: used by several nodes, not measured anew")
        else:
            remeasure(self.small, norm, self.behind)
            self.report.recalibrated.append(norm.mean)

    def refit(self, place: Place, others: Sequence[Place]) -> None:
        layer = place.layer
        pending = [self.twin[p.anchor] for p in others if p.layer.node not in self.fitted]
        self.behind.before(layer.node)
        self.ahead.past(self.twin[place.anchor], hold=pending)
        halves = self._moments(place)
        self.fitted.add(layer.node)
        if self.twin[place.anchor] not in pending:
            self.ahead.forget(self.twin[place.anchor])
        _write(self.small, place, halves, self.report, self.holds.get(layer.weight))

    def _moments(self, place: Place) -> tuple[Gram, Gram]:
        layer, halves = place.layer, (Gram(), Gram())
        scale, shift, _ = _scaling(self.small, place.norm)
        rows = self.changes.get(layer.weight, {}).get(layer.out_dim)
        columns = layer.matrix(self.small.tensor(layer.weight)).shape[1]
        for front, back in zip(self.ahead, self.behind, strict=True):
            target = front.values[self.twin[place.anchor]]
            axis = layer.channel_axis(target)
            if rows is not None:
                target = target.index_select(axis, rows.to(target.device))
            if place.other is not None:
                target = target - _value(back, place.other)
            x = back.values[layer.source]
            positions = layer.positions(target)
            chosen = pick(positions, columns, len(self.behind), self.seed)
            wanted = (layer.rows_out(target, chosen).double() - shift) / scale
            taken = layer.rows_in(x, chosen)
            middle = len(taken) // 2 if chosen is None else int((chosen < positions // 2).sum())
            halves[0].update(taken[:middle], wanted[:middle].to(taken))
            halves[1].update(taken[middle:], wanted[middle:].to(taken))
        return halves


def drift(
    dense: Program, small: Program, changes: Changes, moved: Collection[str] = ()
) -> set[fx.Node]:
    """Nodes of `small` whose value may differ from the dense one with the cut channels left out.

    `moved`: weights that differ although nothing was cut from them.
    """
    consumers = {
        layer.node
        for layer in layers(small)
        if layer.in_dim in changes.get(layer.weight, {}) or layer.weight in moved
    }
    found: set[fx.Node] = set()
    cut: set[fx.Node] = set()
    twin = _twins(small, dense)
    for new in small.graph.nodes:
        if new in twin and new.meta.get("shape") != twin[new].meta.get("shape"):
            cut.add(new)
        sources = new.all_input_nodes
        if new.op != "call_function":
            continue
        hit = any(source in cut for source in sources if source.op != "get_attr")
        if any(s in found for s in sources) or new in consumers or (hit and not _safe(new)):
            found.add(new)
    return found


def _twins(small: Program, dense: Program) -> dict[fx.Node, fx.Node]:
    """Node → the node of that name; a cut adds nodes that compute sizes, and these have none."""
    named = {node.name: node for node in dense.graph.nodes}
    return {node: named[node.name] for node in small.graph.nodes if node.name in named}


def _safe(node: fx.Node) -> bool:
    name = operator_name(node).removeprefix("aten.")
    return name in _SAFE or torch.Tag.pointwise in getattr(node.target, "tags", ())


def with_bias(program: Program, found: Iterable[Layer]) -> list[Layer]:
    """The layers whose refit has a bias: their own, or that of a batch norm behind them."""
    by_source = {norm.node: norm for norm in norms(program)}
    return [x for x in found if x.bias is not None or _place(x, by_source).norm is not None]


def _places(
    small: Program,
    changes: Changes,
    drifted: set[fx.Node],
    consumers_only: bool,
    report: Report,
    moved: Collection[str],
    twin: Mapping[fx.Node, fx.Node],
) -> list[Place]:
    by_source = {norm.node: norm for norm in norms(small)}
    found: list[Place] = []
    for layer in layers(small):
        lost = layer.in_dim in changes.get(layer.weight, {}) or layer.weight in moved
        if not lost and (consumers_only or layer.source not in drifted):
            continue
        place = _place(layer, by_source)
        why = "used by several nodes" if layer.shared else ""
        why = "a grouped convolution" if layer.groups != 1 else why
        if not why and _rows(layer, place.anchor) != _rows(layer, twin[place.anchor]):
            why = "what it runs over was cut as well"  # channels, of a layer that mixes tokens
        if why:
            report.notes.append(f"{layer.weight}: {why}, keeps its weights")
        else:
            found.append(place)
    return found


def _free(program: Program) -> list[Place]:
    """Layers whose weights are neither shared nor in groups."""
    by_source = {norm.node: norm for norm in norms(program)}
    return [_place(x, by_source) for x in layers(program) if x.groups == 1 and not x.shared]


def _rows(layer: Layer, node: fx.Node) -> list[int]:
    """The sizes of a layer's output that are not its channels."""
    sizes = node.meta["shape"]
    return [size for dim, size in enumerate(sizes, 1 + layer.space) if dim != len(sizes)]


def _place(layer: Layer, by_source: Mapping[fx.Node, Norm]) -> Place:
    """Follow the output of a layer as far as it stays an affine map of it, and past one sum."""
    node, norm = layer.node, None
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.op != "call_function" or user.meta.get("shape") != node.meta.get("shape"):
            break
        name = operator_name(user).removeprefix("aten.")
        other = _added(user, node) if name == "add" else None
        if other is not None:
            return Place(layer, user, norm, other)
        found = by_source.get(user)
        if found is not None and norm is None and found.source is node and _fits(layer, found):
            norm = found
        elif name not in _PASSING:
            break
        node = user
    return Place(layer, node, norm, None)


def _fits(layer: Layer, norm: Norm) -> bool:
    """Whether a batch norm can be rewritten together with the layer before it."""
    flat = layer.space > 0 or len(layer.node.meta["shape"]) == 2
    return flat and not norm.shared and (norm.weight is None) == (norm.bias is None)


def _added(node: fx.Node, one: fx.Node) -> fx.Node | None:
    """The other operand of a plain sum that `one` is an operand of."""
    if len(node.args) != 2 or node.kwargs:
        return None
    first, second = node.args
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node) or first is second:
        return None
    return second if first is one else first


def _value(walk: Walk, node: fx.Node) -> Tensor:
    """The value of a node that may lie ahead; the walk stays where it is."""
    if node.op == "get_attr":
        return walk.program.tensor(str(node.target)).detach()
    if node not in walk.values:
        walk = walk.fork()
        walk.run(walk.order.place[node] + 1, hold=[node])
    return walk.values[node]


def _scaling(small: Program, norm: Norm | None) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm behind a layer as scale and shift, and what the layer's weights are scaled by.

    A channel that the norm has switched off gets scale 1, and its weights are scaled to nothing.
    float64 `[out]`, or scalars where there is no norm.
    """
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    if norm is None:
        return one, zero, one
    scale, shift = norm.affine(small)
    dead = scale.abs() <= 1e-6 * scale.abs().max()
    alive = torch.where(dead, torch.ones_like(scale), scale)
    return alive, shift, scale / alive


def _write(
    small: Program, place: Place, halves: tuple[Gram, Gram], report: Report, hold: Hold | None
) -> None:
    """Fit one layer and store what came out, in it and in the batch norm behind it."""
    layer, norm = place.layer, place.norm
    old = small.tensor(layer.weight)
    scale, shift, shrunk = _scaling(small, norm)
    prior = layer.matrix(old.detach()).double() * shrunk.reshape(-1, 1)
    whole = Gram()
    whole.merge(halves[0])
    whole.merge(halves[1])
    why = "" if torch.isfinite(whole.scatter).all() else "its inputs are too large to be multiplied"
    if float(whole.scatter.diagonal().sum()) <= 0.0:
        why = "calibration data give it a constant input"
    if why:
        report.notes.append(f"{layer.weight}: {why}, keeps its weights")
        return
    bias = layer.bias is not None or norm is not None
    fit = least_squares.refit(halves, prior, bias=bias)
    if hold is not None:
        fit = hold(fit, whole, bias, scale)
    elif layer.weight in small.sparse:
        fit = obs_weights.held(fit, whole, bias, layer.matrix(old.detach()) == 0)
    if whole.count < whole.mean.numel():
        report.notes.append(
            f"{layer.weight}: {whole.count} calibration rows for {whole.mean.numel()} columns, "
            "refitted only as far as they reach; more samples would help"
        )
    small.set_tensor(layer.weight, layer.weight_from(fit.weight, old))
    if layer.bias is not None:
        small.set_tensor(layer.bias, fit.bias.to(small.tensor(layer.bias)))
    if norm is not None:
        _express(small, place, fit, whole, scale, shift)
    spread = float(whole.target_scatter.sum()) / whole.count
    report.errors[layer.weight] = float(fit.error.sum()) / max(spread, 1e-30)
    report.ridges[layer.weight] = fit.ridge


def _express(
    small: Program, place: Place, fit: Fit, whole: Gram, scale: Tensor, shift: Tensor
) -> None:
    """Rewrite the batch norm so that layer and norm together are the fit."""
    norm = place.norm
    assert norm is not None
    mean = fit.weight @ whole.mean
    if place.layer.bias is not None:
        mean = mean + fit.bias
    else:
        shift = shift + scale * fit.bias
    if norm.weight is None:  # cannot scale, but can move: its mean takes the bias
        variance = small.tensor(norm.variance).double()
        norm.measure(small, -shift * (variance + norm.eps).sqrt(), variance)
        return
    variance = ((fit.weight @ whole.covariance) * fit.weight).sum(1)
    norm.express(small, scale, shift, mean, variance)
