"""Give one module of a network a subclass of its own class, in place; and the traits that hold what is frozen.

The tuner has to make a module *read* base + delta wherever it reads a tensor. Wrapping the module in another one does
that too, but changes its type, its state-dict keys and every reference that somebody holds to it. Swapping the class
of the instance changes none of these: ``type(module)`` becomes a subclass with the same name, the module keeps its
place, its hooks, its attributes and its keys, and its own ``forward`` runs unchanged. PyTorch does the same in
``torch.nn.utils.parametrize`` and in FSDP2's ``fully_shard``.

A special class is a pure function of (base class, traits, tensor names), so modules that have these three in common
share it, and a copied or pickled module finds it, or makes it again.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..config import NormPolicy
from ..errors import AdapterError, UnsupportedModelError
from ..keys import HOLDER, join

# Functions of torch and timm that put another norm module in the place of the one that they read.
_REPLACING = ("convert_sync_batchnorm", "freeze_batch_norm_2d", "unfreeze_batch_norm_2d")


class Special:
    """Root of every trait. Copies and pickles a special module by its base class and traits.

    Attributes:
        special_base: The class that the module had before.
        special_traits: The mixins that were added, in their order of precedence.
        special_tensors: The names of tensors that are read through a property.
    """

    special_base: type[nn.Module]
    special_traits: tuple[type[Special], ...]
    special_tensors: tuple[str, ...]

    @classmethod
    def tensor_property(cls, name: str) -> property:
        """The property through which this trait's modules read the tensor ``name``."""
        raise NotImplementedError(f"{cls.__name__} adds no tensor properties")

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script asks of every module first: it compiles a class's source, and knows no properties."""
        raise UnsupportedModelError(
            "torch.jit.script cannot compile a network while an adapter is on it. Use torch.jit.trace or torch.export, "
            "or script what merge_and_unload returns."
        )

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class cannot be found by module and name, as pickle would try: it has the name of its base.
        parts = super().__reduce_ex__(max(int(protocol), 2))
        recipe = (self.special_base, self.special_traits, self.special_tensors)
        return (_rebuild, recipe, *parts[2:])


# Weak: a network whose classes were made on the fly, and the special classes with it, may go when nobody has it.
_CLASSES: weakref.WeakKeyDictionary[Any, weakref.WeakValueDictionary[Any, Any]] = weakref.WeakKeyDictionary()


def _special_class(base: type[nn.Module], traits: tuple[type[Special], ...], tensors: tuple[str, ...]) -> Any:
    known, key = _CLASSES.setdefault(base, weakref.WeakValueDictionary()), (traits, tensors)
    if (found := known.get(key)) is not None:
        return found
    # Module, name and qualified name are the base's: code that asks for a class by its name (FSDP's and Accelerate's
    # wrapping policies, torch.fx's rule of what a leaf is) keeps finding what it looks for.
    body: dict[str, Any] = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    body.update(special_base=base, special_traits=traits, special_tensors=tensors)
    cls: Any = type(base.__name__, (*traits, base), body)
    for name in tensors:
        setattr(cls, name, cls.tensor_property(name))
    known[key] = cls
    return cls


def _rebuild(base: type[nn.Module], traits: tuple[type[Special], ...], tensors: tuple[str, ...]) -> nn.Module:
    cls = _special_class(base, traits, tensors)
    return cls.__new__(cls)


def specialise(module: nn.Module, trait: type[Special], tensors: tuple[str, ...] = ()) -> None:
    """Add ``trait`` to the class of ``module``, in place; traits and tensor names add up over calls.

    Args:
        module: Any module whose class can be subclassed (a ScriptModule's cannot).
        trait: The mixin to add; adding it twice changes nothing.
        tensors: Names of the module's own tensors to read through ``trait.tensor_property``.
    """
    traits, names = {trait}, {*tensors}
    if isinstance(module, Special):
        traits |= {*module.special_traits}
        names |= {*module.special_tensors}
    ordered = tuple(sorted(traits, key=lambda one: one.__name__))
    module.__class__ = _special_class(base_class(module), ordered, tuple(sorted(names)))


def restore(module: nn.Module) -> None:
    """Give ``module`` the class back that it had before `specialise`; a no-op on any other module."""
    if isinstance(module, Special):
        target: Any = module
        # Not type(module).__bases__: FSDP2 may have put a class of its own on top.
        target.__class__ = base_class(module)


def stored(module: Any, name: str) -> torch.Tensor:
    """The tensor that ``module`` stores under ``name``, without deltas."""
    for store in (module._parameters, module._buffers, module.__dict__):
        if name in store:
            return store[name]
    # As for any attribute that is not there: FSDP1 takes a parameter away and asks with hasattr().
    raise AttributeError(f"{base_class(module).__name__} no longer has the tuned tensor {name!r}")


def base_class(module: nn.Module) -> type[nn.Module]:
    """The class of ``module`` without any trait."""
    return module.special_base if isinstance(module, Special) else type(module)


# --- norm statistics ---


def has_statistics(module: nn.Module) -> bool:
    """Whether ``module`` keeps running statistics: BatchNorm, InstanceNorm with tracking, and those of other libraries.

    Recognised by their buffers rather than by class, because every library brings norm classes of its own.
    """
    return any(module._buffers.get(mark) is not None for mark in ("running_mean", "running_var"))


def statistics_of(module: nn.Module) -> tuple[str, ...]:
    """The names of the buffers that a norm module updates in training, e.g. running_mean, num_batches_tracked."""
    if not has_statistics(module):
        return ()
    hidden = module._non_persistent_buffers_set
    return tuple(name for name, value in module._buffers.items() if value is not None and name not in hidden)


def moving_statistics(policy: NormPolicy, modules: Iterable[tuple[str, nn.Module]], targeted: set[str]) -> list[str]:
    """The full names of the statistics that an adapter with this policy owns.

    Args:
        policy: The adapter's ``norm_stats``.
        modules: ``model.named_modules()``.
        targeted: Paths of the modules of which at least one tensor (parameter or buffer) is targeted.
    """
    if policy == "frozen":
        return []
    moving = ((path, module) for path, module in modules if policy != "target" or path in targeted)
    return [join(path, name) for path, module in moving for name in statistics_of(module)]


class HoldsStatistics(Special):
    """Trait of a norm module that uses its stored statistics unless an active adapter owns (and saves) them.

    In ``train()`` mode a pretrained BatchNorm replaces the statistics of the source data, tuned or not, which are no
    part of an adapter: PEFT's best-known way to reload another model than the one that was evaluated. The paper's code
    leaves the network in ``eval()``. Here the mode is derived whenever the module asks for it, so neither a later
    ``model.train()`` nor a switch of adapters can leave it wrong, and it also holds for transformers' own
    ``add_adapter``, which keeps no tuner around.
    """

    @property
    def training(self) -> bool:
        """False while the statistics are held, whatever mode was set; children (timm's act, drop) keep their own."""
        if not self.__dict__["mode_set"]:
            return False
        surgery = self.__dict__["_modules"].get(HOLDER)
        return surgery is not None and surgery.statistics_move()

    @training.setter
    def training(self, mode: bool) -> None:
        # Twice: nn.Module's own name is for when the class is restored. torch.compile (2.11 and before) takes
        # __dict__["training"] for this property, so reading it here would never end.
        self.__dict__["training"] = self.__dict__["mode_set"] = mode

    @property
    def affine(self) -> Any:
        """As set by the module; refused to what is about to replace the module, and would let its statistics move."""
        caller = sys._getframe(1).f_code.co_name
        if caller in _REPLACING:
            raise AdapterError(
                f"{caller} would replace norm modules that belong to an adapted network, and so let frozen statistics "
                "move. Call it on the network before get_peft_model, or on what merge_and_unload returns."
            )
        if "affine" not in self.__dict__:
            raise AttributeError("affine")  # which nn.Module answers in its own words
        return self.__dict__["affine"]

    @affine.setter
    def affine(self, value: Any) -> None:
        self.__dict__["affine"] = value

    def reset_running_stats(self) -> None:
        """Reset statistics that an active adapter owns and trains; a warning, and nothing else, for those held."""
        surgery = self.__dict__["_modules"].get(HOLDER)
        if surgery is not None and surgery.statistics_move():
            super().reset_running_stats()  # type: ignore[misc]
            return
        warnings.warn(
            f"{base_class(self).__name__} keeps its statistics: they are frozen. "  # type: ignore[arg-type]
            "torch.optim.swa_utils.update_bn moves those of adapters with norm_stats='target' or 'all' only.",
            stacklevel=2,
        )


class HoldsBuffers(Special):
    """Trait of a module whose other buffers stay as they are: what a training forward writes to is a copy.

    ``spectral_norm`` refines its vectors, a vector quantiser moves its codebook, and both do it in ``train()``, inside
    the forward. No adapter owns these buffers, so they would be lost on saving. The forward has its copies from the
    first hook to the last, so it computes what it always does.
    """

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        buffers = self.__dict__["_buffers"]
        held = {name: buffers.get(name) for name in _other_buffers(self)} if self.training else {}  # type: ignore
        try:
            for name, value in held.items():
                buffers[name] = value.clone()
            return super()._call_impl(*args, **kwargs)  # type: ignore[misc]
        finally:
            buffers.update(held)


def _other_buffers(module: nn.Module) -> list[str]:
    """The names of the persistent buffers that are no norm statistics."""
    if has_statistics(module):  # all of them are what the norm updates in training
        return []
    hidden = module._non_persistent_buffers_set
    return [name for name, value in module._buffers.items() if value is not None and name not in hidden]


def hold_buffers(model: nn.Module) -> None:
    """Make every module of ``model`` hold its buffers; see `HoldsStatistics` and `HoldsBuffers`."""
    for path, module in model.named_modules():
        if HOLDER in path.split("."):  # an adapter's own
            continue
        if has_statistics(module):
            module.__dict__["mode_set"] = module.__dict__["training"]
            specialise(module, HoldsStatistics)
        elif _other_buffers(module):
            specialise(module, HoldsBuffers)
