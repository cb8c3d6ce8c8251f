"""A truncated, altered or forged file costs a StorageError: no other error, no memory, no code."""

import json
import resource
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from torch import nn

from laconic import storage
from laconic.core.errors import StorageError
from laconic.methods.base import Context, method_class
from laconic.program.capture import capture
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.storage import container, header, operators
from laconic.storage.limits import Limits


@pytest.fixture
def file(frozen, tmp_path):
    path = tmp_path / "model.laconic"
    storage.save(frozen, path)
    return path


def refused(path, raw, match=None):
    path.write_bytes(raw)
    with pytest.raises(StorageError, match=match) as caught:
        storage.load(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def forge(path, change):
    """The file with its header changed by a function, and everything else right."""
    content = storage.read_header(path)
    raw = path.read_bytes()
    stored, data = struct.unpack_from("<I", raw, 12)[0], struct.unpack_from("<Q", raw, 24)[0]
    body = raw[64 + stored : 64 + stored + data]
    content = change(content) or content
    return b"".join(container.assemble(content, [body]))


def test_every_truncation(file):
    raw = file.read_bytes()
    for length in [*range(0, 80), *range(80, len(raw), 61), len(raw) - 1]:
        message = refused(file, raw[:length])
        assert length < 8 or "truncated" in message or length == 0


def test_every_altered_byte_is_found(file):
    raw = file.read_bytes()
    for position in range(0, len(raw), 3):
        refused(file, raw[:position] + bytes([raw[position] ^ 0x10]) + raw[position + 1 :])


def test_the_message_names_the_tensor_and_the_place(file):
    raw = bytearray(file.read_bytes())
    raw[64 + struct.unpack_from("<I", raw, 12)[0] + 5] ^= 1
    message = refused(file, bytes(raw))
    assert "altered" in message and "bytes" in message and "weight" in message


def test_something_behind_the_end_and_other_files(file, tmp_path):
    raw = file.read_bytes()
    refused(file, raw + b"x", "behind its end")
    refused(file, b"", "not a .laconic file")
    refused(file, b"PK\3\4" + raw[4:], "not a .laconic file")
    refused(file, raw[:8] + b"\3" + raw[9:], "version 3")


def test_forged_data_with_right_hashes(file, sealed, rng):
    """Every byte of the data may be anything: the outcome is a Program or a StorageError."""
    raw = file.read_bytes()
    start = 64 + struct.unpack_from("<I", raw, 12)[0]
    end = start + struct.unpack_from("<Q", raw, 24)[0]
    outcomes = {"loaded": 0, "refused": 0}
    for position in range(start, end, max(1, (end - start) // 80)):
        value = bytes([int(rng.integers(256))])
        file.write_bytes(sealed(raw[:position] + value + raw[position + 1 :]))
        try:
            assert isinstance(storage.load(file), Program)
            outcomes["loaded"] += 1
        except StorageError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 0, "some bytes are free values, some are not"


def mutations(value, rng):
    """The value with one thing in it replaced, removed or doubled, at random."""
    strange = [None, True, -1, 2**70, 1.5, "", "x" * 2000, "-1", "0", [], {}, [[]], {"a": 1}, 10**6]
    root = [value]
    places = []

    def walk(owner, key):
        places.append((owner, key))
        inner = owner[key]
        if isinstance(inner, dict):
            for k in inner:
                walk(inner, k)
        elif isinstance(inner, list):
            for k in range(len(inner)):
                walk(inner, k)

    walk(root, 0)
    owner, key = places[int(rng.integers(1, len(places)))]
    how = int(rng.integers(4))
    if how == 0:
        del owner[key]
    elif how == 1 and isinstance(owner, list):
        owner.insert(key, owner[key])
    elif how == 2 and isinstance(owner, dict):
        owner["surprise"] = owner.pop(key)
    else:
        owner[key] = strange[int(rng.integers(len(strange)))]


def test_forged_headers_with_right_hashes(file, rng):
    """Whatever the header says, the outcome is a Program or a StorageError."""
    good = file.read_bytes()
    refusals = 0
    for _ in range(200):
        file.write_bytes(good)
        file.write_bytes(forge(file, lambda content: mutations(content, rng)))
        try:
            assert isinstance(storage.load(file), Program)
        except StorageError:
            refusals += 1
    assert refusals > 100


def set_in(path, *keys, value):
    def change(content):
        owner = content
        for key in keys[:-1]:
            owner = owner[key]
        owner[keys[-1]] = value

    return forge(path, change)


CODE = "x=__import__('os').system('touch pwned')"


@pytest.mark.parametrize(
    ("keys", "value", "match"),
    [
        (("operators", 0), "aten.from_file.default", "not on the list"),
        (("operators", 0), "aten.relu_.default", "not on the list"),
        (("operators", 0), "aten.add.out", "not on the list"),
        (("operators", 0), "os.system", "not on the list"),
        (("operators", 0), "operator.attrgetter", "not on the list"),
        (("operators", 0), "torch.load", "not on the list"),
        (("operators", 0), "aten.relu.__class__", "no operator"),
        (("operators", 0), "aten.relu", "no operator"),
        (("operators", 0), "inductor.resize_storage_bytes_.default", "not on the list"),
        (("operators", 0), 7, "expected text"),
        (("tensors", 0, 0), 'a"); ' + CODE + '; ("', "not a name"),
        (("tensors", 0, 0), "forward", "malformed|not a name"),
        (("tensors", 0, 0), "__class__.x", "not a name"),
        (("tensors", 0, 0), "a..b", "not a name"),
        (("nodes", 0, 1), "self", "not a name"),
        (("nodes", 0, 1), "x):\n    pass\ndef g(y", "not a name"),
        (("nodes", 0, 1), "import", "not a name"),
        (("nodes", -1), [0, ["1"], CODE], "not a name"),
        (("nodes", -1), [0, ["1"], None, {CODE: 1}], "not a name"),
        (("nodes", -1), [0, ["-3"]], "nodes back"),
        (("nodes", -1), [0, ["999999"]], "nodes back"),
        (("nodes", -1), [0, [{"device": "cuda:0"}]], "unknown argument"),
        (("nodes", -1), [0, [{"python": "1"}]], "unknown argument"),
        (("tensors", 0, 3), [2**40, 2**40], "beyond all reason"),
        (("tensors", 0, 3), [2**20, 2**10], "bomb|limit"),
        (("tensors", 0, 3), [-1], "not a shape"),
        (("tensors", 0, 3), [1] * 65, "not a shape"),
        (("tensors", 0, 4), 2**40, "the file holds"),
        (("tensors", 0, 2), "object", "malformed entry"),
        (("inputs", 0), [[2**20, 2**20], "float32"], "limit"),
        (("aliases",), {"stem.0.weight": "stem.0.weight"}, "cannot stand for"),
        (("aliases",), {"new": "nothing"}, "cannot stand for"),
        (("signature", "output"), {"tensor": 99}, "names tensor"),
        (("signature", "output"), {"class": "os.system"}, "signature holds"),
        (("dynamic",), {"x": {"9": "batch"}}, "no such"),
    ],
)
def test_what_a_forger_might_try(file, keys, value, match, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(file, set_in(file, *keys, value=value), match)
    assert not (tmp_path / "pwned").exists()


def test_text_in_arguments_stays_text(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = file.read_bytes()
    for text in ("'+" + CODE + "+'", '"""', "\\", "\n" + CODE):
        file.write_bytes(good)
        refused(file, set_in(file, "nodes", -1, value=[0, ["1", {"string": text}]]))
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("added", "match"),
    [
        ([["aten.arange.default", [10**9]], ["aten.split.Tensor", ["1", 1]]], "pieces"),
        ([["aten.arange.default", [10**9]], ["aten.unbind.int", ["1"]]], "pieces"),
        ([["aten.arange.default", [9]], ["aten.tensor_split.sections", ["1", 10**9]]], "pieces"),
        ([["aten.zeros.default", [[10**6, 1]]], ["aten.chunk.default", ["1", 10**6]]], "pieces"),
        ([["operator.pow", [10, 10**9]]], "exponent"),
        ([["operator.mul", [2**62, 4]]], "64 bits"),
        ([["operator.mul", [[0], 10**9]]], "numbers"),
        ([["operator.mod", [{"string": "%999999999d"}, 1]]], "numbers"),
        ([["torch.sym_sum", [[1, {"string": "x"}]]]], "numbers"),
        ([["math.sqrt", [-1]]], "does not fit"),
        ([["operator.floordiv", [1, 0]]], "does not fit"),
        ([["aten.relu.default", [1]]], "does not fit"),
        ([["aten.conv2d.default", []]], "does not fit"),
    ],
)
def test_finding_out_shapes_cannot_be_stretched(file, added, match):
    def change(content):
        for name, args in added:
            content["operators"].append(name)
            content["nodes"].append(
                [len(content["operators"]) - 1, args, f"new{len(content['nodes'])}"]
            )
            content["origin"].append(0)
        content["output"] = [str(int(back) + len(added)) for back in content["output"]]

    refused(file, forge(file, change), match)


def craft(text, coding=0, size=None):
    """A file without tensors whose header is the given bytes."""
    deflate = zlib.compressobj(9, zdict=header.DICTIONARY)
    stored = deflate.compress(text) + deflate.flush()
    prelude = container.PRELUDE.pack(
        container.MAGIC, 1, coding, len(stored), len(text) if size is None else size,
        zlib.crc32(stored), 0, bytes(32),
    )  # fmt: skip
    return prelude, stored


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"[" * 100 + b"]" * 100, "deep"),
        (b"[" * 1_000_000, "deep"),
        (b'{"a":' * 70 + b"1" + b"}" * 70, "deep"),
        (b"[" + b"0," * 3_000_000 + b"0]", "values"),
        (b'{"nodes":[1e999,NaN]}', "not JSON"),
        (b'{"nodes":' + b"9" * 10_000 + b"}", "not JSON"),
        (b'{"a":"\xff"}', "not JSON"),
        (b"[]", "not a JSON object"),
        (b"{}", "malformed"),
    ],
)
def test_hostile_json(file, sealed, text, match):
    refused(file, sealed(b"".join(craft(text))), match)


def test_brackets_in_strings_do_not_count():
    content = {"extra": "[" * 500 + '\\"' + "{" * 500}
    coding, stored, size = header.pack(content)
    assert header.unpack(coding, stored, size, Limits()) == content


def test_a_header_that_unpacks_to_more_than_it_says(file, sealed):
    for size, match in ((100, "does not unpack"), (2**31, "limit")):
        refused(file, sealed(b"".join(craft(b"{}" + b" " * 5_000_000, size=size))), match)
    refused(file, sealed(b"".join(craft(b"{}", coding=1))), "damaged|unpack")
    refused(file, sealed(b"".join(craft(b"{}", coding=9))), "unknown header coding")


@pytest.mark.parametrize(
    ("limits", "match"),
    [
        (Limits(header_bytes=100), "limit is 100"),
        (Limits(nodes=5), "limit is 5"),
        (Limits(tensors=2), "limit is 2"),
        (Limits(decoded_bytes=1000), "limit is 1000"),
        (Limits(input_bytes=10), "limit is 10"),
        (Limits(depth=2), "limit is 2"),
        (Limits(header_values=9), "limit is 9"),
    ],
)
def test_limits_are_the_callers(file, limits, match):
    with pytest.raises(StorageError, match=match):
        storage.load(file, limits=limits)


def test_many_small_bombs(tmp_path):
    """Each tensor within the rule for one, all together beyond the rule for the file."""
    path = tmp_path / "bomb.laconic"
    rows = [[f"t{i}", "b", "float32", [2000], 5] for i in range(40_000)]
    body = [b"\1" + bytes(4)] * len(rows)
    content = {"tensors": rows, "nodes": []}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(path, b"".join(container.assemble(content, body)), "bomb")
    unit = 1 if sys.platform == "darwin" else 1024
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
    assert grown < 400 << 20


def test_the_list_holds_what_the_program_floor_describes():
    from laconic.program.operators import table

    described = {name for name in table() if name.startswith("aten.")}
    assert described <= operators.allowed()
    for name in ("aten.from_file", "aten.set_", "aten.resize_", "aten.record_stream", "os.system"):
        assert name not in operators.allowed()


def test_every_listed_operator_is_known_and_pure():
    """A word that torch does not know, or knows only in a writing form, has no business there."""
    for name in sorted(operators.allowed()):
        space, _, word = name.partition(".")
        packet = getattr(torch.ops.aten, word, None) if space == "aten" else None
        if packet is None:
            continue
        pure = [o for o in packet.overloads() if not getattr(packet, o)._schema.is_mutable]
        assert pure, name
        assert operators.name_of(getattr(packet, pure[0])) == f"{name}.{pure[0]}"


def test_json_numbers_come_back_exactly():
    values = [0.1, 1e-5, -0.0, 5e-324, 1.7976931348623157e308, 2**63 - 1, -(2**63), True, 1.0]
    coding, stored, size = header.pack({"v": values})
    back = header.unpack(coding, stored, size, Limits())["v"]
    assert json.dumps(back) == json.dumps(values)
    assert [type(v) for v in back] == [type(v) for v in values]
    assert np.signbit(back[2])


@pytest.fixture
def hashed(tmp_path):
    """A layer of 64 x 64 weights in a file of 41 buckets."""
    program = capture(nn.Linear(64, 64).eval(), torch.randn(2, 64))
    context = Context(task=None, original=program)
    made = method_class("share.hash")(ratio=0.01).apply(program, Sites(), context).program
    storage.save(made, tmp_path / "hashed.laconic")
    return tmp_path / "hashed.laconic"


def test_buckets_stand_for_no_tensor_of_any_size(hashed):
    def stretch(content):
        number = content["operators"].index("laconic.hashed.default")
        (row,) = (row for row in content["nodes"] if row[0] == number)
        row[1][1] = [1 << 20, 1 << 20]

    refused(hashed, forge(hashed, stretch), "41 buckets for a shape of")


def test_what_forms_stand_for_counts_as_what_a_file_holds(hashed):
    assert storage.load(hashed, limits=Limits(decoded_bytes=17_000))  # 64 x 64 floats and a bias
    with pytest.raises(StorageError, match="what they stand for"):
        storage.load(hashed, limits=Limits(decoded_bytes=16_000))
