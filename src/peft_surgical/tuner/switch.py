"""Which adapters a network uses: switched, scaled, disabled and joined by another, however many there are.

PEFT's own functions visit every module of every adapter for this. Here a walk ends at each `SurgicalLayer`, a layer
touches the adapters that change, and what PEFT does to add and load an adapter does not see the others (`alone`).
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, _set_adapter
from safetensors import SafetensorError
from torch import nn

from ..errors import AdapterFileError
from ..keys import PREFIX
from .attach import surgical_layers, walk
from .layer import SurgicalLayer


def switched(model: nn.Module) -> Iterator[BaseTunerLayer | AuxiliaryTrainingWrapper]:
    """Every layer of any method, and every wrapper of a module that is saved whole."""
    for _, module in walk(model):
        kind: Any = type(module)  # mypy holds that a class of modules cannot be hashed
        if _is_switched(kind):
            yield cast("BaseTunerLayer | AuxiliaryTrainingWrapper", module)


@functools.lru_cache(maxsize=1024)
def _is_switched(kind: type) -> bool:
    return issubclass(kind, (BaseTunerLayer, AuxiliaryTrainingWrapper))  # slow: one of them has an abstract parent


def activate(model: nn.Module, adapter_names: str | list[str], inference_mode: bool) -> None:
    """Make adapters the active ones, as PEFT's function ``set_adapter`` does for the layers of one method."""
    for module in switched(model):
        if isinstance(module, AuxiliaryTrainingWrapper):
            _set_adapter(module, adapter_names, inference_mode=inference_mode)
        elif isinstance(module, SurgicalLayer):
            if module.merged:
                warnings.warn(
                    "Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=3
                )
                module.unmerge()
            module.set_adapter(adapter_names, inference_mode=inference_mode)


@contextmanager
def alone(model: nn.Module, shown: str | None = None) -> Iterator[None]:
    """Within it the adapters of ``model`` are no part of its tree of modules, but for ``shown`` and those added within.

    Names, scales and what is active stay; nothing may be computed meanwhile.
    """
    hidden: list[tuple[nn.ModuleDict, dict[str, Any]]] = []
    for _, layer in surgical_layers(model):
        for container in (layer.surgical_delta, layer.surgical_stats):
            own: dict[str, Any] = container._modules
            hidden.append((container, own))
            container.__dict__["_modules"] = {name: module for name, module in own.items() if name == shown}
    try:
        yield
    finally:
        for container, own in hidden:
            own.update(container._modules)
            container.__dict__["_modules"] = own


class Switching:
    """The tuner's own ways of saying which adapters are active."""

    model: nn.Module
    peft_config: dict[str, Any]
    active_adapter: str | list[str]
    active_adapters: list[str]

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters; see BaseTuner. The time it takes depends on the tuned modules alone.

        Inactive adapters are frozen, but for tensors whose ``requires_grad`` was set by hand.
        """
        activate(self.model, adapter_name, inference_mode)
        self.active_adapter = adapter_name

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; see BaseTuner. If no other one was active, the first of those left is, in all modules.

        PEFT lets each module choose among its own adapters, so that several would be active at once, or names one that
        is gone where the first module has none left.
        """
        active = list(self.active_adapters)
        super().delete_adapter(adapter_name)  # type: ignore[misc]
        left = [name for name in active if name != adapter_name] or list(self.peft_config)[:1]
        if adapter_name in active:
            self.set_adapter(left)
        self.active_adapter = left

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        for module in switched(self.model):
            module.enable_adapters(enabled)


# --- methods of PeftModel ---


def loading_alone(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``PeftModel.load_adapter``: a surgical adapter is loaded as fast beside many others as beside none.

    PEFT reads its file once more. If another one is being put in its place then, there is an error in words, and the
    model is as it was.
    """
    signature = inspect.signature(original)

    @functools.wraps(original)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_surgical(self):
            return original(self, *args, **kwargs)
        name = signature.bind(self, *args, **kwargs).arguments["adapter_name"]
        with alone(self.base_model.model, shown=name if name in self.peft_config else None):
            try:
                return original(self, *args, **kwargs)
            except (OSError, RuntimeError, SafetensorError) as error:
                content = getattr(self.peft_config.get(name), "content", None)
                if content is None or not content.is_replaced():
                    raise
                if name in self.base_model._awaiting:
                    self.base_model._remove(self.base_model.model, name)
                raise AdapterFileError(
                    f"{content.path} was replaced while it was being loaded: load it again."
                ) from error

    return load_adapter


def disabling_layers(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``PeftModel.disable_adapter``, which asks for the status of every tensor of every adapter."""

    @contextmanager
    def disabled(self: Any) -> Iterator[None]:
        before, states = self._adapters_disabled, {module._disable_adapters for module in switched(self.base_model)}
        if len(states) == 2:
            # As PEFT has it, which callers match.
            warnings.warn(
                "The model contains some adapter layers that are enabled and others that are disabled. This is most "
                "likely unintentional. After exiting the disable_adapter context, all adapters will be enabled",
                stacklevel=3,
            )
        try:
            self.base_model.disable_adapter_layers()
            self._adapters_disabled = True
            yield
        finally:
            if states != {True}:
                self.base_model.enable_adapter_layers()
            self._adapters_disabled = before

    @functools.wraps(original)
    def disable_adapter(self: Any) -> AbstractContextManager[None]:
        return disabled(self) if _is_surgical(self) else original(self)

    return disable_adapter


def _is_surgical(model: Any) -> bool:
    return getattr(model.base_model, "prefix", None) == PREFIX
