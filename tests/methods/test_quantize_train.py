"""quantize.train: grids that train, fall, calm down, fold, freeze, store and export."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from laconic import runtimes, storage
from laconic.core.errors import DataError, RecipeError
from laconic.core.task import classification
from laconic.methods.base import Context, method_of
from laconic.methods.distill.logits import Logits
from laconic.methods.quantize.static import QuantizeStatic
from laconic.methods.quantize.train import QuantizeTrain
from laconic.program.capture import capture
from laconic.program.freezing import form_of, freeze, is_frozen
from laconic.program.program import FAKE_QUANTIZE
from laconic.program.sites import Sites
from laconic.solvers.quantization import learned_steps, placement, ranges
from laconic.solvers.quantization.learned_grids import Course, LearnedGrids
from laconic.solvers.quantization.oscillation import OnGrid, Oscillation
from laconic.solvers.quantization.weight_sites import weight_sites
from laconic.training.plan import Plan

SHORT = {
    "steps": 8, "evaluations": 2, "precision": "fp32", "teacher": "torch", "activations": 4,
    "samples": 16, "lr": 0.01,
}  # fmt: skip
VARIANTS = {
    "plain": {},
    "lowering": {"bits": 2, "activations": 2, "lowering": (8, 4), "lowered": 0.5},
    "pact": {"clipping": "pact", "lowering": (8,), "lowered": 0.25},
    "freeze": {"damping": "freeze", "bits": 3, "ema": 0.8},
    "damp": {"damping": "damp", "optimizer": "adamw"},
    "lsq": {"initial": "lsq", "per_channel": False, "ternary": True, "bits": 2},
    "labels": {"alpha": 0.5, "accumulate": 2, "activations": None},
}
WEIGHTS = ["stem.weight", "inner.weight", "head.weight"]


class Net(nn.Module):
    """[batch, 3, 6, 6] -> [batch, 4], one factor of the batch norm is negative."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.inner = nn.Conv2d(6, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.bn(self.stem(x)))
        return self.head(torch.relu(self.bn2(self.inner(x))).mean((2, 3)))


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        net.head.weight.mul_(20)
        net.bn.weight[2] *= -1
        net.bn2.weight[:3] *= -0.5
        net.bn2.running_mean.normal_()
    return capture(net.eval(), torch.randn(2, 3, 6, 6))


@pytest.fixture(scope="module")
def task(program):
    generator = torch.Generator().manual_seed(1)
    x = [torch.randn(8, 3, 6, 6, generator=generator) for _ in range(6)]
    with torch.no_grad():
        batches = [(each, program(each).argmax(1)) for each in x]
    return classification(train=batches[:4], validation=batches[4:])


def apply(program, task, sites="*", workdir=None, **options):
    context = Context(task=task, original=program, seed=2, workdir=workdir)
    return QuantizeTrain(**{**SHORT, **options}).apply(program, Sites.of(sites), context)


def tensors(program):
    return {name: tensor.detach().clone() for name, tensor in program.tensors()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def grids(program):
    """Name of what is rounded → (qmin, qmax)."""
    found = {}
    for node in program.graph.nodes:
        if node.target is FAKE_QUANTIZE:
            source = node.args[0]
            name = str(source.target) if source.op == "get_attr" else source.name
            found[name] = tuple(node.args[4:6])
    return found


def outputs(program, x):
    with torch.no_grad():
        return program(x)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_the_replay_is_bit_for_bit_and_codes_are_within_their_range(program, task, options):
    before = tensors(program)
    made = apply(program, task, **options)
    assert same(tensors(program), before)
    assert not [p for p, _ in made.program.named_parameters() if p.endswith("_scale")]
    bits = options.get("bits", 4)
    low, high = (-1, 1) if options.get("ternary") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    found = grids(made.program)
    assert found["inner.weight"] == (low, high)
    assert found["stem.weight"] == found["head.weight"] == (-127, 127)
    activations = {k: v for k, v in found.items() if k not in WEIGHTS}
    wanted = {4: (0, 15), 2: (0, 3)}.get(options.get("activations", 4))
    assert activations == ({} if wanted is None else
                           {"x": (-128, 127), "relu": wanted, "mean": (0, 255)})  # fmt: skip
    codes = form_of(made.program, "inner.weight").codes
    assert low <= int(codes.min()) and int(codes.max()) <= high
    again = method_of(QuantizeTrain(**made.resolved).step(), "step 1").apply(
        program, Sites(), Context(task=task, original=program, seed=2)
    )
    assert same(tensors(again.program), tensors(made.program))
    assert again.resolved == made.resolved


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_stopped_and_resumed_equals_uninterrupted(program, task, resumes, options):
    options = {"save_every": 0, **options}
    resumes(lambda held, **more: apply(program, held, **options, **more), task, 0.75)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_frozen_stored_and_thawed_give_the_same_bits(program, task, tmp_path, options):
    made = apply(program, task, **options).program
    x = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(4))
    frozen = freeze(made)
    storage.save(frozen, tmp_path / "frozen.laconic")
    loaded = storage.load(tmp_path / "frozen.laconic")
    assert torch.equal(outputs(frozen, x), outputs(made, x))
    assert torch.equal(outputs(loaded, x), outputs(made, x))
    again = apply(frozen, task, bits=3, sites="inner")  # keeps its grids, trains their steps
    assert is_frozen(again.program)
    assert form_of(again.program, "inner.weight").qmax == form_of(frozen, "inner.weight").qmax
    held = [frozen.tensor("inner.weight_scale"), again.program.tensor("inner.weight_scale")]
    assert not torch.equal(*held)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("options", [{}, {"bits": 8, "activations": 8}, {"bits": 2, "fold": False}],
                         ids=["w4a4", "w8a8", "unfolded"])  # fmt: skip
def test_runtimes_agree(program, task, tmp_path, name, options):
    pytest.importorskip(name)
    made = apply(program, task, **options).program
    runtime = runtimes.get(name)
    path = runtime.write(made, tmp_path / f"m{runtime.suffix}", "int8")
    x = torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(4))
    (found,) = runtime.load(path, "int8", 1).run([x.numpy()])
    wanted = outputs(made, x).numpy()
    step = np.abs(wanted).max() / 2**4  # of the coarsest grid on the way
    assert np.abs(found - wanted).max() < step
    assert np.abs(found - wanted).mean() < step / 20


def test_the_fold_keeps_every_code(program, task):
    """Unfolded, the steps are those of the filters; folded, times the norms' factors."""
    bare = classification(train=task.train)
    x = torch.randn(9, 3, 6, 6, generator=torch.Generator().manual_seed(5))
    for bits, ternary in ((2, True), (3, False), (8, False)):
        folded = apply(program, bare, bits=bits, ternary=ternary).program
        assert not any("batch_norm" in node.name for node in folded.graph.nodes)
        held = apply(program, bare, bits=bits, ternary=ternary, fold=False).program
        assert any("batch_norm" in node.name for node in held.graph.nodes)
        if ternary or bits == 8:  # no filter had to be turned: the same training
            one, two = (form_of(p, "inner.weight").codes for p in (folded, held))
            sign = torch.sign(held.tensor("bn2.weight")).to(one.dtype).reshape(-1, 1, 1, 1)
            assert torch.equal(one, two * sign)
            assert torch.allclose(outputs(folded, x), outputs(held, x), rtol=0, atol=2e-3)
        assert bool((folded.tensor("inner.weight_scale") > 0).all())


def test_before_training_it_is_the_nearest_grid(program, task):
    """With a rate of (nearly) zero, folding and turned filters change the outputs by rounding."""
    bare = classification(train=task.train)
    options = {"lr": 1e-12, "warmup": 0.0, "momentum": 0.0, "weight_decay": 0.0, "steps": 1}
    made = apply(program, bare, bits=8, activations=None, **options).program
    x = torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(5))
    plain = program.clone().train()  # one step moves the running statistics
    plain(next(iter(_first_batch(program, task))))
    plain.eval()
    wanted, found = outputs(plain, x), outputs(made, x)
    assert float((wanted - found).norm() / wanted.norm()) < 0.01


def _first_batch(program, task):
    seen = []

    def split(batch):
        seen.append(batch[0])
        return (batch[0],), batch[1]

    told = classification(train=task.train, split=split)
    apply(program, told, steps=1, activations=None, alpha=1.0, samples=1)
    yield seen[-1]


def test_steps_learn_as_lsq_says(program, task, monkeypatch):
    """The gradient that reaches the optimizer is LSQ's: sum of the slopes / sqrt(n qmax)."""
    found = {}
    real = LearnedGrids.before

    def before(self, step):
        program = self._program
        raw = {n: p.grad.clone() for n, p in program.named_parameters() if n.endswith("_scale")}
        real(self, step)
        now = {n: p.grad.clone() for n, p in program.named_parameters() if n.endswith("_scale")}
        found.update({n: (raw[n], now[n]) for n in raw})

    monkeypatch.setattr(LearnedGrids, "before", before)
    apply(program, task, steps=1)
    counts = {"inner.weight_scale": (6 * 9, 7), "stem.weight_scale": (27, 127),
              "activations.relu_scale": (6 * 36, 15)}  # fmt: skip
    for name, (n, qmax) in counts.items():
        raw, now = found[name]
        assert torch.allclose(now, raw / (n * qmax) ** 0.5, rtol=1e-5)
        assert bool((raw != 0).any())


@pytest.mark.parametrize("bits", [2, 4])
def test_pact_moves_only_with_what_is_clipped(bits):
    """d y / d alpha is 1 where x > alpha, 0 elsewhere; y is the rounded clip of x."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.ReLU(), nn.Conv2d(2, 2, 1, bias=False))
    made = capture(net.eval(), torch.randn(2, 2, 4, 4))
    (place,) = placement.places(made, weight_sites(made)[0], [])
    grid = ranges.grid(0.0, 1.3, symmetric=True, bits=bits)
    step = learned_steps.insert_activation(made, place, [grid], "pact")
    made.recompile()
    made.train()
    x = torch.rand(8, 2, 4, 4, generator=torch.Generator().manual_seed(1)) * 3
    upper = torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    weight = made.tensor("1.weight").detach()
    (made(x) * upper).sum().backward()
    back = torch.nn.functional.conv_transpose2d(upper, weight)  # gradient at the rounded value
    scale = made.tensor(step.scale)
    alpha = float(scale.detach()) * grid.qmax
    wanted = back[x > alpha].sum() * grid.qmax  # of the step: alpha = step * qmax
    assert torch.allclose(scale.grad, wanted, rtol=1e-4)
    assert step.gradient == (1 / grid.qmax**2,)
    trained = outputs(made, x)
    learned_steps.settle(made, [step])
    assert torch.equal(outputs(made, x), trained)
    assert grids(made) == {"relu": (0, 2**bits - 1)}


def test_bits_fall_and_only_the_last_ones_are_judged(program, task):
    made = apply(program, task, bits=2, lowering=(8, 4), lowered=0.5, evaluations=8)
    assert made.figures["best_step"] >= 4
    assert grids(made.program)["inner.weight"] == (-2, 1)
    with pytest.raises(ValidationError, match="fall"):
        QuantizeTrain(bits=4, lowering=(4,))
    with pytest.raises(ValidationError, match="ternary"):
        QuantizeTrain(bits=4, ternary=True)


@pytest.mark.parametrize("damping", ["damp", "freeze"])
def test_damping_leaves_fewer_weights_jumping(damping):
    """Weights pulled to a point between two codes jump for ever; damped or frozen they do not."""
    steps = 600
    share, codes = {}, {}
    for mode in ("none", damping):
        weight = nn.Parameter(torch.linspace(-1, 1, 50))
        target = weight.detach() + 0.02
        held = OnGrid(weight, torch.tensor(0.25), torch.tensor(0), None, -8, 7)
        watched = Oscillation(mode, 2.0)
        watched.begin({"w": held}, steps)
        jumps = torch.zeros(50)
        before = held.codes()
        for step in range(1, steps + 1):
            rounded = held.decoded(held.codes())
            weight.grad = rounded - target  # straight through
            watched.damp(step)
            with torch.no_grad():
                weight.sub_(0.02 * weight.grad)
            watched.look(step)
            if step > 0.9 * steps:
                jumps += (held.codes() != before).float()
            before = held.codes()
        share[mode], codes[mode] = watched.share(), int((jumps > 0).sum())
    assert codes["none"] >= 40
    assert codes[damping] < codes["none"] / 4
    assert share[damping] < share["none"] or damping == "freeze"


def test_the_loss_falls_and_the_original_is_followed(program, task):
    bare = classification(train=task.train, validation=task.validation)
    made = apply(program, bare, bits=3, activations=3, steps=150, evaluations=3, lr=0.02)
    losses = [entry["loss"] for entry in made.figures["history"] if entry["loss"] is not None]
    assert losses[-1] < 0.6 * losses[0]


def test_weights_on_a_grid_keep_it_and_learn_their_steps(program, task):
    context = Context(task=task, original=program)
    static = QuantizeStatic(bits=4, samples=16, skip_above=None).apply(program, Sites(), context)
    made = apply(static.program, task)
    assert grids(made.program) == grids(static.program)
    name = "inner.weight_scale"
    assert not torch.equal(made.program.tensor(name), static.program.tensor(name))
    more = Logits(steps=2, teacher="torch").apply(made.program, Sites(), context)
    assert grids(more.program) == grids(made.program)


def test_sites_are_what_is_rounded_and_everything_trains(program, task):
    made = apply(program, task, sites="inner", first_last=None).program
    assert set(grids(made)) == {"inner.weight", "relu"}
    assert not torch.equal(made.tensor("head.weight"), program.tensor("head.weight"))
    with pytest.raises(RecipeError, match="inner"):
        apply(program, task, sites="inmer")


def test_pruned_weights_stay_zero(program, task):
    made = program.clone()
    weight = made.tensor("inner.weight").detach().clone()
    weight[:, ::2] = 0
    made.set_tensor("inner.weight", weight)
    made.sparse |= {"inner.weight"}
    for options in ({"damping": "freeze"}, {"damping": "damp", "ternary": True, "bits": 2}):
        found = apply(made, task, **options).program
        assert bool((found.tensor("inner.weight")[:, ::2] == 0).all())


def test_what_is_only_zeros_stays_float_and_nan_is_refused(program):
    zeros = [(torch.zeros(8, 3, 6, 6), torch.zeros(8, dtype=torch.long))] * 2
    made = apply(program, classification(train=zeros))
    assert any("only zeros" in note and note.startswith("x:") for note in made.notes)
    broken = [(torch.full((8, 3, 6, 6), float("nan")), torch.zeros(8, dtype=torch.long))]
    with pytest.raises(DataError, match="x"):
        apply(program, classification(train=broken))


def test_rounding_is_the_same_in_bfloat16_training(program, task):
    """Under autocast, scales and rounding stay in float32: the codes are those of float32."""
    scale, zero = torch.tensor(0.0301), torch.tensor(0, dtype=torch.int32)
    x = (torch.rand(4096, generator=torch.Generator().manual_seed(0)) * 8).bfloat16()
    for low, high in ((0, 255), (0, 15)):
        found = torch.ops.laconic.fake_quantize(x, scale, zero, None, low, high)
        wanted = torch.ops.laconic.fake_quantize(x.float(), scale, zero, None, low, high)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, wanted.bfloat16())


def test_steps_and_factors_of_norms_stay_positive(program):
    made = program.clone().train()
    site = next(s for s in weight_sites(made)[0] if s.name == "inner.weight")
    step = learned_steps.insert_weight(made, site, 0, [(-2, 1)], "lsq")
    made.recompile()
    first = made.tensor(step.scale).detach().clone()
    wanted = 2 * made.tensor("inner.weight").detach().abs().mean((1, 2, 3))
    assert torch.allclose(first, wanted)  # sqrt(qmax) is 1
    grids = LearnedGrids([step], Course(positive=("bn2.weight",)))
    grids.begin(made, Plan(steps=3))
    made.tensor(step.scale).data.fill_(-1.0)
    made.tensor("bn2.weight").data.fill_(-1.0)
    optimizer = torch.optim.SGD([made.tensor(step.scale)], lr=0.1)
    grids.after(1, optimizer)
    assert torch.allclose(made.tensor(step.scale), 0.01 * first)
    assert bool((made.tensor("bn2.weight") == 0).all())
