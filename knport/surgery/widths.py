"""Widths: unknown channel counts, and which of them are equal, are parts of one another, or cannot change.

An *axis* is the size of one tensor dimension written as an ordered tuple of widths, which add up to it: ``(a,)`` behind
a convolution, ``(a, b)`` behind a concatenation, ``(u,) * g`` where it must divide into g equal blocks (groups, chunks,
shuffles). A spatial or batch dimension is a width that cannot change. Only sizes matter here: an axis says nothing of
which channel is which beyond the order of its parts.
"""

from __future__ import annotations

from collections.abc import Iterable

from knport.errors import KNPortError

Axis = tuple[int, ...]


class Widths:
    """Union-find over widths, where a width may also be bound to a sequence of smaller ones.

    Example:
        >>> widths = Widths()
        >>> a, b = widths.new(64), widths.new(64)
        >>> widths.equate((a,), (b,))
        >>> widths.resolve((a, b))
        (1, 1)
    """

    def __init__(self):
        self.size: list[int] = []
        self.frozen: dict[int, str] = {}  # width -> why it cannot change
        self.marks: dict[int, frozenset[str]] = {}
        self._bound: dict[int, Axis] = {}

    def new(self, size: int) -> int:
        """A width of its own, of `size` channels now."""
        self.size.append(size)
        return len(self.size) - 1

    def fixed(self, size: int, why: str = "") -> Axis:
        """An axis that cannot change."""
        width = self.new(size)
        self.frozen[width] = why
        return (width,)

    def resolve(self, axis: Axis) -> Axis:
        """The axis in widths that are bound to nothing."""
        if not any(w in self._bound for w in axis):
            return axis
        return tuple(leaf for w in axis for leaf in self._leaves(w))

    def _leaves(self, width: int) -> Axis:
        if width not in self._bound:
            return (width,)
        self._bound[width] = self.resolve(self._bound[width])
        return self._bound[width]

    def total(self, axis: Axis, sizes: dict[int, int] | None = None) -> int:
        """Channels of an axis now, or with the `sizes` of some widths changed."""
        sizes = sizes or {}
        return sum(sizes.get(w, self.size[w]) for w in self.resolve(axis))

    def is_fixed(self, axis: Axis) -> bool:
        """Whether no part of the axis can change."""
        return all(w in self.frozen for w in self.resolve(axis))

    def freeze(self, axis: Axis, why: str) -> None:
        """From now on every width of the axis keeps its size; the first reason stands."""
        for width in self.resolve(axis):
            if not self.frozen.get(width):
                self.frozen[width] = why

    def mark(self, axis: Axis, word: str) -> None:
        """Remember something of every width of the axis."""
        for width in self.resolve(axis):
            self.marks[width] = self.marks.get(width, frozenset()) | {word}

    def equate(self, a: Axis, b: Axis, why: str = "tied to a size that is fixed") -> None:
        """The two axes stay of equal size: part by part where their parts agree, else by splitting the longer part."""
        if a == b or (self.is_fixed(a) and self.is_fixed(b)):
            return
        if self.total(a) != self.total(b):
            raise KNPortError(f"an axis of {self.total(a)} channels cannot equal one of {self.total(b)}")
        while True:
            a, b = self.resolve(a), self.resolve(b)
            x, y = next(((x, y) for x, y in zip(a, b, strict=False) if x != y), (None, None))
            if x is None:
                return
            if self.size[x] == self.size[y]:
                self._merge(x, y, why)
            else:
                longer, shorter = (x, y) if self.size[x] > self.size[y] else (y, x)
                self._split(longer, self.size[shorter])

    def cut(self, axis: Axis, sizes: Iterable[int]) -> list[Axis]:
        """The axis in consecutive pieces of the given sizes, which add up to it; a width at a boundary is split."""
        pieces = [(self.new(size),) for size in sizes]
        self.equate(axis, tuple(w for piece in pieces for w in piece))
        return [self.resolve(piece) for piece in pieces]

    def _merge(self, x: int, y: int, why: str) -> None:
        """Bind x to y; a fixed one makes both fixed, and says why where it knows."""
        if x in self.frozen or y in self.frozen:
            self.frozen[y] = self.frozen.get(x) or self.frozen.get(y) or why
        if marks := self.marks.get(x):
            self.marks[y] = self.marks.get(y, frozenset()) | marks
        self._bound[x] = (y,)

    def _split(self, width: int, first: int) -> None:
        parts = (self.new(first), self.new(self.size[width] - first))
        for part in parts:
            if width in self.frozen:
                self.frozen[part] = self.frozen[width]
            if width in self.marks:
                self.marks[part] = self.marks[width]
        self._bound[width] = parts
