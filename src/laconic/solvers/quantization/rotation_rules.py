"""What operators make of values whose axis is rotated: rules for `rotatable`.

A rule says what the result of an operator is if its inputs are rotated along an axis, or refuses
with the operator's name. Kinds of results: "turned" (x R in place of x), "square" (the squares of
such values, which are only good for sums over the axis), "even" (the same number along the whole
axis), None (it does not have the axis, and is what it was).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from laconic.program import axes
from laconic.program.axes import Term
from laconic.program.equations import Dims, arguments, operator_name
from laconic.program.groups import Group
from laconic.program.program import Program, is_getitem

_MOVES = {
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "permute", "transpose", "t",
    "swapaxes", "movedim", "unsqueeze", "squeeze", "contiguous", "clone", "cat", "stack", "split",
    "split_with_sizes", "chunk", "unbind", "getitem", "slice", "select", "index", "index_select",
    "narrow", "roll", "flip", "repeat", "repeat_interleave", "dropout", "alias", "detach",
    "to", "_to_copy", "type_as", "numpy_T", "mT",
}  # fmt: skip
"""Operators that leave the values along the axis as they are."""
_LINEAR = {
    "neg", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_bilinear2d",
}  # fmt: skip
"""Operators that mix other dimensions linearly."""
CONSTANT = _MOVES | {"mean"}
"""Operators that give a constant for a constant."""


class Refused(Exception):
    """Why an axis cannot be rotated."""


@dataclass(frozen=True)
class Scene:
    """One program as rules see it.

    Attributes:
        program: its shapes propagated.
        terms: node → a term for every dimension, as in `Equations`.
    """

    program: Program
    terms: Mapping[fx.Node, "Dims | list[Dims]"]


@dataclass
class Way:
    """The operators on the way of one axis: what each makes of rotated values.

    Attributes:
        about: the program.
        group: the axis.
        kinds: node → "turned" (x R in place of x), "square" (of such values), "even" (the same
            number along the whole axis).
        keeps_ones: whether an operator lets only rotations pass that keep the all-ones vector.
        scaled: operators with a vector that multiplies the axis and one that is added to it.
    """

    about: Scene
    group: Group
    kinds: dict[fx.Node, str] = field(default_factory=dict[fx.Node, str])
    keeps_ones: bool = False
    scaled: list[tuple[fx.Node, Any, Any]] = field(default_factory=list[tuple[fx.Node, Any, Any]])

    # what rules use ---------------------------------------------------------------------------

    def no(self, node: fx.Node, why: str) -> Refused:
        origin = node.meta.get("origin")
        return Refused(f"{operator(node)} {node.name}{f' in {origin}' if origin else ''} {why}")

    def dims(self, node: Any) -> Dims:
        found = self.about.terms.get(node, ()) if isinstance(node, fx.Node) else ()
        return found if isinstance(found, tuple) else (found or [()])[0]

    def places(self, node: Any) -> list[int]:
        """The dimensions of a value that the axis stands in."""
        every = self.about.terms.get(node, ()) if isinstance(node, fx.Node) else ()
        outputs = every if isinstance(every, list) else [every]
        found = {
            place
            for dims in outputs
            for place, term in enumerate(dims)
            if self.group.atom in axes.atoms(term)
        }
        return sorted(found)

    def turned(self, node: fx.Node, *values: Any) -> bool:
        """Whether all of the values are rotated; False if none of them is."""
        kinds = [self.kinds.get(value) for value in values]
        if any(kind not in (None, "turned") for kind in kinds):
            raise self.no(node, "is not linear in it")
        if len({kind for kind in kinds}) > 1:
            raise self.no(node, "combines it with something that does not have the axis")
        return kinds[0] == "turned"

    def stored(self, node: fx.Node) -> None:
        if not self.about.program.tensor(str(node.target)).is_floating_point():
            raise Refused(f"{node.target} holds integers")
        self.kinds[node] = "turned"

    def rule(self, node: fx.Node) -> str | None:
        name = operator(node)
        if name in _MOVES:
            return self._moved(node, name)
        if name in _LINEAR:
            self.turned(node, node.args[0])
            return "turned"
        rule = _RULES.get(name)
        if rule is None:
            raise self.no(node, "is not known to keep a rotation")
        return rule(self, node, arguments(node))

    # operators --------------------------------------------------------------------------------

    def _moved(self, node: fx.Node, name: str) -> str | None:
        first: Any = node.args[0]
        values = list(first) if isinstance(first, (list, tuple)) else [first]
        carried = self.places(node)
        if not carried:
            if name in ("getitem", "slice"):
                return None  # another piece
            raise self.no(node, "picks single indices of it")
        kinds = {self.kinds.get(value) for value in values}
        if kinds == {None} or len(kinds) > 1:
            raise self.no(node, "puts it beside something that does not have the axis")
        return kinds.pop()

    def sum_(self, node: fx.Node, a: Any) -> str | None:
        """add, sub: of two rotated tensors."""
        one, two = a["self"], a["other"]
        if self.kinds.get(one) == self.kinds.get(two) == "even":
            return "even"
        if not self._aligned(one, two):
            raise self.no(node, "adds the same number to all of it")
        self.turned(node, one, two)
        return "turned"

    def _aligned(self, one: Any, two: Any) -> bool:
        """Whether two operands that broadcast have the axis in the same dimension."""
        at = [[p - len(self.dims(v)) for p in self.places(v)] for v in (one, two)]
        return at[0] == at[1]

    def factor(self, node: fx.Node, a: Any) -> str | None:
        """mul, div: by what does not depend on the index; by itself; by a stored vector."""
        one, two = a["self"], a["other"]
        kinds = self.kinds.get(one), self.kinds.get(two)
        divides = operator(node) == "div"
        if one is two and kinds[0] == "turned" and not divides:
            return "square"
        if kinds == ("turned", "turned") and not divides:
            vector = next((v for v in (two, one) if self._is_vector(v)), None)
            if vector is not None and self._aligned(one, two):
                self.scaled.append((node, vector, None))
                return "turned"
            raise self.no(node, "multiplies it, index by index")
        if kinds[0] in ("turned", "even", None) and kinds[1] in ("even", None):
            return kinds[0] or (None if divides else kinds[1])
        if kinds[0] in ("even", None) and kinds[1] == "turned" and not divides:
            return "turned"
        raise self.no(node, "is not linear in it")

    def _is_vector(self, value: Any) -> bool:
        """Whether a value is a stored vector along the axis that nothing else reads."""
        if not isinstance(value, fx.Node) or value.op != "get_attr":
            return False
        places, shape = self.places(value), value.meta["shape"]
        return len(places) == 1 and shape[places[0]] == torch.Size(shape).numel()

    def power(self, node: fx.Node, a: Any) -> str | None:
        """pow, square: the squares of rotated values."""
        if a.get("exponent", 2) != 2 or self.kinds.get(a["self"]) != "turned":
            raise self.no(node, "is not linear in it")
        return "square"

    def reduced(self, node: fx.Node, a: Any) -> str | None:
        """mean, sum: over other dimensions; of squares over the axis."""
        kind, carries = self.kinds.get(a["self"]), bool(self.places(node))
        if kind == "turned" and not carries:
            raise self.no(node, "sums over it")
        return kind if carries else None

    def length(self, node: fx.Node, a: Any) -> str | None:
        """The Euclidean norm over the axis."""
        order = a.get("ord", a.get("p"))
        if order not in (2, None) or self.places(node):
            raise self.no(node, "is not linear in it")
        self.turned(node, a.get("x", a.get("self")))
        return None

    def expanded(self, node: fx.Node, a: Any) -> str | None:
        """Expand: of other dimensions, or along the axis."""
        return self.kinds.get(a["self"], "even") if self.places(node) else None

    def chosen(self, node: fx.Node, a: Any) -> str | None:
        """Where, masked_fill: whole positions of rotated values, or zeros."""
        values = [a["self"], a["other"]] if "condition" in a else [a["self"], a["value"]]
        mask = a.get("condition", a.get("mask"))
        if self.kinds.get(mask) is not None:
            raise self.no(node, "is not linear in it")
        self.turned(node, *(v for v in values if isinstance(v, fx.Node) or v != 0))
        return "turned"

    def padded(self, node: fx.Node, a: Any) -> str | None:
        """Padding with zeros."""
        if a.get("value") or a.get("mode", "constant") != "constant":
            raise self.no(node, "pads it with something that is not zero")
        return "turned" if self.turned(node, a["self"]) else None

    def norm(self, node: fx.Node, a: Any) -> str | None:
        """Layer norm and RMS norm over the whole axis."""
        count = len(a["normalized_shape"])
        (place,) = self.places(a["input"]) or [-1]
        if not self.turned(node, a["input"]) or place < len(self.dims(a["input"])) - count:
            raise self.no(node, "divides every index of it by another number")
        self.keeps_ones = self.keeps_ones or "rms" not in operator(node)
        vectors = (a.get("weight"), a.get("bias"))
        if any(v is not None and not self._is_vector(v) for v in vectors):
            raise self.no(node, "has a weight that is not a stored vector")
        if any(v is not None for v in vectors):
            self.scaled.append((node, *vectors))
        return "turned"

    def linear(self, node: fx.Node, a: Any) -> str | None:
        """Input [..., in], weight [out, in]."""
        return self.product(node, a["input"], a["weight"], -1, -1, a["bias"])

    def matmul(self, node: fx.Node, a: Any) -> str | None:
        """As numpy."""
        del a
        right = node.args[1]
        return self.product(node, node.args[0], right, -1, -2 if len(self.dims(right)) > 1 else -1)

    def addmm(self, node: fx.Node, a: Any) -> str | None:
        """Self + mat1 @ mat2."""
        if (a.get("alpha"), a.get("beta")) != (1, 1):
            raise self.no(node, "is not known to keep a rotation")
        return self.product(node, a["mat1"], a["mat2"], -1, -2, a["self"])

    def convolution(self, node: fx.Node, a: Any) -> str | None:
        """Channels in, channels out."""
        if a["groups"] != 1 or a.get("transposed"):
            raise self.no(node, "treats its indices unlike")
        return self.product(node, a["input"], a["weight"], 1, 1, a["bias"])

    def product(
        self, node: fx.Node, left: Any, right: Any, left_sum: int, right_sum: int, bias: Any = None
    ) -> str | None:
        """A product that sums over one dimension of either side."""
        in_left, free_left = self._side(node, left, left_sum)
        in_right, free_right = self._side(node, right, right_sum)
        if in_left != in_right:
            raise self.no(node, "sums over it on one side only")
        if in_left and self.term(left, left_sum) != self.term(right, right_sum):
            raise self.no(node, "pairs its indices in another order")
        if free_left and free_right:
            raise self.no(node, "treats every index of it for itself")
        if not free_left and not free_right:
            return None
        if bias is not None and (free_left or self.kinds.get(bias) != "turned"):
            raise self.no(node, "adds a bias that does not have the axis")
        return "turned"

    def _side(self, node: fx.Node, value: Any, summed: int) -> tuple[bool, list[int]]:
        """Whether a factor has the axis where it is summed over, and where else."""
        if self.kinds.get(value) not in (None, "turned"):
            raise self.no(node, "is not linear in it")
        places = self.places(value) if value in self.kinds else []
        at = summed % max(len(self.dims(value)), 1)
        return at in places, [place for place in places if place != at]

    def term(self, value: Any, place: int) -> Term:
        return axes.resolve(self.dims(value)[place])

    def attention(self, node: fx.Node, a: Any) -> str | None:
        """Scaled dot product: q and k are summed over, v passes."""
        last = [len(self.dims(a[name])) - 1 for name in ("query", "key", "value")]
        at = [self.places(a[name]) for name in ("query", "key", "value")]
        fits = all(places in ([], [end]) for places, end in zip(at, last, strict=True))
        if not fits or bool(at[0]) != bool(at[1]) or self.places(a.get("attn_mask")):
            raise self.no(node, "treats every index of it for itself")
        if at[0] and self.term(a["query"], -1) != self.term(a["key"], -1):
            raise self.no(node, "pairs its indices in another order")
        self.turned(node, *(a[n] for n, p in zip(("query", "key", "value"), at, strict=True) if p))
        return "turned" if at[2] else None

    def embedding(self, node: fx.Node, a: Any) -> str | None:
        """Rows of a table."""
        if self.places(a["weight"]) != [1]:
            raise self.no(node, "looks it up")
        return "turned"

    def size(self, node: fx.Node, a: Any) -> str | None:
        """Only a size is read."""
        del node, a
        return None


_RULES: dict[str, Callable[[Way, fx.Node, Any], str | None]] = {
    "add": Way.sum_,
    "sub": Way.sum_,
    "mul": Way.factor,
    "div": Way.factor,
    "pow": Way.power,
    "square": Way.power,
    "mean": Way.reduced,
    "sum": Way.reduced,
    "linalg_vector_norm": Way.length,
    "norm": Way.length,
    "expand": Way.expanded,
    "expand_as": Way.expanded,
    "where": Way.chosen,
    "masked_fill": Way.chosen,
    "constant_pad_nd": Way.padded,
    "pad": Way.padded,
    "layer_norm": Way.norm,
    "rms_norm": Way.norm,
    "linear": Way.linear,
    "matmul": Way.matmul,
    "mm": Way.matmul,
    "bmm": Way.matmul,
    "addmm": Way.addmm,
    "conv1d": Way.convolution,
    "conv2d": Way.convolution,
    "convolution": Way.convolution,
    "scaled_dot_product_attention": Way.attention,
    "embedding": Way.embedding,
    "sym_size": Way.size,
}


def operator(node: fx.Node) -> str:
    """The operator's short name."""
    if is_getitem(node):
        return "getitem"
    return operator_name(node).removeprefix("aten.")
