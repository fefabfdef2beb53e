"""Names that users type, and the things they stand for.

A registry is filled by decorator, by import, or by a third party's entry point
(group ``offramp.<kind>``), so adding a policy, method or backbone edits no central file.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import EntryPoints, entry_points
from typing import Generic, TypeVar

from offramp.errors import ConfigError

T = TypeVar("T")


def nearest(name: str, known: list[str]) -> str:
    """A ' Did you mean ...?' for a mistyped name, or nothing."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def import_all(package: str, folder: Iterable[str]) -> None:
    """Import every module of a package, so that what stands in a file of its own is known."""
    for module in pkgutil.iter_modules(folder):
        importlib.import_module(f"{package}.{module.name}")


@functools.cache
def installed(group: str) -> EntryPoints:
    """The entry points of a group; looking through all installed packages takes a while."""
    return entry_points(group=group)


class Registry(Generic[T]):
    """Maps names to things of one kind, with helpful errors for unknown names."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}

    def register(self, name: str, item: T | None = None) -> Callable[[T], T]:
        """Register `item` under `name`; without `item`, use as a decorator."""

        def add(thing: T) -> T:
            if name in self._items and self._items[name] is not thing:
                raise ConfigError(f"A {self.kind} named '{name}' is already registered.")
            self._items[name] = thing
            return thing

        if item is not None:
            add(item)
        return add

    def names(self) -> list[str]:
        return sorted({*self._items, *(e.name for e in self._entry_points())})

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: str) -> bool:
        return name in self._items or name in self.names()

    def __getitem__(self, name: str) -> T:
        if name not in self:
            installed.cache_clear()  # it may have been installed since
        if name not in self._items:
            for entry in self._entry_points():
                if entry.name == name:
                    # what is imported may register itself, and not as what it is called there
                    thing = entry.load()
                    self._items.setdefault(name, thing)
        if name not in self._items:
            known = self.names()
            raise ConfigError(
                f"Unknown {self.kind} '{name}'.{nearest(name, known)} Known: {', '.join(known)}."
            )
        return self._items[name]

    def _entry_points(self) -> EntryPoints:
        return installed(f"offramp.{self.kind.replace(' ', '_')}")
