"""Charts of the HTML report: matplotlib figures as inline SVG in the colours of the page.

One unit of a chart is one CSS pixel. Colours are drawn as placeholders and replaced by CSS variables of the page, so
that the same chart serves the light and the dark theme; text stays text, in the font of the page.
"""

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from wandazeta.pruning.records import BlockRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _MUTED, _LINE, _ACCENT, _SURFACE = "#010101", "#020202", "#030303", "#040404", "#050505"
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _LINE: "--line", _ACCENT: "--accent", _SURFACE: "--surface"}
_PLACEHOLDER = re.compile("|".join(_VARIABLES))
_STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": _LINE,
    "axes.facecolor": "none",
    "axes.labelcolor": _MUTED,
    "axes.labelsize": 12,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same layout on every machine
    "font.size": 12,
    "grid.color": _LINE,
    "legend.borderaxespad": 0,
    "legend.fontsize": 12,
    "legend.frameon": False,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "wandazeta",
    "text.color": _INK,
    "text.parse_math": False,  # a name may hold a dollar sign
    "xtick.color": _LINE,
    "xtick.labelcolor": _MUTED,
    "ytick.color": _LINE,
    "ytick.labelcolor": _MUTED,
    "ytick.left": False,
}
_CHART = (400, 230)
_LOG_RATIO = 30
_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"


def waffle(fraction: float) -> str:
    """Waffle chart of the sparsity: 100 squares, hollow ones for zeros.

    Args:
        fraction: Fraction of zeros.

    Returns:
        The SVG.
    """
    kept = 100 - round(100 * fraction)
    with _figure(220, 220) as figure:
        axes = _bare_axes(figure, 10, 10)
        for index in range(100):
            _cell(axes, index % 10, index // 10, 1.0 if index < kept else 0.0)
        return _svg(figure, "waffle", f"Of every 100 weights, {100 - kept} are zero.")


def sparsity_map(blocks: Sequence[BlockRecord]) -> str:
    """Heat map of the sparsity of every layer, one column per block and one row per layer name.

    Args:
        blocks: The blocks, at least one with a layer.

    Returns:
        The SVG.
    """
    names = list(dict.fromkeys(layer.name for block in blocks for layer in block.layers))
    labels = [_short(name.removesuffix(".weight")) for name in names]
    width = min(max(20, 800 // len(blocks)), 110)
    labelled = width >= 40
    reached = [layer.sparsity for block in blocks for layer in block.layers]
    tips = {}
    # the margin is estimated from the longest name: the font of the reader is not known
    left, bottom = 7.5 * max(map(len, labels)) + 12, 40
    with _figure(left + width * len(blocks), 30 * len(names) + bottom) as figure:
        axes = _bare_axes(figure, len(blocks), len(names), left, bottom)
        for column, block in enumerate(blocks):
            for layer in block.layers:
                row = names.index(layer.name)
                key = f"cell-{column}-{row}"
                tips[key] = f"block {block.index}, {layer.name}: {layer.sparsity:.2%} zeros ({layer.pattern})"
                # light enough for the number on it to be read
                _cell(axes, column, row, 0.05 + (0.6 if labelled else 0.95) * layer.sparsity, key)
                if labelled:
                    position = (column + 0.5, row + 0.5)
                    axes.text(*position, f"{layer.sparsity:.0%}", ha="center", va="center", fontsize=11)
        step = math.ceil(30 / width)
        ticks = range(0, len(blocks), step)
        axes.set_xticks([tick + 0.5 for tick in ticks], [str(blocks[tick].index) for tick in ticks])
        axes.set_yticks([row + 0.5 for row in range(len(names))], labels)
        axes.set_xlabel("block")
        label = (
            f"Heat map of {len(blocks)} blocks by {len(names)} layer names: between {min(reached):.2%} and "
            f"{max(reached):.2%} of a layer's weights are zero."
        )
        return _svg(figure, "zeros", label, tips)


def layers_differ(blocks: Sequence[BlockRecord]) -> bool:
    """Whether layers differ in their sparsity by more than rounding.

    Args:
        blocks: The blocks, at least one with a layer.
    """
    reached = [layer.sparsity for block in blocks for layer in block.layers]
    return max(reached) - min(reached) > 0.005


def score_rows(blocks: Sequence[BlockRecord]) -> str:
    """Curves of the pruning score over the blocks, one row per layer name with a scale of its own.

    Args:
        blocks: The blocks, at least one with a layer.

    Returns:
        The SVG.
    """
    import numpy as np

    names = list(dict.fromkeys(layer.name for block in blocks for layer in block.layers))
    labels = [_short(name.removesuffix(".weight"), 18) for name in names]
    indices = [block.index for block in blocks]
    scores = np.full((2, len(names), len(blocks)), np.nan)  # mean and standard deviation
    tips = {}
    for column, block in enumerate(blocks):
        for layer in block.layers:
            row = names.index(layer.name)
            scores[:, row, column] = layer.score_mean, layer.score_std
            tips[f"place-{column}-{row}"] = (
                f"block {block.index}, {layer.name}: mean {layer.score_mean:.3g}, "
                f"standard deviation {layer.score_std:.3g}"
            )
    scores[~np.isfinite(scores)] = np.nan
    with _figure(_CHART[0], 34 * len(names) + 46) as figure:
        axes = figure.add_subplot()
        for column, row in ((column, row) for column in range(len(blocks)) for row in range(len(names))):
            if (key := f"place-{column}-{row}") in tips:
                _place(axes, indices[column], row, key)
        for row, (mean, std) in enumerate(zip(*scores, strict=True)):
            largest = float(np.max(mean + std, initial=0, where=~np.isnan(mean + std))) or 1.0
            # the axis points downwards: a row ends at its baseline, and a tenth of it is left free above the curve
            heights = [row + 1 - 0.9 * np.maximum(value, 0) / largest for value in (mean - std, mean, mean + std)]
            axes.fill_between(indices, heights[0], heights[2], color=_ACCENT, alpha=0.2, linewidth=0)
            axes.plot(indices, heights[1], ".-", color=_ACCENT, linewidth=1.5, markersize=4)
            axes.text(indices[-1] + 0.5, row + 0.15, f" {largest:.2g}", color=_MUTED, fontsize=10, va="center")
        axes.set_ylim(len(names), 0)
        axes.set_yticks(np.arange(len(names)) + 0.6, labels)
        axes.hlines(range(1, len(names) + 1), indices[0] - 0.5, indices[-1] + 0.5, color=_LINE, linewidth=0.8)
        _block_ticks(axes, blocks)
        label = (
            f"Mean and standard deviation of the pruning score of {len(names)} layer names over {len(blocks)} blocks."
        )
        return _svg(figure, "scores", label, tips)


def measured_losses(blocks: Sequence[BlockRecord]) -> dict[int, tuple[float, float]]:
    """RO loss before and after the optimisation by block index, of the blocks where both are known and finite.

    Args:
        blocks: The blocks.
    """
    pairs = {block.index: (block.loss_before, block.loss_after) for block in blocks}
    return {
        index: (before, after)
        for index, (before, after) in pairs.items()
        if before is not None and after is not None and math.isfinite(before) and math.isfinite(after)
    }


def losses(blocks: Sequence[BlockRecord]) -> str:
    """Chart of the RO loss of every block before and after the optimisation.

    Args:
        blocks: The blocks, at least one of them with both losses.

    Returns:
        The SVG.
    """
    pairs = measured_losses(blocks)
    before, after = ([pair[side] for pair in pairs.values()] for side in (0, 1))
    with _figure(*_CHART) as figure:
        axes = _block_axes(figure, blocks)
        size = min(7, max(3.5, 180 / len(blocks)))
        if before != after:  # without optimisation there is one loss
            axes.vlines(list(pairs), before, after, color=_MUTED, linewidth=1)
            axes.plot(list(pairs), before, "o", color=_MUTED, mfc=_SURFACE, ms=size, label="before optimisation")
        axes.plot(list(pairs), after, "o", color=_ACCENT, ms=size, label="after")
        if before != after:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1.03), ncols=2, handletextpad=0.1)
        _scale(axes, [*before, *after])
        tips = {f"column-{index}": f"block {index}: {pair[0]:.3g} → {pair[1]:.3g}" for index, pair in pairs.items()}
        label = (
            f"RO loss of {len(pairs)} blocks: before between {min(before):.3g} and {max(before):.3g}, after between "
            f"{min(after):.3g} and {max(after):.3g}."
        )
        return _svg(figure, "losses", label, tips)


def block_bars(blocks: Sequence[BlockRecord], values: Sequence[float], key: str, unit: str) -> str:
    """Bar chart with one bar per block.

    Args:
        blocks: The blocks.
        values: The height of each bar.
        key: Name of the chart, unique in the page.
        unit: Unit of the values.

    Returns:
        The SVG.
    """
    with _figure(*_CHART) as figure:
        axes = _block_axes(figure, blocks)
        axes.bar([block.index for block in blocks], values, width=0.7, color=_ACCENT)
        axes.set_ylim(bottom=0, top=None if any(values) else 1)
        tips = {f"column-{b.index}": f"block {b.index}: {v:.3g} {unit}" for b, v in zip(blocks, values, strict=True)}
        label = f"Bars of {len(blocks)} blocks, between {min(values):.3g} and {max(values):.3g} {unit}."
        return _svg(figure, key, label, tips)


def perplexity_bars(perplexities: Mapping[str, float]) -> str:
    """Bar chart of perplexities, one horizontal bar per model, on a logarithmic axis from 1, the smallest possible.

    Args:
        perplexities: Finite perplexities by model name.

    Returns:
        The SVG.
    """
    names = [_short(name) for name in perplexities]
    values = list(perplexities.values())
    with _figure(_CHART[0], 34 * len(names) + 46) as figure:
        axes = figure.add_subplot()
        bars = axes.barh(range(len(names)), values, height=0.66, color=_ACCENT)
        axes.bar_label(bars, [f"{value:,.2f}" for value in values], padding=5)
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(axis="y", labelcolor=_INK)
        axes.invert_yaxis()
        axes.grid(axis="x")
        # a third of the width is left for the numbers
        axes.set(xscale="log", xlim=(1, max(*values, 10) ** 1.5))
        _plain_numbers(axes, "x")
        words = ", ".join(f"{name} {value:,.2f}" for name, value in zip(names, values, strict=True))
        return _svg(figure, "perplexities", f"Perplexities: {words}.")


def is_logarithmic(values: Sequence[float]) -> bool:
    """Whether values differ so much that they are drawn on a logarithmic scale.

    Args:
        values: The values of a chart.
    """
    return min(values) > 0 and max(values) > _LOG_RATIO * min(values)


@contextmanager
def _figure(width: float, height: float) -> Iterator["Figure"]:
    from matplotlib import style
    from matplotlib.figure import Figure

    # not pyplot, which would open windows and keep the figure in memory
    with style.context(_STYLE, after_reset=True):
        yield Figure(figsize=(width / 72, height / 72), layout="constrained")


def _bare_axes(figure: "Figure", columns: int, rows: int, left: float = 0, bottom: float = 0) -> "Axes":
    """Axes whose units are cells, the first in the upper left corner."""
    figure.set_layout_engine("none")
    width, height = (72 * inches for inches in figure.get_size_inches())
    axes = figure.add_axes((left / width, bottom / height, 1 - left / width, 1 - bottom / height))
    axes.set(xlim=(0, columns), ylim=(rows, 0))
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(length=0, pad=6)
    if not left:
        axes.set_axis_off()
    return axes


def _cell(axes: "Axes", column: int, row: int, opacity: float, key: str | None = None) -> None:
    from matplotlib.patches import Rectangle

    low = 0.04
    square = Rectangle((column + low, row + low), 1 - 2 * low, 1 - 2 * low, linewidth=1, gid=key)
    square.set(facecolor=(_ACCENT, opacity), edgecolor=_LINE)
    axes.add_patch(square)


def _place(axes: "Axes", index: int, row: int, key: str) -> None:
    """Invisible rectangle behind the value of a block in a row, which shows a tooltip."""
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((index - 0.5, row), 1, 1, color=_SURFACE, linewidth=0, zorder=0, gid=key))


def _block_axes(figure: "Figure", blocks: Sequence[BlockRecord]) -> "Axes":
    """Axes with the blocks along x, and a column behind each block that shows its values in a tooltip."""
    axes = figure.add_subplot()
    for block in blocks:
        column = axes.axvspan(block.index - 0.5, block.index + 0.5, color=_SURFACE, linewidth=0, zorder=0)
        column.set_gid(f"column-{block.index}")
    _block_ticks(axes, blocks)
    axes.grid(axis="y")
    return axes


def _block_ticks(axes: "Axes", blocks: Sequence[BlockRecord]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(blocks[0].index - 0.5, blocks[-1].index + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(min(len(blocks), 10), integer=True))
    axes.set_xlabel("block")


def _scale(axes: "Axes", values: Sequence[float]) -> None:
    if is_logarithmic(values):
        axes.set_yscale("log")
        _plain_numbers(axes, "y")
    else:
        axes.set_ylim(bottom=0)


def _plain_numbers(axes: "Axes", which: str) -> None:
    """Label powers of ten with plain numbers; matplotlib sets them as mathematics otherwise."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
    axis.minorticks_off()


def _printable(text: str) -> str:
    """Replace the characters that XML does not allow."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def _short(name: str, length: int = 26) -> str:
    name = _printable(name)
    return name if len(name) <= length else f"{name[: length // 2 - 1]}…{name[-length // 2 :]}"


def _svg(figure: "Figure", key: str, label: str, tips: Mapping[str, str] | None = None) -> str:
    """Convert a figure to an SVG element of the page.

    Args:
        figure: The figure.
        key: Prefix of every id, since ids must be unique in the page.
        label: Description for screen readers.
        tips: Tooltips by the gid of the artist that shows them.
    """
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(file.getvalue())
    # the first child is a style sheet, which would apply to the whole page
    root.remove(root[0])
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-label": label,
        "style": f"--width: {72 * figure.get_size_inches()[0]:.0f}px",
    }
    by_id = {element.attrib["id"]: element for element in root.iter() if "id" in element.attrib}
    for name, tip in (tips or {}).items():
        title = ElementTree.Element(f"{{{_SVG}}}title")
        title.text = _printable(tip)
        by_id[name].set("class", "tip")
        by_id[name].insert(0, title)
    for name, element in by_id.items():
        element.set("id", f"{key}-{name}")
    for element in root.iter():
        for attribute in ("clip-path", f"{{{_XLINK}}}href"):
            if attribute in element.attrib:
                element.set(attribute, element.attrib[attribute].replace("#", f"#{key}-"))
        if "style" in element.attrib:
            style = _PLACEHOLDER.sub(lambda match: f"var({_VARIABLES[match[0]]})", element.attrib["style"])
            element.set("style", style)
    return ElementTree.tostring(root, encoding="unicode")
