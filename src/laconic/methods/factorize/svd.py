"""Low rank: one linear layer or convolution becomes two (or more) that are cheaper together.

Idea: a weight whose outputs live in few directions is a product of smaller ones. `kind` says how a
convolution is taken apart: "channel" (k x k to r channels, then 1x1), "spatial" (k x 1, then
1 x k), "tucker2" (1x1, k x k, 1x1) or "cp" (1x1, two depthwise, 1x1). What is kept is what matters
for the layer's outputs on calibration data (`weighting: covariance`), the ranks come from one
budget for all layers, and with `repair: refit` each layer is refitted front to back, as far as its
rank allows, to give what the original network gives.

Papers: Denton et al. 2014, Jaderberg et al. 2014, Zhang et al. 2015 (asymmetric, by data), Lebedev
et al. 2015 (CP), Kim et al. 2016 (Tucker-2); weighting as in ASVD (Yuan et al. 2023) and SVD-LLM
(Wang et al. 2024).

Helps: wide convolutions and the feed-forward part of transformers whose inputs are correlated.
Does not help: narrow layers, 1x1 bottlenecks and networks bound by the number of operators, of
which there are more afterwards; pruned channels are faster at the same multiply-adds. Depthwise and
grouped convolutions are left alone.

Cost: one forward pass over `samples` and one eigenvalue problem per layer; with refit about as much
as `prune.channels`. `cp` fits every layer at several ranks, which takes minutes on large ones.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from laconic.core.errors import RecipeError
from laconic.core.suggest import nearest
from laconic.methods.base import Context, Method, Outcome
from laconic.program.cost import cost
from laconic.program.equations import operator_name
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.channels.compensate import compensate
from laconic.solvers.finite import refuse_broken
from laconic.solvers.layers import chain
from laconic.solvers.least_squares import Fit, residual
from laconic.solvers.quantization.metric import Metric, metric, streamed
from laconic.solvers.recalibrate import norms, recalibrate
from laconic.solvers.sharing import low_rank, ranks
from laconic.solvers.sharing.low_rank import Factors, Kind
from laconic.solvers.sharing.ranks import Of, Option, Scope
from laconic.statistics.batches import Batches, Flat
from laconic.statistics.convoy import affordable
from laconic.statistics.gram import Gram
from laconic.statistics.layers import Layer, layers

_BATCH = 128  # samples that go through the network side by side


class FactorizeSvd(Method):
    """Options of `factorize.svd`. Sites are names of weights.

    Attributes:
        kind: how convolutions are taken apart; linear layers and 1x1 convolutions become A B.
        weighting: "covariance" keeps what matters for the outputs on data, "none" what is large.
        energy: part of each layer's output energy that stays; None goes by `ratio`.
        ratio: part of the cost that is to go, from 0 to below 1.
        of: the cost: multiply-adds or parameters.
        scope: "global" is one budget for the whole program, spent where it harms least; "layer"
            takes the same part of every layer.
        repair: "refit" layers by least squares against the original, front to back; "norms" only
            measures batch norms anew; "none".
        damping: added to the covariance, in units of the mean variance of the inputs.
        samples: calibration samples, unlabelled, at most.
        ranks: weight → ranks (tucker2: of inputs, of outputs), in place of everything that chooses
            them (a replay has it).
    """

    quick: ClassVar[Mapping[str, Any]] = {"energy": 0.5, "samples": 16}

    kind: Kind = "channel"
    weighting: Literal["covariance", "none"] = "covariance"
    energy: float | None = Field(default=None, gt=0, le=1)
    ratio: float = Field(default=0.3, ge=0, lt=1)
    of: Of = "macs"
    scope: Scope = "global"
    repair: Literal["refit", "norms", "none"] = "refit"
    damping: float = Field(default=1e-3, gt=0)
    samples: int = Field(default=1024, ge=1)
    ranks: dict[str, list[int]] | None = None

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """Replace layers by chains of cheaper ones.

        Raises:
            RecipeError: sites or ranks that fit no layer.
            BudgetError: the ratio cannot be reached; says how far it can go and what is in the way.
            DataError: calibration data that are missing, do not fit, or are not finite; or a
                parameter that is not finite.
        """
        refuse_broken(program)
        dense = program.clone()
        if _device(dense) != context.device:
            dense = dense.to(context.device)
        dense.propagate()
        job = _Job(self, dense, context)
        job.choose(sites)
        return job.finish(_device(program))


class _Job:
    """One application: the program on its device, its layers, its data, what was found so far."""

    def __init__(self, method: FactorizeSvd, dense: Program, context: Context) -> None:
        self.method, self.dense, self.context = method, dense, context
        self.notes: list[str] = []
        self.options: dict[str, Option] = {}
        self.factors: dict[str, Factors] = {}
        self.layers = {layer.weight: layer for layer in layers(dense)}
        self.shapes = {name: chain.shape_of(dense, layer) for name, layer in self.layers.items()}
        self.kinds: dict[str, Kind] = {
            n: low_rank.fitting(method.kind, shape) for n, shape in self.shapes.items()
        }
        self._batches: list[Flat] | None = None
        self._norms = {norm.source: norm for norm in norms(dense)}

    # choosing -----------------------------------------------------------------------------

    def choose(self, sites: Sites) -> None:
        """Fill `options`: what each layer that is to be replaced gets."""
        method = self.method
        if method.ranks is not None:
            wanted = self._asked(method.ranks)
            free = self._free(list(wanted))
            for layer in free:
                option = self._option(layer.weight, wanted[layer.weight])
                if option is not None:
                    self.options[layer.weight] = option
            return
        free = self._free(sites.choose(self._names()))
        if method.ratio == 0 and method.energy is None:
            self.notes.append("ratio is 0: nothing is replaced")
            return
        found: dict[str, list[Option]] = {}
        for layer, (seen, _) in self._metrics(free):
            name, shape = layer.weight, self.shapes[layer.weight]
            known = ranks.options(self.kinds[name], shape, self._weight(layer), *seen)
            found[name] = [ranks.whole(shape), *known]
            if not known:
                self.notes.append(f"{name}: no rank makes it cheaper, left whole")
        if found:
            self._take(found)
        else:
            self.notes.append("no layer of this program can be replaced")

    def _take(self, found: Mapping[str, Sequence[Option]]) -> None:
        method, whole = self.method, cost(self.dense)
        taken = ranks.take(
            found,
            energy=method.energy,
            ratio=method.ratio,
            of=method.of,
            scope=method.scope,
            total=whole.macs if method.of == "macs" else whole.params,
        )
        self.options = {name: option for name, option in taken.items() if option.ranks}
        for name, known in found.items():
            if name in self.options or len(known) == 1:
                continue
            if method.energy is not None:
                self.notes.append(f"{name}: lower ranks keep less of its energy, left whole")
            elif method.scope == "layer":
                part = ranks.furthest(known, method.of)
                self.notes.append(f"{name}: {method.of} can fall by {part:.1%} at most, left whole")

    def _names(self) -> list[str]:
        """Weights that sites may name: those of layers, and those that are refused in words."""
        return [*self.layers, *_others(self.dense, self.layers)]

    def _free(self, names: Sequence[str]) -> list[Layer]:
        """The layers of these names that can be taken apart; why the others cannot is noted."""
        others = _others(self.dense, self.layers)
        found: list[Layer] = []
        for name in names:
            reason = others.get(name) or _refusal(self.layers[name], self.kinds[name])
            if reason is None:
                found.append(self.layers[name])
            else:
                self.notes.append(f"{name}: {reason}, left whole")
        return found

    def _asked(self, wanted: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
        """Ranks by name, in the order of the graph.

        Raises:
            RecipeError: a name that no layer has, or ranks that it cannot have.
        """
        for name, asked in wanted.items():
            if name not in self.layers:
                raise RecipeError("no layer has this weight", where=name,
                                  hint=nearest(name, list(self.layers)))  # fmt: skip
            count = 2 if self.kinds[name] == "tucker2" else 1
            if len(asked) != count or min(asked) < 1:
                raise RecipeError(
                    f"ranks {list(asked)}, expected {count} of at least 1 for {self.kinds[name]}",
                    where=name,
                )
        return {name: tuple(wanted[name]) for name in self.layers if name in wanted}

    def _option(self, name: str, wanted: tuple[int, ...]) -> Option | None:
        shape = self.shapes[name]
        held = ranks.held(self.kinds[name], shape, wanted)
        macs, params = low_rank.cost(self.kinds[name], shape, held)
        if macs < shape.macs and params < shape.params:
            return Option(held, macs, params, 0.0)
        self.notes.append(f"{name}: ranks {list(wanted)} are not cheaper than it, left whole")
        return None

    # data ---------------------------------------------------------------------------------

    def _metrics(
        self, free: Sequence[Layer]
    ) -> Iterator[tuple[Layer, tuple[Metric, Tensor | None]]]:
        """Each layer with the metric of its output's errors, and the mean input it makes up for."""
        if self.method.weighting == "none":
            yield from ((layer, ((None, None), None)) for layer in free)
            return
        for layer, gram in streamed(
            self.dense, free, self.batches(), self.context.seed, self.context.progress
        ):
            norm = self._norms.get(layer.node)
            norm = norm if len(layer.node.users) == 1 else None
            scale = norm.affine(self.dense)[0] if norm is not None else None
            moved = layer.bias is not None or (norm is not None and self.method.repair != "none")
            mean = gram.mean.double().cpu() if moved else None
            yield layer, (self.metric_of(layer.weight, gram, moved, scale), mean)

    def metric_of(self, name: str, gram: Gram, bias: bool, scale: Tensor | None) -> Metric:
        """The metric; what the data fall short of is noted."""
        found, note = metric(gram, bias=bias, scale=scale, damping=self.method.damping)
        if note and f"{name}: {note}" not in self.notes:
            self.notes.append(f"{name}: {note}")
        return found

    def batches(self) -> list[Flat]:
        """The calibration data, as many samples as fit into memory in both programs."""
        if self._batches is None:
            samples, afford = self.method.samples, affordable(self.dense, walks=2)
            if afford < samples:
                self.notes.append(
                    f"calibration was held to {afford} samples, more do not fit into memory"
                )
            context = self.context
            self._batches = list(
                Batches(self.dense, context.task, min(samples, afford), context.device, _BATCH)
            )
        return self._batches

    # making -------------------------------------------------------------------------------

    def finish(self, device: torch.device) -> Outcome:
        """The result, with what replays it and what it cost and saved."""
        method, small = self.method, self.dense.clone()
        errors: dict[str, float] = {}
        if method.repair == "refit" and self.options:
            self._from_original(small, [n for n in self.options if self.kinds[n] == "cp"])
            started, self.factors = self.factors, {}
            holds = {name: _Hold(self, name, started.get(name)) for name in self.options}
            report = compensate(
                self.dense, small, {}, self.batches(), seed=self.context.seed,
                progress=self.context.progress, holds=holds,
            )  # fmt: skip
            errors, self.notes = report.errors, [*self.notes, *report.notes]
        self._from_original(small, [name for name in self.options if name not in self.factors])
        self.notes += [f"{name}: its zeros are gone, the factors are dense"
                       for name in self.options if name in self.dense.sparse]  # fmt: skip
        if self.options:
            self._replace(small)
        if method.repair == "norms" and self.options:
            recalibrate(small, self.batches(), self.context.progress)
        before, after = cost(self.dense), cost(small)
        used = {name: list(option.ranks) for name, option in self.options.items()}
        return Outcome(
            program=small if _device(small) == device else small.to(device),
            resolved={**method.model_dump(mode="json", exclude_defaults=True), "ranks": used},
            notes=[*dict.fromkeys(self.notes)],
            figures={
                "macs": [before.macs, after.macs],
                "parameters": [before.params, after.params],
                "ranks": used,
                "lost": {name: option.harm for name, option in self.options.items()},
                "refit_error": errors,
            },
        )

    def _from_original(self, small: Program, names: Sequence[str]) -> None:
        """Factors of the original weights; a bias takes up the mean of what is lost."""
        wanted = [layer for name, layer in self.layers.items() if name in names]
        for layer, (seen, mean) in self._metrics(wanted) if wanted else ():
            name, kind, weight = layer.weight, self.kinds[layer.weight], self._weight(layer)
            found = low_rank.decompose(kind, weight, self.options[name].ranks, *seen)
            if found is None:
                self.notes.append(f"{name}: {kind} did not converge at this rank, left whole")
                del self.options[name]
                continue
            self.factors[name] = found
            if layer.bias is not None and mean is not None:
                missing = (weight.flatten(1) - low_rank.product(kind, found)) @ mean
                old = small.tensor(layer.bias).detach()
                small.set_tensor(layer.bias, (old.double() + missing.to(old.device)).to(old))

    def _replace(self, small: Program) -> None:
        places = {layer.weight: layer for layer in layers(small)}
        for name, option in self.options.items():
            stages = low_rank.stages(self.kinds[name], self.shapes[name], option.ranks)
            chain.replace(small, places[name], stages, self.factors[name])
        small.graph.eliminate_dead_code()
        small.drop_unused()
        small.propagate()
        small.recompile()

    def _weight(self, layer: Layer) -> Tensor:
        """float64 `[out, into, *kernel]` on the CPU."""
        matrix = layer.matrix(self.dense.tensor(layer.weight).detach()).double().cpu()
        return matrix.reshape(len(matrix), -1, *layer.kernel)


@dataclass(frozen=True)
class _Hold:
    """What a low-rank layer can hold of a fit; leaves its factors with the job."""

    job: _Job
    name: str
    start: Factors | None

    def __call__(self, fit: Fit, gram: Gram, bias: bool, scale: Tensor) -> Fit:
        job, name = self.job, self.name
        kind, shape = job.kinds[name], job.shapes[name]
        weight = fit.weight.cpu().reshape(shape.out, shape.into, *shape.kernel)
        moment, rows = None, None
        if job.method.weighting == "covariance":
            moment, rows = job.metric_of(name, gram, bias, scale if scale.ndim else None)
        if self.start is not None:
            found = low_rank.polished(kind, self.start, weight, moment)
        else:
            found = low_rank.decompose(kind, weight, job.options[name].ranks, moment, rows)
        assert found is not None  # only cp may find nothing, and it has a start
        job.factors[name] = found
        held = low_rank.product(kind, found).to(fit.weight)
        offset = gram.target_mean - held @ gram.mean if bias else torch.zeros_like(fit.bias)
        made = Fit(held, offset, fit.ridge, fit.error)
        return replace(made, error=residual(made, gram))


def _refusal(layer: Layer, kind: Kind) -> str | None:
    """Why a layer cannot be taken apart."""
    if layer.groups != 1:
        return "depthwise and grouped convolutions have nothing to factorise between channels"
    if layer.shared:
        return "its weight or bias is tied or used by several operators"
    if kind == "spatial" and layer.space < 2:
        return "spatial needs two spatial dimensions"
    return None


def _others(program: Program, known: Mapping[str, Layer]) -> dict[str, str]:
    """Weights of two and more dimensions that are no layer's here → why they stay."""
    found: dict[str, str] = {}
    for node in program.graph.nodes:
        if node.op != "get_attr":
            continue
        name = program.aliases.get(str(node.target), str(node.target))
        tensor = program.tensor(name)
        if name in known or not isinstance(tensor, torch.nn.Parameter) or tensor.ndim < 2:
            continue
        used = ", ".join(sorted({operator_name(user) for user in node.users}))
        found[name] = f"{used} uses it, not a plain linear layer or a 1-d or 2-d convolution"
    return found


def _device(program: Program) -> torch.device:
    return next((tensor.device for _, tensor in program.tensors()), torch.device("cpu"))
