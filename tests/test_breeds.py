"""BREEDS: a miniature hierarchy worked by hand, Living-17 as published, and ImageNet's folders without an image."""

import json

import pytest

from paper.breeds import (
    BENCHMARKS,
    ROOT,
    Breeds,
    Design,
    Subclass,
    Superclass,
    breeds,
    draw_superclasses,
    read_hierarchy,
)
from paper.subpopulations import imagenet_files
from peft_surgical.errors import DataError

CLASSES = [[number, f"n0000010{number}", f"class {number}, alias"] for number in range(9)]

# Level 1: living, thing. Level 2: dummy1 with the classes 1 to 4, plants with 5, 6, 7, tools with 0 and 8. Saws hang
# below things and below tools, so that their longest path makes them level 3. n00000999, and n00000998 with the node
# above it, are no classes.
EDGES = f"""\
{ROOT} n00000020
{ROOT} n00000010
n00000010 dummy1
dummy1 n00000104
dummy1 n00000102
dummy1 n00000101
dummy1 n00000103
n00000010 n00000012
n00000012 n00000013
n00000013 n00000105
n00000013 n00000106
n00000012 n00000107
n00000012 n00000999
n00000020 n00000022
n00000020 n00000021
n00000021 n00000022
n00000021 n00000100
n00000022 n00000108
n00000020 n00000023
n00000023 n00000998
"""

NAMES = {
    ROOT: "entity",
    "n00000010": "living thing, animate thing",
    "dummy1": "worms",
    "n00000012": "plant, flora",
    "n00000013": "herb",
    "n00000020": "thing",
    "n00000021": "tool",
    "n00000022": "saw",
}


def write(folder, classes=CLASSES, edges=EDGES, names=NAMES):
    folder.mkdir(exist_ok=True)
    (folder / "dataset_class_info.json").write_text(json.dumps(classes))
    (folder / "class_hierarchy.txt").write_text(edges)
    (folder / "node_names.txt").write_text("".join(f"{node}\t{name}\n" for node, name in names.items()))
    return folder


def indices(superclasses, domain):
    return [tuple(sub.index for sub in getattr(one, domain)) for one in superclasses]


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "modified")


def test_levels_are_longest_paths_to_classes_only(folder):
    hierarchy = read_hierarchy(folder)
    assert {node: level for node, level in hierarchy.levels.items() if node in NAMES} == {
        ROOT: 0,
        "n00000010": 1,
        "n00000020": 1,
        "dummy1": 2,
        "n00000012": 2,
        "n00000021": 2,
        "n00000013": 3,
        "n00000022": 3,
    }
    assert hierarchy.levels["n00000108"] == 4
    assert not {"n00000999", "n00000998", "n00000023"} & hierarchy.levels.keys()
    assert hierarchy.below("n00000021") == {"n00000021", "n00000022", "n00000100", "n00000108"}


def test_superclasses_by_hand(folder):
    # RandomState(2) permutes 4, then 3, then 2 candidates as [2, 3, 1, 0], [0, 1, 2], [1, 0]; choice takes the first.
    found = draw_superclasses(read_hierarchy(folder), Design(level=2, ancestor=ROOT, subclasses=2, superclasses=3))
    assert [(one.wnid, one.name) for one in found] == [
        ("dummy1", "worms"),
        ("n00000012", "plant, flora"),
        ("n00000021", "tool"),
    ]
    assert indices(found, "source") == [(3,), (5,), (8,)]
    assert indices(found, "target") == [(4,), (6,), (0,)]
    assert found[0].source[0] == Subclass("n00000103", 3, "class 3, alias")


def test_too_small_superclasses_draw_nothing(folder):
    # Only the worms have 4 classes: [2, 3, 1, 0] of the classes 1 to 4.
    found = draw_superclasses(read_hierarchy(folder), Design(level=2, ancestor=ROOT, subclasses=4, superclasses=1))
    assert indices(found, "source") == [(3, 4)]
    assert indices(found, "target") == [(2, 1)]


def test_ancestor_and_level_choose_the_nodes(folder):
    hierarchy = read_hierarchy(folder)
    below = draw_superclasses(hierarchy, Design(level=2, ancestor="n00000020", subclasses=2, superclasses=1))
    assert [one.name for one in below] == ["tool"]
    herb = draw_superclasses(hierarchy, Design(level=3, ancestor=ROOT, subclasses=2, superclasses=1))
    assert [one.name for one in herb] == ["herb"]  # saws have one class only
    for change, match in (
        ({"subclasses": 3}, "subclasses=3 cannot be halved"),
        ({"subclasses": 0}, "subclasses=0 cannot be halved"),
        ({"ancestor": "n00000023"}, "the ancestor 'n00000023' is not in the hierarchy, or has no class below it"),
        ({"level": 7}, f"no node of level 7 below {ROOT} has 2 classes"),
    ):
        design = {"level": 2, "ancestor": ROOT, "subclasses": 2, "superclasses": 1, **change}
        with pytest.raises(DataError, match=match):
            draw_superclasses(hierarchy, Design(**design))


def test_classes_outside_the_hierarchy_take_no_part(tmp_path, folder):
    more = write(tmp_path / "more", classes=[*CLASSES, [9, "n00000109", "stray"]])
    design = Design(level=2, ancestor=ROOT, subclasses=2, superclasses=3)
    expected = draw_superclasses(read_hierarchy(folder), design)
    assert draw_superclasses(read_hierarchy(more), design) == expected


# The classes of Living-17 and the split that the authors print: cell 13 of "Constructing BREEDS datasets.ipynb" in
# github.com/MadryLab/BREEDS-Benchmarks, commit 3dd8d35. First and last ImageNet class, source, target.
LIVING17 = {
    ("n01629276", "salamander"): (25, 29, (27, 29), (26, 28)),
    ("n01662784", "turtle"): (33, 37, (37, 34), (33, 35)),
    ("n01674464", "lizard"): (38, 48, (41, 44), (47, 38)),
    ("n01726692", "snake, serpent, ophidian"): (52, 68, (60, 57), (65, 61)),
    ("n01772222", "spider"): (72, 77, (76, 72), (74, 77)),
    ("n01795088", "grouse"): (80, 83, (81, 83), (82, 80)),
    ("n01816887", "parrot"): (87, 90, (88, 90), (87, 89)),
    ("n01976957", "crab"): (118, 121, (118, 120), (119, 121)),
    ("n02084071", "dog, domestic dog, Canis familiaris"): (151, 268, (163, 154), (257, 157)),
    ("n02114100", "wolf"): (269, 272, (272, 271), (270, 269)),
    ("n02118333", "fox"): (277, 280, (280, 279), (277, 278)),
    ("n02121808", "domestic cat, house cat, Felis domesticus, Felis catus"): (281, 285, (282, 285), (283, 284)),
    ("n02131653", "bear"): (294, 297, (297, 295), (296, 294)),
    ("n02164464", "beetle"): (300, 307, (305, 306), (302, 303)),
    ("n02274259", "butterfly"): (321, 326, (325, 321), (324, 322)),
    ("n02470325", "ape"): (365, 369, (368, 365), (366, 367)),
    ("n02484322", "monkey"): (370, 382, (377, 380), (381, 379)),
}


@pytest.fixture
def living17_folder(tmp_path):
    """The hierarchy of Living-17 without its inner nodes: ids that sort as ImageNet's do, in the order of the classes.

    The draw depends on the order of the ids and on how many classes a superclass has, not on what lies in between.
    """
    leaf = "c{:03d}".format
    edges = [(ROOT, "n00004258"), ("n00004258", "n00015388"), ("n00015388", "dummy3"), ("dummy3", "dummy4")]
    names = {ROOT: "entity", "n00004258": "living thing"}
    for (wnid, name), (first, last, _, _) in LIVING17.items():
        edges += [("dummy4", wnid), *((wnid, leaf(number)) for number in range(first, last + 1))]
        names[wnid] = name
    classes = [[number, leaf(number), f"class {number}"] for number in range(1000)]
    return write(tmp_path / "living17", classes, "".join(f"{p} {c}\n" for p, c in edges), names)


def test_living17_is_the_published_split(living17_folder):
    found = breeds(living17_folder, "living17")
    assert [(one.wnid, one.name) for one in found.superclasses] == list(LIVING17)
    assert indices(found.superclasses, "source") == [source for _, _, source, _ in LIVING17.values()]
    assert indices(found.superclasses, "target") == [target for _, _, _, target in LIVING17.values()]
    assert found.labels("target")["c379"] == 16
    assert len(found.labels("source")) == 34
    assert not found.labels("source").keys() & found.labels("target").keys()
    with pytest.raises(DataError, match="unknown domain 'test': choose source or target"):
        found.labels("test")


def test_designs():
    assert BENCHMARKS["living17"] == Design(level=5, ancestor="n00004258", subclasses=4, superclasses=17, seed=2)
    assert BENCHMARKS["entity30"] == Design(level=4, ancestor=ROOT, subclasses=8, superclasses=30, seed=2)


def test_breeds_refuses_other_names_and_other_hierarchies(folder, living17_folder):
    with pytest.raises(DataError, match="unknown benchmark 'living-17': choose one of living17, entity30"):
        breeds(folder, "living-17")
    with pytest.raises(DataError, match="the ancestor 'n00004258' is not in the hierarchy"):
        breeds(folder, "living17")
    edges = (living17_folder / "class_hierarchy.txt").read_text()
    (living17_folder / "class_hierarchy.txt").write_text(edges.replace("dummy4 n02084071\n", ""))
    with pytest.raises(DataError, match=r"gives 16 superclasses, and living17 has 17: take the files of .*modified"):
        breeds(living17_folder, "living17")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(
        DataError, match=r"dataset_class_info.json, class_hierarchy.txt, node_names.txt not in .*put the"
    ):
        read_hierarchy(tmp_path / "nowhere")
    folder = write(tmp_path / "some")
    (folder / "node_names.txt").unlink()
    with pytest.raises(DataError, match=r"^node_names.txt not in"):
        read_hierarchy(folder)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"edges": EDGES + "n1\n"}, r"class_hierarchy.txt:21 is 'n1', not 'parent child'"),
        ({"edges": EDGES + f"n00000013 {ROOT}\n"}, "is no hierarchy, it has a circle"),
        ({"edges": "n1 n00000101\n"}, f"joins no class of dataset_class_info.json to the root {ROOT}"),
        ({"edges": ""}, "joins no class"),
        ({"classes": [[0, "n0"]]}, r"is no list of \[number, id, name\]"),
        ({"classes": 3}, r"is no list of \[number, id, name\]"),
        ({"classes": [*CLASSES, [9, "n00000101", "again"]]}, "lists n00000101 more than once"),
        ({"classes": [*CLASSES, [8, "n00000109", "again"]]}, "lists 8 more than once"),
        ({"names": {"dummy1": ""}}, r"node_names.txt:1 is 'dummy1\\t', not a node, a tab and its name"),
    ],
)
def test_broken_files_are_named(tmp_path, change, match):
    with pytest.raises(DataError, match=match):
        read_hierarchy(write(tmp_path / "broken", **change))


def test_a_superclass_without_a_name_is_refused(tmp_path):
    folder = write(tmp_path / "nameless", names={k: v for k, v in NAMES.items() if k != "dummy1"})
    with pytest.raises(DataError, match=r"node_names.txt has no name for dummy1"):
        draw_superclasses(read_hierarchy(folder), Design(level=2, ancestor=ROOT, subclasses=2, superclasses=3))


def subclasses(*numbers):
    return tuple(Subclass(f"n{number}", number, f"class {number}") for number in numbers)


BENCHMARK = Breeds(
    "tiny",
    (
        Superclass("a", "cat, house cat", subclasses(5, 1), subclasses(2)),
        Superclass("b", "dog", subclasses(3), subclasses(4, 0)),
    ),
)


@pytest.fixture
def images(tmp_path):
    """Empty files, which nothing could decode: 4 images for each class, and one note."""
    for number in range(6):
        place = tmp_path / "train" / f"n{number}"
        place.mkdir(parents=True)
        for image in range(4):
            (place / f"n{number}_{image}.JPEG").touch()
    (tmp_path / "train" / "n2" / "notes.txt").touch()
    return tmp_path / "train"


def test_files_of_both_domains_in_order(images):
    source, target = imagenet_files(images, BENCHMARK)
    assert list(zip(target.files, target.labels.tolist(), strict=True)) == [
        *((f"n2/n2_{image}.JPEG", 0) for image in range(4)),
        *((f"n{number}/n{number}_{image}.JPEG", 1) for number in (4, 0) for image in range(4)),
    ]
    assert target.paths[0] == str(images / "n2" / "n2_0.JPEG")
    assert source.labels.tolist() == [0] * 8 + [1] * 4
    assert not set(source.paths) & set(target.paths)


def test_folders_that_do_not_fit_are_refused(tmp_path, images):
    with pytest.raises(DataError, match=r"has no folder for 6 of 6 classes, first n0: pass .*train$"):
        imagenet_files(images.parent, BENCHMARK)
    with pytest.raises(DataError, match="is no folder: pass the one that holds ImageNet's folders"):
        imagenet_files(tmp_path / "nowhere", BENCHMARK)
    flat = tmp_path / "val"
    flat.mkdir()
    with pytest.raises(DataError, match="first n0: pass ImageNet's train/ or val/ with all 1,000 classes"):
        imagenet_files(flat, BENCHMARK)
    (flat / "ILSVRC2012_val_00000001.JPEG").touch()
    with pytest.raises(DataError, match="first n0: its images lie in no folders; sort them into one for each class"):
        imagenet_files(flat, BENCHMARK)
    for image in (images / "n3").iterdir():
        image.unlink()
    with pytest.raises(DataError, match="n3 holds no image: unpack the archive"):
        imagenet_files(images, BENCHMARK)
