"""Which images are wrong and which class is taken for which, on logits whose answers are plain to see."""

import csv

import torch

from peft_surgical.experiment.mistakes import COLUMNS, accuracy_of_class, confusion_of, write_mistakes

PREDICTED = [0, 1, 1, 0, 2, 0]
LABELS = torch.tensor([0, 1, 0, 0, 1, 1])
LOGITS = torch.nn.functional.one_hot(torch.tensor(PREDICTED), 4) * torch.tensor([[1.0, 2, 3, 4, 5, 6]]).T


def test_confusion_counts_true_class_by_predicted_class():
    found = confusion_of(LOGITS, LABELS, 4)
    assert found == [[2, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert accuracy_of_class(found) == [2 / 3, 1 / 3, None, None]


def test_mistakes_are_listed_the_most_confident_first(tmp_path):
    names, files = ["ant", "=bee", "cow", "dog"], ["a.png", "b.png", "+c.png", "d.png", "e,1.png", '"f".png']
    assert write_mistakes(tmp_path / "m.csv", files, LOGITS, LABELS, names) == 3
    with (tmp_path / "m.csv").open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert tuple(header) == COLUMNS
    # No cell is a formula; e^6 / (e^6 + 3) = 0.9926, e^5: 0.9802, e^3: 0.8700.
    assert rows == [
        ['"f".png', "'=bee", "ant", "0.9926"],
        ["e,1.png", "'=bee", "cow", "0.9802"],
        ["'+c.png", "ant", "'=bee", "0.8700"],
    ]


def test_without_mistakes_there_is_a_header(tmp_path):
    assert write_mistakes(tmp_path / "m.csv", ["a"], torch.eye(2)[:1], torch.tensor([0]), ["x", "y"]) == 0
    assert (tmp_path / "m.csv").read_text().splitlines() == ["file,label,predicted,confidence"]
