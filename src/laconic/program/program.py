"""The captured model: one flat graph of ATen operators, and its tensors by name.

A Program is a plain `nn.Module` with the original parameter names. It trains in anybody's loop:
`train()` and `eval()` switch batch norm and dropout although the exported graph fixes them.
"""

import copy
import operator
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from laconic.core.errors import SurgeryError
from laconic.forms import operators as _form_operators  # registers laconic::*
from laconic.program import choices as _choices  # registers laconic::choose
from laconic.program.shapes import Shapes
from laconic.program.signature import Signature

_TRAINING_ARGUMENT = {
    torch.ops.aten.batch_norm.default: 5,
    torch.ops.aten.instance_norm.default: 5,
    torch.ops.aten.dropout.default: 2,
    torch.ops.aten.feature_dropout.default: 2,
    torch.ops.aten.alpha_dropout.default: 2,
    torch.ops.aten.feature_alpha_dropout.default: 2,
}
FAKE_QUANTIZE = _form_operators.FAKE_QUANTIZE
DEQUANTIZE = _form_operators.DEQUANTIZE
DYNAMIC_QUANTIZE = _form_operators.DYNAMIC_QUANTIZE
FAKE_LEVELS = _form_operators.FAKE_LEVELS
LEVELS = _form_operators.LEVELS
LOOKUP = _form_operators.LOOKUP
COMBINE = _form_operators.COMBINE
VECTORS = _form_operators.VECTORS
HASHED = _form_operators.HASHED
MEMBER = _form_operators.MEMBER
CHOOSE = _choices.CHOOSE
FAKES = _form_operators.FAKES
STORED = _form_operators.STORED


class Program(nn.Module):
    """A trained model as one flat graph.

    Attributes:
        graph: `torch.fx.Graph`; placeholders are the input tensors in order, `get_attr` nodes name
            tensors, the output is a flat tuple of tensors. `node.meta["origin"]` is the module
            path a node came from; after `propagate()`, `node.meta["shape"]` and `["dtype"]` hold
            what the node gives for the example inputs (tuples of them for several outputs).
        signature: how arguments and outputs nest around the flat tensors.
        example: example input tensors, flat, on the CPU.
        dynamic: placeholder name → {dimension: name}, the dimensions that may change.
        aliases: other names of tied tensors → the name they are kept under.
        lost: what capturing in eval mode could not keep, in words.
        sparse: tensors whose zeros are pruned weights and stay zeros in training: their gradients
            there are zero. The pattern is the stored zeros themselves.
        dropout: whether `train()` switches dropout on; a switch of this object, not kept.
    """

    dropout: bool = True

    def __init__(
        self,
        graph: fx.Graph,
        tensors: Mapping[str, Tensor],
        signature: Signature,
        example: Sequence[Tensor],
        *,
        dynamic: Mapping[str, Mapping[int, str]] | None = None,
        aliases: Mapping[str, str] | None = None,
        lost: Sequence[str] = (),
        sparse: Iterable[str] = (),
    ) -> None:
        """Wrap a graph and its tensors; parameters are those that are `nn.Parameter`."""
        super().__init__()
        self.graph = graph
        graph.owning_module = None  # a Program owns the tensors, not the module that was exported
        self.signature = signature
        self.example = tuple(example)
        self.dynamic = {name: dict(dims) for name, dims in (dynamic or {}).items()}
        self.aliases = dict(aliases or {})
        self.lost = tuple(lost)
        self.sparse = frozenset(sparse)
        self._guards: dict[str, tuple[Tensor, RemovableHandle]] = {}
        self._shared = False
        self._run: Callable[..., tuple[Tensor, ...]] | None = None
        for name, tensor in tensors.items():
            self._register(name, tensor)
        for alias, name in self.aliases.items():
            self._register(alias, self.tensor(name))
        self.training = False
        self._set_mode(False)

    # calling ------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph; arguments and outputs are those of the original model."""
        return self.signature.arrange(self.run_flat(*self.signature.flatten(args, kwargs)))

    def run_flat(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the graph on flat inputs in placeholder order."""
        run = self._run or self.recompile()
        return run(self, *inputs)

    def recompile(self) -> Callable[..., tuple[Tensor, ...]]:
        """Make the Python function of the graph anew; call it after changing the graph."""
        self.graph.lint()
        code = self.graph.python_code("self")
        scope: dict[str, Any] = dict(code.globals)
        exec(compile(code.src, "<laconic program>", "exec"), scope)  # noqa: S102
        self._run = run = scope["forward"]
        return run

    def as_graph_module(self) -> fx.GraphModule:
        """A flat `GraphModule` over the same tensors, for exporters and tracers."""
        module = fx.GraphModule(self, copy.deepcopy(self.graph), class_name="Program")
        module.training = self.training
        return module

    # modes --------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Self:
        """Switch batch norm and dropout; training unshares the tensors first."""
        if mode:
            self.unshare()
        super().train(mode)
        self._set_mode(mode)
        self._guard_zeros()
        return self

    def _guard_zeros(self) -> None:
        """Let no gradient reach the zeros of sparse tensors, whatever optimizer there is."""
        for name in self.sparse:
            tensor = self.tensor(name)
            held = self._guards.get(name)
            if held is not None and held[0] is tensor:
                continue
            if held is not None:
                held[1].remove()
                del self._guards[name]
            if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
                self._guards[name] = (tensor, _keep_zeros(tensor))

    def _set_mode(self, training: bool) -> None:
        changed = False
        for node in self.graph.nodes:
            position = _TRAINING_ARGUMENT.get(node.target) if node.op == "call_function" else None
            if position == 5 and node.args[3] is None:
                continue  # a norm without running statistics: the same in both modes
            wanted = training and (self.dropout or position == 5)
            if position is not None and node.args[position] != wanted:
                node.update_arg(position, wanted)
                changed = True
        if changed:
            self._run = None

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self.unshare()
        super()._apply(fn, recurse)
        device = next(iter(self.state_dict().values()), torch.empty(0)).device
        for node in self.graph.nodes:  # constants made inside the graph follow the tensors
            for index, value in enumerate(node.args):
                if isinstance(value, torch.device):
                    node.update_arg(index, device)
            if isinstance(node.kwargs.get("device"), torch.device):
                node.update_kwarg("device", device)
        self._run = None
        return self

    # copies -------------------------------------------------------------------------------

    def clone(self) -> "Program":
        """A Program of its own graph whose tensors share memory until one side trains."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph, {}))
        _copy_output_meta(self.graph, graph)
        made = Program(
            graph,
            {name: _share(tensor) for name, tensor in self.tensors()},
            self.signature,
            self.example,
            dynamic=self.dynamic,
            aliases=self.aliases,
            lost=self.lost,
            sparse=self.sparse,
        )
        self.share()
        made.share()
        return made

    def share(self) -> None:
        """State that somebody else holds the same memory: training will copy it first."""
        self._shared = True

    def __deepcopy__(self, memo: dict[int, Any]) -> "Program":
        made = self.clone()
        made.unshare()
        if self.training:
            made.train()
        return made

    def unshare(self) -> None:
        """Give this Program memory of its own; parameter objects stay the same."""
        if not self._shared:
            return
        with torch.no_grad():
            for _, tensor in self.tensors():
                tensor.data = tensor.data.clone()
        self._shared = False

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As in torch; unshares first, because it writes in place."""
        self.unshare()
        return super().load_state_dict(*args, **kwargs)

    # tensors ------------------------------------------------------------------------------

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter and buffer once, under its canonical name."""
        for name, tensor in self.state_dict(keep_vars=True).items():
            if name not in self.aliases:
                yield name, tensor

    def tensor(self, name: str) -> Tensor:
        """The parameter or buffer `name` (any of its names).

        Raises:
            SurgeryError: there is none of that name.
        """
        owner, leaf = self._owner(name, create=False)
        found = owner._parameters.get(leaf, owner._buffers.get(leaf))
        if found is None:
            raise SurgeryError("the program has no such tensor", where=name)
        return found

    def set_tensor(self, name: str, tensor: Tensor) -> None:
        """Replace a tensor under all its names; it stays a parameter if it was one and is float."""
        name = self.aliases.get(name, name)
        old = self.tensor(name)
        if isinstance(old, nn.Parameter) and tensor.is_floating_point():
            tensor = nn.Parameter(tensor.detach(), requires_grad=old.requires_grad)
        for every in [name, *(a for a, kept in self.aliases.items() if kept == name)]:
            self._drop(every)
            self._register(every, tensor)
        if self.training:
            self._guard_zeros()

    def add_tensor(self, name: str, tensor: Tensor) -> str:
        """Register a new buffer (or parameter, if it is one); returns the name it got.

        A name that is taken gets a number behind it.
        """
        unique, number = name, 1
        present = set(self.state_dict())
        while unique in present:
            number += 1
            unique = f"{name}_{number}"
        self._register(unique, tensor)
        return unique

    def untie(self, alias: str) -> None:
        """Give another name of a tied tensor a copy of its own, which no node reads yet."""
        held = self.tensor(alias)
        value = held.detach().clone()
        del self.aliases[alias]
        self._drop(alias)
        trains = isinstance(held, nn.Parameter)
        self._register(alias, nn.Parameter(value, held.requires_grad) if trains else value)

    def drop_unused(self) -> list[str]:
        """Remove tensors that no node reads; returns their names."""
        used = {n.target for n in self.graph.nodes if n.op == "get_attr"}
        gone = [name for name, _ in self.tensors() if name not in used]
        for name in gone:
            for every in [name, *(a for a, kept in self.aliases.items() if kept == name)]:
                self._drop(every)
                self.aliases.pop(every, None)
        self.sparse -= set(gone)
        return gone

    def _owner(self, name: str, *, create: bool) -> tuple[nn.Module, str]:
        *path, leaf = name.split(".")
        owner: nn.Module = self
        for part in path:
            child = owner._modules.get(part)
            if child is None:
                if not create:
                    raise SurgeryError("the program has no such tensor", where=name)
                child = nn.Module()
                child.training = self.training
                owner.add_module(part, child)
            owner = child
        return owner, leaf

    def _register(self, name: str, tensor: Tensor) -> None:
        owner, leaf = self._owner(name, create=True)
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(leaf, tensor)
        else:
            owner.register_buffer(leaf, tensor)

    def _drop(self, name: str) -> None:
        owner, leaf = self._owner(name, create=False)
        owner._parameters.pop(leaf, None)
        owner._buffers.pop(leaf, None)

    # graph --------------------------------------------------------------------------------

    @property
    def placeholders(self) -> list[fx.Node]:
        """The input nodes in order."""
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    @property
    def output_node(self) -> fx.Node:
        """The node that holds the flat tuple of outputs."""
        return self.graph.output_node()

    def batch_size(self) -> int:
        """The batch of the example inputs: the size of the dimension named "batch", else 1."""
        for node, tensor in zip(self.placeholders, self.example, strict=True):
            for dim, name in self.dynamic.get(node.name, {}).items():
                if name == "batch":
                    return tensor.shape[dim]
        return 1

    def propagate(self, example: Sequence[Tensor] | None = None) -> None:
        """Set `meta["shape"]` and `meta["dtype"]` of every node by fake execution.

        Raises:
            SurgeryError: an operator refuses its inputs' shapes; names the node.
        """
        Shapes.write(self, example if example is not None else self.example)


def is_getitem(node: fx.Node) -> bool:
    """Whether a node picks one of several outputs."""
    return node.op == "call_function" and node.target is operator.getitem


def _keep_zeros(tensor: Tensor) -> RemovableHandle:
    """Make the gradient of a leaf zero where its value is zero at that time."""
    leaf = weakref.ref(tensor)  # a hook that holds its own tensor would be a cycle

    def masked(gradient: Tensor) -> Tensor:
        held = leaf()
        return gradient if held is None else gradient.masked_fill(held.detach() == 0, 0.0)

    wanted = tensor.requires_grad
    handle = tensor.requires_grad_(True).register_hook(masked)
    tensor.requires_grad_(wanted)
    return handle


def _share(tensor: Tensor) -> Tensor:
    detached = tensor.detach()
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(detached, requires_grad=tensor.requires_grad)
    return detached


def _copy_output_meta(old: fx.Graph, new: fx.Graph) -> None:
    new.output_node().meta = dict(old.output_node().meta)
