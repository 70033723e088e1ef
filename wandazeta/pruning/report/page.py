"""The report of a pruning as a self-contained HTML page.

`python -m wandazeta.pruning.report.page report.json` writes the page of the report in a progress folder, or of the
`prune_report.json` of an exported model, with the evaluation in an `evaluation.json` beside it.
"""

import argparse
import json
import math
import os
import re
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from wandazeta.pruning.records import PruneReport
from wandazeta.pruning.report import charts
from wandazeta.pruning.report.evaluation import EVALUATION_FILE, EvaluationSummary, read_evaluation
from wandazeta.utilities.files import write_atomically

if TYPE_CHECKING:
    from markupsafe import Markup

__all__ = ["main", "page_of_file", "write_page"]

_CHARTS = ("waffle", "perplexities", "zeros", "losses", "scores", "seconds", "memory")
_METHODS = {
    "magnitude": "Magnitude pruning",
    "wanda": "Wanda",
    "rgs": "RGS (regional gradients)",
    "ro": "RO (Wanda's score and regional optimisation)",
    "wanda++": "Wanda++ (regional gradients and regional optimisation)",
    "sparsegpt": "SparseGPT",
    "tuned-ro": "Tuned RO (SparseGPT and regional optimisation that tunes itself)",
}


def write_page(
    report: PruneReport,
    path: str | os.PathLike[str],
    *,
    evaluation: EvaluationSummary | None = None,
    model: str | None = None,
) -> None:
    """Write a report as an HTML page that holds its style and charts, and loads nothing from elsewhere.

    Args:
        report: The report of the pruning.
        path: The file to write.
        evaluation: Perplexities and continuations of the pruned model and others.
        model: Name of the model for the headline; by default that of the list of blocks.

    Raises:
        OSError: If the file cannot be written.
        ModuleNotFoundError: If matplotlib or jinja2 is not installed.
    """
    write_atomically(Path(path), _render(report, evaluation, model).encode())


def page_of_file(
    path: str | os.PathLike[str], output: str | os.PathLike[str] | None = None, *, model: str | None = None
) -> Path:
    """Write the page of a report file, with the evaluation in the `evaluation.json` beside it if there is one.

    Args:
        path: `report.json` of a progress folder or `prune_report.json` of an exported model.
        output: The file to write; by default beside the report, as `.html`.
        model: Name of the model for the headline; by default the name in the file.

    Returns:
        The file that was written.

    Raises:
        ValueError: If the report or the evaluation cannot be read.
        OSError: If the file cannot be written.
        ModuleNotFoundError: If matplotlib or jinja2 is not installed.
    """
    path = Path(path)
    report, name = _read(path)
    beside = path.with_name(EVALUATION_FILE)
    evaluation = read_evaluation(beside) if beside.exists() else None
    target = path.with_suffix(".html") if output is None else Path(output)
    write_page(report, target, evaluation=evaluation, model=model or name)
    return target


def _render(report: PruneReport, evaluation: EvaluationSummary | None, model: str | None) -> str:
    try:
        import matplotlib  # noqa: F401 (if it is missing, fail here)
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from markupsafe import Markup
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"The HTML report needs {error.name}; run `pip install 'wandazeta[report]'`", name=error.name
        ) from error
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {
        "amount": _amount,
        "code": _code,
        "count": lambda value: f"{round(value):,}",
        "duration": _duration,
        "json": lambda value: json.dumps(value, ensure_ascii=False),
        "memory": lambda value: f"{value / _memory_unit(value)[1]:.4g} {_memory_unit(value)[0]}",
        "percent": "{:.1%}".format,
        "perplexity": _perplexity,
    }
    patterns = sorted({layer.pattern for block in report.blocks for layer in block.layers})
    drawn = {name: Markup(svg) for name, svg in _charts(report, evaluation).items()}
    return environment.get_template("page.html").render(
        report=report,
        model=model,
        evaluation=evaluation,
        patterns=patterns,
        pattern_words=_pattern_words(patterns),
        lead=_lead(report),
        loss_words=_loss_words(report),
        memory_unit=_memory_unit(report.peak_memory)[0],
        charts={name: drawn.get(name) for name in _CHARTS},
    )


def _charts(report: PruneReport, evaluation: EvaluationSummary | None) -> dict[str, str]:
    drawn = {"waffle": charts.waffle(report.sparsity)}
    models = evaluation.models if evaluation else ()
    measured = {model.name: model.perplexity for model in models if model.perplexity is not None}
    if finite := {name: value for name, value in measured.items() if math.isfinite(value)}:
        drawn["perplexities"] = charts.perplexity_bars(finite)
    if not any(block.layers for block in report.blocks):
        return drawn
    unit, size = _memory_unit(report.peak_memory)
    peaks = [block.peak_memory / size for block in report.blocks]
    # N:M gives every layer the same sparsity, which the headline states
    if charts.layers_differ(report.blocks):
        drawn["zeros"] = charts.sparsity_map(report.blocks)
    drawn["scores"] = charts.score_rows(report.blocks)
    drawn["seconds"] = charts.block_bars(report.blocks, [block.seconds for block in report.blocks], "seconds", "s")
    drawn["memory"] = charts.block_bars(report.blocks, peaks, "memory", unit)
    if charts.measured_losses(report.blocks):
        drawn["losses"] = charts.losses(report.blocks)
    return drawn


def _lead(report: PruneReport) -> str:
    """The introduction: method, duration and calibration data."""
    words = (
        f"{_METHODS.get(report.method_name, report.method_name)} pruned the Linear layers of {len(report.blocks):,} "
        f"blocks in {_duration(report.seconds)}"
    )
    if not report.num_samples:
        return f"{words}, without calibration data."
    words = f"{words}, calibrated on {report.num_samples:,} samples with {report.num_tokens:,} tokens in total."
    return f"{words} {report.unreached_words.replace('`', '')}".strip()


def _pattern_words(patterns: list[str]) -> str:
    if len(patterns) != 1:
        return "differs by layer"
    kept, colon, size = patterns[0].partition(":")
    return f"{kept} of every {size} consecutive inputs are kept" if colon else "of each row are pruned"


def _loss_words(report: PruneReport) -> str:
    words = "Mean squared error of the block's output against its target."
    pairs = [pair for pair in charts.measured_losses(report.blocks).values() if pair[0] > 0]
    if not pairs:
        return words
    left = median(after / before for before, after in pairs)
    if all(before == after for before, after in pairs):
        words += " This method does not optimise the block, so there is one value."
    elif left < 1:
        words += f" In the median block the optimisation reduced it by {1 - left:.0%}."
    else:
        words += f" In the median block it is {left:.3g} times the value before: the optimisation did not help."
    if charts.is_logarithmic([loss for pair in pairs for loss in pair]):
        words += " Logarithmic scale."
    return words


def _perplexity(value: float | None) -> str:
    if value is None:
        return "not measured"
    return f"{value:,.2f}" if math.isfinite(value) else "infinite"


def _code(text: str) -> "Markup":
    """Escape text and set what stands in backticks as code."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


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


def _read(path: Path) -> tuple[PruneReport, str | None]:
    """The report in a file, and the name of the model if the file has it."""
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        return PruneReport.from_dict(content), content.get("model")
    except OSError as error:
        raise ValueError(f"Expected '{path}' to be a file that can be read ({error.strerror}).") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"Expected '{path}' to hold the report of a pruning, but it does not; give the report.json of a progress "
            "folder or the prune_report.json of an exported model."
        ) from error


def main(args: list[str] | None = None) -> None:
    """Write the page of a report from the command line.

    Args:
        args: The arguments; those of the process by default.
    """
    parser = argparse.ArgumentParser(prog="python -m wandazeta.pruning.report.page", description=__doc__)
    parser.add_argument("report", type=Path, help="report.json or prune_report.json")
    parser.add_argument("-o", "--output", type=Path, help="file to write; by default beside the report, as .html")
    parser.add_argument("--model", help="name of the model, for the headline")
    chosen = parser.parse_args(args)
    try:
        page_of_file(chosen.report, chosen.output, model=chosen.model)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
