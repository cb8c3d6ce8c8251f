"""Packed weights for transformers and vLLM, read again by a reader that knows the layout only."""

import json
import struct

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from laconic import storage
from laconic.cli import app
from laconic.core.errors import ExportError
from laconic.methods.base import Context
from laconic.methods.quantize.dynamic import QuantizeDynamic
from laconic.methods.quantize.weights import QuantizeWeights
from laconic.program.capture import capture
from laconic.program.freezing import form_of, freeze
from laconic.program.sites import Sites
from laconic.runtimes._safetensors import pack, write_safetensors
from laconic.testing.contracts import own_outputs

TYPES = {"F32": np.float32, "I32": np.int32, "I64": np.int64}


def read(path):
    """A safetensors file, by its documentation: name → array."""
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    body, found = raw[8 + size :], {}
    header.pop("__metadata__")
    assert sum(end - start for start, end in (h["data_offsets"] for h in header.values())) == len(
        body
    )
    for name, held in header.items():
        start, end = held["data_offsets"]
        found[name] = np.frombuffer(body[start:end], TYPES[held["dtype"]]).reshape(held["shape"])
    return found


def unpacked(words, bits, count):
    """Element i of a row stands at bits i * bits and following, raised by 2^(bits - 1)."""
    stream = ((words.astype(np.int64)[..., None] >> np.arange(32)) & 1).reshape(len(words), -1)
    taken = stream[:, : count * bits].reshape(len(words), count, bits)
    return (taken << np.arange(bits)).sum(-1) - 2 ** (bits - 1)


def weights(folder):
    """Float weights of every tensor of a folder, decoded as its config says."""
    tensors = read(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "pack-quantized")
    found = {n: v for n, v in tensors.items() if ".weight_" not in n}
    for name in [n.removesuffix("_packed") for n in tensors if n.endswith("_packed")]:
        layer = name.removesuffix(".weight")
        held = [g["weights"] for g in config["config_groups"].values()
                if layer in g["targets"] or "Linear" in g["targets"]]  # fmt: skip
        assert len(held) == 1 and layer not in config["ignore"]
        bits, (rows, columns) = held[0]["num_bits"], tensors[f"{name}_shape"]
        codes = unpacked(tensors[f"{name}_packed"], bits, columns)
        scale = tensors[f"{name}_scale"]
        zero = np.zeros(scale.shape)
        if not held[0]["symmetric"]:
            zero = unpacked(tensors[f"{name}_zero_point"].T, bits, rows).T
        run = held[0]["group_size"] or columns
        assert held[0]["strategy"] == ("group" if held[0]["group_size"] else "channel")
        spread = [np.repeat(side, run, 1) for side in (zero, scale)]
        found[name] = ((codes - spread[0]) * spread[1]).astype(np.float32)
    return found


class Words(nn.Module):
    """Ids [batch, tokens] -> logits; odd sizes, so that rows end within a word."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 24), nn.LayerNorm(24)
        self.up, self.down = nn.Linear(24, 13), nn.Linear(13, 24, bias=False)
        self.head = nn.Linear(24, 11)

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(self.norm(x + self.down(torch.relu(self.up(x)))))


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    return capture(Words().eval(), torch.arange(10).reshape(2, 5))


def quantize(program, method=QuantizeWeights, sites=("up*", "down*", "head*"), **options):
    context = Context(task=own_outputs(program), original=program)
    return method(**options).apply(program, Sites.of(list(sites)), context).program


CASES = {
    "w4": {"bits": 4, "first_last": None},
    "w4 zero points": {"bits": 4, "symmetric": False, "first_last": None},
    "w3 in groups": {"bits": 3, "group": 12, "first_last": None, "sites": ("up*",)},
    "w8": {"bits": 8},
    "both": {"bits": 4, "first_last": 8, "sites": ("*",), "symmetric": True},
    "one scale": {"bits": 8, "per_channel": False},
}


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_reader_of_the_layout_gets_the_weights(program, tmp_path, case, frozen):
    made = quantize(program, **case)
    written = write_safetensors(freeze(made) if frozen else made, tmp_path, {"model_type": "x"})
    assert json.loads(written[1].read_text())["model_type"] == "x"
    found = weights(tmp_path)
    model = Words()
    model.load_state_dict({name: torch.tensor(value) for name, value in found.items()})
    for name in ("up.weight", "down.weight", "head.weight"):
        wanted = form_of(made, name).decode().detach().numpy()
        # the product of an integer and a scale, in float64 here and in float32 there
        np.testing.assert_allclose(found[name], wanted, rtol=1e-6, atol=0)
    ids = program.example[0]
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids), made(ids), rtol=1e-4, atol=1e-5)


def test_what_stays_float_is_said(program, tmp_path):
    write_safetensors(quantize(program, sites=("up*",), bits=4), tmp_path, {})
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["down", "head"]


@pytest.mark.parametrize("bits", [4, 8])
def test_words_hold_the_lowest_bits_first(bits):
    codes = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))[None].repeat(3, 1)
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert int(words[0, 0]) & (2**bits - 1) == 0
    assert np.array_equal(unpacked(words.numpy(), bits, codes.shape[1]), codes.numpy())


def test_what_the_file_cannot_hold_is_refused(program, tmp_path):
    with pytest.raises(ExportError, match="no weight of a linear layer"):
        write_safetensors(program, tmp_path, {})
    with pytest.raises(ExportError, match="weights only"):
        write_safetensors(quantize(program, QuantizeDynamic), tmp_path, {})


def test_a_tied_head_stays_float(tmp_path):
    model = Words()
    model.head.weight = model.embed.weight
    tied = capture(model.eval(), torch.arange(10).reshape(2, 5))
    made = quantize(tied, sites=("*",), bits=4, first_last=None)
    write_safetensors(made, tmp_path, {})
    found = weights(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["head"]
    assert found["embed.weight"].dtype == np.float32 and "head.weight" not in found


def test_the_command_writes_a_folder(program, tmp_path):
    path, config = tmp_path / "words.laconic", tmp_path / "original.json"
    storage.save(freeze(quantize(program, bits=4, symmetric=True)), path)
    config.write_text(json.dumps({"hidden_size": 24}))
    command = ["export", str(path), "--to", "safetensors", "--config", str(config)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    held = json.loads((tmp_path / "words" / "config.json").read_text())
    assert held["hidden_size"] == 24 and "quantization_config" in held
    assert "up.weight" in weights(tmp_path / "words")
    config.write_text("{")
    assert "not a configuration" in CliRunner().invoke(app, command).output
