"""`push_adapter`: an adapter with its card, in one commit."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel

from ..config import SurgicalConfig
from ..errors import ConfigError
from ..evaluation import Report
from ..training.search import NONE
from ..tuner.saving import CARD
from .card_figure import draw
from .card_text import moved_of, rows_of
from .cards import About, card_of, check
from .commits import FIGURE, OWN, REPORT, Goal, commit_files
from .rebuilding import BaseName
from .remote import HTTPError, explained, patiently
from .staging import Staged, described, prove, public_report, stage_folder, stage_model, weights_of

Place = str | os.PathLike[str]


@dataclass(frozen=True)
class Pushed:
    """An adapter that is on the Hub.

    Attributes:
        repo: The repository.
        url: Page of the commit.
        oid: Hash of the commit, for ``revision=``.
        revision: The branch, or ``refs/pr/N``.
        pr_url: Page of the pull request, where one was asked for.
        sha256: Of the adapter file; its card has it, too.
        files: What was pushed.
    """

    repo: str
    url: str
    oid: str
    revision: str
    pr_url: str | None
    sha256: str
    files: tuple[str, ...]


def push_adapter(
    model_or_folder: PeftModel | Place,
    repo: str,
    *,
    license: str | None = None,
    datasets: Sequence[str] | None = None,
    report: Report | Place | None = None,
    comparison: Sequence[Report | Place] = (),
    figure: Place | None = None,
    base: BaseName | None = None,
    loading: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    tags: Sequence[str] = (),
    adapter_name: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    commit_message: str = "Upload a surgical adapter",
    commit_description: str | None = None,
) -> Pushed:
    """Upload an adapter, its config, the record of its base, its card, report and figure, in one commit.

    ::

        push_adapter(model, "me/frost-adapter", license="apache-2.0", datasets=[], report="tuned/report.json")

    Before anything is sent, a live model is saved, loaded again and compared bit for bit, the base is opened from its
    record and takes the adapter, and the Hub validates the card. Nothing is announced that is not there as a whole.

    Args:
        model_or_folder: A live model, or a folder that ``save_pretrained`` or ``peft-surgical tune`` wrote.
        repo: ``owner/name``; made if it does not exist.
        license: Licence of the deltas, an identifier of the Hub.
        datasets: Repositories of the data that it was tuned on; empty where they are not on the Hub.
        report: The adapter's numbers, or their file; of a folder, its ``report.json``. Without one, the card says that
            nothing was measured.
        comparison: Reports of other targets on the same data, whose rows the card shows beside: none, all.
        figure: A .png file; of a folder, its ``figure.png``. Drawn from the report where there is none.
        base: The base, where neither the model nor the folder tells it: a repository, or the arguments of `load_base`
            as a mapping with ``name``. With ``loading``, words will do.
        loading: For a network that is not of timm or transformers: lines of Python that load it and the adapter, for
            the card.
        license_name: What a licence ``"other"`` is called.
        license_link: Where it can be read.
        tags: Further tags of the card.
        adapter_name: Of a live model with several.
        private: Whether a new repository is private. An existing public one is refused if this is True.
        revision: A branch; made if it does not exist.
        create_pr: Open a pull request instead.
        token: By default the one that was logged in with.
        commit_message: First line.
        commit_description: The rest.

    Raises:
        ConfigError: Something is missing that the card needs, or nobody could open the base. Names all of it.
        AdapterFileError: The folder holds no whole adapter.
        BaseMismatchError: The base that the record opens is not the adapter's.
        AdapterError: The Hub refused, somebody else committed first, or it could not be reached.
    """
    about = About(
        repo,
        license,
        None if datasets is None else tuple(datasets),
        base if isinstance(base, str) else None,
        loading,
        opens=loading is None,
        license_name=license_name,
        license_link=license_link,
        tags=tuple(tags),
        comparison=tuple(map(_read, comparison)),
    )
    # What the card lacks is said before the base is downloaded, which tells its own name.
    check(about, later=["base"] if loading is None else [])
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if isinstance(model_or_folder, PeftModel):
            staged = stage_model(model_or_folder, adapter_name, folder)
        else:
            staged = stage_folder(Path(model_or_folder), folder)
        numbers = _report(report, folder)
        staged = prove(staged, base, numbers, token) if loading is None else described(staged, str(base))
        if numbers is not None:
            numbers = public_report(numbers, str(staged.config.base_model_name_or_path))
            numbers.save(folder / REPORT)
        files = _complete(staged, numbers, figure, about)
        goal = Goal(repo, revision, private, create_pr, commit_message, commit_description)
        with explained("push to", repo, revision):
            done = commit_files(files, goal, token)
        digest = weights_of(staged).sha256
    return Pushed(repo, done.url, done.oid, done.revision, done.pr_url, digest, tuple(files))


def _report(report: Report | Place | None, folder: Path) -> Report | None:
    """The adapter's report: the one that was given, or else the one in the folder."""
    if report is None:
        return Report.load(folder / REPORT) if (folder / REPORT).is_file() else None
    numbers = _read(report)
    if numbers.target == NONE:
        raise ConfigError("this report is of the base without an adapter: pass the adapter's own (report=, --report)")
    return numbers


def _read(report: Report | Place) -> Report:
    return report if isinstance(report, Report) else Report.load(Path(report))


def _complete(staged: Staged, report: Report | None, figure: Place | None, about: About) -> dict[str, Path]:
    """Add figure and card to the folder; the files to push.

    Raises:
        ConfigError: The figure is none, or the Hub's own check refuses the card.
    """
    folder, weights = staged.folder, weights_of(staged)
    if figure is not None:
        if Path(figure).suffix.lower() != ".png" or not Path(figure).is_file():
            raise ConfigError(f"the figure {figure} is no .png file: draw one, or leave it out")
        shutil.copyfile(figure, folder / FIGURE)
    elif not (folder / FIGURE).is_file() and importlib.util.find_spec("matplotlib"):
        rows = [] if report is None else rows_of(report, about.comparison)
        if rows:
            draw(rows, weights, moved_of(report), folder / FIGURE)
    record = staged.record
    about = replace(
        about,
        base=about.base if record is None else record.id,
        base_revision=None if record is None else record.revision,
        labelled=record is not None and record.label_names is not None,
        figure=FIGURE if (folder / FIGURE).is_file() else None,
    )
    card = card_of(staged.config, report, weights, about)
    with explained("check the card of", about.repo):
        try:
            patiently(card.validate)
        except HTTPError:
            raise
        except ValueError as error:
            raise ConfigError(f"the Hub refuses the card of {about.repo}: {error}") from error
    card.save(folder / CARD)
    return {name: folder / name for name in OWN if (folder / name).is_file()}


def redirected(original: Callable[..., str], push: Callable[..., Pushed] = push_adapter) -> Callable[..., str]:
    """Wrap ``PeftModel.push_to_hub``: a surgical adapter goes through ``push``, all others are none of ours.

    The original writes a card of its own over the adapter's, which says neither what it is nor what it was made on.
    """

    @functools.wraps(original)
    def push_to_hub(self: Any, repo_id: str, **kwargs: Any) -> str:
        if not any(isinstance(config, SurgicalConfig) for config in self.peft_config.values()):
            return original(self, repo_id, **kwargs)
        kwargs.pop("max_shard_size", None)  # an adapter is one file
        given = {name: value for name, value in kwargs.items() if value is not None}
        return push(self, repo_id, **given).url

    return push_to_hub
