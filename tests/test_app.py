"""What is behind the page in the browser: uploads, workspaces, runs in a process, and results; no browser here."""

import errno
import io
import json
import os
import struct
import sys
import threading
import time
import zipfile
import zlib
from pathlib import Path, PurePosixPath

import pytest
from hub_server import READ, hub  # noqa: F401 (a fixture)
from huggingface_hub import constants

pytest.importorskip("datasets")
timm = pytest.importorskip("timm")
PIL = pytest.importorskip("PIL.Image")

from timm.models import save_for_hf  # noqa: E402

from peft_surgical.bases import load_base  # noqa: E402
from peft_surgical.errors import ConfigError, DataError  # noqa: E402
from peft_surgical.experiment.api import plan_tuning, tune  # noqa: E402
from peft_surgical.training.ledger import Ledger  # noqa: E402
from peft_surgical.training.progress import Watch  # noqa: E402
from peft_surgical_app import outcome, uploads  # noqa: E402
from peft_surgical_app.handlers import Handlers, in_labels, numbers_of, plan_html, status_html  # noqa: E402
from peft_surgical_app.login import forget_login  # noqa: E402
from peft_surgical_app.runner import Runner, RunStatus  # noqa: E402
from peft_surgical_app.uploads import UploadLimits, add_archive, add_images, class_counts, read_image  # noqa: E402
from peft_surgical_app.worker import carry_out  # noqa: E402
from peft_surgical_app.workspace import AppSettings, Workspaces  # noqa: E402

LIMITS = UploadLimits()
SMALL = {"weights": "random", "cpu": True, "epochs": 1, "lr": [1e-3]}


def picture(colour=(10, 200, 30), form="PNG", side=16):
    file = io.BytesIO()
    PIL.new("RGB", (side, side), colour).save(file, form)
    return file.getvalue()


def photographs(folder, count=8):
    for number, name in enumerate(("fog", "frost")):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            PIL.new("RGB", (16, 16), (25 * i, 99 * number, 7)).save(folder / name / f"{i}.png")
    return folder


def zipped(place, members):
    with zipfile.ZipFile(place, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return place


def files_in(folder):
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


# --- uploads ---


@pytest.mark.parametrize(
    ("members", "kept"),
    [
        (["cat/1.png", "dog/1.png"], ["cat/1.png", "dog/1.png"]),
        (["photos/cat/1.png", "photos/dog/1.png"], ["cat/1.png", "dog/1.png"]),
        (["train/cat/1.png", "test/cat/1.png"], ["test/cat/1.png", "train/cat/1.png"]),
        (["train/cat/1.png"], ["train/cat/1.png"]),
        (["photos/train/cat/1.png", "photos/test/cat/1.png"], ["test/cat/1.png", "train/cat/1.png"]),
        (["cat/1.png"], ["cat/1.png"]),
        (["cat\\1.png", "__MACOSX/cat/._1.png", "cat/.hidden.png", "cat/Thumbs.db"], ["cat/1.png"]),
    ],
)
def test_a_zip_file_of_class_folders_is_unpacked(tmp_path, members, kept):
    file = zipped(tmp_path / "a.zip", {name: picture() for name in members})
    assert add_archive(tmp_path / "to", file, LIMITS).kept == len(kept)
    assert files_in(tmp_path / "to") == kept


@pytest.mark.parametrize(
    "name", ["../../out/1.png", "/etc/cat/1.png", "cat/../../1.png", "C:\\cat\\1.png", "..\\x\\1.png"]
)
def test_a_path_that_leads_elsewhere_refuses_the_whole_zip_file(tmp_path, name):
    file = zipped(tmp_path / "a.zip", {"cat/1.png": picture(), name: picture()})
    with pytest.raises(DataError, match="is no path that can be unpacked here"):
        add_archive(tmp_path / "in" / "to", file, LIMITS)
    assert files_in(tmp_path) == ["a.zip"]


def test_a_link_in_a_zip_file_is_no_image(tmp_path):
    link = zipfile.ZipInfo("cat/link.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
        archive.writestr("cat/1.png", picture())
    found = add_archive(tmp_path / "to", tmp_path / "a.zip", LIMITS)
    assert found.kept == 1
    assert "cat/link.png is no image of" in found.left_out[0]
    assert files_in(tmp_path / "to") == ["cat/1.png"]


def test_a_zip_file_that_lies_about_sizes_writes_no_more_than_the_limit(tmp_path):
    limits = UploadLimits(image_bytes=1000)
    file = zipped(tmp_path / "a.zip", {"cat/1.png": picture(), "cat/2.png": picture() + bytes(5000)})
    content = bytearray(file.read_bytes())
    true = len(picture()) + 5000
    for at in [i for i in range(len(content) - 4) if struct.unpack_from("<I", content, i)[0] == true]:
        struct.pack_into("<I", content, at, 10)
    file.write_bytes(content)
    with zipfile.ZipFile(file) as archive:
        assert archive.getinfo("cat/2.png").file_size == 10
    with pytest.raises(DataError, match="cannot be read as a zip file"):  # the sizes do not agree
        add_archive(tmp_path / "to", file, limits)
    assert files_in(tmp_path / "to") == []


@pytest.mark.parametrize(
    ("limits", "names", "why"),
    [
        (UploadLimits(images=2), ["a/1.png", "a/2.png", "a/3.png"], "at most 2 images"),
        (UploadLimits(images=1), ["a/1.png", "a/2.png", "a/3.png"], "holds 3 files"),
        (UploadLimits(total_bytes=100), ["a/1.png", "a/2.png"], "of 0 MiB together. Nothing was added"),
    ],
)
def test_what_exceeds_the_limits_leaves_nothing_behind(tmp_path, limits, names, why):
    file = zipped(tmp_path / "a.zip", {name: picture() for name in names})
    with pytest.raises(DataError, match=why):
        add_archive(tmp_path / "to", file, limits)
    assert files_in(tmp_path / "to") == []


def test_zip_files_that_are_none_are_said_to_be_so(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"no zip")
    with pytest.raises(DataError, match="cannot be read as a zip file"):
        add_archive(tmp_path / "to", tmp_path / "a.zip", LIMITS)
    file = zipped(tmp_path / "b.zip", {"1.png": picture(), "notes.txt": "x"})
    with pytest.raises(DataError, match="holds no image in a folder of its class"):
        add_archive(tmp_path / "to", file, LIMITS)
    secret = bytearray(zipped(tmp_path / "c.zip", {"cat/1.png": picture()}).read_bytes())
    secret[secret.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "c.zip").write_bytes(secret)
    with pytest.raises(DataError, match="has a password"):
        add_archive(tmp_path / "to", tmp_path / "c.zip", LIMITS)


def test_only_images_of_usual_formats_are_kept_whatever_they_are_called(tmp_path):
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"
    half = picture(form="JPEG", side=64)[:-200]
    contents = {
        "good.png": picture(),
        "eps.png": postscript,
        "half.jpg": half,
        "doc.pdf": b"%PDF",
        "same.gif": picture(),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    found = add_images(tmp_path / "to", "grey  cat", [tmp_path / name for name in contents], LIMITS)
    assert files_in(tmp_path / "to") == ["grey cat/good.png", "grey cat/same.gif"]
    assert [text.split(" ")[1] for text in found.left_out] == ["cat/eps.png", "cat/half.jpg", "cat/doc.pdf"]
    assert "2 images were added, 3 left out" in str(found)
    with pytest.raises(DataError, match="is no image of BMP, GIF"):
        read_image(tmp_path / "eps.png", LIMITS)
    assert read_image(tmp_path / "good.png", LIMITS).size == (16, 16)


def test_an_image_of_enormous_size_is_left_out_before_it_is_decoded(tmp_path):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )
    (tmp_path / "bomb.png").write_bytes(bomb)
    (left_out,) = add_images(tmp_path / "to", "cat", [tmp_path / "bomb.png"], LIMITS).left_out
    assert "bomb.png" in left_out
    wide = UploadLimits(pixels=100)
    (tmp_path / "wide.png").write_bytes(picture())
    with pytest.raises(DataError, match="has 16 x 16 pixels, more than"):
        read_image(tmp_path / "wide.png", wide)


def test_images_of_one_name_are_both_kept(tmp_path):
    (tmp_path / "1.png").write_bytes(picture())
    for _ in range(2):
        add_images(tmp_path / "to", "cat", [tmp_path / "1.png"], LIMITS)
    assert files_in(tmp_path / "to") == ["cat/1-2.png", "cat/1.png"]
    assert class_counts(tmp_path / "to") == {"cat": 2}


@pytest.mark.parametrize("label", ["", "../x", ".x", "a/b", "a\\b", "a\x00b", "x" * 101, "c:d"])
def test_a_class_is_a_name_and_no_path(tmp_path, label):
    with pytest.raises(DataError, match="cannot be the name of a class"):
        add_images(tmp_path / "to", label, [], LIMITS)


def test_what_is_unpacked_stays_in_its_folder_even_through_a_link(tmp_path):
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "cat").symlink_to(tmp_path)
    with pytest.raises(DataError, match="leads out of the folder"):
        uploads._write(tmp_path / "to", PurePosixPath("cat/1.png"), b"", [])


@pytest.fixture
def full_disk(monkeypatch):
    """A disk on which half of the second file that is written finds room."""
    written = []

    class Full(io.FileIO):
        def write(self, content):
            written.append(self.name)
            if len(written) < 2:
                return super().write(content)
            super().write(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    true = Path.open
    monkeypatch.setattr(Path, "open", lambda self, mode="r", **how: (Full if "x" in mode else true)(self, mode, **how))


def test_a_refused_upload_leaves_no_folder_of_its_own(tmp_path):
    (tmp_path / "1.png").write_bytes(picture())
    add_images(tmp_path / "to", "cat", [tmp_path / "1.png"], LIMITS)
    (tmp_path / "to" / "empty").mkdir()
    limits = UploadLimits(images=2)
    with pytest.raises(DataError, match="at most 2 images"):
        add_images(tmp_path / "to", "bird", [tmp_path / "1.png"] * 2, limits)
    names = ["cat/2.png", "empty/1.png", "train/bird/1.png"]
    with pytest.raises(DataError, match="at most 2 images"):
        add_archive(tmp_path / "to", zipped(tmp_path / "a.zip", {name: picture() for name in names}), limits)
    there = sorted(file.relative_to(tmp_path / "to").as_posix() for file in (tmp_path / "to").rglob("*"))
    assert there == ["cat", "cat/1.png", "empty"]


def test_a_full_disk_leaves_no_half_image(tmp_path, full_disk):
    names = ["bird/1.png", "train/cat/1.png"]
    file = zipped(tmp_path / "a.zip", {name: picture() for name in names})
    with pytest.raises(DataError, match=r"cat/1\.png cannot be kept \(No space left on device\): nothing was added"):
        add_archive(tmp_path / "to", file, LIMITS)
    assert list((tmp_path / "to").iterdir()) == []


# --- what may be named ---


def test_only_what_the_page_offers_can_be_named(tmp_path):
    (tmp_path / "photos" / "here").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    closed = AppSettings(tmp_path, models=("timm/a",), any_model=False)
    assert closed.model(" timm/a ") == "timm/a"
    for name in ("timm/b", "", str(tmp_path), "local-dir:/x"):
        with pytest.raises(ConfigError, match="is no network that can be used here: choose one of the list"):
            closed.model(name)
    with pytest.raises(DataError, match="folders of this machine are not read"):
        closed.folder(str(tmp_path))
    opened = AppSettings(tmp_path, folders=tmp_path / "photos")
    assert opened.folder("here") == opened.folder(str(tmp_path / "photos" / "here")) == tmp_path / "photos" / "here"
    assert opened.model("hf-hub:me/mine") == "hf-hub:me/mine"
    assert opened.model("here") == str(tmp_path / "photos" / "here")
    (tmp_path / "photos" / "link").symlink_to(tmp_path / "outside")
    for name in ("../outside", str(tmp_path / "outside"), "link", "", "none", "/", "a\x00"):
        with pytest.raises(DataError, match="is no folder below"):
            opened.folder(name)
    for name in ("../outside", "/etc", "local-dir:here", "a/../b", "https://x/y"):
        with pytest.raises(ConfigError, match="is no network that can be used here"):
            opened.model(name)


def test_a_folder_of_this_machine_is_no_id_of_the_hub(tmp_path, monkeypatch):
    (tmp_path / "me" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="is no network"):
        AppSettings(tmp_path).model("me/mine")
    assert AppSettings(tmp_path, models=("me/mine",)).model("me/mine") == str(tmp_path / "me" / "mine")


@pytest.mark.parametrize("token", ["", None, 7, "../..", "0" * 31, "g" * 32, "0" * 32])
def test_a_token_that_was_not_given_gets_a_new_workspace(tmp_path, token):
    (tmp_path / "secret").mkdir()
    found = Workspaces(AppSettings(tmp_path)).of(token)
    assert found.place.parent == tmp_path
    assert len(found.token) == 32
    assert found.token != token
    assert Workspaces(AppSettings(tmp_path)).of(found.token) == found


def test_workspaces_that_were_not_used_for_long_are_removed(tmp_path, monkeypatch):
    spaces = Workspaces(AppSettings(tmp_path, hours=1))
    old = spaces.of("")
    (tmp_path / "other").mkdir()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3599)
    kept = spaces.of("")
    monkeypatch.setattr(time, "time", lambda: now + 3700)
    spaces.of("")
    assert not old.place.exists()
    assert (tmp_path / "other").is_dir()
    assert not kept.place.exists()  # made at the same moment of the disk's clock


# --- runs ---

SPEAKER = """
import json, sys
job = json.loads(sys.stdin.readline())
print(json.dumps({"plan": job["arguments"]["say"]}), flush=True)
print(json.dumps({"line": "one"}), flush=True)
print(json.dumps({"done": 1.5, "total": 3.0, "now": "block1"}), flush=True)
if job["kind"] == "wait":
    sys.stdin.read()
    print(json.dumps({"ended": "stopped"}), flush=True)
elif job["kind"] == "die":
    print("out of luck", file=sys.stderr)
    sys.exit(3)
else:
    print(json.dumps({"ended": "done"}), flush=True)
"""


@pytest.fixture
def runner():
    found = Runner(command=(sys.executable, "-c", SPEAKER))
    yield found
    found.close()


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "took too long"
        time.sleep(0.02)


def test_a_job_is_followed_to_its_end(runner, tmp_path):
    assert runner.status("me") is None
    runner.start("me", "plan", {"say": "häuser"}, tmp_path / "log")
    until(lambda: runner.status("me").state != "running")
    assert runner.status("me") == RunStatus("plan", "done", "häuser", ("one",), "", 1.5, 3.0)
    assert runner.status("you") is None


def test_one_job_at_a_time_which_only_its_owner_stops(runner, tmp_path):
    runner.start("me", "wait", {"say": ""}, tmp_path / "log")
    with pytest.raises(ConfigError, match="your last run has not ended"):
        runner.start("me", "plan", {"say": ""}, tmp_path / "log")
    with pytest.raises(ConfigError, match="somebody else's run is going on"):
        runner.start("you", "plan", {"say": ""}, tmp_path / "log")
    runner.stop("you")
    until(lambda: runner.status("me").now == "block1")
    assert runner.status("me").state == "running"
    runner.stop("me")
    until(lambda: runner.status("me").state != "running")
    assert runner.status("me").state == "stopped"
    until(lambda: runner._process is None)
    runner.start("you", "plan", {"say": ""}, tmp_path / "log")
    until(lambda: runner.status("you").state == "done")


def test_a_process_that_dies_is_reported_with_its_last_words(runner, tmp_path):
    runner.start("me", "die", {"say": ""}, tmp_path / "log")
    until(lambda: runner.status("me").state != "running")
    assert runner.status("me").state == "failed"
    assert "exit code 3. Started again, it goes on. Its last words: out of luck" in runner.status("me").error


def test_a_fault_of_the_worker_is_reported_as_the_last_line_of_its_traceback(tmp_path):
    """In the worker itself, whose thread waits for the end of standard input; and not that of the interpreter's end."""
    fails = """
import atexit, sys
import peft_surgical_app.worker as worker

atexit.register(print, "Fatal Python error: could not acquire lock at interpreter shutdown", file=sys.stderr)

def tune(**arguments):
    raise RuntimeError("mat1 and mat2 cannot be multiplied")

worker.tune = tune
worker.work()
"""
    runner = Runner(command=(sys.executable, "-c", fails))
    runner.start("me", "tune", {}, tmp_path / "log")
    until(lambda: runner.status("me").state != "running", 120)
    told = "exit code 1. Started again, it goes on. Its last words: RuntimeError: mat1 and mat2 cannot be multiplied"
    assert runner.status("me").error.endswith(told)
    assert "Traceback (most recent call last)" in (tmp_path / "log").read_text(encoding="utf-8")


def test_a_job_that_takes_too_long_is_stopped(tmp_path):
    runner = Runner(minutes=0.01, command=(sys.executable, "-c", SPEAKER))
    runner.start("me", "wait", {"say": ""}, tmp_path / "log")
    until(lambda: runner.status("me").state != "running")
    assert runner.status("me").lines[-1] == "warning: stopped, because the time for one run is over"


def test_the_worker_tells_what_the_command_line_would(tmp_path):
    events = []
    arguments = {"network": "test_resnet", "data": str(photographs(tmp_path / "p")), "target": "block1", **SMALL}
    job = {"kind": "plan", "arguments": {**arguments, "output": str(tmp_path / "plan")}}
    carry_out(job, lambda **event: events.append(event))
    assert [list(event) for event in events] == [["plan"], ["ended"]]
    assert "batches of 8, 1 epoch" in events[0]["plan"]
    job = {"kind": "tune", "arguments": {**arguments, "output": str(tmp_path / "tuned")}}
    events.clear()
    carry_out(job, lambda **event: events.append(event))
    assert events[-1] == {"ended": "done"}
    assert {"done": 1, "total": 1} in events
    assert any("seed 0, block1 at 0.001: epoch 1 of 1, validation" in event.get("line", "") for event in events)
    assert (tmp_path / "tuned" / "report.json").is_file()


@pytest.mark.parametrize(
    ("change", "says"),
    [({"data": "nowhere"}, "nowhere does not exist"), ({"target": "blok1"}, "'blok1'"), ({"epochs": 0}, "epochs")],
)
def test_errors_of_the_package_are_told_as_their_sentence(tmp_path, change, says):
    events = []
    given = {
        "network": "test_resnet",
        "data": str(photographs(tmp_path / "p")),
        "output": str(tmp_path / "out"),
        **SMALL,
    }
    carry_out({"kind": "tune", "arguments": {**given, **change}}, lambda **event: events.append(event))
    assert says in events[-1]["error"]


def test_a_plan_is_what_tuning_begins_with_and_trains_nothing(tmp_path):
    class Noting(Watch):
        def __init__(self):
            self.plans = []

        def note(self, text):
            self.plans.append(text)

    watch, data = Noting(), photographs(tmp_path / "p")
    plan = plan_tuning("test_resnet", data, "head", output=tmp_path / "a", **SMALL)
    assert not (tmp_path / "a" / "ledger.jsonl").exists()
    tune("test_resnet", data, "head", output=tmp_path / "a", watch=watch, **SMALL)
    assert watch.plans == [plan]
    assert len(plan.splitlines()) == 4


# --- results ---


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    place = tmp_path_factory.mktemp("tuned")
    data = photographs(place / "p")
    tune("test_resnet", data, "block1", output=place / "out", test=6, watch=Watch(), **{**SMALL, "lr": [1e-3, 1e-4]})
    return place / "out", data


def test_results_are_those_of_the_report(tuned):
    folder, data = tuned
    report = outcome.Report.load(folder / "report.json")
    assert "block1 at learning rate" in outcome.gate_html(report)
    accuracy = report.find("accuracy", "test")
    assert f"<td>accuracy</td><td>test</td><td>{100 * accuracy.value:.1f}</td>" in outcome.accuracy_html(report)
    candidates = outcome.candidates_html(folder)
    assert candidates.count("<tr>") == 3
    assert "block1 at 0.001" in candidates
    classes = outcome.classes_html(report)
    counts = report.settings["test"]["confusion"]
    assert sum(map(sum, counts)) == 6
    for row in counts:
        assert all(f">{count}</td>" in classes for count in row if count)
    mistakes = outcome.read_mistakes(folder)
    assert len(mistakes) == report.settings["test"]["mistakes"]
    shown = outcome.mistakes_html(folder, data)
    assert shown.count("data:image/jpeg") == len(mistakes)
    assert "data:image/png" in outcome.figure_html(folder)


def test_a_mistake_whose_picture_lies_elsewhere_is_shown_without_it(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.png").write_bytes(picture())
    (tmp_path / "mistakes.csv").write_text(
        "file,label,predicted,confidence\n../secret.png,<b>fog</b>,frost,0.9\n", encoding="utf-8"
    )
    shown = outcome.mistakes_html(tmp_path, tmp_path / "data")
    assert "data:image" not in shown
    assert "&lt;b&gt;fog&lt;/b&gt;, taken for frost (90%)" in shown


def test_the_zip_file_holds_an_adapter_that_loads_and_no_place_of_the_photographs(tuned, tmp_path):
    from peft import PeftModel

    from peft_surgical.bases import load_base

    folder, data = tuned
    with zipfile.ZipFile(outcome.zip_adapter(folder, tmp_path / "a.zip")) as archive:
        archive.extractall(tmp_path / "a")
    assert not any(str(data) in file.read_text(errors="replace") for file in (tmp_path / "a").iterdir())
    report = outcome.Report.load(tmp_path / "a" / "report.json")
    base = load_base(report.model, **report.settings["open"])
    PeftModel.from_pretrained(base.model, tmp_path / "a")
    with pytest.raises(DataError, match="holds no adapter"):
        outcome.zip_adapter(tmp_path, tmp_path / "b.zip")


def test_base_and_tuned_network_are_compared_as_they_predict(tuned):
    folder, data = tuned
    image = PIL.open(data / "fog" / "3.png").convert("RGB")
    shown = outcome.Predictor().compare_html(folder, image)
    assert "only the tuned network can say" in shown  # the head is new
    assert shown.count("<td>") == 4
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert report["settings"]["open"]["head"] == "new"


# --- what the buttons do ---


@pytest.fixture
def do(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "cache").mkdir()
    settings = AppSettings(tmp_path / "root", models=("test_resnet",), any_model=False, own_login=False)
    found = Handlers(settings, tmp_path / "cache")
    found.runner = Runner(command=(sys.executable, "-c", SPEAKER.replace('["say"]', '["target"]')))
    yield found
    found.runner.close()


FIELDS = ("", "test_resnet", "block1", 2, 0.2, "1e-3", None, None, False, 0)


def test_from_upload_to_results(do, tuned, tmp_path):
    visitor = do.workspaces.of("").token
    with pytest.raises(DataError, match="there are no photographs yet"):
        do.start(visitor, "tune", *FIELDS)
    file = zipped(tmp_path / "a.zip", {f"{name}/1.png": picture() for name in ("fog", "frost")})
    news, counts = do.add_archive(visitor, str(file))
    assert "2 images were added." in news
    assert "2 photographs in 2 folders: fog 1, frost 1" in counts
    assert do.results(visitor) is do.download(visitor) is None
    do.start(visitor, "tune", *FIELDS)
    until(lambda: do.runner._process is None)
    assert do.status(visitor).state == "done"
    assert "<li>block1</li>" in plan_html(do.status(visitor))
    _, output = do.workspaces.of(visitor).last()
    output.parent.mkdir()
    output.symlink_to(tuned[0])
    assert "Which class is taken for which" in do.results(visitor)
    assert zipfile.is_zipfile(do.download(visitor))
    stranger = do.workspaces.of("").token
    assert do.results(stranger) is do.download(stranger) is do.status(stranger) is None
    do.start(visitor, "wait", *FIELDS)
    with pytest.raises(DataError, match="a run is reading these photographs"):
        do.clear(visitor)
    do.stop(visitor)
    until(lambda: do.runner._process is None)
    assert do.status(visitor).state == "stopped"
    with pytest.raises(ConfigError, match="give a token of the Hub"):
        do.push(visitor, "me/x", "mit", "", True, "")
    assert "No photographs yet" in do.clear(visitor)[1]
    with pytest.raises(DataError, match="there is no finished run yet"):
        do.push(stranger, "me/x", "mit", "", True, "hf_x")


def test_the_same_settings_go_on_in_the_same_folder_and_others_do_not(do, tmp_path):
    visitor = do.workspaces.of("").token
    do.add_archive(visitor, str(zipped(tmp_path / "a.zip", {"a/1.png": picture()})))
    places = []
    for epochs in (2, 2, 3):
        do.start(visitor, "tune", *FIELDS[:3], epochs, *FIELDS[4:])
        until(lambda: do.runner._process is None)
        places.append(do.workspaces.of(visitor).last()[1])
    assert places[0] == places[1] != places[2]


def test_other_photographs_are_tuned_on_in_another_folder(do, tmp_path):
    visitor = do.workspaces.of("").token
    (tmp_path / "1.png").write_bytes(picture())
    do.add_images(visitor, "cat", [str(tmp_path / "1.png")])

    def started():
        do.start(visitor, "tune", *FIELDS)
        until(lambda: do.runner._process is None)
        return do.workspaces.of(visitor).last()[1]

    first = started()
    how = {"seed": 0, "method": "block1", "lr": 1e-3}
    Ledger(first / outcome.LEDGER).append(how, {"validation": 0.5, "cost": 8})
    assert "block1 at 0.001" in do.candidates(visitor)
    assert started() == first
    do.add_images(visitor, "cat", [str(tmp_path / "1.png")])
    second = started()
    assert second != first
    assert do.candidates(visitor) == ""
    do.clear(visitor)
    (tmp_path / "1.png").write_bytes(picture((1, 2, 3)))
    for _ in range(2):  # of the same names
        do.add_images(visitor, "cat", [str(tmp_path / "1.png")])
    assert started() not in (first, second)


def test_where_nothing_was_tuned_there_is_nothing_to_compare_or_push(do, tmp_path):
    visitor = do.workspaces.of("").token
    data = photographs(tmp_path / "p")
    tune("test_resnet", data, "none", output=tmp_path / "out", watch=Watch(), weights="random", cpu=True)
    do.workspaces.of(visitor).remember(data, tmp_path / "out")
    assert "there is no adapter" in do.results(visitor)
    assert do.download(visitor) is None
    (tmp_path / "1.png").write_bytes(picture())
    with pytest.raises(DataError, match=r"nothing was tuned.*there is no adapter to compare or push"):
        do.compare(visitor, str(tmp_path / "1.png"))
    with pytest.raises(DataError, match="nothing was tuned"):
        do.push(visitor, "me/x", "mit", "", True, "hf_x")


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (0, "/etc", "folders of this machine are not read"),
        (1, "other/model", "is no network that can be used here"),
        (3, 0, "Epochs: 0 is no whole number from 1"),
        (3, 2.5, "Epochs: 2.5 is no whole number"),
        (5, "fast", "'fast' are no learning rates"),
    ],
)
def test_what_cannot_be_done_is_refused_before_a_process_is_started(do, tmp_path, place, value, says):
    visitor = do.workspaces.of("").token
    do.add_archive(visitor, str(zipped(tmp_path / "a.zip", {"a/1.png": picture()})))
    fields = list(FIELDS)
    fields[place] = value
    with pytest.raises((ConfigError, DataError), match=says):
        do.start(visitor, "tune", *fields)
    assert do.status(visitor) is None


@pytest.fixture
def logged_in(monkeypatch, tmp_path):
    """A machine with a login of the Hub, in the environment and in a file, whatever becomes of them in a test."""
    (tmp_path / "token").write_text(READ, encoding="utf-8")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, READ)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def test_without_its_login_this_machine_opens_no_private_network(hub, logged_in, tmp_path):  # noqa: F811
    save_for_hf(timm.create_model("test_resnet", num_classes=2), tmp_path / "base", safe_serialization=True)
    files = {file.name: file.read_bytes() for file in (tmp_path / "base").iterdir()}
    hub.add("lab/secret", files, private=True)
    hub.add("lab/public", files)
    assert load_base("lab/secret").classes == 2  # and is in the cache from now on
    forget_login()
    with pytest.raises(DataError, match="lab/secret"):
        load_base("lab/secret")
    assert load_base("lab/public").classes == 2


def test_without_its_login_this_machine_hands_no_token_to_the_worker(logged_in, tmp_path):
    shows = """
import json, os, sys
from huggingface_hub import constants
from huggingface_hub.utils import build_hf_headers
sys.stdin.readline()
print(json.dumps({"plan": build_hf_headers().get("authorization", "none")}), flush=True)
print(json.dumps({"line": f"{'HF_TOKEN' in os.environ} {os.path.basename(constants.HF_HUB_CACHE)}"}), flush=True)
print(json.dumps({"ended": "done"}), flush=True)
"""
    runner = Runner(command=(sys.executable, "-c", shows))

    def sent():
        runner.start("me", "plan", {}, tmp_path / "log")
        until(lambda: runner._process is None)
        return runner.status("me").plan, runner.status("me").lines

    assert sent() == (f"Bearer {READ}", ("True cache",))
    forget_login()
    assert sent() == ("none", ("False cache-public",))


def test_rates_are_typed_with_commas_or_blanks():
    assert numbers_of("1e-3, 1e-4") == numbers_of("1e-3 1e-4") == [1e-3, 1e-4]
    assert numbers_of(" ") is None


def test_messages_name_the_fields_of_the_page():
    assert in_labels('x is broken; on_broken="skip" leaves it out') == (
        'x is broken; "Leave out broken images" "skip" leaves it out'
    )
    assert in_labels("lr=[1e-3, 2] and depth=3") == '"Learning rates" 1e-3, 2 and depth=3'


def test_what_strangers_wrote_makes_no_html():
    assert "<img" not in status_html(RunStatus("tune", "failed", error="<img src=x>"))
    assert "<img" not in status_html(RunStatus("tune", plan="p", now="<img src=x>"))
    assert "<img" not in plan_html(RunStatus("tune", plan="<img src=x>"))


def test_the_command_says_what_to_install_where_gradio_is_missing(monkeypatch, capsys):
    pytest.importorskip("typer")
    from peft_surgical_cli import app as cli

    monkeypatch.setitem(sys.modules, "gradio", None)
    assert cli.run(["app"]) == 2
    said = capsys.readouterr().err
    assert said == 'peft-surgical: the page in the browser needs gradio: pip install "peft-surgical[app]"\n'


def test_a_stopped_worker_leaves_a_run_that_goes_on(tmp_path):
    """The interrupt comes between two epochs; the same job then ends as one that was never stopped."""
    given = {
        "network": "test_resnet",
        "data": str(photographs(tmp_path / "p")),
        "target": "block1",
        **SMALL,
        "epochs": 3,
    }
    stopped: list = []

    def stop_after_an_epoch(**event):
        stopped.append(event)
        if "epoch 2 of 3" in event.get("line", "") and threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt

    carry_out({"kind": "tune", "arguments": {**given, "output": str(tmp_path / "a")}}, stop_after_an_epoch)
    assert stopped[-1] == {"ended": "stopped"}
    events: list = []
    for name in ("a", "b"):
        carry_out(
            {"kind": "tune", "arguments": {**given, "output": str(tmp_path / name)}}, lambda **e: events.append(e)
        )
    assert any("goes on after epoch" in event.get("line", "") for event in events)
    one, other = (Path(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab")
    assert one == other
