import io

import pytest
from helpers.reports import made_up, with_unreached_expert
from rich.console import Console

from wandazeta.pruning.records import PruneReport
from wandazeta.pruning.report.table import report_table


def printed(report, width=140):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(report_table(report))
    return console.export_text()


def test_table_has_a_line_for_each_block_and_says_what_it_buys():
    report = made_up(3, losses=(0.5, 0.25))
    text = printed(report)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows] == ["0", "1", "2", "all"]
    assert rows[0] == ["0", "640", "15.00%", "0.5", "0.25", "1.5", "1.00"]
    assert rows[3] == ["all", "1,920", "25.00%", "", "", "4.5", "1.00"]
    assert "Pruned by tuned-ro to 2:4: model.layers" in text
    assert report.gain in " ".join(text.split())


def test_experts_that_no_token_reached_are_named():
    words = " ".join(printed(with_unreached_expert(made_up())).split())
    assert "which were pruned by magnitude: `model.layers.0.mlp.experts` 2." in words


def test_what_was_not_measured_is_a_dash():
    text = printed(made_up(1, losses=(None, None)))
    assert text.count(" - ") == 2
    assert "Pruned by ?" in printed(PruneReport({}, "model.layers"))


@pytest.mark.parametrize("num_blocks", [3, 80])
def test_large_figures_fit_a_terminal_of_80_columns(num_blocks):
    # 68 billion weights, as of LLaMA-2 70B, and hours
    large = {"width": 53_477_376, "losses": (1.234e-05, 1.234e-06), "seconds": 12345.67, "peak_memory": 999 * 2**30}
    report = made_up(num_blocks, **large)
    text = printed(report, width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for figure in (f"{report.num_weights:,}", "855,638,016", "1.23e-05", "1.23e-06", "12345.7", "999.00", "before"):
        assert figure in text
    rows = [line for line in text.splitlines() if line.startswith("│")]
    assert len(rows) == num_blocks + 1
