"""Give one module of a network a subclass of its own class, in place.

The tuner has to make a module *read* base + delta wherever it reads a tensor. Wrapping the module in another one does
that too, but changes its type, its state-dict keys and every reference that somebody holds to it. Swapping the class
of the instance changes none of these: ``type(module)`` becomes a subclass with the same name, the module keeps its
place, its hooks, its attributes and its keys, and its own ``forward`` runs unchanged. PyTorch does the same in
``torch.nn.utils.parametrize`` and in FSDP2's ``fully_shard``.

A special class is a pure function of (base class, traits, tensor names), so it is made once, and a copied or pickled
module finds it again by these three.
"""

from __future__ import annotations

from typing import Any

from torch import nn


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

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class cannot be found by module and name, as pickle would try: it has the name of its base.
        parts = super().__reduce_ex__(max(int(protocol), 2))
        recipe = (self.special_base, self.special_traits, self.special_tensors)
        return (_rebuild, recipe, *parts[2:])


_CLASSES: dict[Any, Any] = {}


def _special_class(base: type[nn.Module], traits: tuple[type[Special], ...], tensors: tuple[str, ...]) -> Any:
    key = (base, traits, tensors)
    if key in _CLASSES:
        return _CLASSES[key]
    names = ("__module__", "__qualname__", "__doc__")
    # Module, name and qualified name are the base's: code that asks for a class by its name (FSDP's and Accelerate's
    # wrapping policies, torch.fx's rule of what a leaf is) keeps finding what it looks for.
    body: dict[str, Any] = {name: getattr(base, name) for name in names}
    body.update(special_base=base, special_traits=traits, special_tensors=tensors)
    cls: Any = type(base.__name__, (*traits, base), body)
    for name in tensors:
        setattr(cls, name, cls.tensor_property(name))
    _CLASSES[key] = cls
    return cls


def _rebuild(base: type[nn.Module], traits: tuple[type[Special], ...], tensors: tuple[str, ...]) -> nn.Module:
    cls = _special_class(base, traits, tensors)
    return cls.__new__(cls)


def specialise(module: nn.Module, trait: type[Special], tensors: tuple[str, ...] = ()) -> None:
    """Add ``trait`` to the class of ``module``, in place; tensor names add up over calls.

    Args:
        module: Any module whose class can be subclassed (a ScriptModule's cannot).
        trait: The mixin to add; adding it twice changes nothing.
        tensors: Names of the module's own tensors to read through ``trait.tensor_property``.
    """
    base, traits, names = base_class(module), {trait}, {*tensors}
    if isinstance(module, Special):
        traits |= {*module.special_traits}
        names |= {*module.special_tensors}
    ordered = tuple(sorted(traits, key=lambda one: one.__name__))
    module.__class__ = _special_class(base, ordered, tuple(sorted(names)))


def restore(module: nn.Module) -> None:
    """Give ``module`` the class back that it had before `specialise`; a no-op on any other module."""
    if isinstance(module, Special):
        target: Any = module
        # Not type(module).__bases__: FSDP2 may have put a class of its own on top.
        target.__class__ = base_class(module)


def base_class(module: nn.Module) -> type[nn.Module]:
    """The class of ``module`` without any trait."""
    return module.special_base if isinstance(module, Special) else type(module)
