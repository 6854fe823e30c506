"""`SurgicalConfig`: what to tune, how, and (once saved) what was tuned on which base.

A config file may come from anybody, so every field's type is checked: a wrong one would fail later and elsewhere.
"""

from __future__ import annotations

import enum
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft import PeftConfig
from peft.utils import TaskType

from .blocks import parse
from .errors import AdapterFileError, BaseMismatchError, ConfigError, TargetError
from .files import Content, Held, file_sha256, find_weights, printable, read_object, verify_file
from .folders import canonical_json, write_atomically
from .keys import CONFIG, WEIGHTS, file_key

NormPolicy = Literal["frozen", "target", "all", "estimated"]
"""``frozen``: no statistics move. ``target``: those of modules with a targeted tensor. ``all``: every module's.
``estimated``: every module's are estimated once, by `estimate_statistics`, and held in training."""
DELTA_DTYPES = ("float32", "bfloat16", "float16", "float64")
_UNSAVED = ("strict_base", "held", "content", "measured_fingerprint")


class SurgicalType(str, enum.Enum):
    """The key of this method in PEFT's mappings.

    PEFT's own enum is closed. This one hashes and compares like a string, and has the ``.value`` that others read.
    """

    SURGICAL = "SURGICAL"


def _is(*types: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, types)


def _is_names(value: Any) -> bool:
    return isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(name, str) for name in value)


def _is_terms(value: Any) -> bool:
    return isinstance(value, str) or _is_names(value)


def _is_hashes(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(text, str) for pair in value.items() for text in pair)


def _is_scale(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= torch.finfo(torch.float32).max  # in which deltas are scaled; False for NaN


_REQUIRED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "norm_stats": (_is(str), "the name of a policy"),
    "scale": (_is_scale, "a number, finite in float32: 0 is the base, 1 the tuned model"),
    "inference_mode": (_is(bool), "True or False"),
}
_OPTIONAL: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "target": (_is_terms, "a target, or a list of them"),
    "delta_dtype": (_is(str), "the name of a dtype"),
    "blocks": (_is(Mapping), "a mapping of blocks to paths"),
    "target_modules": (_is_terms, "a regex, or a list of names"),
    "exclude_modules": (_is_terms, "a regex, or a list of names"),
    "modules_to_save": (_is_names, "a list of names"),
    "selection": (_is(Mapping), "a mapping"),
    "tensor_names": (lambda value: _is_names(value) and len({*value}) == len(value), "a list of names, each once"),
    "base_fingerprint": (_is_hashes, "a mapping of names to hashes"),
    "weights_sha256": (_is(str), "a hash"),
    "auto_mapping": (_is(Mapping), "a mapping"),
    "base_model_name_or_path": (_is(str, os.PathLike), "a name or a path"),
    "revision": (_is(str), "a name"),
    "peft_version": (_is(str), "a version"),
}


def check_fields(values: Mapping[str, Any]) -> None:
    """Raise `ConfigError` unless every known field among ``values`` has a value of its type."""
    for name, value in values.items():
        if name in _OPTIONAL and value is None:
            continue
        fits, kind = _REQUIRED.get(name) or _OPTIONAL.get(name) or (None, "")
        if fits is not None and not fits(value):
            raise ConfigError(f"{name}={printable(value)} is not {kind}.")
    task = values.get("task_type")
    if task is not None and task not in list(TaskType):
        choices = ", ".join(TaskType)  # in PEFT's words, which its callers match
        raise ConfigError(f"Invalid task type: {printable(task)}. Must be one of the following task types: {choices}.")


@dataclass
class SurgicalConfig(PeftConfig):
    """Configuration of a surgical adapter.

    What to tune is either a ``target`` (blocks, paths, globs, regexes: see `parse`) or PEFT's ``target_modules``.

    Args:
        target: For example ``"block1"``, ``"block2-4 + head"``, ``"all - head"``, ``"*.norm*"``, or a list of such
            terms, which is their sum.
        norm_stats: Whose normalisation statistics move: ``"frozen"`` nobody's (the paper's protocol), ``"target"``
            those of targeted modules, ``"all"`` every module's, ``"estimated"`` only in `estimate_statistics`.
        delta_dtype: Dtype of the deltas on disk: ``"bfloat16"`` or ``"float16"`` halve the file and round what is
            reloaded; None keeps their dtype. ``"float64"`` is theirs in memory, too, as `extract_adapter` needs it.
        blocks: Block name -> module or tensor paths, for networks whose blocks cannot be derived. Saved.
        target_modules: PEFT's: a list of module names (exact or as a suffix) or a regex; all tensors of a matched
            module are tuned. Names that match nothing are named in a warning, and are an error if none matches; every
            term of ``target`` has to match.
        exclude_modules: PEFT's: modules, matched the same way, whose tensors are not tuned.
        modules_to_save: PEFT's: modules to train and save whole, such as a new head.
        scale: Factor of the deltas (WiSE-FT, Wortsman et al. 2022): 0 is the base, 1 the tuned model. Saved.
        strict_base: False turns the error for a base with another fingerprint into a warning. Not saved.
        selection: Filled in by `resolve_target` and by searches: how data chose the target, with the blocks' scores.
        tensor_names: Filled in: the full names of the tuned tensors.
        base_fingerprint: Filled in on saving: tensor name -> hash of the base's value; see `fingerprint`.
        weights_sha256: Filled in on saving: SHA-256 of the adapter file.

    Attributes:
        held: What the adapter file holds that `from_pretrained` verified. None for a config that was not read with a
            file. Not saved.
        content: That file, until its tensors are on a model. Not saved.
        measured_fingerprint: `fingerprint` of the base when the adapter's tensors were last gathered, saved as
            ``base_fingerprint``. That field stays as it is: the config may serve a fresh adapter on another base.

    These attributes are here because PEFT and transformers pass nothing but the config between files and the tuner.

    Raises:
        ConfigError: For arguments that contradict each other or have unknown values.
        TargetError: For a target that does not parse.

    Example:
        >>> SurgicalConfig(target="block1").target
        'block1'
    """

    target: str | list[str] | None = None
    norm_stats: str = "frozen"
    delta_dtype: str | None = None
    blocks: dict[str, list[str]] | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    scale: float = 1.0
    strict_base: bool = True
    selection: dict[str, Any] | None = None
    tensor_names: list[str] | None = None
    base_fingerprint: dict[str, str] | None = None
    weights_sha256: str | None = None
    held: Held | None = field(default=None, init=False, repr=False, compare=False)
    content: Content | None = field(default=None, init=False, repr=False, compare=False)
    measured_fingerprint: dict[str, str] | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_fields(vars(self))
        super().__post_init__()
        self.peft_type = SurgicalType.SURGICAL
        if self.norm_stats not in get_args(NormPolicy):
            choices = ", ".join(get_args(NormPolicy))
            raise ConfigError(f"norm_stats={self.norm_stats!r} is not a policy: choose one of {choices}.")
        if self.delta_dtype is not None and self.delta_dtype not in DELTA_DTYPES:
            choices = ", ".join(DELTA_DTYPES)
            raise ConfigError(f"delta_dtype={self.delta_dtype!r}: choose one of {choices}, or leave it out.")
        self.scale = float(self.scale)
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            if isinstance(value := getattr(self, name), (set, tuple)):
                setattr(self, name, sorted(value))
        if self.blocks is not None:
            self.blocks = _as_blocks(self.blocks)
        if self.target is not None:
            if self.target_modules:
                raise ConfigError(
                    f"Both target={self.target!r} and target_modules={self.target_modules!r} say what to tune. Give "
                    "one: target knows blocks, and takes module paths too."
                )
            self.target = self.target if isinstance(self.target, str) else list(self.target)
            parse(self.target)

    def to_dict(self) -> dict[str, Any]:
        """The config as plain data, without ``strict_base``, which is for whoever loads it to decide."""
        plain = super().to_dict()
        plain["base_fingerprint"] = self.measured_fingerprint or plain["base_fingerprint"]
        return {name: value for name, value in plain.items() if name not in _UNSAVED}

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write ``adapter_config.json`` in one step, with the hash of the adapter file that lies beside it."""
        folder = Path(save_directory)
        weights = folder / WEIGHTS
        folder.mkdir(parents=True, exist_ok=True)
        mapping = kwargs.pop("auto_mapping_dict", None)
        plain = self.to_dict()
        plain["weights_sha256"] = file_sha256(weights) if weights.is_file() else None
        plain["base_model_name_or_path"] = _found_from_anywhere(self.base_model_name_or_path)
        if mapping is not None:
            plain["auto_mapping"] = mapping
        write_atomically(folder / CONFIG, canonical_json(plain))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> SurgicalConfig:
        """Read the config in a folder or Hub repository, and verify the adapter file that belongs to it.

        PEFT reads the config before it touches the model, so a truncated, altered, incomplete or non-finite file is
        refused while the model is still exactly as it was. While it is being replaced, one of the two is read whole.

        Args:
            pretrained_model_name_or_path: A folder or a Hub repository id.
            subfolder: Folder inside it.
            **kwargs: ``strict_base``, and what `huggingface_hub.hf_hub_download` takes (revision, token, ...).

        Raises:
            AdapterFileError: Names the file and what is wrong with it.
            BaseMismatchError: The config has no fingerprint of its base, which only ``strict_base=False`` allows.
        """
        strict = kwargs.pop("strict_base", True)
        source = os.fspath(pretrained_model_name_or_path)
        before: tuple[str | None, ...] = ()
        for _ in range(20):
            try:
                config = super().from_pretrained(source, subfolder=subfolder, **kwargs)
                if not isinstance(config, cls):
                    return config
                weights = find_weights(source, subfolder, kwargs)
                content = None if weights is None else Content(weights)
                config = config if content is None else _superseded(content, config) or config
            except (ConfigError, TargetError) as error:
                raise AdapterFileError(f"The config of {source} does not hold what a config holds: {error}") from error
            found = (config.weights_sha256, None if content is None else content.sha256)
            if None in found or found[0] == found[1] or found == before:
                break  # they belong together, or nobody is replacing them
            before = found
        config.strict_base = strict
        if content is not None:
            config.held, config.content = config._verified(source, content), content
            content.again = functools.partial(find_weights, source, subfolder, {**kwargs, "local_files_only": True})
        elif config.weights_sha256 is not None or config.base_fingerprint is not None:
            raise AdapterFileError(f"{source} has an adapter's config, but no {WEIGHTS}: save or download it again.")
        return config

    def _verified(self, source: str, content: Content) -> Held:
        if self.tensor_names is None:
            # The target would be resolved anew, by patterns from a file, and perhaps to other tensors.
            raise AdapterFileError(
                f"The config of {source} does not say which tensors its file is for (tensor_names). It is not the "
                "config that was saved with it: save or download both again."
            )
        if self.base_fingerprint is None and self.strict_base:
            raise BaseMismatchError(
                f"The config of {source} does not say what its base is (base_fingerprint). If you know that it fits, "
                "say strict_base=False."
            )
        keys = {file_key(name) for name in self.tensor_names}
        return verify_file(content, self.weights_sha256, keys, others=bool(self.modules_to_save))

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Read the JSON, without the journal that a killed save may have left in it."""
        plain = read_object(path_json_file)
        plain.pop("superseded", None)
        plain.pop("runtime_config", None)  # of other methods, and never read from a file
        return plain


def _found_from_anywhere(base: str | None) -> str | None:
    """The absolute path of a base that is a folder here, since the adapter may be loaded in another directory."""
    folder = Path(os.path.expanduser((base or "").removeprefix("local-dir:")))
    return str(folder.absolute()) if base and folder.is_dir() else base


def _as_blocks(blocks: Mapping[str, str | Sequence[str]]) -> dict[str, list[str]]:
    named = {name: [paths] if isinstance(paths, str) else paths for name, paths in blocks.items()}
    whole = (isinstance(v, (list, tuple)) and all(isinstance(part, str) for part in (k, *v)) for k, v in named.items())
    if not named or not all(whole):
        raise ConfigError(
            f"blocks={blocks!r}: give a mapping such as {{'block1': ['conv1', 'layer1'], 'head': ['fc']}}."
        )
    return {name: list(paths) for name, paths in named.items()}


def _superseded(weights: Content, config: SurgicalConfig) -> SurgicalConfig | None:
    """The older config, if a save was killed between its two files: these weights are still the old adapter's."""
    path = weights.path.with_name(CONFIG)
    if config.weights_sha256 == weights.sha256 or not path.is_file():
        return None
    old = read_object(path).get("superseded")
    if old is not None and not isinstance(old, dict):
        raise ConfigError("superseded is not the config of an older adapter.")
    if old is None or old.get("weights_sha256") != weights.sha256:
        return None
    arguments = {field.name for field in fields(SurgicalConfig) if field.init}
    return SurgicalConfig(**{key: value for key, value in old.items() if key in arguments})
