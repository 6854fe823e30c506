"""`SurgicalConfig`: what to tune, how, and (once saved) what was tuned on which base."""

from __future__ import annotations

import enum
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft import PeftConfig

from .blocks import parse
from .errors import AdapterFileError, BaseMismatchError, ConfigError, TargetError
from .fields import check_fields, read_object
from .files import canonical_json, file_sha256, verify_file, write_atomically
from .keys import CONFIG, PICKLE, WEIGHTS, file_key
from .norm import check_policy

_UNSAVED = ("strict_base", "held", "measured_fingerprint")
DELTA_DTYPES = ("float32", "bfloat16", "float16")


class SurgicalType(str, enum.Enum):
    """The key of this method in PEFT's mappings.

    PEFT's own enum is closed. A string enum hashes and compares like the plain string and has the ``.value`` that
    transformers and PEFT's status code read.
    """

    SURGICAL = "SURGICAL"


@dataclass
class SurgicalConfig(PeftConfig):
    """Configuration of a surgical adapter.

    Say what to tune either by ``target`` (blocks, paths, globs, regexes: see `parse`) or in PEFT's own way by
    ``target_modules``; the other arguments have defaults. Validated without a model. A config that does not say what to
    tune can be made, as with PEFT's other methods; ``get_peft_model`` refuses it.

    Args:
        target: For example ``"block1"``, ``"block2-4 + head"``, ``"all - head"``, ``"*.norm*"``, or a list of such
            terms, which is their sum.
        norm_stats: Whose normalisation statistics move: ``"frozen"`` nobody's (the paper's protocol),
            ``"target"`` those of targeted modules, ``"all"`` every module's. What moves is saved.
        delta_dtype: Dtype of the deltas on disk: ``"bfloat16"`` or ``"float16"`` halve the file and round what is
            reloaded; None keeps the dtype in which they were trained.
        blocks: An explicit cut of the network, block name -> module or tensor paths, for networks whose blocks cannot
            be derived. Kept in the adapter's config.
        target_modules: PEFT's: a list of module names (exact or as a suffix) or a regex; all tensors of a matched
            module are tuned. Names that match nothing are named in a warning, and are an error if none matches; every
            term of ``target`` has to match.
        exclude_modules: PEFT's: modules, matched the same way, whose tensors are not tuned.
        modules_to_save: PEFT's: modules to train and save whole, such as a new head.
        scale: Factor of the deltas (WiSE-FT, Wortsman et al. 2022): 0 is the base, 1 the tuned model. Saved, so that
            what is reloaded is what was evaluated.
        strict_base: False turns the error for a base with another fingerprint into a warning. Not saved.
        selection: Filled in by `resolve_target` and by searches: how data chose the target, with the blocks' scores.
        tensor_names: Filled in: the resolved names of the tuned tensors, so that loading re-derives nothing.
        base_fingerprint: Filled in on saving: tensor name -> hash of the base's value; see `fingerprint`.
        weights_sha256: Filled in on saving: SHA-256 of the adapter file.

    Attributes:
        held: What the adapter file that `from_pretrained` verified holds: key -> shape, and whether it is floating
            point. None for a config that was not read with a file. Not saved.
        measured_fingerprint: `fingerprint` of the base under the adapter whose tensors were last gathered for saving;
            it is saved as ``base_fingerprint``. That field itself says what base an adapter expects, and stays as it
            is, since the same config may serve for a fresh adapter on another base.

    The two attributes are here because PEFT and transformers pass nothing but the config from reading a file to the
    tuner, and from the tuner to writing a file.

    Raises:
        ConfigError: For arguments that contradict each other or have unknown values.
        TargetError: For a target that does not parse.

    Example:
        >>> SurgicalConfig(target="block1").target
        'block1'
    """

    target: str | list[str] | None = field(default=None, metadata={"help": "What to tune, e.g. 'block1'."})
    norm_stats: str = field(default="frozen", metadata={"help": "frozen, target or all."})
    delta_dtype: str | None = field(default=None, metadata={"help": "Dtype of the deltas on disk."})
    blocks: dict[str, list[str]] | None = field(default=None, metadata={"help": "Explicit cut into blocks."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to tune, PEFT's way."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules not to tune."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained and saved whole."})
    scale: float = field(default=1.0, metadata={"help": "Factor of the deltas."})
    strict_base: bool = field(default=True, metadata={"help": "Refuse a base with another fingerprint."})
    selection: dict[str, Any] | None = field(default=None, metadata={"help": "How data chose the target; filled in."})
    tensor_names: list[str] | None = field(default=None, metadata={"help": "Resolved; filled in."})
    base_fingerprint: dict[str, str] | None = field(default=None, metadata={"help": "Filled in on saving."})
    weights_sha256: str | None = field(default=None, metadata={"help": "Filled in on saving."})
    held: Mapping[str, tuple[tuple[int, ...], bool]] | None = field(default=None, init=False, repr=False, compare=False)
    measured_fingerprint: dict[str, str] | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_fields(vars(self))
        super().__post_init__()
        self.peft_type = SurgicalType.SURGICAL
        check_policy(self.norm_stats)
        if self.delta_dtype is not None and self.delta_dtype not in DELTA_DTYPES:
            choices = ", ".join(DELTA_DTYPES)
            raise ConfigError(f"delta_dtype={self.delta_dtype!r}: choose one of {choices}, or leave it out.")
        self.scale = float(self.scale)
        if isinstance(self.target_modules, (set, tuple)):
            self.target_modules = sorted(self.target_modules)
        if isinstance(self.exclude_modules, (set, tuple)):
            self.exclude_modules = sorted(self.exclude_modules)
        if isinstance(self.modules_to_save, (set, tuple)):
            self.modules_to_save = sorted(self.modules_to_save)
        if self.blocks is not None:
            self.blocks = _as_blocks(self.blocks)
        if self.target is not None and self.target_modules:
            raise ConfigError(
                f"Both target={self.target!r} and target_modules={self.target_modules!r} say what to tune. Give one: "
                "target knows blocks, and takes module paths too."
            )
        if self.target is not None:
            if not isinstance(self.target, str):
                self.target = list(self.target)
            parse(self.target)

    def to_dict(self) -> dict[str, Any]:
        """The config as plain data. ``strict_base`` is a decision of whoever loads, so it is left out."""
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
        """Read the config of an adapter and verify the adapter file that belongs to it.

        PEFT reads the config before it touches the model, so a truncated, altered, incomplete or non-finite file is
        refused while the model is still exactly as it was.

        Args:
            pretrained_model_name_or_path: A folder or a Hub repository id.
            subfolder: Folder inside it.
            **kwargs: ``strict_base``, and what `huggingface_hub.hf_hub_download` takes (revision, token, ...).

        Raises:
            AdapterFileError: Names the file and what is wrong with it.
        """
        strict = kwargs.pop("strict_base", True)
        source = os.fspath(pretrained_model_name_or_path)
        try:
            config = super().from_pretrained(source, subfolder=subfolder, **kwargs)
            if not isinstance(config, cls):
                return config
            weights = _locate(source, subfolder, kwargs)
            if weights is not None:
                config = _superseded(weights) or config
        except (ConfigError, TargetError) as error:
            raise AdapterFileError(f"The config of {source} does not hold what a config holds: {error}") from error
        config.strict_base = strict
        if weights is not None:
            config.held = config._verified(source, weights)
        elif config.weights_sha256 is not None or config.base_fingerprint is not None:
            # PEFT would look for the file once the adapter is on the model.
            raise AdapterFileError(
                f"{source} has the config of an adapter, but no {WEIGHTS}: save or download it again."
            )
        return config

    def _verified(self, source: str, weights: Path) -> dict[str, tuple[tuple[int, ...], bool]]:
        """Check the adapter file that belongs to this config; what it holds, see `verify_file`."""
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
        return verify_file(weights, self.weights_sha256, keys, others=bool(self.modules_to_save))

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Read the JSON, without the journal that a killed save may have left in it."""
        plain = read_object(path_json_file)
        plain.pop("superseded", None)
        plain.pop("runtime_config", None)  # of other methods, and never read from a file
        return plain


def _found_from_anywhere(base: str | None) -> str | None:
    """A base that is a folder of this machine by its absolute path: the adapter may be loaded in another directory."""
    folder = Path((base or "").removeprefix("local-dir:")).expanduser()
    return str(folder.absolute()) if base and folder.is_dir() else base


def _as_blocks(blocks: Mapping[str, str | Sequence[str]]) -> dict[str, list[str]]:
    named = {name: [paths] if isinstance(paths, str) else paths for name, paths in blocks.items()}
    whole = all(isinstance(paths, (list, tuple)) and all(isinstance(p, str) for p in paths) for paths in named.values())
    if not named or not whole or not all(isinstance(name, str) for name in named):
        raise ConfigError(
            f"blocks={blocks!r}: give a mapping such as {{'block1': ['conv1', 'layer1'], 'head': ['fc']}}."
        )
    return {name: list(paths) for name, paths in named.items()}


def _locate(source: str, subfolder: str | None, kwargs: Mapping[str, Any]) -> Path | None:
    folder = Path(source, subfolder or "")
    if folder.is_dir():
        if (folder / WEIGHTS).is_file():
            return folder / WEIGHTS
        if (folder / PICKLE).exists():
            raise AdapterFileError(
                f"{folder} holds only {PICKLE}, a pickle, which can run code when it is read. Ask its author for "
                f"{WEIGHTS}; this package reads and writes nothing else."
            )
        return None
    download = {
        key: value
        for key, value in kwargs.items()
        if key in ("revision", "token", "cache_dir", "local_files_only", "force_download") and value is not None
    }
    try:
        return Path(hf_hub_download(source, WEIGHTS, subfolder=subfolder, **download))
    except LocalEntryNotFoundError as error:  # it says nothing about what the repository has
        raise AdapterFileError(
            f"{WEIGHTS} of {source} could not be fetched from the Hub, and is not in the cache: go online (without "
            "HF_HUB_OFFLINE) and try again."
        ) from error
    except EntryNotFoundError as error:
        raise AdapterFileError(f"{source} on the Hub has no {WEIGHTS}; nothing else is loaded.") from error


def _superseded(weights: Path) -> SurgicalConfig | None:
    """The older config, if a save was killed between its two files: these weights are still the old adapter's."""
    path = weights.with_name(CONFIG)
    old = read_object(path).get("superseded") if path.is_file() else None
    if old is None:
        return None
    if not isinstance(old, dict):
        raise ConfigError("superseded is not the config of an older adapter.")
    if old.get("weights_sha256") != file_sha256(weights):
        return None
    arguments = {field.name for field in fields(SurgicalConfig) if field.init}
    return SurgicalConfig(**{key: value for key, value in old.items() if key in arguments})
