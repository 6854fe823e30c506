"""A diagnosis as one HTML page that stands alone: its pictures and curves are in it, and it loads nothing."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

from ..evaluation import Interval
from .diagnose import Seen, least_sure
from .verdict import KINDS, Diagnosis

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
    head = f'<meta charset="utf-8"><title>{html.escape(found.model)}: diagnosis</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body>\n{body}\n</body>\n</html>\n'


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
    return f'<p class="verdict"><b>{html.escape(KINDS[found.kind])}</b>.{sure}{advice}</p>'


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
    lines = []
    for number, one in enumerate(found.drift):
        top, width = 24 * number, 300 * max(one.effect, 0) / most
        colour = "#1f5fa8" if one.p <= 0.05 else "#b8c4d0"
        lines.append(
            f'<text x="0" y="{top + 16}">{html.escape(one.name)}</text>'
            f'<rect x="110" y="{top + 4}" width="{width:.1f}" height="16" fill="{colour}"/>'
            f'<text x="{116 + width:.1f}" y="{top + 16}">{one.effect:.3f}, p {one.p:.3f}</text>'
        )
    size = f'width="560" height="{24 * len(found.drift)}"'
    return f'<svg {size} role="img" aria-label="drift of each block">{"".join(lines)}</svg>'


def _curve(found: Diagnosis) -> str:
    most = found.curve[-1].images
    marks, line = [], []
    for one in found.curve:
        x = 50 + 420 * one.images / most
        y, low, high = (
            190 - 170 * min(1.0, max(0.0, value)) for value in (one.accuracy.value, one.accuracy.low, one.accuracy.high)
        )
        line.append(f"{x:.1f},{y:.1f}")
        marks.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="#1f5fa8"/>'
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="#1f5fa8"/>'
            f'<text x="{x - 8:.1f}" y="208">{one.images}</text>'
        )
    axis = "".join(
        f'<text x="0" y="{194 - 170 * part:.0f}">{part:.0%}</text>'
        f'<line x1="45" x2="490" y1="{190 - 170 * part:.0f}" y2="{190 - 170 * part:.0f}" stroke="#ddd"/>'
        for part in (0.0, 0.5, 1.0)
    )
    path = f'<polyline points="{" ".join(line)}" fill="none" stroke="#1f5fa8"/>'
    label = "accuracy by number of labels"
    return f'<svg width="520" height="220" role="img" aria-label="{label}">{axis}{path}{"".join(marks)}</svg>'


def _pictures(found: Diagnosis, seen: Seen, count: int) -> list[str]:
    place = {file: number for number, file in enumerate(seen.images.files)}
    if found.label_next:
        title, rows = "Label these next", [place[file] for file in found.label_next[:count]]
    else:
        title, rows = "The images it is least sure of", list(least_sure(seen.features, count))
    figures = [
        f'<figure><img alt="" src="data:image/jpeg;base64,{_thumbnail(seen.images.read(row))}">'
        f"<figcaption>{html.escape(seen.images.files[row])}</figcaption></figure>"
        for row in rows
    ]
    return [f"<h2>{title}</h2>", "<div>", *figures, "</div>"]


def _thumbnail(image: Any) -> str:
    small = image.copy()
    small.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=80)
    return base64.b64encode(file.getvalue()).decode("ascii")
