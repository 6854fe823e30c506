"""Whether `anatomy_of` is right for every network of timm and transformers: the table of docs/measured.md.

::

    python benchmarks/zoo.py timm                         # about 1,370 names, on the meta device
    python benchmarks/zoo.py transformers                 # every architecture of the mappings below
    python benchmarks/zoo.py timm --only 'vit_*'          # these names alone
    python benchmarks/zoo.py table --markdown docs/results/zoo.md

Each network's row is written to ``--rows`` as soon as it is known, and a later run goes on with the names that have
none; ``--again`` checks those that are not right once more.

No weights are loaded and nothing is computed. Each network is made for two numbers of classes, and then

- its blocks must hold every parameter and persistent buffer exactly once;
- the head must be the tensors whose shape depends on the number of classes, and no other; a language model's, the
  tensors of ``get_output_embeddings()`` that it does not share with its embedding; a network without a classifier has
  no head, and says so when asked for it;
- blocks must come in the order in which a forward pass reaches them first, where one runs on the meta device.

A network is *right* where all of this holds, a *clear error* where `AnatomyError` shows a ``blocks=`` to fill in, else
*wrong*. The exit code is 1 if one is wrong or fewer than 97% are right.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import json
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.models.auto import modeling_auto

from peft_surgical import Anatomy, anatomy_of
from peft_surgical.errors import AnatomyError, UnknownTargetError
from peft_surgical.evaluation import TextTable

MAPPINGS = {
    "image classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "image features": "MODEL_FOR_IMAGE_MAPPING_NAMES",
    "image and text": "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "text classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "causal language model": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
}
REQUIRED = 0.97
ELEMENTWISE = (
    "batch_norm layer_norm group_norm dropout relu relu_ relu6 gelu silu silu_ sigmoid sigmoid_ hardswish hardsigmoid "
    "hardtanh hardtanh_ mish leaky_relu elu tanh softmax add add_ __add__ mul mul_ __mul__ sub __sub__ div __truediv__ "
    "normal_ uniform_ fill_ zero_ copy_"
)
SHAPE_KEPT = {getattr(at, name) for at in (torch, F, torch.Tensor) for name in ELEMENTWISE.split() if hasattr(at, name)}
LIBRARIES = ("timm", "transformers")
VERDICTS = RIGHT, REFUSED, WRONG, NOT_BUILT = ("right", "clear error", "wrong", "not built")


@dataclass(frozen=True)
class Row:
    """What was found of one network."""

    library: str
    family: str
    name: str
    verdict: str
    problems: list[str]
    ordered: bool = False  # whether a forward pass ran, so that the order was looked at


# --- what must hold ---


def problems(model: nn.Module, head: set[str] | None, run: Callable[[nn.Module], Any] | None) -> tuple[str, list[str]]:
    """("right", []), ("clear error", [message]), or ("wrong", what is wrong).

    Args:
        model: On the meta device.
        head: The names of the classifier's tensors; None where no rule tells.
        run: Calls the network; None to leave the order unchecked.
    """
    try:
        anatomy = anatomy_of(model)
    except AnatomyError as error:
        return (REFUSED, [str(error)]) if "blocks={" in str(error) else (WRONG, [f"no blocks= in: {error}"])
    except Exception as error:  # whatever it is, it is wrong
        return WRONG, [f"{type(error).__name__}: {error}"]
    found = [*_not_total(model, anatomy), *_wrong_head(anatomy, head)]
    if run is not None:
        found += _wrong_order(model, anatomy, run)
    return (WRONG, found) if found else (RIGHT, [])


def _not_total(model: nn.Module, anatomy: Anatomy) -> Iterator[str]:
    held = Counter(tensor for block in anatomy for tensor in block.tensors)
    names: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor):
            names.setdefault(id(tensor), name)
    aliases = {*anatomy.aliases}
    if twice := [name for name, count in held.items() if count > 1]:
        yield f"twice: {twice[:3]}"
    if missing := [name for name in names.values() if name not in held and name not in aliases]:
        yield f"missing: {missing[:3]}"
    if surplus := [name for name in held if name not in names.values()]:
        yield f"no tensors: {surplus[:3]}"


def _wrong_head(anatomy: Anatomy, expected: set[str] | None) -> Iterator[str]:
    found = {*anatomy["head"].tensors} if "head" in anatomy.names else set()
    if expected is not None and found != expected:
        yield f"head: surplus {sorted(found - expected)[:4]}, missing {sorted(expected - found)[:4]}"
    if not found:
        try:
            anatomy["head"]
            yield "a head that is not among the blocks"
        except UnknownTargetError as error:
            if "head" not in str(error):
                yield f"does not say that there is no head: {error}"


def _wrong_order(model: nn.Module, anatomy: Anatomy, run: Callable[[nn.Module], Any]) -> Iterator[str]:
    first: dict[str, int] = {}
    order: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, path=path: order.append(path))
        for path, module in model.named_modules()
        if module._parameters
    ]
    try:
        with torch.no_grad(), ShapesAlone():
            run(model.eval())
    except Exception:  # data decides the way, or the input is another
        return
    finally:
        for handle in handles:
            handle.remove()
    for index, path in enumerate(order):
        module = model.get_submodule(path)
        if any(True for child in module.children() for _ in child.parameters()):
            continue  # it is called before its children, whenever it uses what it holds itself
        for name in module._parameters:
            full = f"{path}.{name}".lstrip(".")
            tensor = anatomy.aliases.get(full, full)
            if tensor in anatomy.tensors:
                first.setdefault(anatomy.block_of(tensor).name, index)
    towers: dict[str, list[tuple[str, int]]] = {}
    for block in anatomy:
        if block.name in first:
            towers.setdefault(block.name.rpartition(".")[0], []).append((block.name, first[block.name]))
    for reached in towers.values():
        for (before, at), (name, later) in itertools.pairwise(reached):
            if later < at:
                yield f"order: {name} is reached before {before}"


class ShapesAlone(TorchFunctionMode):
    """What keeps shape and dtype of its input computes nothing: on the meta device Python would do so, slowly."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own, other = (*args, None, None)[:2]
        if func in SHAPE_KEPT and isinstance(own, torch.Tensor) and own.is_meta and not (kwargs or {}).get("dtype"):
            name = func.__name__
            known = not isinstance(other, torch.Tensor) or "norm" in name
            if known or (own.shape, own.dtype) == (other.shape, other.dtype):
                return own if name.endswith("_") and not name.endswith("__") else torch.empty_like(own)
        return func(*args, **(kwargs or {}))


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}


def _changed(before: Mapping[str, torch.Size], model: nn.Module) -> set[str]:
    """The tensors of a network that were not there before, or had another shape."""
    return {name for name, shape in _shapes(model).items() if before.get(name) != shape}


@contextmanager
def no_initialisation() -> Iterator[None]:
    """Let modules draw no values, which nobody reads here and which take nine tenths of the time."""
    names = [name for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")]
    modules = [nn.init, *(module for key, module in [*sys.modules.items()] if key.startswith("timm."))]
    found = [(module, name, getattr(module, name)) for module in modules for name in names if hasattr(module, name)]
    try:
        for module, name, _ in found:
            setattr(module, name, lambda tensor, *_, **__: tensor)
        yield
    finally:
        for module, name, original in found:
            setattr(module, name, original)


# --- timm ---


def timm_rows(only: str, known: Collection[str] = ()) -> Iterator[Row]:
    """A row for each model name of the installed timm that is not known yet; a family is a module of timm's."""
    families: dict[str, list[str]] = {}
    for name in timm.list_models(only):
        families.setdefault(timm.models.model_entrypoint(name).__module__.rpartition(".")[2], []).append(name)
    # One of each family, then the next of each: whoever stops early has seen them all.
    turns = itertools.zip_longest(*([(family, name) for name in names] for family, names in families.items()))
    for family, name in (pair for turn in turns for pair in turn if pair is not None):
        if name in known:
            continue
        try:
            with torch.device("meta"), no_initialisation(), ShapesAlone():
                model: Any = timm.create_model(name)
                classes, before = getattr(model, "num_classes", 0) or 0, _shapes(model)
                verdict, found = problems(model, set(), None) if classes == 0 else (RIGHT, [])
                try:
                    model.reset_classifier(classes + 7)
                except Exception:  # a few need more than the number
                    model = timm.create_model(name, num_classes=classes + 7)
        except Exception as error:
            yield Row("timm", family, name, NOT_BUILT, [f"{type(error).__name__}: {error}"])
            continue
        channels, *size = model.pretrained_cfg.get("input_size", (3, 224, 224))
        ran: list[Any] = []

        def run(network: nn.Module, shape: Sequence[int] = (1, channels, *size), ran: list[Any] = ran) -> None:
            ran.append(network(torch.zeros(shape, device="meta")))

        if verdict == RIGHT:
            verdict, found = problems(model, _changed(before, model), run)
        yield Row("timm", family, name, verdict, found, bool(ran))


# --- transformers ---


def transformers_rows(only: str, known: Collection[str] = ()) -> Iterator[Row]:
    """A row for each architecture in `MAPPINGS` that is not known yet; a family is one of these."""
    for kind, mapping in MAPPINGS.items():
        for model_type, classes in getattr(modeling_auto, mapping).items():
            for name in (classes,) if isinstance(classes, str) else classes:
                label = f"{kind}: {name}"
                if fnmatch.fnmatch(name, only) and label not in known:
                    yield Row("transformers", kind, label, *_transformers_row(kind, model_type, name))


def _transformers_row(kind: str, model_type: str, name: str) -> tuple[str, list[str], bool]:
    labels = kind.endswith("classification")
    try:
        cls: Any = getattr(transformers, name)
        config_class = cls.config_class or transformers.CONFIG_MAPPING[model_type]  # that of a part, for some
        if model_type in ("timm_wrapper", "timm_backbone"):
            config = {"architecture": "test_resnet", "backbone": "test_resnet", "do_pooling": True}
            model, other = (_built(cls, config_class, {**config, "num_labels": n}) for n in (5, 7))
        elif labels:
            model, other = (_built(cls, config_class, {"num_labels": n}) for n in (5, 7))
        else:
            model = other = _built(cls, config_class, {})
    except Exception as error:
        return NOT_BUILT, [f"{type(error).__name__}: {str(error)[:200]}"], False
    head: set[str] | None = None
    if labels:
        head = _changed(_shapes(model), other)
    elif kind == "image features":
        head = set()
    elif kind == "causal language model":
        head = _language_head(other)
    ran: list[Any] = []
    verdict, found = problems(other, head, lambda network: ran.append(_run(network)))
    return verdict, found, bool(ran)


def _built(cls: Any, config_class: Any, settings: dict[str, Any]) -> Any:
    """A network on the meta device with few layers, or with as many as it has where that contradicts its config."""
    last = {"is_decoder": True}  # Reformer's language model asks for it
    for few in ({"num_hidden_layers": 3}, {}, last):
        try:
            config = config_class(**settings, **few)
            if "num_labels" in settings and config.num_labels != settings["num_labels"]:
                config.num_labels = settings["num_labels"]
            if vars(config).get("head_dim", 0) is None:
                config.head_dim = config.hidden_size // config.num_attention_heads
            if vars(config).get("vocab_size", 0) is None:
                config.vocab_size = 32
            if vars(config).get("num_key_value_heads", 0) is None:
                config.num_key_value_heads = config.num_attention_heads
            with torch.device("meta"):
                return cls(config)
        except Exception:
            if few is last:
                raise
    raise AssertionError("the last attempt raises")


def _language_head(model: Any) -> set[str] | None:
    output, shared = model.get_output_embeddings(), {id(p) for p in model.get_input_embeddings().parameters()}
    if output is None:
        return None
    own = {id(p) for p in output.parameters()} - shared
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        first.setdefault(id(parameter), name)
    return {name for identity, name in first.items() if identity in own}


def _run(model: Any) -> Any:
    config = model.config
    tokens = torch.zeros((1, 8), dtype=torch.long, device="meta")
    size = getattr(config, "image_size", None) or 224
    size = size if isinstance(size, int) else size[0]
    pixels = torch.zeros((1, getattr(config, "num_channels", 3), size, size), device="meta")
    if model.main_input_name == "pixel_values":
        return model(pixel_values=pixels)
    return model(input_ids=tokens)


# --- the table ---


def read(file: Path) -> dict[str, Row]:
    """The rows of a file by name: the last one of each name."""
    if not file.is_file():
        return {}
    lines = file.read_text(encoding="utf-8").splitlines()
    return {row.name: row for row in (Row(**json.loads(line)) for line in lines)}


def summary(rows: Collection[Row]) -> tuple[Counter[str], int, float]:
    """How many rows have each verdict, how many networks could be built, and the share of these that is right."""
    counts = Counter(row.verdict for row in rows)
    built = len(rows) - counts[NOT_BUILT]
    return counts, built, counts[RIGHT] / max(built, 1)


_SAYS_NOTHING = (
    "has no group_matcher()",
    "not a transformers PreTrainedModel",
    "no segmentation network with an encoder and a decoder beside it",
)


def reason(row: Row) -> str:
    """Why a network is not right, in one line."""
    text = row.problems[0] if row.problems else ""
    if row.verdict == REFUSED and "Tried:" in text:
        tried = [line.strip() for line in text.partition("Tried:\n")[2].split("\n") if line.startswith("  ")]
        said = [line.partition(": ")[2] for line in tried if not line.endswith(_SAYS_NOTHING)]
        return said[0] if said else ""
    short = text.partition(" You can install")[0].partition("blocks=")[0].partition(" Check out")[0]
    return " ".join(short.split())[:160]


def _architectures() -> int:
    named = ((kind, value) for kind, mapping in MAPPINGS.items() for value in getattr(modeling_auto, mapping).values())
    return len({(kind, name) for kind, value in named for name in ((value,) if isinstance(value, str) else value)})


def markdown(rows: Collection[Row]) -> str:
    """Counts by family, and then each network that is not right, with the reason."""
    parts = []
    for library in LIBRARIES:
        own = [row for row in rows if row.library == library]
        families = {family: [row for row in own if row.family == family] for family in sorted({r.family for r in own})}
        lines = []
        for family, members in [*families.items(), ("all", own)]:
            counts, built, share = summary(members)
            numbers = (built, *(counts[verdict] for verdict in VERDICTS), sum(row.ordered for row in members))
            lines.append([family, *map(str, numbers), f"{share:.1%}" if built else "-"])
        version = {"timm": timm, "transformers": transformers}[library].__version__
        names = len(timm.list_models()) if library == "timm" else _architectures()
        text = (
            f"{library} {version}: {len(own):,} of {names:,} names, torch {torch.__version__.partition('+')[0]}, no "
            "weights, on the meta device."
        )
        parts.append(
            TextTable(["family", "networks", *VERDICTS, "order checked", "right, share"], lines, text).markdown()
        )
    left = [[row.library, row.name, row.verdict, reason(row)] for row in rows if row.verdict != RIGHT]
    parts.append(TextTable(["library", "network", "verdict", "reason"], sorted(left)).markdown())
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check what has no row yet, print what is not right, and count; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("library", choices=(*LIBRARIES, "table"), help="whose networks; or the table of all rows")
    add("--only", default="*", metavar="PATTERN", help="names that match, as in a shell")
    add("--again", action="store_true", help="check again what is not right, too")
    add("--rows", type=Path, default=Path("outputs/benchmarks/zoo.jsonl"), metavar="FILE", help="one row per network")
    add("--markdown", type=Path, metavar="FILE", help="write the table to this file")
    args = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    rows = read(args.rows)
    if args.library != "table":
        known = {name for name, row in rows.items() if row.verdict == RIGHT or not args.again}
        args.rows.parent.mkdir(parents=True, exist_ok=True)
        check = timm_rows if args.library == "timm" else transformers_rows
        for row in check(args.only, known):
            rows[row.name] = row
            with args.rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(row)) + "\n")
    found, code = [*rows.values()], 0
    for library in LIBRARIES if args.library == "table" else (args.library,):
        own = [row for row in found if row.library == library]
        for row in own:
            if row.verdict != RIGHT:
                print(f"{row.name}: {row.verdict}: {'; '.join(row.problems)[:300]}")
        counts, built, share = summary(own)
        print(
            f"{library}: {built} networks: {counts[RIGHT]} right ({share:.1%}), {counts[REFUSED]} clear errors, "
            f"{counts[WRONG]} wrong; {counts[NOT_BUILT]} could not be built"
        )
        code |= int(counts[WRONG] > 0 or share < REQUIRED)
    if args.markdown is not None:
        args.markdown.write_text(markdown(found), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
