"""The report of a pruning as a page to look at: one HTML file that needs nothing else.

`python -m wandazeta.pruning.report.page report.json` makes it from the report in a progress folder, or from the
`prune_report.json` of an exported model.
"""

import argparse
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from wandazeta.pruning.records import PruneReport
from wandazeta.pruning.report import pictures
from wandazeta.utilities.files import write_atomically

_METHODS = {
    "magnitude": "By magnitude",
    "wanda": "Wanda",
    "rgs": "RGS (regional gradients)",
    "ro": "RO (Wanda's score and regional optimisation)",
    "wanda++": "Wanda++ (regional gradients and regional optimisation)",
    "sparsegpt": "SparseGPT",
}


def write_page(
    report: PruneReport,
    path: str | os.PathLike[str],
    perplexities: Mapping[str, float] | None = None,
    *,
    model: str | None = None,
) -> None:
    """Writes the report as an HTML page, which holds its style and pictures and refers to nothing outside.

    Args:
        report: What `prune_model` returned.
        path: The file to write.
        perplexities: Perplexities to show as bars, by the name of what has them, in order.
        model: The model's name, for the headline; the name of the list of blocks stands for it otherwise.

    Raises:
        ValueError: If a perplexity is not a number larger than 0.
        ModuleNotFoundError: If matplotlib or jinja2 is not installed.
    """
    perplexities = dict(perplexities or {})
    for name, value in perplexities.items():
        if not 0 < value < math.inf:
            raise ValueError(
                f"Expected argument `perplexities` to hold numbers larger than 0, but got {value!r} for {name!r}; "
                "leave out what was not measured."
            )
    write_atomically(Path(path), _render(report, perplexities, model).encode())


def _render(report: PruneReport, perplexities: dict[str, float], model: str | None) -> str:
    try:
        import matplotlib  # noqa: F401 - missed here and not in the middle of a picture
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from markupsafe import Markup
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"The report as a page needs {error.name}; run `pip install 'wandazeta[report]'`", name=error.name
        ) from error
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {
        "amount": _amount,
        "count": lambda value: f"{round(value):,}",
        "duration": _duration,
        "json": lambda value: json.dumps(value, ensure_ascii=False),
        "memory": lambda value: f"{value / _memory_unit(value)[1]:.4g} {_memory_unit(value)[0]}",
        "percent": "{:.1%}".format,
    }
    patterns = sorted({layer.pattern for block in report.blocks for layer in block.layers})
    num_weights = sum(block.num_weights for block in report.blocks)
    drawn = {name: Markup(svg) for name, svg in _pictures(report, perplexities).items()}
    return environment.get_template("page.html").render(
        report=report,
        model=model,
        num_layers=sum(len(block.layers) for block in report.blocks),
        num_weights=num_weights,
        patterns=patterns,
        pattern_words=_pattern_words(patterns),
        lead=_lead(report),
        loss_words=_loss_words(report),
        memory_unit=_memory_unit(report.peak_memory)[0],
        logarithmic=bool(perplexities) and pictures.is_logarithmic(list(perplexities.values())),
        pictures={name: drawn.get(name) for name in ("waffle", "zeros", "losses", "perplexities", "seconds", "memory")},
    )


def _pictures(report: PruneReport, perplexities: dict[str, float]) -> dict[str, str]:
    drawn = {"waffle": pictures.waffle(report.sparsity)}
    if perplexities:
        drawn["perplexities"] = pictures.perplexity_bars(perplexities)
    if not any(block.layers for block in report.blocks):
        return drawn
    unit, size = _memory_unit(report.peak_memory)
    peaks = [block.peak_memory / size for block in report.blocks]
    drawn["zeros"] = pictures.sparsity_map(report.blocks)
    drawn["seconds"] = pictures.block_bars(report.blocks, [block.seconds for block in report.blocks], "seconds", "s")
    drawn["memory"] = pictures.block_bars(report.blocks, peaks, "memory", unit)
    if pictures.measured_losses(report.blocks):
        drawn["losses"] = pictures.losses(report.blocks)
    return drawn


def _lead(report: PruneReport) -> str:
    """The whole run in two sentences."""
    method = str(report.options.get("method", "?"))
    words = (
        f"{_METHODS.get(method, method)} pruned the Linear layers of {len(report.blocks):,} blocks in "
        f"{_duration(report.seconds)}"
    )
    if not report.num_samples:
        return f"{words}, without calibration data."
    return f"{words}, calibrated on {report.num_samples:,} samples with {report.num_tokens:,} tokens in all."


def _pattern_words(patterns: list[str]) -> str:
    if len(patterns) != 1:
        return "by layer"
    kept, colon, size = patterns[0].partition(":")
    return f"of every {size} consecutive inputs, {kept} kept" if colon else "of each row"


def _loss_words(report: PruneReport) -> str:
    words = "Mean squared error of the block's output against its target."
    pairs = [pair for pair in pictures.measured_losses(report.blocks).values() if pair[0] > 0]
    if not pairs:
        return words
    left = median(after / before for before, after in pairs)
    if all(before == after for before, after in pairs):
        words += " This method does not optimise, so both are the same."
    elif left < 1:
        words += f" In the median block the optimisation took {1 - left:.0%} of it away."
    else:
        words += f" In the median block it is {left:.3g} times what it was: the optimisation did not help."
    if pictures.is_logarithmic([loss for pair in pairs for loss in pair]):
        words += " Logarithmic scale."
    return words


def _amount(value: float) -> str:
    if value >= 1e9:
        return f"{value / 1e9:.4g} billion"
    return f"{value / 1e6:.4g} million" if value >= 1e7 else f"{round(value):,}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _memory_unit(num_bytes: int) -> tuple[str, int]:
    return ("GiB", 2**30) if num_bytes >= 2**30 else ("MiB", 2**20)


def _perplexity(argument: str) -> tuple[str, float]:
    name, _, value = argument.rpartition("=")
    if not name:
        raise ValueError
    return name, float(value)


def _read(path: Path) -> PruneReport:
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        return PruneReport.from_dict(content)
    except OSError as error:
        raise ValueError(f"Expected '{path}' to be a file that can be read ({error.strerror}).") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"Expected '{path}' to hold the report of a pruning, but it does not; give the report.json of a progress "
            "folder or the prune_report.json of an exported model."
        ) from error


def main(args: list[str] | None = None) -> None:
    """Writes the page of a report from the command line.

    Args:
        args: The arguments; those of the process by default.
    """
    parser = argparse.ArgumentParser(prog="python -m wandazeta.pruning.report.page", description=__doc__)
    parser.add_argument("report", type=Path, help="report.json or prune_report.json")
    parser.add_argument("-o", "--output", type=Path, help="the page to write; default: beside the report, as .html")
    parser.add_argument("--model", help="name of the model, for the headline")
    parser.add_argument(
        "--perplexity",
        type=_perplexity,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a bar to show; may be given more than once",
    )
    chosen = parser.parse_args(args)
    output = chosen.output or chosen.report.with_suffix(".html")
    try:
        write_page(_read(chosen.report), output, dict(chosen.perplexity), model=chosen.model)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
