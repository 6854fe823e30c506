"""A diagnosis as one HTML page that stands alone: its pictures and curves are in it, and it loads nothing."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

from ..evaluation import Interval
from .diagnose import Seen, least_sure
from .verdict import ALPHA, KINDS, Diagnosis

_SIDE = 96
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1b; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem .2rem 0; text-align: left; }
.verdict { border-left: .4rem solid #1f5fa8; background: #eef4fb; padding: .8rem 1rem; }
figure { display: inline-block; margin: .3rem; width: 7rem; font-size: .75rem; overflow-wrap: anywhere; }
svg text { font: 12px system-ui, sans-serif; }
"""


def to_html(found: Diagnosis, seen: Seen | None = None, pictures: int = 12) -> str:
    """The page.

    Args:
        found: What `diagnose` found.
        seen: The images, to show those to label next, or the least sure ones; None shows none.
        pictures: How many.
    """
    parts = [f"<h1>What has shifted for {html.escape(found.model)}</h1>", _verdict(found)]
    if found.drift:
        parts += ["<h2>How far each block's features have moved</h2>", _bars(found)]
    parts += ["<h2>Numbers</h2>", _numbers(found)]
    if found.scores:
        scores = sorted(found.scores.items(), key=lambda one: -one[1])
        parts += ["<h2>RGN</h2>", _table(("block", "RGN"), [(name, f"{value:.3g}") for name, value in scores])]
    if found.curve:
        parts += ["<h2>What labels bring</h2>", "<p>Accuracy of a probe on the last features.</p>", _curve(found)]
    if found.gain:
        rows = [(str(count), points(one)) for count, one in found.gain.items()]
        note = "Accuracy of the probe with images chosen by clusters, minus with random ones, in points."
        parts += ["<h2>Which images to label</h2>", f"<p>{note}</p>", _table(("labels", "gain"), rows)]
    if seen is not None:
        parts += _pictures(found, seen, pictures)
    if found.notes:
        parts += ["<h2>To read this</h2>", "<ul>", *(f"<li>{html.escape(note)}</li>" for note in found.notes), "</ul>"]
    body = "\n".join(parts)
    title = _tag("title", f"{html.escape(found.model)}: diagnosis")
    head = _tag("head", _tag("meta", charset="utf-8") + title + _tag("style", _STYLE))
    return f"<!doctype html>\n{_tag('html', head + _tag('body', body), lang='en')}\n"


_VOID = ("meta", "img")


def _tag(name: str, content: str = "", **attributes: Any) -> str:
    """An element; ``content`` is HTML, attributes are plain, with ``_`` for ``-`` and floats to a tenth of a pixel."""
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
    texts = {key: f"{value:.1f}" if isinstance(value, float) else str(value) for key, value in given.items()}
    opened = " ".join([name, *(f'{key}="{html.escape(value)}"' for key, value in texts.items())])
    return f"<{opened}>" if name in _VOID else f"<{opened}>{content}</{name}>"


def share(value: Interval | None) -> str:
    """A fraction with its interval, in percent; ``-`` for None."""
    if value is None:
        return "-"
    return f"{100 * value.value:.1f}% ({100 * value.low:.1f} to {100 * value.high:.1f})"


def points(value: Interval) -> str:
    """A difference of fractions with its interval, in points."""
    return f"{100 * value.value:+.1f} ({100 * value.low:+.1f} to {100 * value.high:+.1f})"


def _verdict(found: Diagnosis) -> str:
    sure = "" if found.sure is None else f" {found.sure:.0%} of random halves of the images say the same."
    advice = f" Suggested target: <b>{html.escape(found.target)}</b>." if found.target else ""
    return _tag("p", f"<b>{html.escape(KINDS[found.kind])}</b>.{sure}{advice}", class_="verdict")


def _numbers(found: Diagnosis) -> str:
    confidence = ["-" if one is None else f"{100 * one:.1f}%" for one in found.confidence]
    rows = [
        ("images", str(found.images), str(found.source_images or "-")),
        ("mean confidence", *confidence),
        ("accuracy (95% interval)", share(found.accuracy), share(found.source_accuracy)),
        ("probe on the last features", share(found.probe), "-"),
    ]
    return _table(("", "here", "source"), rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

    return f"<table>{row(header, 'th')}{''.join(row(cells, 'td') for cells in rows)}</table>"


def _bars(found: Diagnosis) -> str:
    most = max(1e-9, *(one.effect for one in found.drift))
    parts = []
    for number, one in enumerate(found.drift):
        top, long = 24 * number, 300 * max(one.effect, 0) / most
        colour = "#1f5fa8" if one.p <= ALPHA else "#b8c4d0"
        parts.append(_tag("text", html.escape(one.name), x=0, y=top + 16))
        parts.append(_tag("rect", x=110, y=top + 4, width=float(long), height=16, fill=colour))
        parts.append(_tag("text", f"{one.effect:.3f}, p {one.p:.3f}", x=float(116 + long), y=top + 16))
    return _svg(560, 24 * len(found.drift), "drift of each block", parts)


def _svg(wide: int, high: int, label: str, parts: Sequence[str]) -> str:
    return _tag("svg", "".join(parts), width=wide, height=high, role="img", aria_label=label)


def _curve(found: Diagnosis) -> str:
    def height_of(share: float) -> float:
        return 190 - 170.0 * share

    most = found.curve[-1].images
    parts, line = [], []
    for part in (0.0, 0.5, 1.0):
        y = height_of(part)
        parts.append(_tag("text", f"{part:.0%}", x=0, y=y + 4))
        parts.append(_tag("line", x1=45, x2=490, y1=y, y2=y, stroke="#ddd"))
    for one in found.curve:
        x, (y, low, high) = 50 + 420 * one.images / most, (height_of(value) for value in one.accuracy)
        line.append(f"{x:.1f},{y:.1f}")
        parts.append(_tag("line", x1=x, x2=x, y1=low, y2=high, stroke="#1f5fa8"))
        parts.append(_tag("circle", cx=x, cy=y, r=3, fill="#1f5fa8"))
        parts.append(_tag("text", str(one.images), x=x - 8, y=208))
    parts.append(_tag("polyline", points=" ".join(line), fill="none", stroke="#1f5fa8"))
    return _svg(520, 220, "accuracy by number of labels", parts)


def _pictures(found: Diagnosis, seen: Seen, count: int) -> list[str]:
    place = {file: number for number, file in enumerate(seen.images.files)}
    if found.label_next:
        title, rows = "Label these next", [place[file] for file in found.label_next[:count]]
    else:
        title, rows = "The images it is least sure of", list(least_sure(seen.features, count))
    figures = [
        _tag(
            "figure",
            _tag("img", alt="", src=f"data:image/jpeg;base64,{_thumbnail(seen.images.read(row))}")
            + _tag("figcaption", html.escape(seen.images.files[row])),
        )
        for row in rows
    ]
    return [f"<h2>{title}</h2>", "<div>", *figures, "</div>"]


def _thumbnail(image: Any) -> str:
    small = image.copy()
    small.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=80)
    return base64.b64encode(file.getvalue()).decode("ascii")
