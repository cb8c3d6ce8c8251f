"""The header: JSON, deflated or LZMA-coded, opened under limits."""

import json
import lzma
import re
import zlib
from typing import Any

import numpy as np

from laconic.core.errors import StorageError
from laconic.storage.codecs import inflate
from laconic.storage.limits import Limits

DEFLATE, LZMA = 0, 1
_FILTERS = [{"id": lzma.FILTER_LZMA1, "dict_size": 1 << 20, "lc": 4, "lp": 0, "pb": 0}]
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"')

# Part of the format: what headers have in common, so that a small network's header is small.
DICTIONARY = (
    b'{"lost":[],"extra":{}}"dynamic":{"input_ids":{"0":"batch","1":"sequence"},"attention_mask":'
    b'"float64","float16","bfloat16","int64","int32","bool","uint8""channels_last"'
    b'{"dtype":"float32"}{"memory_format":"contiguous_format"},null,{"device":"any"},{"layout":'
    b'"operator.getitem","operator.mul","operator.add","aten.sym_size.int","aten.arange.default",'
    b'"aten.embedding.default","aten.layer_norm.default","aten.scaled_dot_product_attention.default"'
    b'"aten.matmul.default","aten.softmax.int","aten.transpose.int","aten.permute.default",'
    b'"aten.reshape.default","aten.view.default","aten.expand.default","aten.unsqueeze.default",'
    b'"aten.select.int","aten.slice.Tensor","aten.split.Tensor","aten.cat.default","aten.pad.default'
    b'","aten.contiguous.default","aten.clone.default","aten.to.dtype","aten.dropout.default",'
    b'"aten.tanh.default","aten.sigmoid.default","aten.silu.default","aten.gelu.default",'
    b'"aten.mul.Tensor","aten.sub.Tensor","aten.div.Tensor","aten.add.Tensor","aten.mean.dim",'
    b'"aten.hardswish.default","aten.hardtanh.default","aten.avg_pool2d.default",'
    b'"aten.max_pool2d.default","aten.adaptive_avg_pool2d.default","aten.flatten.using_ints",'
    b'"aten.batch_norm.default","aten.relu.default","aten.conv2d.default","aten.linear.default",'
    b'"laconic.fake_quantize.default","laconic.dequantize.default"],"nodes":[[-1,"x"],[-1,"input"],'
    b"[-2,0],[-2,1],[-2,2],[-2,3],[-2,4],[-2,5],[-2,6],[-2,7],[-2,8],[-2,9],[-2,10],[-2,11],"
    b"[-2,12],[-2,13],[-2,14],[-2,15],[-2,16],"
    b'["1","2","3","4",false,0.1,1e-05,true]],[0,["1","2",null,[1,1],[1,1],[1,1],1]],[1,["1"]],'
    b'[0,["1","2","3",0,-127,127]],[2,["1",[2,2],[2,2]]],[3,["1",[1,1]]],[4,["1",1]],[5,["1",[-1,'
    b'"output":["1"],"origins":["","conv1","bn1","layer1.0.conv1","layers.0","features.0",'
    b'"encoder.layer.0.attention.self.query","fc1","head","classifier"],"origin":[0,0,0,0,0,0,0,0,'
    b"1,1,1,1,1,1,1,1,0,0],"
    b'"tensors":[["0.weight","p","float32",[16,1,3,3],["0.bias","p","float32",[32],'
    b'".weight","b","int8",[64,32,3,3],".weight_scale","b","float32",[64],"affine.scale"],'
    b'".weight_zero_point","b","int32",[64],5,"affine.zero_point"],"affine.codes"],["fc.weight",'
    b'["bn.running_mean","b","float32",[16],".running_var","b","float32",[],'
    b'["activations.conv2d_scale","b","float32",[],5],["activations.relu_1_zero_point","b","int32",'
    b'[],5],"inputs":[[[2,3,32,32],"float32"]],"signature":{"arguments":{"input":{"tensor":0},"x":{'
    b'"tensor":0}},"output":{"record":{"last_hidden_state":{"constant":null},"dict":{"logits":{'
    b'"tuple":[{"tensor":0}},"inputs":1,"positional":["input"]},"dynamic":{"input":{"0":"batch"},"x"'
    b':{"0":"batch"}},"aliases":{},"lost":[],"extra":{}}'
    b'{"laconic":"0.1.0","operators":["aten.conv2d.default",'
)


def pack(content: dict[str, Any]) -> tuple[int, bytes, int]:
    """Coding, stored bytes, and the length of the JSON text."""
    try:
        text = json.dumps(content, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise StorageError(f"not plain JSON: {error}", where="extra") from error
    raw = text.encode()
    deflate = zlib.compressobj(9, zlib.DEFLATED, 15, 9, zlib.Z_DEFAULT_STRATEGY, DICTIONARY)
    deflated = deflate.compress(raw) + deflate.flush()
    dense = lzma.compress(raw, lzma.FORMAT_RAW, filters=_FILTERS)
    coding, stored = min((DEFLATE, deflated), (LZMA, dense), key=lambda pair: len(pair[1]))
    return coding, stored, len(raw)


def unpack(coding: int, stored: bytes, size: int, limits: Limits) -> dict[str, Any]:
    """The header's content.

    Raises:
        StorageError: damaged, or beyond a limit; nothing beyond a limit is unpacked or parsed.
    """
    if size > limits.header_bytes:
        raise StorageError(
            f"claims {size} bytes, the limit is {limits.header_bytes}",
            where="header",
            hint="pass larger limits if you trust the file",
        )
    if coding == DEFLATE:
        raw = inflate(stored, size, "the header", DICTIONARY)
    elif coding == LZMA:
        raw = _unlzma(stored, size)
    else:
        raise StorageError(f"unknown header coding {coding}")
    _check_extent(raw, limits)
    try:
        content = json.loads(raw.decode(), parse_constant=_no_constant)
    except ValueError as error:
        raise StorageError(f"the header is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise StorageError("the header is not a JSON object")
    return content


def _unlzma(stored: bytes, size: int) -> bytes:
    unpacker = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_FILTERS)
    try:
        raw = unpacker.decompress(stored, size + 1)
    except (lzma.LZMAError, EOFError) as error:
        raise StorageError(f"the header is damaged: {error}") from error
    if len(raw) != size or not unpacker.eof or unpacker.unused_data:
        raise StorageError(f"the header does not unpack to {size} bytes")
    return raw


def _check_extent(raw: bytes, limits: Limits) -> None:
    """Depth and number of values, before anything is built."""
    bare = np.frombuffer(_STRING.sub(b"", raw), np.uint8)
    opens = np.isin(bare, np.frombuffer(b"[{", np.uint8))
    closes = np.isin(bare, np.frombuffer(b"]}", np.uint8))
    depth = int(np.cumsum(opens.astype(np.int32) - closes).max(initial=0))
    if depth > limits.depth:
        raise StorageError(f"the header nests {depth} deep, the limit is {limits.depth}")
    values = int(opens.sum()) + int((bare == ord(",")).sum())
    if values > limits.header_values:
        raise StorageError(f"the header has {values} values, the limit is {limits.header_values}")


def _no_constant(name: str) -> Any:
    raise ValueError(f"the constant {name} is not JSON")
