"""What a target means in one network: ``resolve(spec, anatomy)`` names its tensors."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence

from ..errors import UnknownTargetError, UnresolvedTargetError
from .anatomy import Anatomy, Block
from .parsing import NUMBERED_BLOCK, Count, Name, Pattern, Range, TargetSpec, Term, compiled, dotted

_BY_SCORES = "call config = peft_surgical.resolve_target(config, model, dataloader) before get_peft_model"
_BY_RUNS = "call peft_surgical.training.search.{}, which trains candidates, or run `peft-surgical tune --target {}`"
_SEARCHES = {"auto": "auto", "race": "race", "cross-val": "cross_val", "greedy": "greedy"}
_DECIDED_BY = {name: _BY_RUNS.format(function, name) for name, function in _SEARCHES.items()}
_OTHER_NAMES = {"first": "block1", "last": "head", "stem": "embedding"}


def resolve(spec: TargetSpec, anatomy: Anatomy) -> tuple[str, ...]:
    """Name the tensors that a target means in one network.

    Args:
        spec: What `parse` returned.
        anatomy: The blocks of the network. The other names of tied tensors count as names of the tensor itself.

    Returns:
        Canonical names of parameters and persistent buffers, each once, in the order of the anatomy. Never empty.

    Raises:
        UnresolvedTargetError: Data has to decide first.
        UnknownTargetError: A term matches nothing in this network or takes nothing away, or nothing is left at the end.

    Example:
        >>> from peft_surgical.blocks import parse
        >>> anatomy = Anatomy((Block("block1", ("conv1.weight", "bn1.weight"), 9), Block("head", ("fc.weight",), 4)))
        >>> resolve(parse("all - head"), anatomy)
        ('conv1.weight', 'bn1.weight')
        >>> resolve(parse("*.weight - bn1"), anatomy)
        ('conv1.weight', 'fc.weight')
    """
    if spec.needs_data:
        raise UnresolvedTargetError(
            f"{spec} names no tensors until it has seen data: {_DECIDED_BY.get(str(spec), _BY_SCORES)}, or name a "
            "block, e.g. target='block1'."
        )
    network = _Network(anatomy)
    chosen: set[str] = set()
    for step in spec.steps:
        found = network.select(step.term)
        if step.minus and not found & chosen:
            raise network.unknown(
                step.term, f"takes nothing away in {str(spec)!r}: what stands before it holds none of it"
            )
        chosen = chosen - found if step.minus else chosen | found
    if not chosen:
        raise network.unknown(spec, "takes away everything that it names, so nothing is left to tune")
    return tuple(name for name in network.tensors if name in chosen)


def paths_matched(patterns: str | Collection[str], paths: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Match module paths as PEFT's ``target_modules`` and ``exclude_modules`` do, pattern by pattern.

    PEFT asks only whether anything matched at all; answering for each pattern lets the caller name those in vain.

    Args:
        patterns: A string is a regex for the whole path; a collection holds names that are a path or the end of one,
            in whole components. Unlike in a target, an exact path does not keep its name from matching others.
        paths: Module paths, as ``named_modules()`` gives them.

    Returns:
        For each pattern the paths that it matches, in the order given; an empty tuple where there are none.

    Raises:
        TargetError: The regex does not compile.

    Example:
        >>> paths_matched(["conv1", "fc"], ["conv1", "layer1.0.conv1"])
        {'conv1': ('conv1', 'layer1.0.conv1'), 'fc': ()}
    """
    paths = tuple(paths)
    if isinstance(patterns, str):
        regex = compiled(patterns, patterns)
        return {patterns: tuple(path for path in paths if regex.fullmatch(path))}
    return {name: tuple(path for path in paths if path == name or path.endswith(f".{name}")) for name in patterns}


class _Network:
    """The names of one network, and what they stand for."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self.tensors = tuple(name for block in anatomy for name in block.tensors)
        self.named = {**anatomy.parts, **{block.name: block.tensors for block in anatomy}}
        self.paths: dict[str, set[str]] = {}
        for name, tensor in [*((name, name) for name in self.tensors), *anatomy.aliases.items()]:
            components = name.split(".")
            for depth in range(1, len(components) + 1):
                self.paths.setdefault(".".join(components[:depth]), set()).add(tensor)

    def select(self, term: Term) -> set[str]:
        text = str(term)
        if text in self.named:
            found = set(self.named[text])
        elif isinstance(term, Range | Count):
            found = self._numbered(term)
        elif isinstance(term, Pattern):
            regex = compiled(term.regex, text)
            found = self._under(path for path in self.paths if regex.fullmatch(path))
        else:
            found = self._by_name(text)
        found = found.intersection(self.tensors)
        if not found:
            reason = "holds no tensors" if text in self.named else "matches nothing"
            raise self.unknown(term, f"{reason} in this model", near=text not in self.named)
        return found

    def _under(self, paths: Iterable[str]) -> set[str]:
        return set().union(*(self.paths[path] for path in paths))

    def _by_name(self, text: str) -> set[str]:
        tower, dot, word = text.rpartition(".")
        other = tower + dot + _OTHER_NAMES.get(word, word)
        if other in self.named:
            return set(self.named[other])
        if text == "all":
            return set(self.tensors)
        if text in self.paths:
            return self.paths[text]
        # Before the ends of paths: 'head' must not mean some inner module while 'vision.head' is a block.
        if inner := [name for name in self.named if name.endswith((f".{text}", f".{other}"))]:
            raise self.unknown(text, f"does not say which tower of this model it means: write {_either(inner)}")
        return self._under(path for path in self.paths if path.endswith(f".{text}"))

    def _numbered(self, term: Range | Count) -> set[str]:
        towers: dict[str, dict[int, Block]] = {}
        for block in self.anatomy:
            if match := NUMBERED_BLOCK.fullmatch(block.name):
                towers.setdefault(match[1] or "", {})[int(match[2])] = block
        numbered = towers.get(term.tower)
        if numbered is None:
            if str(term) in self.paths:
                return self.paths[str(term)]
            if towers:
                plain = str(term).removeprefix(dotted(term.tower))
                choice = _either([dotted(tower) + plain for tower in towers])
                raise self.unknown(term, f"does not say which tower of this model it means: write {choice}")
            raise self.unknown(term, "counts numbered blocks, of which this model has none")
        if isinstance(term, Range):
            blocks = [block for number, block in numbered.items() if term.first <= number <= term.last]
            asked = term.last - term.first + 1
        else:
            blocks = list(numbered.values())
            blocks = blocks[: term.number] if term.end == "first" else blocks[-term.number :]
            asked = term.number
        if len(blocks) < asked:
            raise self.unknown(term, f"asks for more than the {len(numbered)} numbered blocks that there are")
        return {name for block in blocks for name in block.tensors}

    def unknown(self, term: Term | TargetSpec | str, reason: str, *, near: bool = False) -> UnknownTargetError:
        """The error for a term, with what may have been meant and what there is to choose from."""
        text = str(term)
        says = [f"target {text!r} {reason}."]
        if near:
            plain = text.removeprefix("re:").replace("\\", "").strip("*.")
            # A name may also be the end of a path, so ends of the same depth are candidates as well.
            depth = plain.count(".") + 1
            ends = (".".join(path.split(".")[-depth:]) for path in self.paths)
            names = ["all", "first", "last", *self.named, *self.paths, *ends]
            known = {name.lower(): name for name in reversed(names)}
            if close := difflib.get_close_matches(plain.lower(), known, n=4):
                says.append(f"Near misses: {', '.join(known[name] for name in close)}.")
            if isinstance(term, Name) and "-" in text:
                says.append("To take away, put spaces around the minus ('all - head'); a range is written 'block2-4'.")
        sizes = ", ".join(f"{block.name} ({block.num_parameters:,})" for block in self.anatomy)
        says.append(f"Blocks of this model, with their parameters: {sizes}.")
        if parts := [name for name in self.anatomy.parts if self.named[name]]:
            says.append(f"Parts of them: {', '.join(parts)}.")
        return UnknownTargetError(" ".join(says))


def _either(names: Sequence[str]) -> str:
    return " or ".join(repr(name) for name in names)
