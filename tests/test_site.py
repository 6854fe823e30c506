"""The documentation site: a navigation without gaps, a reference that is complete, links and notebooks that work."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import peft_surgical

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "recipes/README.md"))]
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def site():
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def entries(nav):
    for entry in nav:
        for value in entry.values():
            yield from entries(value) if isinstance(value, list) else [value]


def test_every_page_stands_in_the_navigation_once_and_every_entry_is_a_page(site):
    named = list(entries(site["nav"]))
    assert len(named) == len(set(named))
    files = [DOCS / name if (DOCS / name).is_file() else ROOT / name for name in named]
    assert sorted(files) == sorted(PAGES)


def test_the_site_loads_nothing_from_other_hosts(site):
    assert site["theme"]["font"] is False
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert not re.search(r"https?://", text)
    assert not {"extra_css", "extra_javascript", "extra"} & set(site)


def test_the_reference_has_every_public_name_and_every_other_that_pages_name():
    reference = (DOCS / "api.md").read_text(encoding="utf-8")
    shown = re.findall(r"^::: (\S+)$", reference, re.MULTILINE)
    assert len(shown) == len(set(shown))
    assert {f"peft_surgical.{name}" for name in peft_surgical.__all__} <= set(shown)
    for name in shown:
        module, _, attribute = name.rpartition(".")
        assert name == "peft_surgical.errors" or hasattr(importlib.import_module(module), attribute), name
    modules = {name.rpartition(".")[0] for name in shown} | set(shown)
    for page in PAGES:
        for code in re.findall(r"`(peft_surgical\.[\w.]+)`", page.read_text(encoding="utf-8")):
            known = code in shown or code in modules or any(name.startswith(f"{code}.") for name in shown)
            assert known or code == "peft_surgical.experiment.api.RunSettings", f"{page.name}: {code}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_to_a_file_leads_to_one(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for address in re.findall(r"\]\((?!\w+:|#)([^)\s#]+)", text):
        assert (page.parent / address).exists(), f"{page.name}: {address}"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_is_committed_without_what_a_run_leaves(notebook):
    content = json.loads(notebook.read_text(encoding="utf-8"))
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert code
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    assert f"notebooks/{notebook.name}" in (DOCS / "notebooks.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    built = tmp_path / "site"
    assert (built / "index.html").is_file()  # the README
    for page in PAGES[: len(list(DOCS.glob("*.md")))]:
        assert (built / page.name).with_suffix(".html").is_file()
    for notebook in NOTEBOOKS:
        assert (built / "notebooks" / notebook.name).read_bytes() == notebook.read_bytes()
    for file in built.rglob("*.html"):
        text = file.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*\bsrc=\"?(https?:[^\" >]+)", text)
        loaded += re.findall(r"<link[^>]*rel=\"?(?:stylesheet|preconnect)\"?[^>]*href=\"?(https?:[^\" >]+)", text)
        assert not loaded, f"{file.name}: {loaded}"
        assert ">::<" not in text
    reference = (built / "api.html").read_text(encoding="utf-8")
    assert all(f'id="peft_surgical.{name}"' in reference for name in peft_surgical.__all__)


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs_from_top_to_bottom(notebook):
    for needed in ("nbclient", "ipykernel", "sklearn", "matplotlib", "timm"):
        pytest.importorskip(needed)
    # In a process of its own: nbclient's event loop and its warnings stay out of pytest's.
    code = (
        "import sys, nbformat; from nbclient import NotebookClient; "
        "NotebookClient(nbformat.read(sys.argv[1], as_version=4), timeout=900, kernel_name='python3').execute()"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, str(notebook)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
