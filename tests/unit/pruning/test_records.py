import json

from wandazeta.pruning.records import BlockRecord, LayerRecord, PruneReport, flatten_settings

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


def test_what_the_zeros_buy_depends_on_the_pattern():
    for piece in ("neither smaller nor faster", "`wandazeta prune --pack true`", "0.56", "Ampere", "16-bit"):
        assert piece in REPORT.gain
    other = PruneReport({"sparsity_pattern": "4:8"}, "model.layers").gain
    assert "neither smaller nor faster" in other
    assert "for the 2:4 pattern only" in other
    assert "--pack" not in other


def test_options_may_be_nested():
    nested = {
        "method": {"name": "wanda++", "alpha": 100.0, "optimisation": {"rounds": 5, "optimizer": "rmsprop"}},
        "pattern": {"sparsity_pattern": "2:4", "sparsity": None},
        "exclude_modules": ["lm_head"],
        "seed": 0,
    }
    assert list(flatten_settings(nested).items()) == [
        ("method", "wanda++"),
        ("method.alpha", 100.0),
        ("method.optimisation.rounds", 5),
        ("method.optimisation.optimizer", "rmsprop"),
        ("pattern.sparsity_pattern", "2:4"),
        ("pattern.sparsity", None),
        ("exclude_modules", ["lm_head"]),
        ("seed", 0),
    ]
    for options in (nested, {"method": "wanda++", "sparsity_pattern": "2:4"}):
        report = PruneReport(options, "model.layers")
        assert (report.method_name, report.sparsity_pattern) == ("wanda++", "2:4")
        assert report.gain == REPORT.gain
    unknown = PruneReport({}, "model.layers")
    assert (unknown.method_name, unknown.sparsity_pattern) == ("?", "?")
