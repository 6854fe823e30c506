"""What a run has left in its folder, as HTML: its report, its run log and its table of mistakes."""

from __future__ import annotations

import base64
import csv
import html
import threading
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from peft_surgical.bases import load_base
from peft_surgical.choosing.models import logits_of
from peft_surgical.data.images import decode
from peft_surgical.errors import DataError
from peft_surgical.evaluation import Report
from peft_surgical.evaluation.selected import Gain
from peft_surgical.experiment.mistakes import MISTAKES
from peft_surgical.experiment.requests import Train, request_of
from peft_surgical.keys import CARD, CONFIG, FIGURE, REPORT, WEIGHTS
from peft_surgical.markup import html_table, html_tag, jpeg_address
from peft_surgical.training.ledger import Ledger
from peft_surgical.training.search import candidate_of

LEDGER = "ledger.jsonl"
_MOST_CLASSES = 30  # of which a confusion matrix can be read


def candidates_html(folder: Path) -> str:
    """What was trained so far, the best first; empty where nothing is yet."""
    rows: list[tuple[float, Sequence[str]]] = []
    for run in Ledger(folder / LEDGER).runs():
        request = request_of(run.key)
        if not isinstance(request, Train) or request.how.refit:  # what has seen the validation images says nothing
            continue
        part = "whole run" if request.stop is None else f"{request.stop:.0%} of a run"
        right = run.result["validation"]
        score = f"{run.result['score']:.3f}" if "score" in run.result else "-"
        cells = (str(candidate_of(run)), part, f"{100 * right:.1f}", f"{run.result['cost']:.0f}", score)
        rows.append((run.result.get("score", right), cells))
    if not rows:
        return ""
    ranked = [cells for _, cells in sorted(rows, key=lambda row: -row[0])]
    heading = ("candidate", "trained for", "validation accuracy (%)", "training steps", "score")
    if rows[0][1][-1] == "-":
        return html_table(heading[:-1], [cells[:-1] for cells in ranked])
    return html_table(heading, ranked) + html_tag(
        "p", "The score, by which auto compares, is the mean probability of the right class."
    )


def gate_html(report: Report) -> str:
    """What tuning gains over the base, with its interval, and whether that is shown."""
    gain = (report.settings["selection"] or {}).get("gain")
    if report.target == "none":
        words, kind = "Not to tune validates best: there is no adapter, and the network stays as it is.", "no"
    else:
        rate = report.settings["lr"]
        words = f"{report.target}{'' if rate is None else f' at learning rate {rate:g}'} was tuned."
        kind = ""
    if gain is not None:
        found = Gain(**gain)
        words, kind = f"{words} {found}.", "yes" if found.is_shown and kind != "no" else "no"
    elif kind != "no":
        after, before = (report.find(name, _part(report)) for name in ("accuracy", "accuracy before"))
        words += f" {100 * (after.value - before.value):+.1f} points on {after.n} {after.dataset} images"
        words += ", over the same network with an untrained head." if report.settings["open"]["head"] != "keep" else "."
        words += " Only the target auto measures an interval of this gain."
    if report.settings["head"] != "kept":
        words += f" The head is {report.settings['head']}."
    return html_tag("p", html.escape(words), class_=f"gate {kind}".strip())


def accuracy_html(report: Report) -> str:
    """Accuracy before and after, with intervals."""
    rows = [
        (one.name, one.dataset, f"{100 * one.value:.1f}", f"{100 * one.low:.1f} to {100 * one.high:.1f}", str(one.n))
        for one in report
    ]
    return html_table(("", "images", "%", "95% interval", "n"), rows)


def classes_html(report: Report) -> str:
    """Accuracy of each class on the test images, and which class is taken for which; empty without test images."""
    looked = report.settings.get("test")
    if looked is None:
        return html_tag("p", "There are no test images: give a share of them to see each class and the mistakes.")
    names, confusion = list(looked["accuracy_of_class"]), looked["confusion"]
    shares = looked["accuracy_of_class"].values()
    rows = [
        (name, "-" if share is None else f"{100 * share:.0f}", str(sum(counts)))
        for name, share, counts in zip(names, shares, confusion, strict=True)
    ]
    table = html_table(("class", "right (%)", "test images"), rows)
    if len(names) > _MOST_CLASSES:
        return table
    return f"{table}<h3>Which class is taken for which</h3>{_confusion_html(names, confusion)}"


def _confusion_html(names: list[str], confusion: Sequence[Sequence[int]]) -> str:
    others = ["another class"] * (len(confusion[0]) - len(names))
    corner = html_tag("td", "true class, and how many are predicted as:")
    head = corner + "".join(html_tag("th", html.escape(name), scope="col") for name in [*names, *others])
    rows = []
    for i, counts in enumerate(confusion):
        cells = html_tag("th", html.escape(names[i]), scope="row")
        for j, count in enumerate(counts):
            share = count / max(1, sum(counts))
            colour = "#1f7a4d" if i == j else "#b83228"
            ink = "#fff" if share > 0.5 else "inherit"
            style = f"background: {colour}{round(255 * share):02x}; color: {ink}"
            cells += html_tag("td", str(count) if count else "", style=style)
        rows.append(html_tag("tr", cells))
    return html_tag("div", html_tag("table", html_tag("tr", head) + "".join(rows), class_="confusion"), class_="wide")


def _part(report: Report) -> str:
    return "test" if any(one.dataset == "test" for one in report) else "validation"


@dataclass(frozen=True)
class Mistake:
    """A test image that the tuned network gets wrong.

    Attributes:
        file: Its path below the folder of the data.
        label: Its class.
        predicted: The class that it is taken for.
        confidence: The probability of that class.
    """

    file: str
    label: str
    predicted: str
    confidence: float


def read_mistakes(folder: Path) -> list[Mistake]:
    """All mistakes, the most confident first; none where there are no test images."""
    file = folder / MISTAKES
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as rows:
        return [
            Mistake(row["file"], row["label"], row["predicted"], float(row["confidence"]))
            for row in csv.DictReader(rows)
        ]


def mistakes_html(folder: Path, data: Path, count: int = 24) -> str:
    """The first mistakes as pictures, with what they are and what they were taken for."""
    mistakes = read_mistakes(folder)
    if not mistakes:
        return ""
    figures = []
    for one in mistakes[:count]:
        source = _picture(data, one.file)
        words = f"{one.label}, taken for {one.predicted} ({one.confidence:.0%})"
        picture = html_tag("img", alt=one.file, src=source) if source else ""
        figures.append(html_tag("figure", picture + html_tag("figcaption", html.escape(words))))
    more = f", the {count} most confident of them" if len(mistakes) > count else ""
    words = f"{len(mistakes)} test images are wrong{more}."
    return html_tag("p", words) + html_tag("div", "".join(figures), class_="pictures")


def _picture(data: Path, name: str) -> str | None:
    """An image of the data in a ``data:`` address; None where it is no longer there, or lies elsewhere."""
    for given in (name, name.removeprefix("'")):  # as `csv_cell` writes what looks like a formula
        file = (data / given).resolve()
        if file.is_relative_to(data.resolve()) and file.is_file():
            try:
                return jpeg_address(decode(file.read_bytes(), name))
            except DataError:
                return None
    return None


def figure_html(folder: Path) -> str:
    """The figure: candidates, how far each block moved, and with test images the confusion matrix."""
    file = folder / FIGURE
    if not file.is_file():
        return ""
    source = f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode('ascii')}"
    text = "Validation accuracy of the candidates, how far each block moved, and the confusion matrix"
    return html_tag("div", html_tag("img", alt=text, src=source), class_="wide figure")


def zip_adapter(folder: Path, file: Path) -> Path:
    """Pack the adapter with its card, report, figure and mistakes; the report does not say where the images lay.

    Raises:
        DataError: There is no adapter.
    """
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise DataError(f"{folder} holds no adapter: not to tune was best, or the run has not ended")
    report = Report.load(folder / REPORT)
    named = {"data_from": Path(str(report.settings.get("data_from", "data"))).name}
    report = replace(report, settings={**report.settings, **named})
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in (CONFIG, WEIGHTS, CARD, FIGURE, MISTAKES):
            if (folder / name).is_file():
                archive.write(folder / name, name)
        archive.writestr(REPORT, report.to_json())
    return file


class Predictor:
    """The base and the tuned network of a finished run, to compare them on an image. The last one is kept in memory."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._opened: tuple[Any, Any] = (None, None)

    def compare_html(self, folder: Path, image: Any, count: int = 5) -> str:
        """What both say about an image: the most probable classes, side by side.

        Args:
            folder: That of the run.
            image: A PIL image in RGB.
            count: How many classes.
        """
        report = Report.load(folder / REPORT)
        with self._lock:
            base, model, names = self._open(folder, report)
            inputs = base.transform_eval(image)[None]
            with torch.no_grad():
                tuned = logits_of(model(inputs))[0].double().softmax(0)
                plain = None
                if report.settings["open"]["head"] == "keep":
                    with model.disable_adapter():
                        plain = logits_of(model(inputs))[0].double().softmax(0)
        parts = []
        for title, chances in (("tuned", tuned), ("base", plain)):
            if chances is None:
                parts.append("<p>The base has no head for these classes: only the tuned network can say.</p>")
                continue
            best = chances.topk(min(count, len(names)))
            rows = [
                (names[number], f"{chance:.1%}")
                for number, chance in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]
            parts.append(html_tag("div", f"<h3>{title}</h3>" + html_table(("class", "probability"), rows)))
        return html_tag("div", "".join(parts), class_="beside")

    def _open(self, folder: Path, report: Report) -> tuple[Any, Any, Sequence[str]]:
        key = (folder, report.settings["run"])
        if self._opened[0] != key:
            base = load_base(report.model, **report.settings["open"])
            model = PeftModel.from_pretrained(base.model, folder).eval()
            names = base.label_names or report.settings["open"]["label_names"]
            self._opened = (key, (base, model, names))
        found: tuple[Any, Any, Sequence[str]] = self._opened[1]
        return found
