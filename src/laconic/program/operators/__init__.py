"""One file a family of ATen operators; the table is assembled from the folder.

A file has a dictionary `ROWS`: operator name without overload ("aten.linear") → row. The row named
"pointwise" serves every operator that torch itself tags as pointwise. To describe an operator, add
it to the dictionary of its family, or add a file.
"""

import functools
import importlib
from collections.abc import Mapping

from laconic.core.registry import names
from laconic.program.equations import Row


@functools.cache
def table() -> Mapping[str, Row]:
    """Every row of every family, by operator name.

    >>> "aten.linear" in table()
    True
    """
    rows: dict[str, Row] = {}
    for name in names(__name__):
        rows |= importlib.import_module(f"{__name__}.{name}").ROWS
    return rows
