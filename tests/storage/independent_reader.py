"""A second reader of `.laconic` files, written from `docs/format.md` in plain Python and NumPy.

It shares no code with Laconic and uses none of its dependencies but NumPy. Tensors come back as
bytes, because NumPy has no bfloat16.
"""

import hashlib
import json
import lzma
import math
import re
import struct
import zlib
from pathlib import Path

import numpy as np

WIDTH = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "complex64": 8, "complex128": 16, "int64": 8, "int32": 4, "int16": 2, "int8": 1,
    "uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1, "bool": 1,
}  # fmt: skip
ROTATED = {"float64", "float32", "float16", "bfloat16"}


def read(path, document):
    """Header, and name → (dtype, shape, row-major little-endian bytes).

    `document` is the text of `docs/format.md`: the preset dictionary is taken from there.
    """
    raw = Path(path).read_bytes()
    magic, version, coding, zero, stored, size, crc, data = struct.unpack_from("<8sHBBIIIQ", raw)
    assert magic == b"\x93LACONIC" and version in (1, 2) and zero == 0
    assert len(raw) == 64 + stored + data + 4 * -(-data // 16384)
    assert hashlib.sha256(raw[:32] + raw[64:]).digest() == raw[32:64]
    packed = raw[64 : 64 + stored]
    assert zlib.crc32(packed) == crc
    if coding == 0:
        text = zlib.decompressobj(zdict=dictionary(document)).decompress(packed)
    else:
        filters = [{"id": lzma.FILTER_LZMA1, "dict_size": 1 << 20, "lc": 4, "lp": 0, "pb": 0}]
        text = lzma.decompress(packed, lzma.FORMAT_RAW, filters=filters)
    assert len(text) == size
    header = json.loads(text)
    body = raw[64 + stored : 64 + stored + data]
    sums = struct.unpack(f"<{-(-data // 16384)}I", raw[64 + stored + data :])
    assert all(zlib.crc32(body[16384 * i : 16384 * (i + 1)]) == s for i, s in enumerate(sums))
    tensors, at = {}, 0
    for name, _, dtype, shape, length, *_ in header["tensors"]:
        tensors[name] = (dtype, tuple(shape), decode(body[at : at + length], dtype, shape))
        at += length
    assert at == data
    return header, tensors


def dictionary(document):
    part = document.split("## The preset dictionary")[1]
    found = re.search(r"```text\n(.*?)\n```", part, re.S).group(1).replace("\n", "").encode()
    assert len(found) == int(re.search(r"([\d,]+) bytes of ASCII", part).group(1))
    return found


def decode(data, dtype, shape):
    count, width = math.prod(shape), WIDTH[dtype]
    if count == 0:
        assert data == b""
        return b""
    coding, body = data[0], data[1:]
    if coding == 0:
        out = body
    elif coding == 1:
        out = body * count
    elif coding == 2:
        out = join_planes(planes(body, count, width), dtype)
    elif coding == 3:
        out = zlib.decompress(body)
    elif coding == 4:
        flat = np.frombuffer(zlib.decompress(body), np.uint8)
        out = join_planes(flat.reshape(width, count), dtype)
    elif coding == 5:
        out = context(body, dtype, shape)
    else:
        assert coding == 6
        out = sparse(body, dtype, shape)
    assert len(out) == count * width
    return out


def join_planes(split, dtype):
    width = WIDTH[dtype]
    joined = np.ascontiguousarray(np.asarray(split, np.uint8).T)
    if dtype not in ROTATED:
        return joined.tobytes()
    mask = (1 << 8 * width) - 1
    out = bytearray()
    for row in joined:
        word = int.from_bytes(row.tobytes(), "little")
        out += ((word >> 1) | (word << (8 * width - 1)) & mask).to_bytes(width, "little")
    return bytes(out)


def planes(body, count, width):
    ans, finish = planes_before_the_stream(body, count, width)
    split = finish()
    ans.finish()
    return split


def planes_before_the_stream(body, count, width):
    """The stream, and what reads the coded planes from it when their turn comes."""
    at, kinds, split = 0, [], []
    for _ in range(width):
        kind = body[at]
        kinds.append((kind, body[at + 1 : at + 1 + kind]))
        at += 1 + kind
    for kind, values in kinds:
        if kind == 0:
            split.append(list(body[at : at + count]))
            at += count
        else:
            split.append([values[0]] * count)
    ans = Ans(body[at:])

    def finish():
        for plane, (kind, values) in enumerate(kinds):
            if kind == 2:
                low, high = values
                split[plane] = [low + s for s in adaptive(ans, count, high - low + 1)]
        return split

    return ans, finish


def sparse(body, dtype, shape):
    order, group, count = struct.unpack_from("<BBI", body)
    width, total = WIDTH[dtype], math.prod(shape)
    ans, finish = planes_before_the_stream(body[6:], count, width)
    symbols = adaptive(ans, -(-total // group), 1 << group)
    bits = [symbol >> k & 1 for symbol in symbols for k in range(group)]
    assert not any(bits[total:]) and sum(bits) == count
    places = np.arange(total).reshape(shape)
    places = np.moveaxis(places, 1, -1).ravel() if order else places.ravel()
    filled = sorted(int(place) for place, bit in zip(places, bits, strict=False) if bit)
    words = [int.from_bytes(bytes(column), "little") for column in zip(*finish(), strict=True)]
    ans.finish()
    bits_of_word = 8 * width
    out = bytearray(total * width)
    for place, word in zip(filled, words, strict=True):
        if dtype in ROTATED:
            word = word >> 1 | (word & 1) << bits_of_word - 1
        elif dtype.startswith("int"):
            word = (word >> 1 ^ -(word & 1)) % (1 << bits_of_word)
        out[place * width : (place + 1) * width] = word.to_bytes(width, "little")
    return bytes(out)


class Ans:
    """The stack coder, with Python's own integers."""

    def __init__(self, data):
        assert not data.endswith(b"\0")
        data += bytes(-len(data) % 4)
        self.words = list(struct.unpack(f"<{len(data) // 4}I", data))
        self.state = 0
        while self.words and self.state < 1 << 32:
            self.state = (self.state << 32) | self.words.pop()

    def take(self, frequencies, count):
        """`count` symbols with one table."""
        borders = np.concatenate([[0], np.cumsum(np.array(frequencies, np.int64))])
        assert borders[-1] == 1 << 24 and min(frequencies) >= 1
        out = []
        for _ in range(count):
            quantile = self.state & 0xFFFFFF
            symbol = int(np.searchsorted(borders, quantile, side="right")) - 1
            first = int(borders[symbol])
            self.state = (self.state >> 24) * int(frequencies[symbol]) + quantile - first
            if self.state < 1 << 32 and self.words:
                self.state = (self.state << 32) | self.words.pop()
            out.append(symbol)
        return out

    def finish(self):
        assert self.state == 0 and not self.words


def normalise(weights):
    free = (1 << 24) - len(weights)
    total = sum(weights)
    out = [1 + w * free // total for w in weights]
    out[weights.index(max(weights))] += (1 << 24) - sum(out)
    return out


def adaptive(ans, length, alphabet):
    counts, out = [0] * alphabet, []
    while len(out) < length:
        a = len(out)
        step = min(max(32, a // 2), 1 << 22, length - a)
        block = ans.take(normalise([2 * c + 1 for c in counts]), step)
        for symbol in block:
            counts[symbol] += 1
        out += block
    return out


def e(n):
    return math.isqrt(math.isqrt(math.isqrt(1 << (n + 240))))


def exp2(t):
    if t >= 31 << 16:
        return 0
    v, m = 1 << 30, math.isqrt(1 << 59)
    for bit in range(15, -1, -1):
        if t >> bit & 1:
            v = v * m >> 30
        m = math.isqrt(m << 30)
    return v >> (t >> 16)


def base_table(k, low, high, centre, shape):
    distances = [abs(v - centre) for v in range(low, high + 1)]
    rate, rate2 = 94548 * e(-2 * (k - 8)) >> 14, 30095 * e(-4 * (k - 8)) >> 14
    laplace = [exp2(x * rate >> 16) for x in distances]
    gauss = [exp2(x * x * rate2 >> 16) for x in distances]
    laplace = [(v << 24) // sum(laplace) for v in laplace]
    gauss = [(v << 24) // sum(gauss) for v in gauss]
    weights = zip(laplace, gauss, strict=True)
    return normalise([shape * p + (8 - shape) * g + 512 for p, g in weights])


def context(body, dtype, shape):
    mixture, low, high, centre, axis, first, last = struct.unpack_from("<BhhhBBB", body)
    ans = Ans(body[10:])
    moved = (shape[axis], *shape[:axis], *shape[axis + 1 :])
    rows, columns, positions = moved[0], math.prod(moved[1:]), math.prod(moved[2:])
    classes = [first] * rows
    if first < last:
        classes = [first + s for s in adaptive(ans, rows, last - first + 1)]
    alphabet = high - low + 1
    base = [base_table(k, low, high, centre, mixture) for k in range(40)]
    borders = [e(2 * m - 1) >> 22 for m in range(-11, 13)]
    seen, expected, sums = [0] * alphabet, [0] * alphabet, [0] * columns
    values = np.zeros((rows, columns), np.int64)
    a = 0
    while a < rows:
        b = min(rows, a + max(1, min(a // 2, (1 << 22) // columns)))
        column_classes = classes_of_columns(sums, a, positions, borders)
        ratios = [
            max(1, min(1 << 20, ((s + 16) << 24) // ((x >> 8) + (1 << 20))))
            for s, x in zip(seen, expected, strict=True)
        ]
        places = {}
        for i in range(a, b):
            for j in range(columns):
                k = max(0, min(39, classes[i] + column_classes[j]))
                places.setdefault(k, []).append((i, j))
        for k in sorted(places):
            weights = [f * r >> 6 for f, r in zip(base[k], ratios, strict=True)]
            symbols = ans.take(normalise(weights), len(places[k]))
            for (i, j), symbol in zip(places[k], symbols, strict=True):
                values[i, j] = low + symbol
                seen[symbol] += 1
                deviation = abs(low + symbol - centre) * e(-2 * (classes[i] - 8)) >> 18
                sums[j] += min(deviation, 1 << 20)
            for symbol in range(alphabet):
                expected[symbol] += len(places[k]) * base[k][symbol]
        a = b
    ans.finish()
    kind = f"<{'u' if dtype == 'uint8' else 'i'}{WIDTH[dtype]}"
    return np.moveaxis(values.reshape(moved), 0, axis).astype(kind).tobytes()


def classes_of_columns(sums, rows, positions, borders):
    mean = sum(sums) // (rows * len(sums)) if rows else 0
    if mean == 0:
        return [0] * len(sums)
    out = []
    for j, own in enumerate(sums):
        start = j // positions * positions
        channel = sum(sums[start : start + positions]) // (positions * rows)
        u = (own + 8 * channel + 2 * mean) // (rows + 10)
        ratio = u * 256 // mean
        out.append(sum(border <= ratio for border in borders) - 12)
    return out
