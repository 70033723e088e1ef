"""The report of a pruning as a table for the terminal."""

from typing import TYPE_CHECKING

from wandazeta.pruning.records import PruneReport

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["report_table"]


def report_table(report: PruneReport) -> "Table":
    """Format a report as a table with one row per block, at most 80 characters wide.

    Args:
        report: The report of the pruning.

    Returns:
        A table to print with `rich.print`.
    """
    from rich.table import Table  # pruning itself needs torch only

    title = f"Pruned by {report.method_name} to {report.sparsity_pattern}: {report.block_name}"
    table = Table(title=title, caption=f"{report.unreached_words} {report.gain}".strip())
    for heading in ("block", "weights", "sparsity", "loss\nbefore", "loss\nafter", "seconds", "peak\nGiB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for block in report.blocks:
        table.add_row(
            str(block.index),
            f"{block.num_weights:,}",
            f"{block.sparsity:.2%}",
            _loss(block.loss_before),
            _loss(block.loss_after),
            f"{block.seconds:.1f}",
            _gib(block.peak_memory),
        )
    table.add_section()
    total = ("all", f"{report.num_weights:,}", f"{report.sparsity:.2%}", "", "", f"{report.seconds:.1f}")
    table.add_row(*total, _gib(report.peak_memory), style="bold")
    return table


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f}"
