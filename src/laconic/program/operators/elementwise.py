"""Operators that work element by element: all operands share their axes, up to broadcasting."""

from collections.abc import Mapping

from torch import fx

from laconic.program.equations import Arguments, Dims, Equations, Row


def pointwise(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """Operands broadcast against each other."""
    del a
    return see.broadcast(node, *(see.dims(source) for source in node.all_input_nodes))


def same(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """The result has the axes of the first operand; further operands do not matter."""
    del a
    return see.dims(node.args[0])


def prelu(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """One slope per channel (dimension 1), or one for all."""
    dims, weight = see.dims(a["self"]), see.dims(a["weight"])
    if weight and weight[0].size > 1:
        see.same(dims[1 if len(dims) > 1 else 0], weight[0], node)
    return dims


def glu(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """The first half of an axis times the sigmoid of the second half."""
    dims, dim = list(see.dims(a["self"])), a["dim"] % len(see.dims(a["self"]))
    halves = see.pieces(node, dims[dim], [dims[dim].size // 2])
    if halves is None:
        return ()
    see.same(halves[0], halves[1], node)
    dims[dim] = halves[0]
    return tuple(dims)


def bucketize(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """Looks every element up among boundaries, which stay."""
    see.freeze(node, "values are looked up among them", *see.dims(a.get("boundaries")))
    return see.dims(a["input"] if "input" in a else a["self"])


_SAME = (
    "dropout feature_dropout alpha_dropout feature_alpha_dropout clone contiguous to _to_copy "
    "alias detach lift_fresh_copy lift_fresh type_as softmax _softmax log_softmax _log_softmax "
    "zeros_like ones_like full_like empty_like rand_like randn_like real imag logcumsumexp "
    "bernoulli nan_to_num fill zero resolve_conj resolve_neg"
)
_POINTWISE = (
    "where masked_fill multiply subtract divide negative __and__ __or__ __xor__ float_power "
    "floor_divide true_divide rsub clip relu6 hardswish hardsigmoid hardtanh selu celu mish "
    "log_sigmoid rrelu square isclose"
)

ROWS: Mapping[str, Row] = (
    {f"aten.{name}": same for name in _SAME.split()}
    | {f"aten.{name}": pointwise for name in _POINTWISE.split()}
    | {
        "pointwise": pointwise,
        "aten.prelu": prelu,
        "aten.glu": glu,
        "aten.bucketize": bucketize,
    }
)
