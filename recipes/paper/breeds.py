"""BREEDS (Santurkar, Tsipras & Madry 2021): Living-17 and Entity-30, subpopulation shifts made of ImageNet's classes.

A class hierarchy, edited by the authors, groups ImageNet's classes into superclasses. The classes of each superclass
are divided into those of the source domain and those of the target domain: the task stays, the subpopulations change.
The files are those of ``imagenet_class_hierarchy/modified`` in github.com/MadryLab/BREEDS-Benchmarks; this package
neither holds nor downloads them.

The split is the random one (``split="rand"`` there). It is determined by the files and by this order of events, which
was read off the authors' published code:

1. The hierarchy is cut down to the classes of the dataset and what lies above them. Classes that the hierarchy does
   not hold, 110 of ImageNet's 1,000, take no part.
2. The level of a node is the length of its longest path from the root. The superclasses are the nodes of one level,
   below one ancestor, with at least so many classes below them, sorted by id as text (``dummy9`` before ``n01...``).
3. One ``numpy.random.RandomState(2)`` for all of them: for each superclass in turn, its classes, sorted by id, are
   drawn from with one ``choice(..., replace=False)``. The first half of the draw is the source, the second the target.

Verified with the published ``class_hierarchy.txt``: Living-17 is what the authors' notebook prints, all 17
superclasses, their classes and the order of each; Entity-30, of which no table is printed, agrees with the authors'
algorithm exactly, in all 30 superclasses and their classes. Not known: whether Lee et al. (2023) used the random split.
The splits "good" and "bad", which some papers use, are not offered.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import numpy as np

from peft_surgical.errors import DataError

ROOT = "n00001740"
"""The id of "entity", the root of the hierarchy."""

SOURCE_OF_FILES = "imagenet_class_hierarchy/modified of github.com/MadryLab/BREEDS-Benchmarks"


@dataclass(frozen=True)
class Design:
    """How a benchmark is made from the hierarchy.

    Attributes:
        level: Level of the superclasses; the root's is 0.
        ancestor: The node below which they lie.
        subclasses: Classes of each superclass, half of them source and half target.
        superclasses: How many superclasses this gives with the published files.
        seed: Seed of the draw.
    """

    level: int
    ancestor: str
    subclasses: int
    superclasses: int
    seed: int = 2


BENCHMARKS: dict[str, Design] = {
    "living17": Design(level=5, ancestor="n00004258", subclasses=4, superclasses=17),
    "entity30": Design(level=4, ancestor=ROOT, subclasses=8, superclasses=30),
}
"""Name -> design."""


@dataclass(frozen=True)
class Subclass:
    """A class of ImageNet: its WordNet id, its number 0 to 999, and its names."""

    wnid: str
    index: int
    name: str


@dataclass(frozen=True)
class Superclass:
    """A class of the benchmark: its node, its names, and its subclasses of each domain in the order drawn."""

    wnid: str
    name: str
    source: tuple[Subclass, ...]
    target: tuple[Subclass, ...]


@dataclass(frozen=True)
class Breeds:
    """A benchmark: its superclasses, whose positions are the labels."""

    name: str
    superclasses: tuple[Superclass, ...]

    def labels(self, domain: str) -> dict[str, int]:
        """WordNet id -> label, for the classes of ``"source"`` or ``"target"``.

        Raises:
            DataError: If the domain is neither.
        """
        if domain not in ("source", "target"):
            raise DataError(f"unknown domain {domain!r}: choose source or target")
        return {sub.wnid: label for label, one in enumerate(self.superclasses) for sub in getattr(one, domain)}


@dataclass(frozen=True)
class Hierarchy:
    """The three files, cut down to the classes and what lies above them.

    Attributes:
        classes: WordNet id -> class of the dataset.
        children: Node -> the nodes right below it.
        levels: Node -> length of its longest path from the root.
        names: Node -> its names.
    """

    classes: Mapping[str, Subclass]
    children: Mapping[str, tuple[str, ...]]
    levels: Mapping[str, int]
    names: Mapping[str, str]

    def below(self, node: str) -> set[str]:
        """The node and everything below it."""
        found, todo = {node}, [node]
        while todo:
            new = set(self.children.get(todo.pop(), ())) - found
            found |= new
            todo.extend(new)
        return found


def read_hierarchy(folder: str | os.PathLike[str]) -> Hierarchy:
    """Read ``dataset_class_info.json``, ``class_hierarchy.txt`` and ``node_names.txt``.

    The first is a list of ``[number, id, name]``; the second has a line ``parent child`` for each edge; the third a
    line with a node, a tab and its name.

    Raises:
        DataError: Names the file that is missing, or the row that is not in its format.
    """
    place = Path(folder)
    info, edges, nodes = (place / f for f in ("dataset_class_info.json", "class_hierarchy.txt", "node_names.txt"))
    if missing := [file.name for file in (info, edges, nodes) if not file.is_file()]:
        raise DataError(f"{', '.join(missing)} not in {place}: put the files of {SOURCE_OF_FILES} there")
    classes = _read_classes(info)
    parents: dict[str, list[str]] = {}
    for number, line in _lines(edges):
        pair = line.split()
        if len(pair) != 2:
            raise DataError(f"{edges}:{number} is {line!r}, not 'parent child': fetch the file again")
        parents.setdefault(pair[0], [])
        parents.setdefault(pair[1], []).append(pair[0])
    names = {}
    for number, line in _lines(nodes):
        node, tab, name = line.partition("\t")
        if not tab or not name.strip():
            raise DataError(f"{nodes}:{number} is {line!r}, not a node, a tab and its name: fetch the file again")
        names[node.strip()] = name.strip()

    kept: set[str] = set()
    todo = [wnid for wnid in classes if wnid in parents]
    while todo:
        if (node := todo.pop()) not in kept:
            kept.add(node)
            todo.extend(parents[node])
    if ROOT not in kept:
        raise DataError(f"{edges} joins no class of {info.name} to the root {ROOT}: take both from {SOURCE_OF_FILES}")
    levels: dict[str, int] = {ROOT: 0}
    children: dict[str, list[str]] = {}
    try:
        order = list(TopologicalSorter({node: parents[node] for node in kept}).static_order())
    except CycleError as error:
        raise DataError(f"{edges} is no hierarchy, it has a circle: {' '.join(error.args[1])}") from error
    for node in order:
        for parent in parents[node]:
            children.setdefault(parent, []).append(node)
        if above := [levels[parent] for parent in parents[node] if parent in levels]:
            levels[node] = max(above) + 1
    return Hierarchy(classes, {node: tuple(sorted(set(c))) for node, c in children.items()}, levels, names)


def _read_classes(file: Path) -> dict[str, Subclass]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        classes = [Subclass(str(wnid), int(index), str(name)) for index, wnid, name in rows]
    except (ValueError, TypeError) as error:
        raise DataError(f"{file} is no list of [number, id, name] ({error}): fetch it again") from error
    for part in ("wnid", "index"):
        values = [getattr(one, part) for one in classes]
        if twice := sorted({value for value in values if values.count(value) > 1}):
            raise DataError(f"{file} lists {twice[0]} more than once: fetch it again")
    return {one.wnid: one for one in classes}


def _lines(file: Path) -> list[tuple[int, str]]:
    text = file.read_text(encoding="utf-8")
    return [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def draw_superclasses(hierarchy: Hierarchy, design: Design) -> tuple[Superclass, ...]:
    """The superclasses of this design, drawn in the order that the module describes.

    Raises:
        DataError: If the number of subclasses is odd, the ancestor is unknown, no superclass fits, or one has no name.
    """
    if design.subclasses <= 0 or design.subclasses % 2:
        raise DataError(f"subclasses={design.subclasses} cannot be halved into source and target: choose 2, 4, ...")
    if design.ancestor not in hierarchy.levels:
        raise DataError(
            f"the ancestor {design.ancestor!r} is not in the hierarchy, or has no class below it: take the files of "
            f"{SOURCE_OF_FILES}"
        )
    rng = np.random.RandomState(design.seed)
    superclasses = []
    for node in sorted(hierarchy.below(design.ancestor)):
        candidates = sorted(hierarchy.below(node) & hierarchy.classes.keys())
        if hierarchy.levels[node] != design.level or len(candidates) < design.subclasses:
            continue
        if node not in hierarchy.names:
            raise DataError(f"node_names.txt has no name for {node}: take the files of {SOURCE_OF_FILES}")
        # The same numbers as choice over the ids themselves.
        rows = rng.choice(len(candidates), design.subclasses, replace=False)
        drawn = tuple(hierarchy.classes[candidates[row]] for row in rows)
        half = design.subclasses // 2
        superclasses.append(Superclass(node, hierarchy.names[node], drawn[:half], drawn[half:]))
    if not superclasses:
        raise DataError(
            f"no node of level {design.level} below {design.ancestor} has {design.subclasses} classes: choose another "
            f"level, or fewer subclasses"
        )
    return tuple(superclasses)


def breeds(folder: str | os.PathLike[str], name: str) -> Breeds:
    """A benchmark of :data:`BENCHMARKS`, from the hierarchy files in this folder.

    Raises:
        DataError: If the name is unknown, or the files are missing or not the published ones.
    """
    if name not in BENCHMARKS:
        raise DataError(f"unknown benchmark {name!r}: choose one of {', '.join(BENCHMARKS)}")
    design = BENCHMARKS[name]
    superclasses = draw_superclasses(read_hierarchy(folder), design)
    if len(superclasses) != design.superclasses:
        raise DataError(
            f"the hierarchy in {folder} gives {len(superclasses)} superclasses, and {name} has {design.superclasses}: "
            f"take the files of {SOURCE_OF_FILES}, not those of the plain WordNet hierarchy beside it"
        )
    return Breeds(name, superclasses)
