"""A diagnosis as one HTML page that stands alone: its pictures and curves are in it, and it loads nothing."""

from __future__ import annotations

import html
from collections.abc import Sequence

from ..evaluation import Interval
from ..markup import html_table, html_tag, jpeg_address
from .diagnose import Seen, least_sure
from .verdict import ALPHA, KINDS, Diagnosis

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1b; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem .2rem 0; text-align: left; }
.verdict { border-left: .4rem solid #1f5fa8; background: #eef4fb; padding: .8rem 1rem; }
figure { display: inline-block; margin: .3rem; width: 8.5rem; font-size: .75rem; overflow-wrap: anywhere; }
svg text { font: 12px system-ui, sans-serif; }
"""
_DRIFT = (
    "Energy distance between the features of the new images and those of the source, 0 without a shift. Blue: more "
    f"than chance explains, p at most {ALPHA:g}; grey: no more."
)


def to_html(found: Diagnosis, seen: Seen | None = None, pictures: int = 12) -> str:
    """The page.

    Args:
        found: What `diagnose` found.
        seen: The images, to show those to label next, or the least sure ones; None shows none.
        pictures: How many.
    """
    parts = [f"<h1>What has shifted for {html.escape(found.model)}</h1>", _verdict(found)]
    if found.drift:
        parts += ["<h2>How far each block's features have moved</h2>", f"<p>{_DRIFT}</p>", _bars(found)]
    parts += ["<h2>Numbers</h2>", _numbers(found)]
    if found.scores:
        scores = sorted(found.scores.items(), key=lambda one: -one[1])
        parts += ["<h2>RGN</h2>", html_table(("block", "RGN"), [(name, f"{value:.3g}") for name, value in scores])]
    if found.curve:
        parts += ["<h2>What labels bring</h2>", "<p>Accuracy of a probe on the last features.</p>", _curve(found)]
    if found.gain:
        rows = [(str(count), points(one)) for count, one in found.gain.items()]
        note = "Accuracy of the probe with images chosen by clusters, minus with random ones, in points."
        parts += ["<h2>Which images to label</h2>", f"<p>{note}</p>", html_table(("labels", "gain"), rows)]
    if seen is not None:
        parts += _pictures(found, seen, pictures)
    if found.notes:
        parts += [
            "<h2>Notes</h2>",
            "<ul>",
            *(f"<li>{html.escape(_sentence(note))}</li>" for note in found.notes),
            "</ul>",
        ]
    body = "\n".join(parts)
    title = html_tag("title", f"{html.escape(found.model)}: diagnosis")
    meta = html_tag("meta", charset="utf-8") + html_tag("meta", name="viewport", content="width=device-width")
    head = html_tag("head", meta + title + html_tag("style", _STYLE))
    return f"<!doctype html>\n{html_tag('html', head + html_tag('body', body), lang='en')}\n"


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
    return html_tag("p", f"<b>{html.escape(_sentence(KINDS[found.kind]))}</b>{sure}{advice}", class_="verdict")


def _sentence(words: str) -> str:
    return f"{words[:1].upper()}{words[1:]}{'' if words.endswith('.') else '.'}"


def _numbers(found: Diagnosis) -> str:
    confidence = ["-" if one is None else f"{100 * one:.1f}%" for one in found.confidence]
    rows = [
        ("images", str(found.images), str(found.source_images or "-")),
        ("mean confidence", *confidence),
        ("accuracy (95% interval)", share(found.accuracy), share(found.source_accuracy)),
        ("probe on the last features", share(found.probe), "-"),
    ]
    return html_table(("", "here", "source"), rows)


def _bars(found: Diagnosis) -> str:
    most = max(1e-9, *(one.effect for one in found.drift))
    parts = []
    for number, one in enumerate(found.drift):
        top, long = 24 * number, 170 * max(one.effect, 0) / most
        colour = "#1f5fa8" if one.p <= ALPHA else "#b8c4d0"
        parts.append(html_tag("text", html.escape(one.name), x=0, y=top + 16))
        parts.append(html_tag("rect", x=80, y=top + 4, width=float(long), height=16, fill=colour))
        parts.append(html_tag("text", f"{one.effect:.3f}, p {one.p:.3f}", x=float(86 + long), y=top + 16))
    return _svg(350, 24 * len(found.drift), "drift of each block", parts)


def _svg(wide: int, high: int, label: str, parts: Sequence[str]) -> str:
    svg = html_tag("svg", "".join(parts), width=wide, height=high, role="img", aria_label=label)
    return html_tag("div", svg, class_="wide")


def _curve(found: Diagnosis) -> str:
    def height_of(share: float) -> float:
        return 190 - 170.0 * share

    most = found.curve[-1].images
    parts, line = [], []
    for part in (0.0, 0.5, 1.0):
        y = height_of(part)
        parts.append(html_tag("text", f"{part:.0%}", x=0, y=y + 4))
        parts.append(html_tag("line", x1=45, x2=490, y1=y, y2=y, stroke="#ddd"))
    for one in found.curve:
        x, (y, low, high) = 50 + 420 * one.images / most, (height_of(value) for value in one.accuracy)
        line.append(f"{x:.1f},{y:.1f}")
        parts.append(html_tag("line", x1=x, x2=x, y1=low, y2=high, stroke="#1f5fa8"))
        parts.append(html_tag("circle", cx=x, cy=y, r=3, fill="#1f5fa8"))
        parts.append(html_tag("text", str(one.images), x=x - 8, y=208))
    parts.append(html_tag("polyline", points=" ".join(line), fill="none", stroke="#1f5fa8"))
    return _svg(520, 220, "accuracy by number of labels", parts)


def _pictures(found: Diagnosis, seen: Seen, count: int) -> list[str]:
    place = {file: number for number, file in enumerate(seen.images.files)}
    if found.label_next:
        title, rows = "Label these next", [place[file] for file in found.label_next[:count]]
    else:
        title, rows = "The images it is least sure of", list(least_sure(seen.features, count))
    figures = [
        html_tag(
            "figure",
            html_tag("img", alt="", src=jpeg_address(seen.images.read(row)))
            + html_tag("figcaption", html.escape(seen.images.files[row])),
        )
        for row in rows
    ]
    return [f"<h2>{title}</h2>", "<div>", *figures, "</div>"]
