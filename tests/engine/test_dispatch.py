"""Whatever shape comes: what a dispatcher gives is what the Program gives."""

import json
import shutil
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from laconic.core.errors import DataError, ExportError, RecipeError
from laconic.engine import buckets
from laconic.engine.artifact import declared_inputs, every_way, open_artifact, shipped_bytes
from laconic.engine.buckets import Bucket, hash_of, read, write
from laconic.engine.dispatch import Dispatcher, load
from laconic.engine.specialize import Wish, counted, specialize
from laconic.measuring import latency
from laconic.measuring.parity import float_tolerance
from laconic.program.capture import capture
from laconic.program.specialize import specialize as fix
from laconic.runtimes.openvino import OpenVino

BRIEF = latency.Plan(rounds=1, seconds=0.0, calls=1, warm_calls=1, rest=0.0, repeats=0)
BOTH = ("batch", "sequence")


def wish(**others):
    return Wish(plan=BRIEF, threads=1, **others)


class Encoder(nn.Module):
    """One attention layer over at most 40 tokens; a masked mean, and the tokens if asked for."""

    def __init__(self, tokens=False):
        super().__init__()
        self.tokens = tokens
        self.words, self.places = nn.Embedding(50, 16), nn.Embedding(40, 16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, ids, attention_mask):
        batch, length = ids.shape
        x = self.words(ids) + self.places(torch.arange(length))
        parts = self.qkv(x).view(batch, length, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        kept = attention_mask.unsqueeze(-1).to(x.dtype)
        hidden = (1 - kept)[:, None, None, :, 0] * -1e9
        y = F.scaled_dot_product_attention(*parts, attn_mask=hidden)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, 16))
        mean = (x * kept).sum(1) / kept.sum(1).clamp(min=1e-9)
        return {"mean": mean, "tokens": x} if self.tokens else mean


def _encoder(tokens=False):
    torch.manual_seed(0)
    ids = torch.randint(0, 50, (2, 5))
    inputs = {"ids": ids, "attention_mask": torch.ones_like(ids)}
    return capture(Encoder(tokens).eval(), inputs, dynamic=BOTH)


@pytest.fixture(scope="module")
def encoder():
    return _encoder()


@pytest.fixture(scope="module")
def folder(encoder, tmp_path_factory):
    """Buckets of 4 and 8 tokens, alone and in fours."""
    out = tmp_path_factory.mktemp("encoder")
    sample = [{"batch": b, "sequence": s} for b in (1, 4) for s in (4, 8)]
    specialize(encoder, sample, out, wish(count=2))
    return out


@pytest.fixture
def dispatcher(folder):
    """Costs as if a token were 1 ms, a call 2, and any shape 3 more."""
    held = read(folder / "model.buckets")
    told = [replace(b, ms=2.0 + b.sizes["batch"] * b.sizes["sequence"]) for b in held.buckets]
    costs = ((1.0, 3.0, 6.0), (100.0, 102.0, 105.0))
    return Dispatcher(replace(held, buckets=tuple(told), costs=costs), 1)


def request(lengths, width=None, seed=0):
    """Sentences of these lengths in one batch, random ids in the padding too."""
    draw = np.random.default_rng(seed)
    width = width or max(lengths)
    ids = draw.integers(0, 50, (len(lengths), width))
    mask = (np.arange(width) < np.array(lengths)[:, None]).astype(np.int64)
    return [ids, mask]


def agree(program, given, inputs):
    wanted = program.run_flat(*map(torch.from_numpy, inputs))
    assert len(given) == len(wanted)
    for found, want in zip(given, wanted, strict=True):
        want = want.detach().numpy()
        assert found.shape == want.shape
        assert found.dtype == want.dtype
        # both sides round: each is within the tolerance of the exact value
        assert np.abs(found - want).max() <= 2 * float_tolerance(program) * np.abs(want).max()


@pytest.mark.parametrize(
    ("lengths", "width"),
    [
        ([8], None),  # a bucket of its own
        ([5], None),  # padded
        ([3], 12),  # cut, because the mask hides the rest
        ([13], None),  # longer than all buckets
        ([4, 8, 4, 4], None),  # a full batch, or two of them
        ([1, 8, 2, 30, 4, 4, 7, 5, 3], None),  # taken apart and put back
        ([6, 0, 2], 7),  # a sentence that its mask hides whole
    ],
)
def test_dynamic_and_static_results_are_equal(encoder, dispatcher, lengths, width):
    inputs = request(lengths, width)
    agree(encoder, dispatcher.run(inputs), inputs)


def test_each_request_goes_where_it_costs_least(dispatcher):
    def parts(needs):
        found = dispatcher._plan(tuple((need,) for need in needs), len(needs))
        return [(p.last - p.first, p.bucket.name if p.bucket else "") for p in found]

    assert parts([8]) == [(1, "batch=1 sequence=8")]
    assert parts([3]) == [(1, "batch=1 sequence=4")]
    assert parts([9]) == [(1, "")]
    # 5 ms in any shape of 5 tokens, 10 in the bucket of 8: padding is not for its own sake
    assert parts([5]) == [(1, "batch=1 sequence=8")]
    assert parts([30, 4, 4, 4, 4]) == [(1, ""), (4, "batch=4 sequence=4")]


@pytest.mark.parametrize("seed", range(6))
def test_no_way_of_taking_a_batch_apart_costs_less(dispatcher, seed):
    draw = np.random.default_rng(seed)
    needs = sorted(draw.integers(1, 14, 6).tolist(), reverse=True)

    def price(rows):
        able = [
            b.ms
            for b in dispatcher.held.buckets
            if b.sizes["batch"] >= len(rows) and b.sizes["sequence"] >= rows[0]
        ]
        return min(able, default=np.inf)

    def ways(rows):
        cuts = [c for k in range(len(rows)) for c in combinations(range(1, len(rows)), k)]
        return [[rows[a:b] for a, b in zip((0, *c), (*c, len(rows)), strict=True)] for c in cuts]

    free = dispatcher.held.open_cost()
    over = [need for need in needs if need > 8]  # no bucket takes these
    rest = [sum(map(price, way)) for way in ways(needs[len(over) :])]
    best = min(
        free(6 * needs[0]), (free(len(over) * needs[0]) if over else 0) + min(rest, default=0)
    )
    plan = dispatcher._plan(tuple((need,) for need in needs), 6)
    taken = sum(p.bucket.ms if p.bucket else free((p.last - p.first) * p.need[0]) for p in plan)
    assert [p.first for p in plan] == [0, *(p.last for p in plan[:-1])]
    assert taken == pytest.approx(best)


def test_tokens_that_come_out_keep_their_places(tmp_path):
    program = _encoder(tokens=True)
    made = specialize(program, [8], tmp_path, wish())
    assert made.held.outputs == ({0: "batch"}, {0: "batch", 1: "sequence"})
    for lengths, width in (([5], None), ([3, 6, 2], None), ([2], 6), ([9, 20], None)):
        inputs = request(lengths, width)
        agree(program, made.run(inputs), inputs)
    ids, mask = map(torch.from_numpy, request([4, 3]))
    found = made(ids, attention_mask=mask)
    torch.testing.assert_close(found["tokens"], program(ids, mask)["tokens"])


def test_what_was_missed_is_told_and_can_be_compiled(encoder, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "own")
    dispatcher = load(tmp_path / "own", 1)
    costs = ((1.0, 1.0, 5.0), (20.0, 20.0, 24.0))
    dispatcher.held = replace(dispatcher.held, costs=costs)
    dispatcher._prepare()
    for lengths in ([20], [20], [13]):
        dispatcher.run(request(lengths))
    first, second = dispatcher.missed()[:2]
    assert (first.sizes, first.calls, first.served) == (
        {"batch": 1, "sequence": 20}, 2, "any shape",
    )  # fmt: skip
    assert first.saved_ms == pytest.approx(2 * 4.0)
    assert second.sizes == {"batch": 1, "sequence": 13}
    assert "would compile batch=1 sequence=20: 2 calls" in str(first)
    bucket = dispatcher.compile(first.sizes)
    assert bucket.sizes in [b.sizes for b in read(tmp_path / "own" / "model.buckets").buckets]
    assert first.sizes not in [missed.sizes for missed in dispatcher.missed()]
    inputs = request([20])
    agree(encoder, dispatcher.run(inputs), inputs)
    with pytest.raises(DataError, match="expected a size from 1 on for each of batch, sequence"):
        dispatcher.compile({"sequence": 3})
    with pytest.raises(DataError, match="sequence is 41, the program takes 40"):
        dispatcher.compile({"batch": 1, "sequence": 41})


def test_inputs_that_do_not_fit_are_refused(dispatcher):
    ids, mask = request([5])
    for inputs, said in (
        ([ids], "found 1 inputs, expected 2: ids, attention_mask"),
        ([ids, mask[:, :3]], r"input attention_mask: has shape \[1, 3\], expected .*sequence=5"),
        ([ids[0], mask], r"input ids: has shape \[5\]"),
        ([ids.astype(np.int32), mask], "input ids: is int32, expected int64"),
        (request([41]), "sequence is 41, the program takes 40 at most"),
    ):
        with pytest.raises(DataError, match=said):
            dispatcher.run(inputs)


def test_files_that_are_not_those_written_are_refused(folder, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    (own / "model.bin").write_bytes(b"\0" * 100)
    with pytest.raises(ExportError, match=r"model.bin: is not the file that model.buckets"):
        load(own).run(request([5]))
    (own / "model.xml").unlink()
    with pytest.raises(ExportError, match=r"model.xml: is missing"):
        load(own).run(request([5]))
    about = json.loads((own / "model.buckets").read_text())
    (own / "model.buckets").write_text(json.dumps(about | {"any_shape": "../model.xml"}))
    with pytest.raises(ExportError, match="names a file elsewhere"):
        load(own)
    (own / "model.buckets").write_text("{}")
    with pytest.raises(ExportError, match="no file of buckets"):
        load(own)


def test_images_run_at_their_own_sizes(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    sides = {"args[0]": {0: "batch", 2: "height", 3: "width"}}
    program = capture(net.eval(), (torch.randn(2, 3, 8, 9),), dynamic=sides)
    made = specialize(program, [(8, 8), (12, 8), (12, 8)], tmp_path, wish(batches=[1, 3]))
    assert [tuple(b.sizes.values()) for b in made.held.buckets] == [
        (1, 8, 8), (3, 8, 8), (1, 12, 8), (3, 12, 8),
    ]  # fmt: skip
    assert any("height keeps exact sizes: no input is a mask" in n for n in made.held.notes)
    for shape in ((1, 8, 8), (2, 12, 8), (5, 8, 8), (1, 9, 20)):
        batch, high, wide = shape
        inputs = [np.random.default_rng(1).standard_normal((batch, 3, high, wide), np.float32)]
        agree(program, made.run(inputs), inputs)
    served = [missed.sizes for missed in made.missed() if missed.served != "any shape"]
    assert {"batch": 1, "height": 9, "width": 20} not in served


def test_of_many_exact_sizes_those_that_gain_most_are_compiled(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    sides = {"args[0]": {2: "height", 3: "width"}}
    program = capture(net, (torch.randn(1, 3, 8, 9),), dynamic=sides)
    made = specialize(program, [(8, 8)], tmp_path, wish())
    assert made.held.masks == {}
    inputs = [np.zeros((1, 3, 8, 10), np.float32)]
    agree(program, made.run(inputs), inputs)
    with pytest.raises(DataError, match=r"input .*: has shape \[2, 3, 8, 8\]"):
        made.run([np.zeros((2, 3, 8, 8), np.float32)])


def test_many_lengths_are_served_by_few_buckets(encoder, tmp_path):
    sample = [3] * 50 + [4, 5, 6, 7] * 10 + [30] * 5
    made = specialize(encoder, sample, tmp_path, wish(count=2))
    assert len(made.held.buckets) <= 2
    inputs = request([6])
    agree(encoder, made.run(inputs), inputs)
    dear = specialize(encoder, sample, tmp_path, wish(count=2, requests=1))
    assert dear.held.buckets == ()
    assert "no shape is faster compiled for" in dear.held.notes[0]
    agree(encoder, dear.run(inputs), inputs)


def test_onnx_runtime_needs_no_buckets_and_says_so(encoder, tmp_path):
    made = specialize(encoder, [4, 8], tmp_path, wish(runtime="onnxruntime"))
    assert made.held.buckets == ()
    assert "takes any shape at no cost" in made.held.notes[0]
    inputs = request([5, 2])
    agree(encoder, made.run(inputs), inputs)


def test_inductor_has_a_package_a_shape(encoder, tmp_path, monkeypatch):
    """Machine code is left out: a package is the graph that Inductor would compile."""

    class Package:
        def __init__(self, path):
            extra = {"laconic": ""}
            self.run = torch.export.load(path, extra_files=extra).module()
            self.about = extra

        def get_metadata(self):
            return self.about

        def __call__(self, *tensors):
            return self.run(*tensors)

    def package(exported, package_path, inductor_configs):
        extra = {"laconic": inductor_configs["aot_inductor.metadata"]["laconic"]}
        torch.export.save(exported, package_path, extra_files=extra)

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", package)
    monkeypatch.setattr(torch._inductor, "aoti_load_package", Package)
    made = specialize(encoder, [8], tmp_path, wish(runtime="inductor"))
    assert {"model.buckets", "model.laconic", "model.pt2", "model-batch1-sequence8.pt2"} == {
        path.name for path in tmp_path.iterdir()
    }
    fixed = torch.export.load(tmp_path / "model-batch1-sequence8.pt2")
    assert not [n for n in fixed.graph.nodes if "sym_size" in n.name or "arange" in n.name]
    for lengths in ([8], [5], [11], [3, 9]):
        inputs = request(lengths)
        agree(encoder, made.run(inputs), inputs)
    made.compile({"batch": 1, "sequence": 11})
    again = load(tmp_path)
    assert again.held.buckets[-1].file == "model-batch1-sequence11.pt2"
    inputs = request([11])
    agree(encoder, again.run(inputs), inputs)


@pytest.fixture
def compilations(monkeypatch):
    """Shapes that OpenVINO compiled for."""
    found = []
    compile_it = OpenVino._compile

    def counted_too(self, path, shapes, settings):
        found.append(shapes)
        return compile_it(self, path, shapes, settings)

    monkeypatch.setattr(OpenVino, "_compile", counted_too)
    return found


def _at_once(held):
    """Whatever fits a bucket goes to the smallest."""
    quick = tuple(replace(b, ms=1e-6 * b.sizes["sequence"]) for b in held.buckets)
    return replace(held, buckets=quick)


def test_shapes_are_opened_without_compiling_and_files_are_checked_once(
    encoder, folder, dispatcher, compilations, monkeypatch
):
    hashed = []
    monkeypatch.setattr(buckets, "hash_of", lambda path: hashed.append(path.name) or hash_of(path))
    made = dispatcher
    assert {path.name for path in folder.iterdir()} == {path.name for path in made.held.files()}
    for lengths in ([4], [8], [8, 8, 8, 8], [4] * 4, [20]):
        inputs = request(lengths)
        agree(encoder, made.run(inputs), inputs)
    assert sorted(made._runners) == ["", *sorted(b.name for b in made.held.buckets)]
    assert compilations == []
    assert sorted(hashed) == sorted(made.held.hashes)


def test_compiled_code_is_made_anew_where_it_does_not_fit(encoder, folder, tmp_path, compilations):
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    bucket = load(own, 1).compile({"batch": 1, "sequence": 6})
    assert bucket.file == "model-batch1-sequence6.blob"
    compilations.clear()
    inputs = request([6])

    def run(threads=1):
        made = Dispatcher(_at_once(read(own / "model.buckets")), threads)
        agree(encoder, made.run(inputs), inputs)
        assert len(made._runners) == 1
        return len(compilations)

    assert run() == 0
    assert run(threads=2) == 1
    origin, _, code = (own / bucket.file).read_bytes().partition(b"\n")
    (own / bucket.file).write_bytes(origin.replace(b'"version": "', b'"version": "1') + code)
    with pytest.raises(ExportError, match=r"sequence6.blob: is not the file that model.buckets"):
        run()
    held = read(own / "model.buckets")
    write(replace(held, hashes={**held.hashes, bucket.file: hash_of(own / bucket.file)}))
    assert run() == 2


def test_code_that_has_the_weights_in_it_is_not_kept(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(buckets, "_LARGE", 0)
    made = specialize(encoder, [4], tmp_path / "large", wish())
    without = specialize(encoder, [4], tmp_path / "never", wish(ahead=False))
    for each in (made, without):
        names = {path.name for path in each.held.files()}
        assert names == {"model.buckets", "model.xml", "model.bin"}
        assert {path.name for path in each.held.path.parent.iterdir()} == names
    inputs = request([4])
    agree(encoder, made.run(inputs), inputs)


def test_one_door_opens_it(encoder, folder):
    held = open_artifact(folder, threads=1)
    inputs = request([6, 3])
    agree(encoder, held.run(inputs), inputs)
    declared = declared_inputs(folder, 3)
    assert declared["ids"].shape == (3, 8)
    (label, way), *others = every_way(folder, declared, None, None, 1)
    assert not others
    assert label.endswith("openvino fp32")
    assert way.inputs == ("ids", "attention_mask")
    sizes = [path.stat().st_size for path in folder.iterdir()]
    assert shipped_bytes(folder / "model.buckets") == sum(sizes)


def test_what_cannot_be_specialised_is_refused(encoder, tmp_path):
    fixed = fix(encoder, {"batch": 1, "sequence": 4})
    whole = {"batch": 1, "sequence": 41}
    for program, shapes, options, error, said in (
        (fixed, [4], {}, DataError, "no dimension of the inputs is dynamic"),
        (encoder, [], {}, DataError, "no shapes"),
        (encoder, [0], {}, DataError, "sequence is 0"),
        (encoder, [(1, 2, 3)], {}, DataError, "expected sizes of batch, sequence"),
        (encoder, [{"lenght": 3}], {}, DataError, "no dynamic dimension named 'lenght'"),
        (encoder, [{"batch": 3}], {}, DataError, "has no size for 'sequence'"),
        (encoder, [whole], {}, DataError, "sequence is 41, the program takes 40 at most"),
        (encoder, [4], {"count": 0}, RecipeError, "count is 0"),
        (encoder, [4], {"batches": [0]}, DataError, "sizes of a batch"),
        (encoder, [4], {"runtime": "openvin"}, RecipeError, "openvino"),
    ):
        with pytest.raises(error, match=said):
            specialize(program, shapes, tmp_path / "out", wish(**options))
    assert not list((tmp_path).rglob("*.*"))


def test_a_sample_may_be_written_in_three_ways(encoder):
    found = counted(encoder, [4, (1, 4), {"sequence": 4}, (2, 4), [7]])
    assert found == {(1, 4): 3, (2, 4): 1, (1, 7): 1}


def test_a_bucket_says_its_shape():
    assert Bucket({"batch": 1, "sequence": 16}, "m.xml", 1.0, 0.1).name == "batch=1 sequence=16"
