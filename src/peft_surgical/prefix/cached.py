"""`CachedPrefix`: what lies before the first tuned tensor is computed once for each image, and replayed in training.

::

    with CachedPrefix(model, tuning, validation, batch_size=32) as cached:
        print(cached)
        tuning, validation = cached.datasets
        Trainer(model, train_dataset=tuning, eval_dataset=validation, ...).train()

The rows of ``cached.datasets`` hold the numbers of their images in the images' place, and the model looks its prefix's
outputs up by them. A model, or data, for which this would not give what training on the images themselves gives runs as
it is: ``cached.datasets`` are then the data sets that were passed, and ``cached.reason`` says why.

What is proven, and when: on entering, for some images, that outputs and gradients of all tuned tensors equal those of
the model as it is; and for each batch size at its first batch, that the recorded tensors equal those which the prefix
gives for this batch, which further runs that share the features need not compare again. On the CPU in float32 they are
equal bit for bit, elsewhere within `proof.TOLERANCE`. Kernels differ between batch sizes (a last batch of one image,
say), and so do last digits: a batch of a size for which they are not equal is loaded and computed as it would have been
without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..errors import ConfigError
from ..fingerprints import fingerprint
from ..tuner.attach import surgical_layers
from .cut import NetworkCut, UncutError
from .proof import PROVEN_ON, Passes, model_kept, seed_all
from .samples import Hole, Numbered, Part, around, blank_images, image_of, is_numbers, put, with_image
from .storage import FeatureStore, NoRoomError, key_of_features, layout_of
from .watching import cuts_of, tuned_modules

_CUTS = 4  # places where a cut is tried
_LEAST = 0.02  # share of a forward pass below which looking up costs as much as computing


class CachedPrefix:
    """A context in which a model's frozen prefix is computed once for each image and replayed.

    Args:
        model: In the context it must not be copied; Trainer and DDP may wrap it.
        datasets: Map-style data sets of dicts or tuples with one image (a float tensor (channels, h, w)) each; the
            first is trained on, the others are evaluated on.
        batch_size: Images per batch, or one number for each data set.
        views: For a first data set whose images change from one reading to the next: so many fixed readings of each,
            of which epoch e uses number e mod ``views`` (see `set_epoch`). By default such a data set is not cached.
        collate: Makes a batch of rows, as in the loop; by default Trainer's for dicts, torch's for tuples.
        store: Where features are kept; give the same store to runs that may share them.
        autocast: The dtype of mixed precision in the loop.
        off: Why nothing is to be cached, for `reason`; None to cache.

    Attributes:
        datasets: The data sets to train and evaluate with.
        reason: Why nothing is cached, in one line; None where the prefix is.
        share: Share of a forward pass that is computed once, by floating-point operations.
        computed: Images for which the prefix was run, to record it or to compare, since the context was entered.
        replayed: Images, one in every epoch counted anew, for which it was looked up instead.

    Raises:
        ConfigError: No data set, or a number of batches or views that is none.
    """

    def __init__(
        self,
        model: nn.Module,
        *datasets: Any,
        batch_size: int | Sequence[int] = 64,
        views: int | None = None,
        collate: Callable[[Any], Any] | None = None,
        store: FeatureStore | None = None,
        autocast: torch.dtype | None = None,
        off: str | None = None,
    ) -> None:
        if not datasets:
            raise ConfigError("CachedPrefix has no data set: give the images to train on, and those to evaluate on")
        if views is not None and views < 1:
            raise ConfigError(f"views={views}: give 1 or more, or leave it out")
        sizes = [batch_size] * len(datasets) if isinstance(batch_size, int) else list(batch_size)
        if len(sizes) != len(datasets) or min(sizes) < 1:
            raise ConfigError(f"batch_size={batch_size}: give one positive number, or one for each data set")
        self.model, self._given, self._views = model, datasets, views
        self._sizes = [min(size, len(part)) for size, part in zip(sizes, datasets, strict=True)]
        self._store = FeatureStore() if store is None else store
        self._passes = Passes(model, collate, autocast, self._store.dtype)
        self._off, self._epoch, self._boundary = off, 0, ""
        self.datasets: tuple[Dataset[Any], ...] = datasets
        self.reason = off or "its context has not been entered"
        self.share = 0.0
        self.computed = self.replayed = 0

    @property
    def dataset(self) -> Dataset[Any]:
        """The first of ``datasets``."""
        return self.datasets[0]

    def set_epoch(self, epoch: int) -> None:
        """Choose the view of the images, where there are several."""
        self._epoch = epoch

    def __str__(self) -> str:
        if self.reason:
            return f"prefix not cached: {self.reason}"
        return f"prefix cached: {self.share:.0%} of a forward pass, all before {self._boundary}, is computed once"

    def __enter__(self) -> CachedPrefix:
        self._stack = ExitStack()
        if self._off is not None:
            return self
        try:
            with model_kept(self.model):
                self._set_up()
        except (UncutError, NoRoomError) as error:
            self._stack.close()
            self.reason = str(error)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()
        self._parts: list[Part] = []  # whose features may be large

    # --- setting up ---

    def _set_up(self) -> None:
        if getattr(self.model, "is_gradient_checkpointing", False):
            raise UncutError("gradient checkpointing runs parts of the network twice")
        self._passes.device = next(self.model.parameters()).device
        read = [self._first_rows(dataset) for dataset in self._given]
        views = 1
        for number, (_, changes) in enumerate(read):
            if changes and (number > 0 or self._views is None):
                raise UncutError("the images change from one reading to the next: random augmentation")
            views = self._views or 1 if number == 0 and changes else views
        self._cut = self._find_cut(read[0][0])
        self.share, self._boundary = self._cut.share, self._cut.name
        self._stack.enter_context(self._cut.installed())
        state, self._parts, start = self._state(), [], 0
        for number, dataset in enumerate(self._given):
            self._parts.append(self._part(number, dataset, start, 1 if number else views, state))
            start += len(dataset)
        before = self.model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True)
        after = self.model.register_forward_hook(lambda *_: self._cut.end(), always_call=True)
        for hook in (before, after):
            self._stack.callback(hook.remove)
        self.datasets = tuple(Numbered(part.rows, part.start) for part in self._parts)
        self.reason = ""

    def _first_rows(self, dataset: Any) -> tuple[list[Any], bool]:
        """Some rows, and whether their images change from one reading to the next."""
        count = min(len(dataset), 2 * PROVEN_ON)
        if count < 2:
            raise UncutError("there are fewer than two images")
        rows, again = ([dataset[i] for i in range(count)] for _ in range(2))
        return rows, any(not torch.equal(image_of(a), image_of(b)) for a, b in zip(rows, again, strict=True))

    def _find_cut(self, rows: Sequence[Any]) -> NetworkCut:
        """The deepest cut that is proven."""
        passes, reasons = self._passes, []
        self.model.eval()
        for cut in islice(cuts_of(self.model, lambda n: passes.outputs(around(rows, n))), _CUTS):
            if cut.share < _LEAST:
                reasons.append(f"only {cut.share:.0%} of a forward pass comes before {cut.name}")
                continue
            try:
                with cut.installed():
                    self.model.eval()
                    cut.find_kept(lambda: passes.scalar(around(rows, 3)), 3)
                    for training in (True, False):
                        passes.prove(cut, rows, training)
            except UncutError as error:
                reasons.append(str(error))
            except Exception as error:  # whatever a network raises that is handed something else than it expects
                reasons.append(f"replayed, it raises {type(error).__name__}: {error}".splitlines()[0][:200])
            else:
                return cut
        raise UncutError(reasons[0])

    def _state(self) -> dict[str, Any]:
        """What the features depend on beside the images: for their key."""
        owners = tuned_modules(self.model)
        layers = [(path, layer) for path, layer in surgical_layers(self.model) if layer.get_base_layer() not in owners]
        return {
            "tensors": fingerprint(self._cut.tensors),
            "adapters": [[path, layer.active_adapters, layer.scaling, layer.merged_adapters] for path, layer in layers],
            "calls": [[site.name, site.kept, str(site.module)] for site in self._cut.sites],
            "dtypes": [str(self._passes.autocast), str(self._store.dtype)],
            "device": [str(self._passes.device), torch.get_num_threads(), torch.__version__],
        }

    def _part(self, number: int, dataset: Any, start: int, views: int, state: dict[str, Any]) -> Part:
        cut, size, total, trained = self._cut, self._sizes[number], len(dataset), number == 0
        table = self._store.table(dataset)
        if self._store.shared and table.images is None:  # for processes that share the folder
            table.images = key_of_features(images=[fingerprint({"": image_of(row)}) for row in _all(dataset)])
        data = table.images if self._store.shared else table.token
        key = key_of_features(data=data, size=size, views=views, trained=trained, **state)

        def record(rows: Sequence[Any]) -> list[Tensor]:
            # As in the loop: kernels differ with gradients, modules in training.
            self.model.train(trained)
            self.computed += len(rows)
            with torch.set_grad_enabled(trained):
                return cut.record(lambda: self._passes.outputs(rows))

        first = [dataset[i] for i in range(min(size, 3))]
        found = record(first)
        layouts = [layout_of(tensor, self._store.dtype) for tensor in found]

        def fill(made: Sequence[Tensor]) -> None:
            rows: list[Any] = [None] * total
            for view in range(views):
                seed_all(view)
                for at in range(0, total, size):
                    at = min(at, total - size)  # all batches are of one size
                    read = [dataset[i] for i in range(at, at + size)]
                    for layout, new, into in zip(layouts, record(read), made, strict=True):
                        if layout.shape != tuple(new.shape[1:]):
                            raise UncutError("the images differ in size")
                        into[view * total + at : view * total + at + size] = layout.stored(new)
                    rows[at : at + size] = [with_image(row, Hole()) for row in read]
            table.rows = rows

        features = self._store.features(key, layouts, views * total, fill)
        if table.rows is None:  # another process has computed them
            table.rows = [with_image(row, Hole()) for row in _all(dataset)]
        dtypes = [tensor.dtype for tensor in found]
        agrees = self._store.agreements(key)
        return Part(dataset, table.rows, start, views, image_of(first[0]), layouts, dtypes, features, agrees)

    # --- replaying ---

    def _before(self, model: nn.Module, args: Any, kwargs: Any) -> Any:
        given = next((value for value in (*args, *kwargs.values()) if is_numbers(value)), None)
        if given is None:
            return None
        numbers, device = given.flatten().cpu(), self._passes.device
        part = next(part for part in self._parts if part.holds(int(numbers[0])))
        features = part.features_of(numbers, self._epoch % part.views, device)
        precision = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        kind = (len(numbers), model.training, torch.is_grad_enabled(), precision)
        if part.views > 1:  # what was read once at random cannot be read again
            part.agrees[kind] = True
        if not part.agrees.get(kind, False):
            images = part.images(numbers, device)
            given = put(args, images), put(kwargs, images)
            if kind not in part.agrees:
                self.computed += len(numbers)
                with model_kept(model):
                    found = self._cut.record(lambda: model(*given[0], **given[1]))
                part.agrees[kind] = self._passes.same(found, features)
            if not part.agrees[kind]:
                return given
        self.replayed += len(numbers)
        self._cut.begin(features, len(numbers))
        blank = blank_images(part.image, len(numbers), device)
        return put(args, blank), put(kwargs, blank)


def _all(dataset: Any) -> Any:
    return (dataset[i] for i in range(len(dataset)))
