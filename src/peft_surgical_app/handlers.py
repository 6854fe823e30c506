"""What the buttons of the page do, and the texts that they show; knows nothing of Gradio."""

from __future__ import annotations

import html
import tempfile
from pathlib import Path

from peft_surgical.errors import ConfigError, DataError
from peft_surgical.evaluation import Report
from peft_surgical.experiment.subject import SEARCHES
from peft_surgical.hub.pushing import push_adapter
from peft_surgical.keys import REPORT
from peft_surgical.markup import html_tag
from peft_surgical.texts import with_arguments

from . import outcome
from .runner import RUNNING, Runner, RunStatus
from .uploads import Received, add_archive, add_images, class_counts, read_image, remove_uploads
from .workspace import AppSettings, Workspace, Workspaces

TARGETS = (*SEARCHES, "all", "head", "block1", "block2", "last3")
LICENSES = ("apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0", "other")
LABELS = {
    "lr": "Learning rates",
    "epochs": "Epochs",
    "batch_size": "Batch size",
    "test": "Share of images for the test",
    "image_size": "Image size",
    "on_broken": "Leave out broken images",
    "seed": "Seed",
    "head": "Head",
    "target": "What to tune",
    "license": "Licence",
    "datasets": "Data sets",
    "token": "Token",
}
"""Argument of `tune` and `push_adapter` -> what the page calls it."""


def in_labels(message: str) -> str:
    """A message of the package in the words of the page: arguments become the names of its fields."""

    def written(name: str, value: str) -> str | None:
        label = LABELS.get(name)
        return None if label is None else f'"{label}" {value.strip("[]")}'.rstrip()

    return with_arguments(message, written)


def problem_html(message: str) -> str:
    """Something to mend."""
    return html_tag("div", html.escape(in_labels(message)), class_="problem", role="alert")


def news_html(message: str) -> str:
    """Something that was done."""
    return html_tag("div", html.escape(message), class_="news", role="status")


def uploads_html(workspace: Workspace) -> str:
    """What was sent so far."""
    counts = class_counts(workspace.uploads)
    if not counts:
        return html_tag("p", "No photographs yet.")
    named = ", ".join(f"{name} {count}" for name, count in counts.items())
    folders = f"{len(counts)} folder{'s' if len(counts) > 1 else ''}"
    return html_tag("p", html.escape(f"{sum(counts.values())} photographs in {folders}: {named}"))


def status_html(status: RunStatus | None) -> str:
    """How far a run is."""
    if status is None:
        return ""
    if status.error:
        return problem_html(status.error)
    what = "The plan" if status.kind == "plan" else "The run"
    if status.state != RUNNING:
        words = {"done": "is ready.", "stopped": "was stopped. Started again with the same settings, it goes on."}
        return news_html(f"{what} {words[status.state]}")
    if status.kind == "plan" or not status.plan:
        return news_html("Reading the photographs and the network; this takes a while the first time.")
    share = f"{status.done:.1f} of {status.total:.0f} epochs" if status.total else "preparing"
    bar = html_tag("progress", max=status.total or 1.0, value=status.done, aria_label="epochs")
    return bar + news_html(f"{share}: {status.now}" if status.now else share)


def plan_html(status: RunStatus | None) -> str:
    """What a run does."""
    if status is None or not status.plan:
        return ""
    lines = [html_tag("li", html.escape(line)) for line in status.plan.splitlines()]
    return f"<h3>The plan</h3>{html_tag('ul', ''.join(lines))}"


def numbers_of(text: str) -> list[float] | None:
    """Learning rates as they are typed: with commas or blanks between them; None for an empty text.

    Raises:
        ConfigError: Something is no number.
    """
    words = text.replace(",", " ").split()
    try:
        return [float(word) for word in words] or None
    except ValueError as error:
        raise ConfigError(f"{text!r} are no learning rates: give numbers, such as 1e-3, 1e-4") from error


class Handlers:
    """What the buttons do: each method takes the visitor's token, and then the values of fields.

    Args:
        settings: What the page offers.
        cache: Folder for files that are handed to the browser.
    """

    def __init__(self, settings: AppSettings, cache: Path) -> None:
        self.settings = settings
        self.cache = cache
        self.workspaces = Workspaces(settings)
        self.runner = Runner(settings.minutes)
        self.predictor = outcome.Predictor()

    def add_archive(self, token: str, file: str | None) -> tuple[str, str]:
        """Keep the images of a zip file; what became of it, and what there is now."""
        if file is None:
            raise DataError("there is no zip file yet: choose one")
        found = add_archive(self._of(token).uploads, Path(file), self.settings.limits)
        return self._received(token, found)

    def add_images(self, token: str, label: str, files: list[str] | None) -> tuple[str, str]:
        """Keep photographs of one class."""
        if not files:
            raise DataError("there are no photographs yet: choose some, and say which class they show")
        found = add_images(self._of(token).uploads, label or "", map(Path, files), self.settings.limits)
        return self._received(token, found)

    def clear(self, token: str) -> tuple[str, str]:
        """Remove all uploads."""
        workspace = self._of(token)
        now = self.runner.status(workspace.token)
        if now is not None and now.state == RUNNING:
            raise DataError("a run is reading these photographs: stop it first")
        remove_uploads(workspace.uploads)
        return news_html("All photographs that were sent are removed."), uploads_html(workspace)

    def start(
        self,
        token: str,
        kind: str,
        folder: str,
        model: str,
        target: str,
        epochs: float,
        test: float,
        lr: str,
        batch_size: float | None,
        image_size: float | None,
        skip_broken: bool,
        seed: float,
    ) -> None:
        """Begin a run, or ask for its plan."""
        workspace = self._of(token)
        data = self.settings.folder(folder) if folder and folder.strip() else workspace.uploads
        if data == workspace.uploads and not class_counts(data):
            raise DataError("there are no photographs yet: add them first")
        arguments = {
            "network": self.settings.model(model or ""),
            "data": str(data),
            "target": (target or "auto").strip(),
            "epochs": _whole("Epochs", epochs),
            "test": float(test) or None,
            "lr": numbers_of(lr or ""),
            "batch_size": _whole("Batch size", batch_size) if batch_size else None,
            "image_size": _whole("Image size", image_size) if image_size else None,
            "on_broken": "skip" if skip_broken else "raise",
            "seed": _whole("Seed", seed or 0, least=0),
        }
        output = workspace.output(arguments)
        scratch = workspace.place / "plan" if kind == "plan" else output
        self.runner.start(workspace.token, kind, {**arguments, "output": str(scratch)}, workspace.log)
        if kind == "tune":
            workspace.remember(data, output)

    def stop(self, token: str) -> None:
        """Stop the visitor's run."""
        self.runner.stop(self._of(token).token)

    def status(self, token: str) -> RunStatus | None:
        """How far the visitor's run is."""
        return self.runner.status(self._of(token).token)

    def candidates(self, token: str) -> str:
        """What the visitor's run has compared so far."""
        last = self._of(token).last()
        return "" if last is None else outcome.candidates_html(last[1])

    def results(self, token: str) -> str | None:
        """What a finished run has left; None where there is none."""
        found = self._of(token).finished()
        if found is None:
            return None
        data, folder = found
        report = Report.load(folder / REPORT)
        parts = [
            ("", outcome.gate_html(report)),
            ("Accuracy", outcome.accuracy_html(report)),
            ("Candidates", outcome.candidates_html(folder)),
            ("Classes", outcome.classes_html(report)),
            ("Mistakes", outcome.mistakes_html(folder, data)),
            ("Figure", outcome.figure_html(folder)),
        ]
        return "".join((html_tag("h3", title) if title else "") + body for title, body in parts if body)

    def download(self, token: str) -> str | None:
        """The zip file of the adapter; None where there is no adapter."""
        found = self._of(token).finished()
        if found is None or not _has_adapter(found[1]):
            return None
        place = Path(tempfile.mkdtemp(dir=self.cache))
        return str(outcome.zip_adapter(found[1], place / "adapter.zip"))

    def compare(self, token: str, image: str | None) -> str:
        """What base and tuned network say about an image."""
        if image is None:
            raise DataError("there is no image to compare on: choose one")
        read = read_image(Path(image), self.settings.limits)
        return self.predictor.compare_html(self._adapter(token), read)

    def push(self, token: str, repo: str, license: str, datasets: str, private: bool, key: str) -> str:
        """Push the adapter to the Hub."""
        folder = self._adapter(token)
        if not key and not self.settings.own_login:
            raise ConfigError("give a token of the Hub that may write to the repository; it is used once, and not kept")
        named = [one for one in datasets.replace(",", " ").split() if one]
        done = push_adapter(
            folder,
            repo.strip(),
            license=license or None,
            datasets=named,
            private=True if private else None,
            token=key or None,
        )
        return news_html(f"Pushed: {done.url}")

    def _of(self, token: str) -> Workspace:
        return self.workspaces.of(token)

    def _adapter(self, token: str) -> Path:
        """The folder of the adapter of a finished run.

        Raises:
            DataError: No run has ended, or not to tune was best.
        """
        found = self._of(token).finished()
        if found is None:
            raise DataError("there is no finished run yet: tune first")
        if not _has_adapter(found[1]):
            raise DataError(
                "nothing was tuned, because not to tune validates best: there is no adapter to compare or push"
            )
        return found[1]

    def _received(self, token: str, found: Received) -> tuple[str, str]:
        return news_html(str(found)), uploads_html(self._of(token))


def _has_adapter(folder: Path) -> bool:
    return Report.load(folder / REPORT).target != "none"


def _whole(label: str, value: float, least: int = 1) -> int:
    if value is None or value != int(value) or value < least:
        raise ConfigError(f"{label}: {value!r} is no whole number from {least}")
    return int(value)
