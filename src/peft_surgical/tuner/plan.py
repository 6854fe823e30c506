"""What an adapter will touch: (model, config) -> a frozen plan. Everything that can be refused is refused here.

No tensor and no module changes while a plan is made, so a refused adapter leaves the model exactly as it was.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn

from ..blocks import Anatomy, Block, anatomy_of, parse, paths_matched, resolve
from ..config import SurgicalConfig
from ..errors import AdapterError, AnatomyError, BaseMismatchError, ConfigError, UnknownTargetError
from ..files import shown
from ..fingerprints import TensorMark, check_base, fingerprint, mark_of, with_all_bytes
from ..keys import join
from .attach import bare, base_value
from .base import base_tensors, changed_since, is_whole, recorded_base
from .specialise import moving_statistics, statistics_of
from .support import ModulePlan, Site, check_held, check_supported, is_quantized, refuse_other_methods


@dataclass(frozen=True)
class Plan:
    """All modules that an adapter touches, in the model's order."""

    modules: tuple[ModulePlan, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Full names of the tuned parameters and owned statistics."""
        entries = ((entry.path, (*entry.parameters, *entry.statistics)) for entry in self.modules)
        return tuple(join(path, name) for path, names in entries for name in names)

    def base(self) -> dict[str, torch.Tensor]:
        """Name -> the base's own value of each tuned parameter, also where another adapter is merged into it now.

        Statistics are left out: an adapter replaces them, it does not add to them.
        """
        return {join(e.path, name): base_value(e.module, name) for e in self.modules for name in e.parameters}


def make_plan(model: nn.Module, config: SurgicalConfig, names: Sequence[str] | None = None) -> Plan:
    """Resolve what ``config`` targets in ``model`` and refuse what cannot be tuned.

    Args:
        model: The base, with or without other surgical adapters.
        config: What to tune. Resolved ``tensor_names`` are taken as they are, and nothing is derived again.
        names: Full names of tensors, instead of the config's target.

    Raises:
        ConfigError: The config does not say what to tune.
        UnknownTargetError: Nothing matches, or everything that does is excluded.
        UnsupportedModelError: The tensors cannot be read through deltas: quantized, offloaded, in a container.
        AdapterError: The model already carries another PEFT method.
        AdapterFileError: The config is from disk, and its file does not hold what the base needs.
    """
    # torch.compile's wrapper puts itself into every path; the adapter is the network's.
    model = getattr(model, "_orig_mod", model)
    refuse_other_methods(model)
    with bare(model):
        modules = dict(model.named_modules())
        resolved = names is None and _is_resolved(config)
        exact = config.tensor_names if resolved else names
        wanted = _wanted(model, modules, config) if exact is None else _existing(modules, config, exact)
        plan = _plan(modules, {*wanted}, config, exact=exact is not None)
        if resolved:
            check_held(modules, plan.modules, config)
    check_supported(model, plan.modules)
    return plan


def _is_resolved(config: SurgicalConfig) -> bool:
    """Whether the config's ``tensor_names`` are to be taken as they are: in a config that was read from disk.

    A config that was used in this process is resolved again: its target may have been changed since, or it may serve
    another network.
    """
    if config.tensor_names is None:
        return False
    from_disk = config.base_fingerprint is not None or config.held is not None
    return from_disk or (config.target is None and not config.target_modules)


def _existing(modules: Mapping[str, nn.Module], config: SurgicalConfig, names: Sequence[str]) -> Sequence[str]:
    known = {join(path, name) for path, module in modules.items() for name in _tensors(module)}
    if missing := [name for name in names if name not in known]:
        raise UnknownTargetError(
            f"The model has no tensor {shown(missing)}, which the adapter (target {config.target!r}) was made "
            f"for. Load its own base, {config.base_model_name_or_path or 'which its config does not name'}."
        )
    return names


def _wanted(model: nn.Module, modules: Mapping[str, nn.Module], config: SurgicalConfig) -> list[str]:
    """Full names of the tensors (parameters and buffers) that the config's target names, in the model's order."""
    if config.target is not None:
        wanted = _by_target(model, modules, config)
    elif config.target_modules:
        wanted = _by_modules(model, modules, config)
    else:
        raise ConfigError(
            "Nothing in the config says what to tune. Please specify `target_modules`, or a target such as "
            "target='block1' ('head', 'all', a path, a glob)."
        )
    return _without_excluded(wanted, modules, config)


def _by_target(model: nn.Module, modules: Mapping[str, nn.Module], config: SurgicalConfig) -> list[str]:
    spec = parse(config.target or "")
    try:
        return list(resolve(spec, anatomy_of(model, config.blocks)))
    except AnatomyError as error:
        if config.blocks is not None or spec.needs_data:
            raise
        # Paths, globs and "all" need no blocks: they are looked up in the network taken as one.
        names = tuple(join(path, name) for path, module in modules.items() for name in _tensors(module))
        try:
            return list(resolve(spec, Anatomy((Block("network", names, 0),))))
        except UnknownTargetError as unknown:
            raise error from unknown


def _by_modules(model: nn.Module, modules: Mapping[str, nn.Module], config: SurgicalConfig) -> list[str]:
    patterns = config.target_modules
    if isinstance(patterns, str) and patterns.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        patterns = sorted(_maybe_include_all_linear_layers(copy.copy(config), model).target_modules or ())
    paths = [path for path in modules if path]
    matched = paths_matched(patterns or [], paths)
    if empty := [pattern for pattern, found in matched.items() if not found]:
        problem = (
            f"nothing matches {shown(map(repr, empty))}. Its modules are {shown(paths)}. target='block1' names a block "
            "instead."
        )
        if len(empty) == len(matched):
            raise UnknownTargetError(f"Target modules {patterns} not found in the base model: {problem}")
        # As in PEFT, one match is enough; but PEFT does not tell which names match nothing.
        warnings.warn(f"Some of target_modules={patterns} are not in the base model: {problem}", stacklevel=2)
    roots = {path for found in matched.values() for path in found}
    return [join(path, name) for path, module in modules.items() if _is_under(path, roots) for name in _tensors(module)]


def _without_excluded(wanted: list[str], modules: Mapping[str, nn.Module], config: SurgicalConfig) -> list[str]:
    paths = [path for path in modules if path]
    roots: set[str] = set()
    if config.exclude_modules:
        excluded = paths_matched(config.exclude_modules, paths)
        if not all(excluded.values()):
            empty = [pattern for pattern, found in excluded.items() if not found]
            warnings.warn(
                f"You have passed exclude_modules={config.exclude_modules} but no modules were excluded by "
                f"{shown(map(repr, empty))}. Please check that exclude_modules was set correctly.",
                stacklevel=2,
            )
        roots.update(path for found in excluded.values() for path in found)
    # PEFT's own rule for modules_to_save: the path ends in this text.
    saved = tuple(config.modules_to_save or ())
    roots.update(path for path in paths if saved and path.endswith(saved))
    kept = [name for name in wanted if not _is_under(name.rpartition(".")[0], roots)]
    if wanted and not kept:
        raise UnknownTargetError(
            "All modules were excluded. No modules were targeted for adaptation: every tensor of target "
            f"{config.target or config.target_modules!r} lies in exclude_modules={config.exclude_modules} or "
            f"modules_to_save={config.modules_to_save}. Target another part, or leave it out there."
        )
    return kept


def _is_under(path: str, roots: set[str]) -> bool:
    parts = path.split(".")
    return any(".".join(parts[:end]) in roots for end in range(len(parts), 0, -1))


def _tensors(module: nn.Module) -> Iterator[str]:
    yield from (name for name, value in module._parameters.items() if value is not None)
    hidden = module._non_persistent_buffers_set
    yield from (name for name, value in module._buffers.items() if value is not None and name not in hidden)


def _plan(modules: Mapping[str, nn.Module], chosen: set[str], config: SurgicalConfig, exact: bool) -> Plan:
    sites: dict[int, list[Site]] = {}
    for module in modules.values():
        for name, value in module._parameters.items():
            if value is not None:
                sites.setdefault(id(value), []).append((module, name))
    targeted = {name.rpartition(".")[0] for name in chosen}
    moving = set(moving_statistics(config.norm_stats, modules.items(), targeted))  # type: ignore[arg-type]
    moving &= chosen if exact else moving
    # A tied tensor is one tensor, tuned once: by the module that comes first, under any of its names.
    first = {site: shared for shared in sites.values() for site in shared}
    tuned = {
        first[module, name][0]
        for path, module in modules.items()
        for name, value in module._parameters.items()
        # Integer parameters (lookup tables) have no gradient to follow.
        if value is not None
        and join(path, name) in chosen
        and (value.is_floating_point() or is_quantized(module, value))
    }
    entries = []
    for path, module in modules.items():
        parameters = {name: tuple(first[module, name]) for name in module._parameters if (module, name) in tuned}
        statistics = tuple(name for name in statistics_of(module) if join(path, name) in moving)
        if parameters or statistics:
            entries.append(ModulePlan(path, module, parameters, statistics))
    plan = Plan(tuple(entries))
    if not plan.modules:
        raise UnknownTargetError(
            f"Target {config.target or config.target_modules!r} names only buffers ({shown(chosen)}), which are not "
            "trained. Statistics of norm modules are tuned with norm_stats='target' or 'all'."
        )
    return plan


def check_fingerprint(plan: Plan, config: SurgicalConfig, marks: Mapping[str, TensorMark] | None) -> None:
    """Raise `BaseMismatchError` (or warn, with ``strict_base=False``) unless the base is the one trained on.

    Args:
        plan: What the adapter touches.
        config: Its config, with the fingerprint of its base where it was saved.
        marks: `recorded_base` of the network; None compares the tuned tensors alone.
    """
    base = plan.base()
    if config.base_fingerprint is None or any(value.is_meta for value in base.values()):
        return
    tuned = {name: with_all_bytes(mark_of(name, value), name, value) for name, value in base.items()}
    held = {*plan.names} - {*tuned}  # statistics, which the adapter brings

    def compared(name: str) -> bool:
        return name not in held and not is_whole(name, config)

    expected = {name: mark for name, mark in config.base_fingerprint.items() if compared(name)}
    if marks is None:
        expected = {name: mark for name, mark in expected.items() if name in tuned}
    rest = {name: mark for name, mark in (marks or {}).items() if name not in tuned and compared(name)}
    try:
        check_base(expected, tuned, rest, config.base_model_name_or_path)
    except BaseMismatchError as error:
        if config.strict_base:
            raise
        warnings.warn(f"strict_base=False: {error}", stacklevel=2)


def fingerprint_of(model: nn.Module, config: SurgicalConfig) -> dict[str, str] | None:
    """The fingerprint of the base under an attached adapter, as it was when the first adapter was attached.

    Raises:
        AdapterError: The base has changed since, which the adapter's file would not hold; a warning with
            ``strict_base=False``, and if it was only cast. None where there are no values (meta device).
    """
    tuned = make_plan(model, config, config.tensor_names).base()
    if any(value.is_meta for value in tuned.values()):
        return None
    then, tensors = recorded_base(model), base_tensors(model)
    if then is None:
        return fingerprint(tuned)
    changed, cast = changed_since(then, tensors)
    found = dict(then)
    if changed := [name for name in changed if not is_whole(name, config)]:
        problem = (
            f"{shown(changed)} of the base changed after the adapter was attached. The adapter does not hold that, so "
            "it would be lost on saving. Tune them with target, or list their module in modules_to_save; or, if the "
            "base that the adapter will be loaded onto has changed too, set strict_base=False in the model's "
            "peft_config."
        )
        if config.strict_base:
            raise AdapterError(problem)
        warnings.warn(f"strict_base=False: {problem}", stacklevel=2)
        found = {name: mark_of(name, value) for name, (_, value) in tensors.items()}
    if cast:
        warnings.warn(
            f"The base was cast to {' and '.join(sorted({*cast.values()}))} after the adapter was attached, and so "
            "were its deltas. It is saved for the base as it was attached.",
            stacklevel=2,
        )
    kept = {name: with_all_bytes(found[name], name, value) for name, value in tuned.items() if name not in cast}
    return {name: str(mark) for name, mark in {**found, **kept}.items()}
