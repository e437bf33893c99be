"""The report's pictures as SVG, made of report.json alone: score by depth, order and frequency of removal.

The same figures give the same bytes: fixed ids, no date, letters drawn as paths of matplotlib's own font, and
nobody's matplotlibrc. Colours are Okabe and Ito's, told apart by colour-blind eyes too; line styles and markers
say the same again. The ground is opaque, so that a dark page does not swallow the ink.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from foundation.errors import MissingError
from prune.page import counted, sized

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Found = dict[str, Any]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe & Ito 2008
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", (0, (1, 1.2)), (0, (5, 1, 1, 1, 1, 1)))
INK, PALE, GROUND = "#222222", "#E6E6E6", "#FFFFFF"
BESIDE, SPREAD = 0.09, 0.45  # of a step: from method to method, and all: bars must not hide one another
LABEL_LETTERS = 44  # longer labels go on in a second line

STYLE = {
    "svg.hashsalt": "samovar",
    "svg.fonttype": "path",
    "text.parse_math": False,  # a dollar in a label is a dollar
    "font.family": "DejaVu Sans",
    "font.size": 10.0,
    "figure.facecolor": GROUND,
    "axes.facecolor": GROUND,
    "savefig.facecolor": GROUND,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(found: Found) -> dict[str, bytes]:
    """File name -> SVG. Raises MissingError without matplotlib."""
    return {f"{picture.__name__}.svg": render(picture, found, "svg") for picture in (score, order, frequency)}


def render(picture: Callable[[Found], Figure], found: Found, form: str) -> bytes:
    """The bytes of one picture as `form` ("svg", "png")."""
    with _style():
        figure = picture(found)
        target = io.BytesIO()
        metadata = (
            {"Date": None, "Creator": "Samovar", "Title": figure.get_suptitle()} if form == "svg" else None
        )
        figure.savefig(target, format=form, metadata=metadata)
    return target.getvalue()


@contextmanager
def _style() -> Iterator[None]:
    try:
        import matplotlib
    except ImportError:
        raise MissingError(
            "matplotlib is not installed, and a report has pictures",
            hint='pip install -c constraints.txt "samovar[train]"',
        ) from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def _new(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    """A figure of so many inches with one pair of axes; without pyplot, so no state is left behind."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)  # of the figure: wide labels leave axes narrow
    return figure, figure.add_subplot()


# ------------------------------------------------------------------------------- score against depth


def score(found: Found) -> Figure:
    """Score against layers removed. Bars: 95 % over items; bands: lowest run to highest."""
    methods, dense = found["methods"], found["dense"]
    entries = len(methods) + len(dense)
    figure, axes = _new(8.0, 4.4 + 0.22 * ((entries + 1) // 2), "Score against layers removed")
    lines = [_line(axes, method, place, len(methods)) for place, method in enumerate(methods)]
    deepest = max(row["layers_removed"] for method in methods for row in method["depths"])
    names = [_wrapped(method["label"]) for method in methods]
    for place, name in enumerate(dense):
        lines.append(_dense_line(axes, found, name, place))
        model = found["models"][name]
        names.append(_wrapped(f"{name}: {sized(model['parameters'])} parameters"))
    axes.set_xlim(-0.5, deepest + 0.5)
    axes.set_xticks(_ticks(deepest), [str(tick) for tick in _ticks(deepest)])
    axes.set_xlabel(f"layers removed, of {len(found['base'])}")
    axes.set_ylabel(f"mean score, {counted(len(found['tasks']), 'task')}")
    axes.grid(axis="y", color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    figure.legend(lines, names, loc="outside lower left", ncols=2, frameon=False, handlelength=3.6)
    return figure


def _line(axes: Axes, method: Found, place: int, methods: int) -> Any:
    """One method's line, with a bar a point for one run and a band for several."""
    rows = method["depths"]
    shift = min(BESIDE, SPREAD / methods) * (place - (methods - 1) / 2)
    # What nothing was removed from is one model for all methods: there they meet.
    x = [row["layers_removed"] + (shift if row["layers_removed"] else 0.0) for row in rows]
    y = [row["score"]["mean"] for row in rows]
    colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
    dashes = LINES[place % len(LINES)]
    if method["runs"] > 1:
        low, high = [row["lowest"] for row in rows], [row["highest"] for row in rows]
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    for place_x, row in zip(x, rows, strict=True):
        if row["interval_over"] == "items":
            ends = [row["score"]["low"], row["score"]["high"]]
            axes.plot([place_x, place_x], ends, color=colour, linewidth=1.1, alpha=0.75)
    return axes.plot(x, y, color=colour, marker=marker, markersize=5.5, linestyle=dashes, linewidth=1.7)[0]


def _dense_line(axes: Axes, found: Found, name: str, place: int) -> Any:
    """A dense model: its score across the picture, and a star at the depth whose size is nearest to its own."""
    model = found["models"][name]
    grey = ("#555555", "#888888", "#AAAAAA")[place % 3]
    y = model["score"]["mean"]
    axes.axhline(y, color=grey, linestyle=(0, (6, 3)), linewidth=1.1, zorder=1)
    sizes = {
        row["layers_removed"]: row["parameters"] for method in found["methods"] for row in method["depths"]
    }
    nearest = min(sorted(sizes), key=lambda depth: abs(sizes[depth] - model["parameters"]))
    dashes = (0, (6, 3))
    return axes.plot(
        [nearest], [y], color=grey, marker="*", markersize=12, linestyle=dashes, linewidth=1.1, zorder=3
    )[0]


# ------------------------------------------------------------------------- what went, and how often


def order(found: Found) -> Figure:
    """The paper's Figure 9: a row a run, a column a layer, in the cell the step at which it went."""
    from matplotlib import colormaps

    several = {method["label"] for method in found["methods"] if method["runs"] > 1}
    rows = [run for method in found["methods"] for run in found["runs"] if run["label"] == method["label"]]
    steps = max(len(run["order"]) for run in rows)
    layers = found["layers"]
    title = "Step at which each layer was removed (grey: kept)"
    figure, axes = _new(max(6.4, 3.2 + 0.3 * layers), 1.5 + 0.34 * len(rows), title)
    for y, run in enumerate(rows):
        step_of = {layer: step for step, gone in enumerate(run["order"], 1) for layer in gone}
        for layer in found["base"]:
            step = step_of.get(layer)
            # early removals dark, late ones light; the scale's brightest end is too near to the ground
            shade = colormaps["cividis"](0.92 * (step - 1) / max(steps - 1, 1)) if step else None
            axes.add_patch(_cell(layer, y, shade or PALE))
            if shade:
                ink = "#FFFFFF" if _luminance(shade) < 0.18 else "#000000"
                axes.text(layer, y, str(step), ha="center", va="center", color=ink, fontsize=8.5)
    axes.set_xlim(-0.6, layers - 0.4)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    names = [f"{r['label']}, run {r['number']}" if r["label"] in several else r["label"] for r in rows]
    axes.set_yticks(range(len(rows)), [_wrapped(name) for name in names])
    _layer_axis(axes, layers)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


def frequency(found: Found) -> Figure:
    """The paper's Figure 10: in how many runs each layer went."""
    layers, runs = found["layers"], len(found["runs"])
    title = f"How often each layer was removed, in {counted(runs, 'run')}"
    figure, axes = _new(max(6.4, 1.6 + 0.3 * layers), 3.2, title)
    axes.bar(range(layers), found["frequency"], width=0.8, color=COLOURS[0])
    axes.set_xlim(-0.6, layers - 0.4)
    axes.set_ylim(0, runs)
    axes.set_yticks(_ticks(runs), [str(tick) for tick in _ticks(runs)])
    _layer_axis(axes, layers)
    axes.set_ylabel("runs in which it was removed")
    axes.grid(axis="y", color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure


def _cell(x: float, y: float, shade: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.46, y - 0.44), 0.92, 0.88, facecolor=shade, linewidth=0)


def _luminance(shade: tuple[float, float, float, float]) -> float:
    """Of sRGB, relative: below 0.18 white letters stand out more than black ones (WCAG's contrast)."""
    red, green, blue = (math.pow(part, 2.2) for part in shade[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _layer_axis(axes: Axes, layers: int) -> None:
    axes.set_xticks(range(layers), [str(layer) for layer in range(layers)], fontsize=8.5)
    axes.set_xlabel("layer, numbered as in the original model")


def _ticks(last: int) -> list[int]:
    """0 to `last` in whole steps, at most 13 of them."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, last) if last / step <= 12 or step == last)
    return list(range(0, last + 1, step))


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, LABEL_LETTERS)) or text
