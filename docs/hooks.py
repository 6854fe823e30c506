"""What MkDocs does not do by itself: pages and files that lie outside of ``docs/``, and notebooks as pages.

MkDocs builds a site from one folder. The README, the recipes' index and the guide for contributors stay where people
look for them; here they become pages of the site, under their paths in the repository. Whatever else a page links to (a
recipe, a benchmark, a licence) is copied beside them, so that a link leads to the same file on the site as in the
repository.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(\]\()(?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")
"""A Markdown link or picture whose address is a path: what is before it, the path, and what stands after ``#``."""


def address(path: str) -> str:
    """The path on the site of a file, or of a folder by its README, that has this path in the repository."""
    if (ROOT / path).is_dir():
        path = posixpath.join(path, "README.md")
    return path.removeprefix("docs/")


def place(source: str) -> str:
    """The path in the repository of a file of the site."""
    return f"docs/{source}" if (ROOT / "docs" / source).is_file() else source


def linked(text: str, path: str) -> list[str]:
    """Files and folders of the repository, as paths in it, to which the text of the file at ``path`` links."""
    folder = posixpath.dirname(path)
    paths = [posixpath.normpath(posixpath.join(folder, match[2])) for match in LINK.finditer(text)]
    return [found for found in paths if not found.startswith("..") and (ROOT / found).exists()]


def from_notebook(text: str) -> str:
    """A notebook as Markdown: its texts, and its code in fences."""
    cells = json.loads(text)["cells"]
    parts = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    return "\n\n".join(f"```python\n{source}\n```" if kind == "code" else source for kind, source in parts)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what pages link to, and what those pages link to in turn."""
    todo = ["README.md", *(place(file.src_uri) for file in files.documentation_pages())]
    seen = set(todo)
    while todo:
        path = todo.pop()
        source, file = address(path), ROOT / path
        if path.endswith(".ipynb"):
            content = from_notebook(file.read_text(encoding="utf-8"))
            files.append(File.generated(config, source.replace(".ipynb", ".md"), content=content))
        if source not in files.src_uris:
            files.append(File.generated(config, source, abs_src_path=str(file)))
        if path.endswith(".md"):
            found = [address(link) for link in linked(file.read_text(encoding="utf-8"), path)]
            new = {place(link) for link in found} - seen
            seen |= new
            todo += sorted(new)
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Lead links that leave ``docs/``, or enter it, to the places on the site."""
    source = page.file.src_uri
    folder = posixpath.dirname(place(source))

    def moved(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, match[2]))
        if path.startswith("..") or not (ROOT / path).exists():
            return match[0]
        target = posixpath.relpath(address(path), posixpath.dirname(source) or ".")
        return f"{match[1]}{target}{match[3] or ''})"

    return LINK.sub(moved, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Take away the ``::`` with which docstrings announce an example, which Markdown would show."""
    return html.replace("<p>::</p>\n", "").replace("::</p>", ":</p>")
