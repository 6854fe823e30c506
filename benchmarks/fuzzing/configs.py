"""Mutations of an adapter's config: bytes, types, fields, names, nesting."""

from __future__ import annotations

import hashlib
import json
import math
import random
from typing import Any

from .files import Files, Mutation, dump

MEBI = 2**20
DEEP = 5_000
ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    0.5,
    1e308,
    -1e308,
    10**400,
    math.nan,
    math.inf,
    "",
    " ",
    "x",
    "block1",
    "head",
    "all",
    "auto-rgn",
    "race",
    "fc",
    "conv1",
    "null",
    "../../../../etc/passwd",
    "/etc/passwd",
    "re:(a+)+$",
    "re:(.*.*.*.*)*x",
    "re:(",
    "block1 - all",
    " + ".join(["block1"] * 2000),
    "*" * 200,
    "\ud800",
    "\u202eblock1",
    "b\u200block1",
    "\x00",
    "x" * 100_000,
    [],
    [None],
    [1, 2],
    [""],
    ["."],
    ["fc"],
    ["block1", "head"],
    ["conv1.weight"],
    ["conv1.weight", "conv1.weight"],
    ["../../x"],
    ["(.*)*x"],
    [[]],
    [{}],
    {},
    {"": ""},
    {"block1": ["conv1"]},
    {"conv1.weight": 1},
    {"conv1.weight": None},
    {"conv1.weight": "0" * 16},
    {"block1": None},
    {"a": {"a": {"a": []}}},
    ["x"] * 20_000,
)
EXTRA = (
    "superseded", "runtime_config", "auto_mapping", "peft_type", "task_type", "__class__", "r", "lora_alpha", "self",
    "_fingerprint", "_awaits_weights", "strict_base", "trust_remote_code", "token", "\ud800", "", "x" * 10_000,
)  # fmt: skip


def odd_field(draw: random.Random, files: Files) -> None:
    config = json.loads(files.config)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        config[draw.choice(sorted(config))] = draw.choice(ODD)
    files.config = dump(config)


def more_or_fewer_fields(draw: random.Random, files: Files) -> None:
    config = json.loads(files.config)
    if draw.random() < 0.5:
        for _ in range(draw.choice([1, 1, 2, 10])):
            config.pop(draw.choice(sorted(config)), None)
    else:
        config[draw.choice(EXTRA)] = draw.choice(ODD)
    files.config = dump(config)


def named_choice(draw: random.Random, files: Files) -> None:
    """Values that other configs have, in the fields that have them."""
    config = json.loads(files.config)
    field, values = draw.choice(
        [
            ("norm_stats", ["frozen", "target", "all", "Frozen", "none"]),
            ("delta_dtype", ["float32", "bfloat16", "float16", "float64", "int8", "torch.float16"]),
            ("scale", [0, 1, -1, 2.5, "1", True, 1e-300, 1e300, -0.0, [1.0]]),
            ("task_type", ["SEQ_CLS", "CAUSAL_LM", "SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"]),
            ("peft_type", ["LORA", "surgical", "Surgical", "", "SURGICAL "]),
            ("target", ["block1", "head", "all", "conv1", "block9", "all - head", ["block1", "token"], "re:.*"]),
            ("target_modules", [["conv1"], ["x"], "conv1", ".*", "(.*)*$", "all-linear", []]),
            ("exclude_modules", [["conv1"], "conv1", ".*", "(((a*)*)*)*b", ["bn1", "fc"]]),
            ("modules_to_save", [["fc"], ["conv1"], ["bn1"], "fc", [""], ["c"], ["weight"], [".*"], ["y"], ["t"]]),
            ("modules_to_save", [["layer1", "layer1.0"], ["layer1"], ["default"], ["fc", "fc"], ["1"]]),
            ("inference_mode", [True, False, None, "yes"]),
            ("blocks", [None, {}, {"block1": ["conv1"]}, {"block1": "conv1", "x": "y"}, {"block1": ["nothing"]}]),
            ("weights_sha256", [None, "", "0" * 64, "sha256:" + "0" * 64, 0, ["x"]]),
            ("base_model_name_or_path", [None, "", "../..", "/", "me/other", 1, ["x"]]),
            ("revision", [None, "main", "../..", 1]),
            ("auto_mapping", [{"base_model_class": "system", "parent_library": "os"}, {"parent_library": "this"}]),
            ("peft_version", [None, "0.0.1", "99", 1, "x"]),
            ("selection", [None, {}, [], "x", {"combined": None}]),
        ]
    )  # fmt: skip
    config[field] = draw.choice(values)
    files.config = dump(config)


def tensor_names(draw: random.Random, files: Files) -> None:
    config = json.loads(files.config)
    names = list(config["tensor_names"])
    place = draw.randrange(len(names))
    config["tensor_names"] = draw.choice(
        [
            lambda: names[:place] + names[place + 1 :],
            lambda: [*names, names[place]],
            lambda: [*names, "layer1.0.weight"],
            lambda: [*names, "fc.weight"],
            lambda: [*names, "nothing.weight"],
            lambda: [*names, "../../x"],
            lambda: [*names, "bn1.running_mean"],
            lambda: [*names, None],
            lambda: [*names, 1],
            lambda: [*names, ["x"]],
            lambda: names[::-1],
            lambda: dict.fromkeys(names, 1),
            lambda: ",".join(names),
            lambda: [name.upper() for name in names],
            lambda: [f"x.{name}" for name in names],
            list,
            lambda: None,
            lambda: names * 5000,
        ]
    )()
    files.config = dump(config)


def fingerprints(draw: random.Random, files: Files) -> None:
    config = json.loads(files.config)
    marks = dict(config["base_fingerprint"])
    name = draw.choice(sorted(marks))
    config["base_fingerprint"] = draw.choice(
        [
            lambda: {key: mark for key, mark in marks.items() if key != name},
            lambda: {**marks, name: "0" * 16},
            lambda: {**marks, name: marks[name].upper()},
            lambda: {**marks, name: None},
            lambda: {**marks, name: 7},
            lambda: {**marks, name: [marks[name]]},
            lambda: {**marks, "nothing.weight": "0" * 16},
            lambda: list(marks.values()),
            lambda: "".join(marks.values()),
            dict,
            lambda: None,
            lambda: 1,
        ]
    )()
    files.config = dump(config)


def config_text(draw: random.Random, files: Files) -> None:
    text, n = files.config, len(files.config)
    deep = draw.choice([100, DEEP, 200_000])

    def flipped() -> bytes:
        changed = bytearray(text)
        for _ in range(draw.choice([1, 1, 2, 8])):
            changed[draw.randrange(n)] ^= 1 << draw.randrange(8)
        return bytes(changed)

    key = draw.choice(sorted(json.loads(text)))
    files.config = draw.choice(
        [
            flipped,
            flipped,
            flipped,
            lambda: text[: draw.randrange(n)],
            lambda: text[draw.randrange(1, n) :],
            lambda: text + draw.randbytes(8),
            lambda: draw.randbytes(n),
            lambda: b"",
            lambda: b"null",
            lambda: b"[]",
            lambda: b'"SURGICAL"',
            lambda: b"0",
            lambda: b"{}",
            lambda: b'{"peft_type": "SURGICAL"}',
            lambda: b"[" * deep,
            lambda: b'{"a":' * deep,
            lambda: text[:-2] + b', "selection": ' + b"[" * deep + b"]" * deep + b"}",
            lambda: text[:-2] + f", {json.dumps(key)}: {json.dumps(draw.choice(ODD))}}}".encode(),
            lambda: text[:-2] + b', "scale": ' + b"9" * draw.choice([400, 5000]) + b"}",
            lambda: text.decode().encode("utf-16"),
            lambda: b"\xef\xbb\xbf" + text,
            lambda: b"\xff" + text,
            lambda: text + b" " * (draw.choice([1, 30]) * MEBI),
            lambda: text.replace(b"0", b"NaN", 1),
            lambda: text.replace(b"null", b"undefined", 1),
        ]
    )()


def superseded(draw: random.Random, files: Files) -> None:
    """The journal of a killed save, with another config in it."""
    config = json.loads(files.config)
    old = {**config, "weights_sha256": hashlib.sha256(files.weights).hexdigest()}
    field = draw.choice(sorted(old))
    config["superseded"] = draw.choice(
        [
            lambda: old,
            lambda: {**old, field: draw.choice(ODD)},
            lambda: {key: value for key, value in old.items() if key != field},
            lambda: {"weights_sha256": old["weights_sha256"]},
            lambda: {**old, "superseded": old},
            lambda: draw.choice(ODD),
        ]
    )()
    config["weights_sha256"] = "0" * 64
    files.config = dump(config)


OF_FIELDS: tuple[Mutation, ...] = (odd_field, more_or_fewer_fields, named_choice, tensor_names, fingerprints)
"""Those that leave JSON, so that another change may follow."""
MUTATIONS: tuple[Mutation, ...] = (*OF_FIELDS, odd_field, named_choice, config_text, superseded)
