import io
import json

from rich.console import Console

from wandazeta.pruning.records import BlockRecord, LayerRecord, PruneReport, table

LAYERS = (
    LayerRecord("up.weight", (8, 4), "2:4", 0.5, 1.0, 0.1),
    LayerRecord("down.weight", (4, 24), "2:4", 0.75, 2, 1),
)
REPORT = PruneReport(
    {"method": "wanda++", "sparsity_pattern": "2:4"},
    "model.layers",
    (BlockRecord(0, "model.layers.0", LAYERS, 0.5, 0.25, 1.5, 2**30, 4, 40), BlockRecord(1, "model.layers.1", LAYERS)),
)


def test_json_and_back():
    values = json.loads(json.dumps(REPORT.to_dict()))
    assert PruneReport.from_dict(values) == REPORT
    assert values["sparsity"] == (32 * 0.5 + 96 * 0.75) / 128
    assert (values["num_samples"], values["num_tokens"]) == (4, 40)
    assert BlockRecord.from_dict(json.loads(json.dumps(REPORT.blocks[0].to_dict()))) == REPORT.blocks[0]


def test_table_has_a_line_for_each_block_and_says_what_it_buys():
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(table(REPORT))
    text = console.export_text()
    assert "68.75%" in text
    assert "1.00 GiB" in text
    assert "neither smaller nor faster" in text
    assert "0.25" in text


def test_what_the_zeros_buy_depends_on_the_pattern():
    for piece in ("neither smaller nor faster", "`wandazeta prune --pack true`", "0.56", "Ampere", "16 bit"):
        assert piece in REPORT.gain
    other = PruneReport({"sparsity_pattern": "4:8"}, "model.layers").gain
    assert "neither smaller nor faster" in other
    assert "for 2:4 alone" in other
    assert "--pack" not in other
