"""Miniature copies of published datasets in their exact layouts, and tiny networks of the classes that recipes tune.

Images of 8 x 8 random pixels; where a builder is told to, those of the second class are brighter.
"""

import io

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from safetensors.torch import save_file

from paper import cifar_networks
from paper.wilds_folders import FMOW_CATEGORIES
from peft_surgical.keys import WEIGHTS
from peft_surgical.training.ledger import Ledger


def results_in(file):
    """Method -> what a study's ledger says of its run: the run's own result, and what the test images say of it."""
    runs = Ledger(file).runs()
    tested = [(run.key["test_of"], run.result) for run in runs if "test_of" in run.key]
    own = {run.key["method"]: run for run in runs if "test_of" not in run.key}
    return {
        name: run.result | next((result for key, result in tested if key == run.key), {}) for name, run in own.items()
    }


def cache_changes_nothing(main, asked, folder):
    """Run a recipe with the prefix cached and without: the same results and adapters, and some prefix was cached."""
    found = []
    for name, more in (("cached", ()), ("uncached", ("--no-cache",))):
        main([*asked(folder / name), *more])
        adapters = {str(file.relative_to(folder / name)): file.read_bytes() for file in (folder / name).rglob(WEIGHTS)}
        runs = [run for file in sorted((folder / name).rglob("ledger.jsonl")) for run in Ledger(file).runs()]
        notes = [run.notes["prefix"] for run in runs if "prefix" in run.notes]
        found.append((adapters, [run.result for run in runs], notes))
    (adapters, results, notes), (_, _, without) = found
    assert (adapters, results) == found[1][:2]
    assert any(note.startswith("prefix cached") for note in notes)
    assert not any(note.startswith("prefix cached") for note in without)
    return adapters


def cifar10c_files(root):
    """A folder with an untrained ResNet-26 and 50 images of CIFAR's size, clean and in two corruptions."""
    torch.manual_seed(0)
    file = root / "models" / cifar_networks.NETWORKS["resnet26"].checkpoint / "model.safetensors"
    file.parent.mkdir(parents=True)
    save_file(cifar_networks.ResNet26().state_dict(), file)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    for seed, name in enumerate(("clean", "frost", "snow")):
        cells = []
        for array in np.random.default_rng(seed).integers(0, 256, (50, 32, 32, 3), dtype=np.uint8):
            buffer = io.BytesIO()
            PIL.Image.fromarray(array).save(buffer, format="PNG")
            cells.append({"bytes": buffer.getvalue(), "path": None})
        rows = {"img": cells, "label": [i % 10 for i in range(50)]}
        (root / "data").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(root / "data" / f"{name}.parquet")
    return root


def encoded(seed, mode="RGB", shade=0):
    bands = {"RGB": (8, 8, 3), "RGBA": (8, 8, 4), "L": (8, 8)}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256 - shade, bands, dtype=np.uint8) + np.uint8(shade)
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write(file, lines):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines))


def bytes_of(n):
    return [{"bytes": encoded(i), "path": None} for i in range(n)]


# Rows of each group (label, attribute) = (0, 0), (0, 1), (1, 0), (1, 1) of each split, skewed as published.
GROUPS = {"train": (20, 2, 1, 9), "validation": (9, 9, 5, 6), "test": (4, 4, 2, 2)}


def grouped_rows(groups=GROUPS):
    """(split number, label, attribute), split by split, with groups mixed."""
    rows = []
    for number, of_split in enumerate(groups.values()):
        mixed = [(number, group // 2, group % 2) for group, n in enumerate(of_split) for _ in range(n)]
        rows += [mixed[i] for i in np.random.default_rng(number).permutation(len(mixed))]
    return rows


def waterbirds_folder(root, rows=None, name="waterbirds_v1.0", shade=0):
    lines = ["img_id,img_filename,y,split,place,place_filename"]
    for i, (split, label, place) in enumerate(rows or grouped_rows()):
        file = f"00{label + 1}.Some_Bird/Some_Bird_{i:04d}_{i}.jpg"
        (root / name / file).parent.mkdir(parents=True, exist_ok=True)
        (root / name / file).write_bytes(encoded(i, shade=shade * label))
        lines.append(f"{i + 1},{file},{label},{split},{place},/o/ocean/{i:08d}.jpg")
    write(root / name / "metadata.csv", lines)
    return root


def celeba_folder(root, rows=None, shade=0):
    folder = root / "celebA_v1.0"
    rows = rows or grouped_rows()
    (folder / "img_align_celeba").mkdir(parents=True)
    for i, (_, label, _) in enumerate(rows):
        (folder / "img_align_celeba" / f"{i + 1:06d}.jpg").write_bytes(encoded(i, shade=shade * label))
    attributes = [f"{i + 1:06d}.jpg,-1,{2 * y - 1},{2 * m - 1},1" for i, (_, y, m) in enumerate(rows)]
    write(folder / "list_attr_celeba.csv", ["image_id,5_o_Clock_Shadow,Blond_Hair,Male,Young", *attributes])
    parts = [f"{i + 1:06d}.jpg,{split}" for i, (split, _, _) in enumerate(rows)]
    write(folder / "list_eval_partition.csv", ["image_id,partition", *parts])
    return root


def grouped_tables(name):
    """A DatasetDict as the Hub's copy: grodino/waterbirds, flwrlabs/celeba."""
    if name == "waterbirds":
        features = {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["landbird", "waterbird"]),
            "place": datasets.ClassLabel(names=["land", "water"]),
        }
    else:
        attributes = ("5_o_Clock_Shadow", "Blond_Hair", "Male", "Young")
        features = {
            "image": datasets.Image(),
            "celeb_id": datasets.Value("int64"),
            **{attribute: datasets.Value("bool") for attribute in attributes},
        }
    found = datasets.DatasetDict()
    for number, split in enumerate(("train", "validation" if name == "waterbirds" else "valid", "test")):
        rows = [(label, attribute) for n, label, attribute in grouped_rows() if n == number]
        label, attribute = map(list, zip(*rows, strict=True))
        columns = {"image": bytes_of(len(rows))}
        if name == "waterbirds":
            columns |= {"label": label, "place": attribute}
        else:
            columns |= {"celeb_id": [7] * len(rows), "Blond_Hair": map(bool, label), "Male": map(bool, attribute)}
            columns |= {"5_o_Clock_Shadow": [False] * len(rows), "Young": [True] * len(rows)}
        columns = {key: list(values) for key, values in columns.items()}
        found[split] = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return found


def parquet_folder(root, found):
    """As the Hub stores them: data/train-00000-of-00002.parquet and so on."""
    (root / "data").mkdir(parents=True)
    for split, dataset in found.items():
        for shard in range(2):
            part = dataset.shard(2, shard, contiguous=True)
            part.to_parquet(root / "data" / f"{split}-0000{shard}-of-00002.parquet")
    return root


# (hospital, split number) -> images of each class; the file numbers those of hospitals 1 and 2, too.
CENTERS = {(0, 0): 4, (0, 1): 2, (3, 0): 3, (3, 1): 1, (4, 0): 5, (4, 1): 2, (1, 0): 3, (1, 1): 2, (2, 0): 9, (2, 1): 6}


def camelyon_rows(centers=CENTERS):
    """(patient, node, x, y, tumor, slide, center, split number), slide by slide."""
    rows = []
    for slide, ((center, split), n) in enumerate(centers.items()):
        rows += [(4 + slide, slide % 5, 3328 + 32 * i, 21792, i % 2, slide, center, split) for i in range(2 * n)]
    return rows


def camelyon_folder(root, write_images=True, rows=None, shade=0):
    folder = root / "camelyon17_v1.0"
    lines = [",patient,node,x_coord,y_coord,tumor,slide,center,split"]
    for i, (patient, node, x, y, tumor, slide, center, split) in enumerate(rows or camelyon_rows()):
        lines.append(f"{i},{patient:03d},{node},{x},{y},{tumor},{slide},{center},{split}")
        stem = f"patient_{patient:03d}_node_{node}"
        (folder / "patches" / stem).mkdir(parents=True, exist_ok=True)
        if write_images:
            file = folder / "patches" / stem / f"patch_{stem}_x_{x}_y_{y}.png"
            file.write_bytes(encoded(i, "RGBA" if i % 3 else "L", shade * tumor))
    write(folder / "metadata.csv", lines)
    return root


def camelyon_tables():
    """A DatasetDict as wltjr1007/Camelyon17-WILDS: the validation split holds hospitals 0, 3, 4 and 1."""
    kinds = {"image_id": "uint32", "patient": "uint8", "node": "uint8", "x_coord": "uint16", "y_coord": "uint16"}
    features = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=["normal", "tumor"]),
        "center": datasets.ClassLabel(
            names=["train-center1", "val-center", "test-center", "train-center2", "train-center3"]
        ),
        **{name: datasets.Value(kind) for name, kind in kinds.items()},
        "slide": datasets.Value("uint8"),
    }
    found = {"train": [], "validation": [], "test": []}
    for i, row in enumerate(camelyon_rows()):
        center, split = row[6:]
        name = {1: "validation", 2: "test"}.get(center, ("train", "validation")[split])
        found[name].append((i, *row))
    tables = datasets.DatasetDict()
    for split, rows in found.items():
        number, patient, node, x, y, tumor, slide, center, _ = map(list, zip(*rows, strict=True))
        columns = {"image": bytes_of(len(rows)), "label": tumor, "center": center, "image_id": number}
        columns |= {"patient": patient, "node": node, "x_coord": x, "y_coord": y, "slide": slide}
        tables[split] = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return tables


COUNTRIES = {"Africa": "NAM", "Asia": "JPN", "Europe": "FRA", "Americas": "USA", "Oceania": "AUS", "Other": "XKX"}


def fmow_rows(missing=("space_facility",), countries=None):
    """(split, category, timestamp, country): in Africa, no image at all of some classes."""
    rows = []
    for i, category in enumerate(FMOW_CATEGORIES):
        for country in countries or COUNTRIES.values():
            if country == "NAM" and category in missing:
                continue
            rows.append(("train", category, f"{2002 + i % 11}-06-28T08:21:33Z", country))
            rows.append(("seq", category, "2016-01-01T00:00:00Z", country))
            rows.append(("val", category, "2012-12-31T23:59:59Z", country))
            rows.append(("val", category, "2013-01-01T00:00:00Z", country))
            rows.append(("val", category, "2015-12-31T23:59:59Z", country))
            rows.append(("test", category, "2012-03-05T10:00:00Z", country))
            rows.append(("test", category, "2016-01-01T00:00:00Z", country))
            rows.append(("test", category, "2017-08-09T10:00:00Z", country))
            rows.append(("train", category, "2016-05-05T10:00:00Z", country))
    return rows


def fmow_folder(root, rows, write_images=False):
    folder = root / "fmow_v1.1"
    (folder / "images").mkdir(parents=True)
    for i, (split, category, _, _) in enumerate(rows if write_images else ()):
        if split != "seq":
            (folder / "images" / f"rgb_img_{i}.png").write_bytes(encoded(i, shade=4 * FMOW_CATEGORIES.index(category)))
    lines = [f'{s},{c}_{i}_rgb.jpg,"POLYGON ((1 2, 3 4))",{c},{t},{k}' for i, (s, c, t, k) in enumerate(rows)]
    write(folder / "rgb_metadata.csv", ["split,img_filename,polygon,category,timestamp,country_code", *lines])
    write(
        folder / "country_code_mapping.csv",
        [
            "name,alpha-2,alpha-3,country-code,iso_3166-2,region,sub-region,intermediate-region,region-code,"
            "sub-region-code,intermediate-region-code",
            'Antarctica,AQ,ATA,010,ISO 3166-2:AQ,"","","","","",""',
            'Australia,AU,AUS,036,ISO 3166-2:AU,Oceania,Australia and New Zealand,"",009,053,""',
            'France,FR,FRA,250,ISO 3166-2:FR,Europe,Western Europe,"",150,155,""',
            'Japan,JP,JPN,392,ISO 3166-2:JP,Asia,Eastern Asia,"",142,030,""',
            "Namibia,NA,NAM,516,ISO 3166-2:NA,Africa,Sub-Saharan Africa,Southern Africa,002,202,018",
            'United States of America,US,USA,840,ISO 3166-2:US,Americas,Northern America,"",019,021,""',
        ],
    )
    return root


# Networks


def tiny_clip(folder):
    """A whole CLIP with the files of OpenAI's repositories: a text tower that is not wanted, and no classifier."""
    torch.manual_seed(2)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.CLIPConfig(
        vision_config={**vision, "image_size": 16, "patch_size": 8},
        text_config={**text, "vocab_size": 20, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1},
        projection_dim=16,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    transformers.CLIPImageProcessor(**size).save_pretrained(folder)
    return folder


def tiny_resnet(folder):
    """A ResNet of timm's with four stages, BatchNorm, and a head for other classes."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(2)
    network = timm.create_model("test_resnet", num_classes=5, pretrained_cfg_overlay={"input_size": (3, 32, 32)})
    timm.models.save_for_hf(network, folder, safe_serialization=True)
    return folder
