"""Models from outside: their names, and the classes that this process knows.

A model of one's own has a name of one of two kinds:

    xdeepfm               an entry point of the group `stream_ctr.models` of an installed package,
                          or a class that this process registered
    acme.nets:XDeepFM     an import path, which is imported only when a person names it

A manifest or a pointer never causes an import by a path: `find` returns classes that were
registered, and those that an installed package offers under its name in the group. This module
imports no model by itself, so that the command line starts quickly.

>>> is_import_path("acme.nets:XDeepFM"), is_import_path("xdeepfm")
(True, False)
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import sys
from functools import cache
from typing import Any

from stream_ctr.errors import ConfigError
from stream_ctr.messages import one_line

GROUP = "stream_ctr.models"
"""The entry point group under which packages offer models."""

NAME = r"^[A-Za-z_][A-Za-z0-9_]*([.][A-Za-z0-9_]+)*(:[A-Za-z_][A-Za-z0-9_]*)?$"
"""The names that a model may have."""

LONGEST_NAME = 200

_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)
_registered: dict[str, type[Any]] = {}


class UnknownModel(ConfigError):
    """A model was named that this process does not know."""


def is_import_path(name: str) -> bool:
    """Return whether the name is that of a class in a module, `package.module:Class`."""
    return _IMPORT_PATH.fullmatch(name) is not None


def is_name(name: str) -> bool:
    """Return whether a model may have this name."""
    return len(name) <= LONGEST_NAME and re.fullmatch(NAME, name, re.ASCII) is not None


def register(name: str, model: type[Any]) -> None:
    """Make a class known under this name, in place of an earlier one."""
    _registered[name] = model


def names() -> tuple[str, ...]:
    """Return the names of the registered models, then those that installed packages offer."""
    return tuple(dict.fromkeys([*_registered, *_installed()]))


def find(name: str) -> type[Any]:
    """Return the class that was registered or is installed under this name.

    Raises `UnknownModel` if there is none, and `ConfigError` if its package cannot be imported.
    """
    if name in _registered:
        return _registered[name]
    if entry := _installed().get(name):
        return import_class(entry.value, f"model {name!r} of the package {_package(entry)}")
    if is_import_path(name):
        raise UnknownModel(
            f"the model {name!r} is not known to this process, and a name in a snapshot is never "
            "imported: register it (stream_ctr.register_model, or --allow-model), after a look at "
            "what it is"
        )
    raise UnknownModel(
        f"the model {name!r:.80} is not known to this process: install the package that offers it "
        f"under the entry point group {GROUP!r}, or register it (stream_ctr.register_model)"
    )


def import_class(path: str, subject: str | None = None) -> type[Any]:
    """Import and return the class at `package.module:Class`. It runs the module's code.

    The working directory is searched last. Raises `ConfigError` if there is no such class.
    """
    subject = subject or f"model {path!r:.200}"
    module_name, _, class_name = path.partition(":")
    if not is_import_path(path):
        raise ConfigError(f"{subject} is not an import path, package.module:Class")
    searched = sys.path
    sys.path = [*searched, os.getcwd()]
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{subject}: there is no module {error.name!r}") from None
    except AttributeError:
        raise ConfigError(f"{subject}: {module_name} has no class {class_name!r}") from None
    except Exception as error:  # whatever its code does when it is imported
        raise ConfigError(
            f"{subject}: importing {module_name} failed: {type(error).__name__}: {one_line(error)}"
        ) from error
    finally:
        sys.path = searched
    if not isinstance(found, type):
        raise ConfigError(f"{subject}: {class_name} is not a class")
    return found


@cache
def _installed() -> dict[str, importlib.metadata.EntryPoint]:
    return {entry.name: entry for entry in importlib.metadata.entry_points(group=GROUP)}


def _package(entry: importlib.metadata.EntryPoint) -> str:
    return entry.dist.name if entry.dist else "that offers it"
