"""Recurrent layers: LSTM, GRU and plain RNN over padded sequences.

All layers and directions of one operator share one hidden width, because one tensor holds their
states; so they shrink together. A unit that goes starts at zero, and then stays there: nothing
that is left can tell. Multiply-adds: both products of every step, layer and direction.
"""

from torch import fx

from laconic.program.axes import Term, concatenation, product
from laconic.program.equations import Arguments, Dims, Equations, Row


def _recurrent(gates: int) -> Row:
    """Input [batch, steps, in] or [steps, batch, in], states [layers x directions, batch, hidden].

    For every layer and direction: weights [gates x hidden, in] and [gates x hidden, hidden], and
    two biases of their rows. A layer's outputs are those of its directions, one behind the other.
    Projections of the states are not covered.
    """

    def row(see: Equations, node: fx.Node, a: Arguments) -> list[Dims]:
        x, directions = see.dims(a["input"]), 1 + bool(a["bidirectional"])
        step = 4 if a["has_biases"] else 2
        count = a["num_layers"] * directions
        stages = [a["params"][at : at + step] for at in range(0, len(a["params"]), step)]
        if len(stages) != count or any(len(stage) != step for stage in stages):
            return []  # projections
        hidden: Term = see.dims(stages[0][1])[1]
        see.hint(hidden, "hidden")
        rows = product(*see.rigid(node, "gates", gates), hidden)
        into = x[2]
        for number, (fresh, held, *biases) in enumerate(stages):
            for weight, columns in ((fresh, into), (held, hidden)):
                see.same(see.dims(weight)[0], rows, node)
                see.same(see.dims(weight)[1], columns, node)
                see.role(weight, 0, "producer")
                see.role(weight, 1, "consumer")
                see.count(node, x[0], x[1], rows, columns)
            for bias in biases:
                see.same(see.dims(bias)[0], rows, node)
            if number % directions == directions - 1:
                into = concatenation(*[hidden] * directions)
        batch = x[0] if a["batch_first"] else x[1]
        state = (*see.rigid(node, "layers and directions", count), batch, hidden)
        states = a["hx"] if isinstance(a["hx"], (list, tuple)) else [a["hx"]]
        for given in states:
            for one, other in zip(see.dims(given), state, strict=True):
                see.same(one, other, node)
        return [(x[0], x[1], into), *[state] * len(states)]

    return row


ROWS: dict[str, Row] = {
    "aten.lstm": _recurrent(4),
    "aten.gru": _recurrent(3),
    "aten.rnn_tanh": _recurrent(1),
    "aten.rnn_relu": _recurrent(1),
}
