"""Runtimes that run what Laconic makes: one file each; a name is a file."""

from typing import Any

from laconic.core import registry
from laconic.runtimes.base import PRECISIONS as PRECISIONS
from laconic.runtimes.base import Model as Model
from laconic.runtimes.base import Precision as Precision
from laconic.runtimes.base import Runner as Runner
from laconic.runtimes.base import Runtime as Runtime
from laconic.runtimes.base import batch_of as batch_of
from laconic.runtimes.base import fixed_shapes as fixed_shapes


def names() -> list[str]:
    """Names of all runtimes, without importing any.

    >>> names()
    ['inductor', 'onnxruntime', 'openvino']
    """
    return registry.names(__name__)


def get(name: str) -> Runtime:
    """The runtime `name`.

    Raises:
        RecipeError: there is none of that name; the nearest is named.
    """
    kind: Any = registry.load(__name__, name, Runtime)
    return kind()
