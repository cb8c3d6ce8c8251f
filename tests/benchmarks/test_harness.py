"""The benchmarks' own machinery: rows are kept, resumed and told apart by their settings."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.data import Augmented, Images, cropped_and_flipped, tokenised
from benchmarks.harness import Bench, machine, peak_mb, portable

from benchmarks import models, peers


def bench(folder: Path, *arguments: str) -> Bench:
    made = Bench("example")
    made.parse(["--results", str(folder), *arguments])
    return made


def test_row_is_computed_once_and_kept(tmp_path):
    calls = []
    for _ in range(2):
        run = bench(tmp_path)
        values = run.row("one", lambda: calls.append(1) or {"a": 1.5}, depth=3)
        assert values == {"a": 1.5}
    assert calls == [1]


def test_other_settings_or_only_or_fresh_compute_again(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"n": len(calls)}

    bench(tmp_path).row("one", compute, depth=3)
    assert bench(tmp_path).row("one", compute, depth=4) == {"n": 2}
    assert bench(tmp_path, "--only", "one").row("one", compute, depth=4) == {"n": 3}
    assert bench(tmp_path, "--fresh").row("one", compute, depth=4) == {"n": 4}
    assert bench(tmp_path, "--only", "two", "--fresh").row("one", compute, depth=9) == {"n": 4}


def test_interrupted_run_keeps_finished_rows(tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    run = bench(tmp_path)
    run.row("one", lambda: {"a": 1})
    with pytest.raises(KeyboardInterrupt):
        run.row("two", interrupt)
    assert set(bench(tmp_path).stored()["rows"]) == {"one"}
    assert [path.name for path in tmp_path.iterdir()] == ["example.json"]


def test_last_line_is_the_stored_result(tmp_path, capsys):
    run = bench(tmp_path)
    run.row("one", lambda: {"a": torch.tensor(2.0), "b": np.float32("nan")})
    run.finish(accuracy=93.39, missing=None)
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line == json.loads((tmp_path / "example.json").read_text())
    assert line["accuracy"] == 93.39
    assert "missing" not in line
    assert line["rows"]["one"]["values"] == {"a": 2.0, "b": None}
    assert line["machine"]["cores"] >= 1
    assert line["versions"]["torch"] == torch.__version__


def test_a_part_leaves_the_other_figures(tmp_path, capsys):
    bench(tmp_path).finish(first=1.0, second=2.0)
    run = bench(tmp_path, "--only", "one")
    run.row("one", lambda: {})
    stored = run.finish(first=None, second=3.0)
    assert (stored["first"], stored["second"]) == (1.0, 3.0)


def test_unknown_row_is_refused(tmp_path):
    run = bench(tmp_path, "--only", "none")
    run.row("one", lambda: {})
    with pytest.raises(SystemExit):
        run.finish()


def test_results_hold_no_absolute_path():
    value = portable({"file": Path("/somewhere/resnet56.safetensors"), "text": "/a/b.json"})
    assert value == {"file": "resnet56.safetensors", "text": "b.json"}


def test_quick_results_lie_apart(tmp_path):
    bench(tmp_path, "--quick").row("one", lambda: {"a": 1})
    assert not (tmp_path / "example.json").exists()
    assert bench(tmp_path).stored()["rows"] == {}


def test_peak_memory_counts_what_was_touched():
    before = peak_mb()
    block = np.ones(40 * 2**20, dtype=np.uint8)
    assert peak_mb() >= min(before + 40, before) and peak_mb() > block.nbytes / 2**20


def test_machine_names_no_path():
    assert "/" not in machine()["cpu"]


def test_crop_and_flip_take_pixels_from_the_padded_image(generator):
    raw = torch.randint(1, 255, (64, 3, 8, 8), dtype=torch.uint8, generator=generator)
    out = cropped_and_flipped(raw, generator, padding=2)
    assert out.shape == raw.shape
    for image, cut in zip(raw, out, strict=True):
        padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
        windows = padded.unfold(1, 8, 1).unfold(2, 8, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
        candidates = torch.cat([windows, windows.flip(-1)])
        assert (candidates == cut).flatten(1).all(1).any()


def test_augmented_differs_by_pass_and_repeats_by_seed(rng):
    images = Images(rng.integers(0, 255, (32, 8, 8, 3), dtype=np.uint8), torch.arange(32))
    one, two = Augmented(images, 16, seed=3), Augmented(images, 16, seed=3)
    first, second = list(one), list(one)
    assert len(first) == len(one) == 2
    assert not torch.equal(first[0][1], second[0][1])
    for (x, y), (x2, y2) in zip(first, two, strict=True):
        assert torch.equal(x, x2) and torch.equal(y, y2)


@pytest.mark.parametrize("depth", [8, 20])
def test_cifar_resnet_has_the_papers_size(depth):
    model = models.CifarResNet(depth)
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == depth - 1
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_resnet50_shape_has_its_parameter_count(generator):
    model = models.resnet50_shaped(generator)
    assert sum(p.numel() for p in model.parameters()) == 25_557_032


def test_outputs_over_batches_equal_one_run():
    data = np.arange(14, dtype=np.float32).reshape(7, 2)

    def run(inputs):
        assert len(inputs[0]) == 3
        return [inputs[0] * 2]

    assert np.array_equal(peers.batched_outputs(run, [data], 3), data * 2)


def test_interleaved_runs_all_in_turn():
    order = []
    runners = {name: lambda _, name=name: order.append(name) or [] for name in "ab"}
    found = peers.interleaved(runners, {"a": [], "b": []}, rounds=2, seconds=0.001)
    switches = [x for x, y in zip(order, [*order[1:], None], strict=True) if x != y]
    assert switches in (["a", "b", "a"], ["a", "b", "b", "a"])
    assert all(found[name]["low"] <= found[name]["ms"] <= found[name]["high"] for name in "ab")


def test_tokens_are_padded_as_asked():
    def tokenizer(texts, *, padding, max_length, truncation, return_tensors):
        assert truncation and return_tensors == "pt"
        width = max_length if padding == "max_length" else max(len(text) for text in texts)
        ids = torch.zeros(len(texts), width, dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": ids, "token_type_ids": ids}

    fixed = tokenised(["a", "bcd", "ef"], tokenizer, 2, 16)
    free = tokenised(["a", "bcd", "ef"], tokenizer, 2, None)
    assert [tuple(b["input_ids"].shape) for b in fixed] == [(2, 16), (1, 16)]
    assert [tuple(b["input_ids"].shape) for b in free] == [(2, 3), (1, 2)]
    assert set(fixed[0]) == {"input_ids", "attention_mask"}
