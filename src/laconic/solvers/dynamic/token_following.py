"""Fewer tokens, and everything behind them that has to follow.

The stream behind each chosen layer is replaced by a stand-in, a stored tensor of the same shape.
The equations of the program then say where its token axis goes: every size that is written in the
graph follows it, and whatever ties it to something that cannot follow (a stored table of positions,
an input, an output, an operator that mixes tokens in an unknown way) is named. Where nothing is in
the way the operators that merge or drop take the stand-in's place.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from laconic.core.errors import SurgeryError
from laconic.program import axes, rewrites, surgery
from laconic.program.axes import Atom
from laconic.program.equations import arguments, operator_name
from laconic.program.program import Program
from laconic.solvers.dynamic import token_layers
from laconic.solvers.dynamic.token_axis import POOLS, Refused, Site, Stage, TokenAxis
from laconic.solvers.dynamic.token_layers import Layer
from laconic.solvers.dynamic.token_merging import By, Reduction, Writer, logarithm, reduce, weighed
from laconic.solvers.layers.attentions import FUSED, Mask, attentions

_ATEN: Any = torch.ops.aten


class Following:
    """A program (changed in place) whose chosen layers are to lose tokens.

    Args:
        program: a clone; shapes are propagated.
        names: the layers, which `token_layers.layers` finds.

    Raises:
        Refused: the first layer behind which something cannot follow.
    """

    def __init__(self, program: Program, names: Sequence[str]) -> None:
        self.program = program
        token_layers.take_idle_masks(program)
        chosen = [layer for layer in token_layers.layers(program) if layer.name in names]
        self.tokens = chosen[0].tokens if chosen else 0
        self.mask = token_layers.mask_input(program, self.tokens)
        self.stages = [self._begin(layer) for layer in chosen]
        self._numbers: dict[fx.Node, int] = {}
        if chosen:
            self._ready()
            self._axis = TokenAxis(program, self.stages, self._numbers)

    @property
    def lead(self) -> int:
        """Leading tokens that somebody reads by number; they stay as they are."""
        return max((stage.lead for stage in self.stages), default=0)

    # stand-ins ----------------------------------------------------------------------------

    def _begin(self, layer: Layer) -> Stage:
        if layer.tokens != self.tokens:
            raise Refused(layer.name, f"{layer.tokens} tokens, other layers have {self.tokens}")
        total = layer.total
        held = torch.zeros(total.meta["shape"], dtype=total.meta["dtype"])
        stand = self._stand_in(held, total)
        total.replace_all_uses_with(stand)
        return Stage(layer, stand)

    def _stand_in(self, held: torch.Tensor, behind: fx.Node) -> fx.Node:
        name = self.program.add_tensor("tokens.stand_in", held)
        with self.program.graph.inserting_after(behind):
            made = self.program.graph.get_attr(name)
        made.meta = {"origin": "", "shape": tuple(held.shape), "dtype": held.dtype}
        return made

    def _ready(self) -> None:
        """Number the stages; give each its own padding mask; read single tokens as runs."""
        padding = token_layers.made_of(self.program, self.mask)
        masks = {mask.reader: mask for one in attentions(self.program) for mask in one.masks}
        begun = {stage.stand: number for number, stage in enumerate(self.stages)}
        for node in list(self.program.graph.nodes):
            if node in begun:
                self._numbers[node] = begun[node]
                continue
            sources = [self._numbers[s] for s in node.all_input_nodes if s in self._numbers]
            if not sources or node.op == "output":
                continue
            self._numbers[node] = number = max(sources)
            if operator_name(node) == "aten.select":
                node = self._as_run(node, number)
            if self.mask is not None:
                self._mask(node, masks.get(node), self.stages[number], padding)

    def _as_run(self, node: fx.Node, number: int) -> fx.Node:
        """A place of an axis that may be that of tokens: a run of one, without its dimension."""
        see = arguments(node)
        source, dim, place = see["self"], see["dim"], see["index"]
        size = source.meta["shape"][dim]
        if size != self.tokens or not isinstance(place, int):
            return node
        place %= size
        with self.program.graph.inserting_before(node):
            run = self.program.graph.call_function(
                _ATEN.slice.Tensor, (source, dim, place, place + 1)
            )
            made = self.program.graph.call_function(_ATEN.squeeze.dim, (run, dim))
        run.meta = {"origin": node.meta.get("origin", "")}
        made.meta = dict(node.meta)
        run.meta |= {"shape": tuple(1 if d == dim % len(source.meta["shape"]) else s
                                    for d, s in enumerate(source.meta["shape"])),
                     "dtype": node.meta["dtype"]}  # fmt: skip
        node.replace_all_uses_with(made)
        self.program.graph.erase_node(node)
        self._numbers[run] = self._numbers[made] = number
        del self._numbers[node]
        return made

    # padding ------------------------------------------------------------------------------

    def _mask(self, node: fx.Node, hides: Mask | None, stage: Stage, padding: set[fx.Node]) -> None:
        """Take what hides padding out of an attention; elsewhere read the stage's own mask."""
        assert self.mask is not None
        if hides is not None and hides.value in padding and token_layers.hides_padding_only(
            self.program, hides.value, self.mask
        ):  # fmt: skip
            hides.take()  # what tokens weigh hides it too
            return
        if operator_name(node) == FUSED:
            raise Refused(
                stage.layer.name,
                f"{operator_name(node)} {node.name}: its mask is not that of the padding alone",
            )
        for source in node.all_input_nodes:
            inner = source.meta.get("shape", ())
            if source in padding and source.meta.get("dtype") is not None and (
                self.tokens in tuple(inner)[1:]
            ):  # fmt: skip
                node.replace_input_with(source, self._copied(source, stage, node, padding))

    def _copied(
        self, source: fx.Node, stage: Stage, before: fx.Node, padding: set[fx.Node]
    ) -> fx.Node:
        """`source`, computed from the stage's mask instead of the input."""
        if source is self.mask:
            if stage.mask is None:
                held = torch.ones(source.meta["shape"], dtype=source.meta["dtype"])
                stage.mask = self._stand_in(held, stage.stand)
            return stage.mask
        sized = source.meta.get("dtype") is not None and source.op == "call_function"
        if source not in padding or not sized:
            return source
        if source not in stage.copies:
            with self.program.graph.inserting_before(before):
                made = self.program.graph.node_copy(source)
            made.meta = dict(source.meta)
            stage.copies[source] = made
            self._numbers[made] = self.stages.index(stage)
            for inner in source.all_input_nodes:
                made.replace_input_with(inner, self._copied(inner, stage, made, padding))
        return stage.copies[source]

    # writing ------------------------------------------------------------------------------

    def shrink(self, by: By, removed: Mapping[str, int], proportional: bool) -> None:
        """Let each layer lose its tokens, in place.

        Args:
            by: see `token_merging.reduce`.
            removed: how many tokens each layer loses.
            proportional: attention counts a token as often as the tokens it stands for.

        Raises:
            SurgeryError: the graph does not fit afterwards.
        """
        shapes = self.program.output_node.meta.get("shape")
        sizes: dict[Atom, int] = {}
        gone = 0
        for stage in self.stages:
            gone += removed[stage.layer.name]
            rest = stage.rest
            assert isinstance(rest, Atom)
            sizes[rest] = rest.size - gone
        step = rewrites.Cut(self.program, lambda node: node, {}, sizes)
        for rewrite in self._axis.see.rewrites:
            rewrite.apply(step)
        weights = self._reduce(by, removed)
        for site in self._axis.sites:
            self._weigh(site, weights[site.stage], by == "merge" and proportional, sizes)
        surgery.remove_dead(self.program)
        self.program.propagate()
        if self.program.output_node.meta.get("shape") != shapes:
            raise SurgeryError("outputs have other shapes with fewer tokens", where="tokens")

    def _reduce(self, by: By, removed: Mapping[str, int]) -> list[fx.Node | None]:
        """Put the operators in the place of the stand-ins; the weights behind each."""
        weights: list[fx.Node | None] = []
        tokens, weight = self.tokens, None
        for stage in self.stages:
            layer = stage.layer
            write = Writer(self.program, stage.stand, str(layer.total.meta.get("origin", "")))
            if self.mask is not None and weight is None:
                weight = write(_ATEN.to.dtype, self.mask, layer.total.meta["dtype"])
            width = int(layer.total.meta["shape"][2])
            here = Reduction(layer, tokens, self.lead, removed[layer.name], width)
            made, weight = reduce(write, by, layer.total, weight, here)
            stage.stand.replace_all_uses_with(made)
            if stage.mask is not None:
                assert weight is not None
                real = write(_ATEN.gt.Scalar, weight, 0)
                real = write(_ATEN.to.dtype, real, stage.mask.meta["dtype"])
                stage.mask.replace_all_uses_with(real)
            tokens = here.left
            weights.append(weight)
        return weights

    def _weigh(
        self, site: Site, weight: fx.Node | None, proportional: bool, sizes: Mapping[Atom, int]
    ) -> None:
        """Let a sum over tokens count each as often as it should."""
        node, stage = site.node, self.stages[site.stage]
        write = Writer(self.program, node, str(node.meta.get("origin", "")))
        held: Any = node.args[0]
        if operator_name(node) in POOLS:
            axis = stage.axis if site.whole else stage.rest
            now = axes.new_size(axis, sizes)
            mean = operator_name(node) == "aten.mean"
            if weight is not None:
                own = weight if site.whole else write.run(weight, stage.lead, 2**63 - 1)
                scale = now / axis.size if mean else 1.0
                node.replace_input_with(
                    held, weighed(write, held, site.rank, own, site.place, scale)
                )
            elif not mean:
                node.replace_input_with(held, write(_ATEN.mul.Scalar, held, axis.size / now))
            return
        if weight is None or not (proportional or self.mask is not None):
            return
        if not proportional:  # padding has no weight, all others the same
            weight = write(_ATEN.gt.Scalar, weight, 0)
            weight = write(_ATEN.to.dtype, weight, stage.layer.total.meta["dtype"])
        own = weight if site.whole else write.run(weight, stage.lead, 2**63 - 1)
        bias = logarithm(write, own, site.rank)
        if operator_name(node) == FUSED:
            rewrites.set_argument(node, "attn_mask", bias)
        else:
            node.replace_input_with(held, write(_ATEN.add.Tensor, held, bias))


def follow(program: Program, names: Sequence[str]) -> tuple[Following, dict[str, str]]:
    """A changed clone of `program` with stand-ins behind as many of the layers as can be followed.

    Returns:
        It, and refused layer → what was in the way.
    """
    wanted, refused = list(names), dict[str, str]()
    while True:
        work = program.clone()
        work.propagate()
        try:
            return Following(work, wanted), refused
        except Refused as reason:
            refused[reason.layer] = reason.reason
            wanted.remove(reason.layer)
