"""What is in the file: names, free dimensions, integers, standard operators."""

import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import nn

from laconic.core.errors import ExportError
from laconic.measuring.parity import parity
from laconic.program.capture import capture
from laconic.program.freezing import freeze
from laconic.program.program import FAKE_QUANTIZE
from laconic.runtimes import get
from laconic.runtimes._onnx import write_onnx

STANDARD = {"", "ai.onnx"}


def _check(program, path, batches=None, **bounds):
    """The file is valid, standard, and gives what the Program gives."""
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {opset.domain for opset in model.opset_import} <= STANDARD
    runner = get("onnxruntime").load(path, threads=1)
    example = [program.example] if batches is None else batches
    report = parity(program, runner.run, example, **bounds)
    assert report.ok, report.failures
    return model


def _operators(model):
    return [node.op_type for node in model.graph.node]


def test_names_and_free_dimensions_are_the_programs(attention, tmp_path):
    model = onnx.load(write_onnx(attention, tmp_path / "a.onnx"))
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {
        "ids": ["batch", "sequence"],
        "mask": ["batch", "sequence"],
        "output_0": ["batch", 32],
        "output_1": ["batch", "sequence", 32],
    }


def test_free_dimensions_are_free(attention, tmp_path):
    path = write_onnx(attention, tmp_path / "a.onnx")
    batches = []
    for batch, length in ((1, 5), (3, 20)):
        ids = torch.randint(0, 50, (batch, length))
        batches.append({"ids": ids, "mask": torch.ones_like(ids)})
    _check(attention, path, batches)


@pytest.mark.parametrize("state", ["training", "frozen"])
def test_weights_are_integers_in_both_states(quantized, state, tmp_path):
    program = quantized if state == "training" else freeze(quantized)
    model = _check(quantized, write_onnx(program, tmp_path / "q.onnx"))
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    weights = [array for array in stored.values() if array.ndim >= 2]
    assert len(weights) == 4
    assert all(array.dtype == "int8" for array in weights)
    kinds = _operators(model)
    assert kinds.count("QuantizeLinear") == 5  # input, relu (shared), relu, conv b, mean
    assert kinds.count("DequantizeLinear") == 5 + 4
    assert "Cast" not in kinds


def test_the_int8_file_is_at_most_30_percent(quantize, tmp_path):
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 64)).eval()
    program = capture(model, torch.randn(2, 256))
    whole = write_onnx(program, tmp_path / "f.onnx").stat().st_size
    small = write_onnx(quantize(program), tmp_path / "q.onnx").stat().st_size
    assert small <= 0.3 * whole


def test_both_states_write_the_same_numbers(quantized, tmp_path):
    first = write_onnx(quantized, tmp_path / "a.onnx")
    second = write_onnx(freeze(quantized), tmp_path / "b.onnx")
    load = get("onnxruntime").load
    inputs = [quantized.example[0].numpy()]
    one, other = (load(path, threads=1).run(inputs)[0] for path in (first, second))
    assert (one == other).all()


def test_codes_of_a_linear_layer_on_sequences_stand_before_the_product(
    quantize, attention, tmp_path
):
    model = onnx.load(write_onnx(quantize(attention), tmp_path / "q.onnx"))
    producers = {name: node.op_type for node in model.graph.node for name in node.output}
    stored = {t.name for t in model.graph.initializer}
    made = {name: node for node in model.graph.node for name in node.output}
    weights = [
        node.input[1]
        for node in model.graph.node
        if node.op_type == "MatMul" and producers.get(node.input[1]) == "DequantizeLinear"
    ]
    assert len(weights) == 2
    assert all(made[name].input[0] in stored for name in weights)


@pytest.mark.parametrize("grid", [(-128, 127), (0, 255), (-127, 127), (0, 15), (-8, 7)])
def test_any_grid_of_eight_bits_gives_the_programs_numbers(quantize, residual, grid, tmp_path):
    program = quantize(residual, grid=grid)
    _check(program, write_onnx(program, tmp_path / "q.onnx"))


def test_wider_activations_are_refused(quantize, residual, tmp_path):
    with pytest.raises(ExportError, match="8 bits"):
        write_onnx(quantize(residual, grid=(0, 1023)), tmp_path / "q.onnx")


class _Awkward(nn.Module):
    """Operators that torch's table lacks, in-place ones, and outputs that need care."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.inside = nn.ReLU(inplace=True)
        self.unused = nn.Linear(3, 3)

    def forward(self, x, ignored):
        y = self.inside(self.up(self.norm(x)))
        p = self.pool(y).flatten(1)
        return x, p, p, p.double(), F.adaptive_avg_pool2d(y, (4, 4))


def test_operators_outside_torchs_table_and_awkward_outputs(tmp_path):
    model = _Awkward().eval()
    model.norm.running_mean.normal_()
    example = (torch.randn(2, 4, 8, 8), torch.randn(2, 3))
    program = capture(model, example)
    path = write_onnx(program, tmp_path / "m.onnx")
    model = _check(program, path)
    assert [value.name for value in model.graph.input] == ["x", "ignored"]
    assert [value.name for value in model.graph.output] == [f"output_{i}" for i in range(5)]
    _check(program, path, [(torch.randn(5, 4, 8, 8), torch.randn(5, 3))])


def test_writing_leaves_the_program_alone(quantized, tmp_path):
    before = {name: tensor.clone() for name, tensor in quantized.tensors()}
    code = str(quantized.graph)
    write_onnx(quantized, tmp_path / "q.onnx")
    assert str(quantized.graph) == code
    assert all(torch.equal(before[name], tensor) for name, tensor in quantized.tensors())


def test_a_program_in_training_is_exported_in_eval_mode(tmp_path):
    program = capture(
        nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.9), nn.BatchNorm1d(8)).eval(), torch.randn(4, 8)
    )
    calm = program.clone()
    program.train()
    path = write_onnx(program, tmp_path / "m.onnx")
    assert program.training
    _check(calm, path)


def test_an_interrupted_write_leaves_the_old_file_whole(residual, tmp_path, monkeypatch):
    import onnx_ir

    path = write_onnx(residual, tmp_path / "m.onnx")
    before = path.read_bytes()

    def full(model, target, **_):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx_ir, "save", full)
    with pytest.raises(ExportError, match="No space left"):
        write_onnx(residual, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


def test_what_onnx_lacks_is_named(tmp_path):
    class Odd(nn.Module):
        def forward(self, x):
            return torch.special.airy_ai(x)

    program = capture(Odd(), torch.randn(2, 3))
    with pytest.raises(ExportError, match="airy_ai"):
        write_onnx(program, tmp_path / "m.onnx")


def test_operators_translated_here_need_no_decomposition(tmp_path, monkeypatch):
    class Several(nn.Module):
        def forward(self, x):
            y = F.adaptive_avg_pool1d(x, 1).squeeze(-1)
            z = torch.minimum(y, -y), torch.min(y, y.flip(1)), torch.max(y, -y)
            kept = torch.ones_like(y, dtype=torch.bool) & (y > 0)
            return *z, kept.to("cpu", torch.float64), y.to(torch.int32)

    calls = []
    real = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", lambda *a, **k: calls.append(1) or real(*a, **k))
    program = capture(Several(), torch.randn(2, 4, 6))
    _check(program, write_onnx(program, tmp_path / "m.onnx"))
    assert len(calls) == 1


class Attend(nn.Module):
    """One scaled dot product attention; `mask` from a length per sample, `how` as given."""

    def __init__(self, mask=None, **how):
        super().__init__()
        self.mask, self.how = mask, how

    def forward(self, q, k, v, length):
        options = dict(self.how)
        if self.mask is not None:
            seen = torch.arange(k.shape[-2])[None] < length[:, None]
            seen = seen[:, None, None, :]
            options["attn_mask"] = seen if self.mask == "bool" else seen.logical_not() * -1e30
            if self.mask == "heads":  # each head sees one key less than the one before it
                rest = 5 - torch.arange(4)[:, None, None]
                seen = seen.expand(-1, 4, 5, -1) & (torch.arange(5) < rest)
                options["attn_mask"] = seen
            if self.mask == "inf":
                blind = torch.full((), float("-inf"))
                options["attn_mask"] = torch.where(seen, torch.zeros(()), blind)
        return F.scaled_dot_product_attention(q, k, v, **options)


@pytest.mark.parametrize(
    "module",
    [
        Attend(),
        Attend(scale=0.3),
        Attend(is_causal=True),
        Attend("bool"),
        Attend("float"),
        Attend("inf"),
        Attend("bool", enable_gqa=True),
        Attend("heads"),
        Attend("heads", enable_gqa=True),
        Attend(is_causal=True, enable_gqa=True),
    ],
    ids=lambda m: f"{m.mask} {m.how}",
)
def test_attention_in_all_its_forms(module, tmp_path):
    """A sample that sees nothing (length 0) gives zeros, as in torch."""
    keys = 2 if module.how.get("enable_gqa") else 4

    def batch(size):
        q, (k, v) = torch.randn(size, 4, 5, 8), torch.randn(2, size, keys, 5, 8).unbind(0)
        return {"q": q, "k": k, "v": v, "length": torch.arange(size) % 6}

    first = tuple(batch(2).values())
    program = capture(module, first)
    path = write_onnx(program, tmp_path / "a.onnx")
    model = _check(program, path, [batch(6), batch(3)])
    assert _operators(model).count("MatMul") == 2
    assert "IsNaN" not in _operators(model)


def test_the_table_of_translations_is_read_once_and_never_written(tmp_path, monkeypatch):
    from torch.onnx._internal.exporter import _registration

    from laconic.runtimes import _onnx_registry

    kind = _registration.ONNXRegistry
    read = []
    original = vars(kind)["from_torchlib"]
    counted = classmethod(lambda cls, **k: read.append(k) or original.__func__(cls, **k))
    monkeypatch.setattr(kind, "from_torchlib", counted)
    monkeypatch.setattr(_onnx_registry, "_tables", {})
    program = capture(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), (torch.randn(2, 4),))
    files = [write_onnx(program, tmp_path / f"{index}.onnx") for index in range(3)]
    assert len(read) == 1
    assert len({path.read_bytes() for path in files}) == 1
    (table,) = _onnx_registry._tables.values()
    assert "laconic::fake_quantize" not in table.functions
    assert vars(kind)["from_torchlib"] is counted


@pytest.mark.parametrize(
    ("axis", "zero", "tied"),
    [(None, 0, False), (None, 3, True), (0, 0, False), (0, 3, True), (1, 3, False)],
)
def test_of_a_quantised_table_only_what_is_looked_up_is_decoded(axis, zero, tied, tmp_path):
    program = _words(axis, zero, tied)
    model = _check(program, write_onnx(program, tmp_path / "t.onnx"))
    codes = [t.name for t in model.graph.initializer if list(t.dims) == [11, 6]]
    assert len(codes) == 1
    users = {node.op_type for node in model.graph.node if codes[0] in node.input}
    assert users == {"Gather"} | ({"DequantizeLinear"} if tied else set())
    runner = get("openvino").load(
        get("openvino").write(program, tmp_path / "t.xml", "int8"), "int8"
    )
    report = parity(program, runner.run, [program.example], precision="int8")
    assert report.ok, report.failures


def _words(axis, zero, tied):
    """A look-up of 11 words in 8 bits, and a product with the same table if `tied`."""

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(11, 6), nn.Linear(6, 4)

        def forward(self, ids):
            x = self.table(ids)
            return F.linear(x, self.table.weight) if tied else self.head(x)

    torch.manual_seed(3)
    program = capture(Words().eval(), (torch.randint(0, 11, (2, 5)),))
    shape = () if axis is None else (program.tensor("table.weight").shape[axis],)
    sides = {"scale": torch.rand(shape) * 0.01 + 0.02, "zero_point": torch.full(shape, zero)}
    table = next(node for node in program.graph.nodes if node.target == "table.weight")
    users = list(table.users)
    names = [program.add_tensor(f"table.weight_{name}", side) for name, side in sides.items()]
    with program.graph.inserting_after(table):
        made = program.graph.create_node("call_function", FAKE_QUANTIZE, (table,))
    with program.graph.inserting_before(made):
        nodes = [program.graph.get_attr(name) for name in names]
    made.args = (table, *nodes, axis, -127, 127)
    for user in users:
        user.replace_input_with(table, made)
    program.recompile()
    return program
