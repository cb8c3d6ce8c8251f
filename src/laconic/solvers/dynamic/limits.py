"""The largest size a Program takes along a dimension: the end of a table of positions.

Runtimes do not check: past the end of a table they read something, or zeros. The end has to be the
size of a stored tensor that is looked up or cut, less a few places that some models keep for
themselves. Sizes around those are tried without running the network: shapes by fake execution,
and what depends on nothing but the size (positions, and what they look up) for real.
"""

import logging
from collections.abc import Mapping

from laconic.core.errors import LaconicError
from laconic.program.normalize import base_name
from laconic.program.program import Program
from laconic.program.specialize import dimensions, specialize
from laconic.solvers.layers.constants import fold_constants

_KEPT = 2  # places a table may have beside the positions, as RoBERTa's
_LONGEST = 1 << 16  # no table of positions is longer
_READS = {"embedding", "slice", "select", "narrow", "index", "index_select", "gather"}
_REFUSALS = (RuntimeError, ValueError, IndexError, LaconicError)


def find_limits(program: Program, largest: Mapping[str, int]) -> dict[str, int]:
    """Dimension → its largest size, for those that have one.

    Args:
        program: with dynamic dimensions.
        largest: a size of each dimension that is known to work; limits are looked for above.
    """
    lengths = _lengths(program)
    small = dict.fromkeys(dimensions(program), 2)
    found: dict[str, int] = {}
    for name in largest:
        for length in lengths:
            able = [size for size in range(length, length - _KEPT - 1, -1) if size >= largest[name]]
            if not able or _takes(program, {**small, name: length + 1}):
                continue
            limit = next((size for size in able if _takes(program, {**small, name: size})), None)
            if limit is not None:
                found[name] = limit
            break  # what is larger still cannot be taken either
    return found


def _lengths(program: Program) -> list[int]:
    """Sizes of the tensors that are looked up or cut."""
    names = {
        str(node.target)
        for node in program.graph.nodes
        if node.op == "get_attr" and any(base_name(user) in _READS for user in node.users)
    }
    sizes = {size for name in names for size in program.tensor(name).shape}
    return sorted(size for size in sizes if 1 < size <= _LONGEST)


def _takes(program: Program, sizes: Mapping[str, int]) -> bool:
    log = logging.getLogger("torch._subclasses.fake_tensor")  # tells of every refusal
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        fold_constants(specialize(program, sizes), parameters=True)
    except _REFUSALS:
        return False
    finally:
        log.setLevel(level)
    return True
