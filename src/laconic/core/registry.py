"""A name is a file: `prune.channels` is `methods/prune/channels.py`.

Listing reads the folder without importing anything; using a name imports that one file.
"""

import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from laconic.core.errors import RecipeError
from laconic.core.suggest import nearest

T = TypeVar("T")


def names(package: str) -> list[str]:
    """Dotted names of the modules below `package`, from the folder alone.

    Packages themselves, files whose name begins with an underscore, and `base` are not listed.

    >>> "base" in names("laconic.forms")
    False
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise RecipeError(f"no package {package!r}")
    return sorted(_walk(spec.submodule_search_locations, ""))


def _walk(paths: Iterable[str], prefix: str) -> list[str]:
    found: list[str] = []
    for info in pkgutil.iter_modules(list(paths)):
        if info.name.startswith("_") or (info.name == "base" and not prefix):
            continue
        if info.ispkg:
            below = [str(Path(path) / info.name) for path in paths]
            found += _walk(below, f"{prefix}{info.name}.")
        else:
            found.append(prefix + info.name)
    return found


def load(package: str, name: str, base: type[T]) -> type[T]:
    """The one concrete subclass of `base` that the file of `name` defines.

    Raises:
        RecipeError: no such file (names the nearest), or it defines no subclass of `base`.
    """
    known = names(package)
    if name not in known:
        raise RecipeError(f"no {base.__name__.lower()} named {name!r}", hint=nearest(name, known))
    module = importlib.import_module(f"{package}.{name}")
    for value in vars(module).values():
        own = inspect.isclass(value) and value.__module__ == module.__name__
        if own and issubclass(value, base) and not inspect.isabstract(value):
            return value
    raise RecipeError(f"{package}.{name} defines no {base.__name__}")
