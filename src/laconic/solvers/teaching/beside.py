"""Layers that stand beside a Program while it trains: they are in its graph, and leave it again.

Being nodes and tensors of the Program itself, they train, are averaged, are kept with the best
state and come back with a stopped run like everything else; no second model has to be carried
through training. Nothing reads them but a loss: taking them away changes no output.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from laconic.program.program import Program

_aten = torch.ops.aten
_PLACE = "beside"  # where the tensors stand in the Program
_CONVOLUTIONS = {
    3: _aten.conv1d.default,
    4: _aten.conv2d.default,
    5: _aten.conv3d.default,
}


class Beside:
    """Adds layers beside a Program; made by `beside`, which takes them away again.

    Attributes:
        names: their parameters, in the order in which they were added.
    """

    def __init__(self, program: Program, generator: torch.Generator) -> None:
        self._program = program
        self._generator = generator
        self._added: list[fx.Node] = []
        self._tensors: list[str] = []
        self.names: list[str] = []

    def node(self, name: str) -> fx.Node:
        """The Program's node of that name."""
        return next(node for node in self._program.graph.nodes if node.name == name)

    def call(self, target: Any, *arguments: Any) -> fx.Node:
        """A further operator."""
        with self._program.graph.inserting_before(self._program.output_node):
            made = self._program.graph.call_function(target, arguments)
        self._added.append(made)
        return made

    def linear(self, value: fx.Node, inputs: int, outputs: int) -> fx.Node:
        """`[..., inputs]` → `[..., outputs]`."""
        return self.call(_aten.linear.default, value, *self._weights(inputs, outputs))

    def pointwise(self, value: fx.Node, inputs: int, outputs: int, rank: int) -> fx.Node:
        """A 1x1 convolution of values of `rank` dimensions: channels `inputs` → `outputs`."""
        weights = self._weights(inputs, outputs, *[1] * (rank - 2))
        return self.call(_CONVOLUTIONS[rank], value, *weights)

    def halved(self, value: fx.Node, inputs: int, outputs: int) -> fx.Node:
        """Convolution 3x3 of stride 2, batch normalisation, ReLU, on `[batch, inputs, h, w]`."""
        weights = self._weights(inputs, outputs, 3, 3)
        value = self.call(_aten.conv2d.default, value, *weights, [2, 2], [1, 1])
        ones, zeros = torch.ones(outputs), torch.zeros(outputs)
        weight, bias = self._parameter("weight", ones), self._parameter("bias", zeros)
        mean, variance = self._buffer("mean", zeros.clone()), self._buffer("variance", ones.clone())
        norm = _aten.batch_norm.default
        training = self._program.training
        value = self.call(norm, value, weight, bias, mean, variance, training, 0.1, 1e-5, False)
        return self.relu(value)

    def mean(self, value: fx.Node, dims: Sequence[int]) -> fx.Node:
        """The mean over dimensions, which go."""
        return self.call(_aten.mean.dim, value, list(dims))

    def mean_of_tokens(self, value: fx.Node, mask: fx.Node) -> fx.Node:
        """Of `[batch, tokens, features]` the mean over tokens whose `mask [batch, tokens]` is 1."""
        real = self.call(_aten.to.dtype, mask, torch.float32)
        weight = self.call(_aten.unsqueeze.default, real, -1)
        total = self.call(_aten.sum.dim_IntList, self.call(_aten.mul.Tensor, value, weight), [1])
        count = self.call(_aten.sum.dim_IntList, weight, [1])
        return self.call(_aten.div.Tensor, total, self.call(_aten.clamp.default, count, 1))

    def relu(self, value: fx.Node) -> fx.Node:
        """What is above zero."""
        return self.call(_aten.relu.default, value)

    def remove(self) -> None:
        """Take everything away."""
        for node in reversed(self._added):
            self._program.graph.erase_node(node)
        self._added.clear()
        self._program.recompile()
        for name in self._tensors:
            self._program._drop(name)
        if not any(name.startswith(f"{_PLACE}.") for name, _ in self._program.tensors()):
            self._program._modules.pop(_PLACE, None)

    def _weights(self, inputs: int, outputs: int, *kernel: int) -> tuple[fx.Node, fx.Node]:
        """Weight (normal, its outputs of its inputs' size) and bias (zeros)."""
        noise = torch.randn(outputs, inputs, *kernel, generator=self._generator)
        weight = noise * noise[0].numel() ** -0.5
        return self._parameter("weight", weight), self._parameter("bias", torch.zeros(outputs))

    def _parameter(self, leaf: str, value: Tensor) -> fx.Node:
        node = self._buffer(leaf, nn.Parameter(value))
        self.names.append(str(node.target))
        return node

    def _buffer(self, leaf: str, value: Tensor) -> fx.Node:
        home = next((t.device for _, t in self._program.tensors()), torch.device("cpu"))
        held = nn.Parameter(value.to(home)) if isinstance(value, nn.Parameter) else value.to(home)
        name = self._program.add_tensor(f"{_PLACE}.{leaf}", held)
        self._tensors.append(name)
        with self._program.graph.inserting_before(self._program.output_node):
            made = self._program.graph.get_attr(name)
        self._added.append(made)
        return made


@contextmanager
def beside(program: Program, generator: torch.Generator) -> Generator[Beside, None, None]:
    """For the length of a `with` block, layers may be added beside a Program."""
    made = Beside(program, generator)
    try:
        yield made
    finally:
        made.remove()
