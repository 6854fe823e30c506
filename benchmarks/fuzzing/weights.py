"""Mutations of a safetensors file: bits, lengths, header, names, dtypes, shapes, offsets, values."""

from __future__ import annotations

import json
import math
import pickle
import random
import struct
from collections.abc import Mapping
from typing import Any

from .files import CONFIG, WEIGHTS, Files, Mutation, dump, join, parts_of, relaid, split

MEBI = 2**20


def some_entry(draw: random.Random, header: Mapping[str, Any]) -> str:
    return draw.choice([key for key in header if key != "__metadata__"])


def flip_bits(draw: random.Random, files: Files) -> None:
    changed = bytearray(files.weights)
    for _ in range(draw.choice([1, 1, 2, 8, 64])):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    files.weights = bytes(changed)


def flip_header_bits(draw: random.Random, files: Files) -> None:
    (length,) = struct.unpack("<Q", files.weights[:8])
    changed = bytearray(files.weights)
    for _ in range(draw.choice([1, 1, 2, 4])):
        changed[draw.randrange(8 + length)] ^= 1 << draw.randrange(8)
    files.weights = bytes(changed)


def cut_or_append(draw: random.Random, files: Files) -> None:
    n = len(files.weights)
    files.weights = draw.choice(
        [
            lambda: files.weights[: draw.randrange(n)],
            lambda: files.weights[draw.randrange(1, n) :],
            lambda: files.weights + draw.randbytes(draw.choice([1, 7, 8, 4096])),
            lambda: files.weights[: n // 2] + files.weights[n // 2 + draw.randrange(1, 64) :],
            lambda: draw.randbytes(draw.choice([0, 1, 7, 8, 9, 100, 5000])),
            lambda: files.weights * 2,
        ]
    )()


def lie_about_the_header(draw: random.Random, files: Files) -> None:
    (length,) = struct.unpack("<Q", files.weights[:8])
    lie = draw.choice(
        [0, 1, 2, length - 1, length + 1, length + 8, 2**31, 2**32, 2**40, 2**62, 2**63, 2**64 - 1, 10**8, 10**8 + 1]
    )
    files.weights = struct.pack("<Q", lie) + files.weights[8:]


def other_dtype(draw: random.Random, files: Files) -> None:
    header, data = split(files.weights)
    entry = header[some_entry(draw, header)]
    entry["dtype"] = draw.choice(
        ["F16", "BF16", "F32", "F64", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "C64", "F4", "f32", "", None, 32, {}]
    )
    if draw.random() < 0.5 and entry["shape"]:
        sizes = {"F16": 2, "BF16": 2, "F64": 8, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "BOOL": 1, "C64": 8}
        size = sizes.get(entry["dtype"] if isinstance(entry["dtype"], str) else "", 4)
        begin, end = entry["data_offsets"]
        entry["shape"] = [(end - begin) // size]
    files.weights = join(header, data)


def other_shape(draw: random.Random, files: Files) -> None:
    header, data = split(files.weights)
    entry = header[some_entry(draw, header)]
    shape = list(entry["shape"])
    entry["shape"] = draw.choice(
        [
            shape[::-1],
            [*shape, 1],
            [1, *shape],
            shape[1:],
            [math.prod(shape)],
            [0],
            [2**40],
            [2**62, 4],
            [2**64],
            [2**32, 2**32],
            [-1],
            [-size for size in shape],
            [float(size) for size in shape],
            [str(size) for size in shape],
            [None],
            "3",
            None,
            [1] * 100_000,
            [[3]],
        ]
    )
    files.weights = join(header, data)


def other_offsets(draw: random.Random, files: Files) -> None:
    header, data = split(files.weights)
    one, other = some_entry(draw, header), some_entry(draw, header)
    begin, end = header[one]["data_offsets"]
    header[one]["data_offsets"] = draw.choice(
        [
            header[other]["data_offsets"],
            [end, begin],
            [begin + 4, end + 4],
            [begin, end + 4],
            [begin, end - 4],
            [begin + 2**40, end + 2**40],
            [2**64 - 4, 2**64 - 4 + end - begin],
            [-4, end - begin - 4],
            [0, len(data)],
            [begin, 2**63],
            [begin],
            [begin, end, end],
            [float(begin), float(end)],
            None,
            "0",
        ]
    )
    files.weights = join(header, data)


def swap_tensors(draw: random.Random, files: Files) -> None:
    header, data = split(files.weights)
    one, other = some_entry(draw, header), some_entry(draw, header)
    header[one], header[other] = header[other], header[one]
    files.weights = join(header, data)


def other_name(draw: random.Random, files: Files) -> None:
    header, data = split(files.weights)
    key = some_entry(draw, header)
    new = draw.choice(
        [
            "../../../../etc/passwd",
            "/etc/passwd",
            "C:\\windows\\system32",
            key.replace("surgery", "../surgery"),
            key.replace("base_model.model.", ""),
            key.replace("surgical_delta", "surgical_stats"),
            key.replace("surgical_stats", "surgical_delta"),
            key.replace("surgical_delta", "surgical_delta.default"),
            key.replace("surgical_delta", "lora_A"),
            "base_model.model." + key,
            key + ".weight",
            key.upper(),
            key.replace("e", "\u0435"),  # a Cyrillic letter that looks the same
            key + "\u200b",
            "\ud800",
            "",
            ".",
            "a" * 100_000,
            "__class__",
            "__metadata__2",
            "base_model.model.surgery.surgical_delta.",
            "base_model.model..surgery.surgical_delta.weight",
            some_entry(draw, header),
        ]
    )
    files.weights = join({new if name == key else name: entry for name, entry in header.items()}, data)


def duplicate_name(draw: random.Random, files: Files) -> None:
    header, data = split(files.weights)
    one, other = some_entry(draw, header), some_entry(draw, header)
    text = json.dumps(header)
    files.weights = join(f"{text[:-1]}, {json.dumps(one)}: {json.dumps(header[other])}}}".encode(), data)


def drop_or_add(draw: random.Random, files: Files) -> None:
    header, data = split(files.weights)
    if draw.random() < 0.5:
        del header[some_entry(draw, header)]
    else:
        name = draw.choice(["base_model.model.fc.weight", "x", "base_model.model.conv1.surgery.surgical_delta.bias"])
        size = draw.choice([0, 4, 24])
        header[name] = {"dtype": "F32", "shape": [size // 4], "data_offsets": [len(data), len(data) + size]}
        data += draw.randbytes(size)
    files.weights = join(header, data)


def compacted(draw: random.Random, files: Files) -> None:
    """Drop a tensor and its bytes, so that the file is whole in itself."""
    header, data = split(files.weights)
    gone = some_entry(draw, header)
    kept, parts, place = {}, [], 0
    for key, entry in header.items():
        if key in (gone, "__metadata__"):
            continue
        begin, end = entry["data_offsets"]
        kept[key] = {**entry, "data_offsets": [place, place + end - begin]}
        parts.append(data[begin:end])
        place += end - begin
    files.weights = join(kept, b"".join(parts))


def other_values(draw: random.Random, files: Files) -> None:
    header, data = split(files.weights)
    entry = header[some_entry(draw, header)]
    begin, end = entry["data_offsets"]
    if entry["dtype"] == "I64":
        raw = struct.pack("<q", draw.choice([0, -1, 2**62, -(2**63)]))
    else:
        raw = struct.pack("<f", draw.choice([math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-45, 0.0, -0.0, 1.0]))
        raw = raw[2:] if entry["dtype"] == "BF16" else raw
    count = (end - begin) // len(raw)
    place = begin + len(raw) * draw.randrange(count)
    data = data[:place] + raw + data[place + len(raw) :]
    if draw.random() < 0.2:
        data = data[:begin] + raw * count + data[end:]
    files.weights = join(header, data)


def other_header(draw: random.Random, files: Files) -> None:
    header, data = split(files.weights)
    entry = some_entry(draw, header)
    deep = draw.choice([100, 10_000, 1_000_000])
    files.weights = draw.choice(
        [
            lambda: join(b"", data),
            lambda: join(b"null", data),
            lambda: join(b"[]", data),
            lambda: join(b"{}", b""),
            lambda: join(b"[" * deep, data),
            lambda: join(b'{"a":' * deep, data),
            lambda: join(json.dumps(header).encode("utf-16"), data),
            lambda: join(b"\xff" + json.dumps(header).encode(), data),
            lambda: join(json.dumps(header).encode() + b" " * draw.choice([1, 8, MEBI]), data),
            lambda: join(b" " + json.dumps(header).encode(), data),
            lambda: join({**header, entry: None}, data),
            lambda: join({**header, entry: []}, data),
            lambda: join({**header, entry: {**header[entry], "more": 1}}, data),
            lambda: join(
                {**header, "__metadata__": draw.choice([None, [], "x", {"a": 1}, {"a": {}}, {"format": "tf"}])}, data
            ),
            lambda: join({**header, "__metadata__": {"a" * 100: "b" * MEBI}}, data),
            lambda: join(
                {
                    key: {
                        name: value
                        for name, value in header[key].items()
                        if name != draw.choice(["dtype", "shape", "data_offsets"])
                    }
                    if key == entry
                    else header[key]
                    for key in header
                },
                data,
            ),
            lambda: join(dict(reversed(header.items())), data),
            lambda: join(json.dumps(header).replace('"shape"', '"\\u0073hape"').encode(), data),
        ]
    )()


def other_format(draw: random.Random, files: Files) -> None:
    files.weights = draw.choice(
        [
            b"",
            pickle.dumps({"weight": [1.0]}),
            b"PK\x03\x04" + draw.randbytes(200),
            b"\x93NUMPY" + draw.randbytes(100),
            files.config,
            b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1234\n",
            b"<!DOCTYPE html><html></html>",
            b"\x00" * 1000,
        ]
    )


def recast(draw: random.Random, files: Files) -> None:
    """A whole file in which one tensor has another dtype, and values at random."""
    header, tensors = parts_of(files)
    key = draw.choice(sorted(tensors))
    sizes = {
        "F64": 8,
        "F32": 4,
        "F16": 2,
        "BF16": 2,
        "F8_E4M3": 1,
        "F8_E5M2": 1,
        "I64": 8,
        "I32": 4,
        "U8": 1,
        "BOOL": 1,
    }
    dtype = draw.choice(sorted(sizes))
    count = math.prod(header[key]["shape"])
    small = [draw.choice([0, 0, 1]) if dtype == "BOOL" else draw.randrange(64) for _ in range(count * sizes[dtype])]
    header[key] = {**header[key], "dtype": dtype}
    tensors[key] = bytes(small) if draw.random() < 0.7 else draw.randbytes(len(small))
    files.weights = relaid(header, tensors)


def less_of_both(draw: random.Random, files: Files) -> None:
    """A tensor fewer, in the file and in the config: another adapter, and a whole one."""
    header, tensors = parts_of(files)
    key = draw.choice(sorted(tensors))
    path, mark, rest = key.removeprefix("base_model.model.").rpartition("surgery.surgical_")
    name = path + rest.partition(".")[2] if mark else key.removeprefix("base_model.model.")
    files.weights = relaid(header, {other: raw for other, raw in tensors.items() if other != key})
    config = json.loads(files.config)
    config["tensor_names"] = [other for other in config["tensor_names"] if other != name]
    if draw.random() < 0.5:
        config["base_fingerprint"].pop(name, None)
    files.config = dump(config)


def other_layout(draw: random.Random, files: Files) -> None:
    """Files that are not there, or no files."""
    what = draw.choice(["no {}", "{} is a folder", "{} leads nowhere"])
    files.layout = what.format(draw.choice([WEIGHTS, WEIGHTS, CONFIG]))


MUTATIONS: tuple[Mutation, ...] = (
    flip_bits,
    flip_header_bits,
    cut_or_append,
    lie_about_the_header,
    other_dtype,
    other_shape,
    other_offsets,
    swap_tensors,
    other_name,
    duplicate_name,
    drop_or_add,
    compacted,
    other_values,
    other_header,
    other_format,
    recast,
    less_of_both,
    other_layout,
)
