"""The page in a real browser, without a screen: from the upload to the adapter, by keyboard, and what it asks for."""

import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("datasets")
timm = pytest.importorskip("timm")
PIL = pytest.importorskip("PIL.Image")
gradio = pytest.importorskip("gradio", reason='the page needs the extra "app"')

from peft import PeftModel  # noqa: E402

from peft_surgical.bases import load_base, save_checkpoint  # noqa: E402
from peft_surgical.evaluation import Report  # noqa: E402
from peft_surgical_app import page as page_module  # noqa: E402
from peft_surgical_app.workspace import AppSettings  # noqa: E402

ROOT = Path(__file__).parents[1]
SPACE = ROOT / "recipes" / "space"
SIZES = {"desktop": (1280, 900), "phone": (400, 800)}
LABELLED = "document.querySelectorAll('input:not([type=file]):not([hidden]), textarea, select')"

NAME = """(e => e.getAttribute('aria-label') || [...(e.labels ?? [])].map(l => l.innerText).join() || e.innerText || '')
(document.activeElement)"""


def photographs():
    """Three classes of real photographs, eight each: webcam pictures, or crops of those that scikit-learn brings."""
    shared = os.environ.get("PEFT_SURGICAL_SHARED")
    webcam = Path(shared or "", "data", "office_caltech", "webcam")
    if shared and webcam.is_dir():
        return {name: sorted((webcam / name).iterdir())[:8] for name in ("bike", "mug", "projector")}
    images = pytest.importorskip("sklearn.datasets").load_sample_images().images
    found = {}
    for name, image, top in (("roof", images[0], 0), ("tree", images[0], 250), ("flower", images[1], 100)):
        found[name] = [PIL.fromarray(image[top : top + 96, 60 * i : 60 * i + 96]) for i in range(8)]
    return found


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The address of the page of ``peft-surgical app``, which offers one small network, and a zip file for it."""
    place = tmp_path_factory.mktemp("page")
    save_checkpoint("timm", timm.create_model("test_resnet", num_classes=1000), place / "base")
    with zipfile.ZipFile(place / "photographs.zip", "w") as archive:
        for name, images in photographs().items():
            for i, image in enumerate(images):
                if isinstance(image, Path):
                    archive.write(image, f"{name}/{i}{image.suffix}")
                else:
                    with archive.open(f"{name}/{i}.png", "w") as out:
                        image.save(out, "PNG")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "peft_surgical", "app", "--models", str(place / "base"), "--port", port]
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    server = subprocess.Popen(
        [*command, "--output", str(place / "root"), "--no-browser"],
        env={**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        text=True,
    )
    said = server.stdout.readline()
    try:
        assert said.startswith(f"The page is at http://127.0.0.1:{port}"), said
        yield f"http://127.0.0.1:{port}/", place / "photographs.zip"
    finally:
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=60)


@pytest.fixture(scope="module")
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("needs a Chromium on the path: apt-get install chromium")
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(served, chromium):
    """A function from the name of a size to a fresh visitor's page, and the addresses that pages asked for."""
    asked, contexts = [], []

    def visit(size):
        wide, high = SIZES[size]
        context = chromium.new_context(viewport={"width": wide, "height": high}, accept_downloads=True)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(300_000)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(served[0])
        page.get_by_text("No photographs yet").wait_for()
        return page

    yield visit, asked
    for context in contexts:
        context.close()


@pytest.mark.slow
def test_from_the_upload_to_the_downloaded_adapter(served, opened, tmp_path):
    visit, asked = opened
    page = visit("desktop")
    page.set_input_files("input[type=file] >> nth=0", served[1])
    page.get_by_text("24 images were added.").wait_for()
    page.get_by_label("Epochs").fill("2")
    target = page.get_by_label("What to tune")
    target.fill("blok1")
    target.press("Enter")
    page.get_by_role("button", name="Tune", exact=True).click()
    page.get_by_role("alert").get_by_text("blok1").wait_for()  # as a sentence, and the page goes on
    target.fill("block1")
    target.press("Enter")
    page.get_by_role("button", name="Show the plan").click()
    page.get_by_text("The plan is ready").wait_for()
    assert "4 to test on" not in page.content()
    assert re.search(r"images: \d+ to tune on, \d+ to choose with, \d+ to test on", page.content())
    page.get_by_role("button", name="Tune", exact=True).click()
    page.get_by_text("The run is ready").wait_for()
    page.get_by_text("block1 at learning rate").wait_for()
    page.get_by_text("Which class is taken for which").wait_for()
    assert "Only the target auto measures an interval" in page.content()
    with page.expect_download() as download:
        page.get_by_text("Download the adapter (zip)").click()
    download.value.save_as(tmp_path / "adapter.zip")
    with zipfile.ZipFile(tmp_path / "adapter.zip") as archive:
        archive.extractall(tmp_path / "adapter")
    report = Report.load(tmp_path / "adapter" / "report.json")
    base = load_base(report.model, **report.settings["open"])
    assert PeftModel.from_pretrained(base.model, tmp_path / "adapter").peft_config["default"].target == "block1"
    page.reload()  # the same visitor finds the result again, also where a plan was the last that was asked for
    page.get_by_text("Which class is taken for which").wait_for()
    page.get_by_role("button", name="Show the plan").click()
    page.get_by_text("The plan is ready").wait_for()
    page.reload()
    page.get_by_text("Which class is taken for which").wait_for()
    page.get_by_text("Download the adapter (zip)").wait_for()
    page.get_by_role("button", name="Compare base and tuned").click()
    with zipfile.ZipFile(served[1]) as archive:
        image = archive.extract(archive.namelist()[0], tmp_path)
    page.locator("input[type=file]").last.set_input_files(image)
    page.get_by_role("button", name="Compare", exact=True).click()
    page.get_by_text("only the tuned network can say").wait_for()
    stranger = visit("phone")
    stranger.wait_for_timeout(1500)
    assert "Which class is taken for which" not in stranger.content()
    elsewhere = [url for url in asked if not url.startswith((served[0], "data:", "blob:"))]
    assert elsewhere == []


@pytest.mark.parametrize("own_login", [True, False])
def test_who_serves_others_lends_no_login(tmp_path, monkeypatch, own_login):
    forgot = []
    monkeypatch.setattr(page_module, "forget_login", lambda: forgot.append(True))
    nothing = SimpleNamespace(block_thread=lambda: None, close=lambda: None)
    monkeypatch.setattr(page_module, "build_page", lambda *given: (nothing, SimpleNamespace(runner=nothing)))
    monkeypatch.setattr(page_module, "launch", lambda *page, **how: ("", "", ""))
    monkeypatch.setattr(os, "environ", {**os.environ})
    page_module.serve_page(AppSettings(tmp_path, own_login=own_login))
    assert bool(forgot) is not own_login


@pytest.mark.slow
def test_a_run_is_stopped_and_goes_on(served, opened):
    page = opened[0]("desktop")
    page.set_input_files("input[type=file] >> nth=0", served[1])
    page.get_by_text("24 images were added.").wait_for()
    page.get_by_label("Epochs").fill("200")
    target = page.get_by_label("What to tune")
    target.fill("all")
    target.press("Enter")
    page.get_by_role("button", name="Tune", exact=True).click()
    page.get_by_text(re.compile(r"\d+\.\d of \d+ epochs: seed 0, all at")).wait_for()
    page.get_by_role("button", name="What has happened").click()
    page.wait_for_function("[...document.querySelectorAll('textarea')].some(e => e.value.includes('epoch 3 of'))")
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("The run was stopped.").wait_for()
    page.get_by_role("button", name="Tune", exact=True).click()
    page.wait_for_function(
        "[...document.querySelectorAll('textarea')].some(e => e.value.includes('goes on after epoch'))"
    )
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("The run was stopped.").wait_for()


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_it_fits_and_every_control_has_a_name_and_is_reached_by_keyboard(opened, size):
    page = opened[0](size)
    page.get_by_role("button", name="More settings").click()
    page.get_by_label("Learning rates").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0]
    named = (
        "[...%s].filter(e => e.offsetParent).map(e => [e.labels?.length, e.getAttribute('aria-label'), e.outerHTML])"
    )
    nameless = [html for labels, label, html in page.evaluate(named % LABELLED) if not labels and not label]
    assert nameless == []
    page.evaluate("document.activeElement.blur()")
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        name = page.evaluate(NAME)
        reached.add(" ".join(name.split("\n")[0].split()))
    wanted = {"A zip file", "Network", "What to tune", "Epochs", "Learning rates", "Seed", "Show the plan", "Tune"}
    assert wanted <= reached
    page.get_by_role("button", name="Tune", exact=True).focus()
    page.keyboard.press("Enter")
    page.get_by_role("alert").get_by_text("there are no photographs yet").wait_for()


@pytest.mark.slow
def test_no_file_of_the_machine_is_served(served):
    address = served[0].rstrip("/")
    secret = served[1]
    for path in ("/etc/passwd", str(secret), str(ROOT / "README.md"), "..%2F..%2Fetc%2Fpasswd"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{address}/gradio_api/file={path}")
        assert refused.value.code in (403, 404)
        refused.value.close()


def test_the_space_is_what_the_hub_reads_and_offers_no_path_and_no_token():
    yaml = pytest.importorskip("yaml")
    _, front, _ = (SPACE / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    card = yaml.safe_load(front)
    assert card["sdk"] == "gradio"
    assert (SPACE / card["app_file"]).is_file()
    assert len(card["short_description"]) <= 60
    pinned = re.search(r"^gradio==(.*)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert card["sdk_version"] == pinned[1]
    spec = importlib.util.spec_from_file_location("space_app", SPACE / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.SETTINGS.folders is None
    assert not module.SETTINGS.own_login
    assert not module.SETTINGS.any_model
