import json

import pytest

from wandazeta.pruning.records import BlockRecord, LayerRecord, PruneReport

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


def test_records_of_experts_are_joined_to_one_of_their_fused_weight():
    experts = [
        LayerRecord(f"mlp.experts.down_proj[{i}]", (4, 8), "2:4", 0.5, mean, std, (tokens,))
        for i, (mean, std, tokens) in enumerate([(1.0, 0.5, 7), (3.0, 0.1, 0)])
    ]
    joined = LayerRecord.fused("mlp.experts.down_proj", experts)
    assert (joined.name, joined.shape, joined.sparsity) == ("mlp.experts.down_proj", (8, 8), 0.5)
    # of the scores of both, taken together
    assert joined.score_mean == 2.0
    assert joined.score_std == pytest.approx(((0.5**2 + 0.1**2) / 2 + 1) ** 0.5)
    report = PruneReport({}, "layers", tuple(BlockRecord(i, f"layers.{i}", (joined,)) for i in range(2)))
    assert PruneReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    assert report.unreached_experts == {"layers.0.mlp.experts": (1,), "layers.1.mlp.experts": (1,)}
    assert report.unreached_words.endswith("`layers.0.mlp.experts` 1; `layers.1.mlp.experts` 1.")
    assert REPORT.unreached_words == ""


def test_what_the_zeros_buy_depends_on_the_pattern():
    for piece in ("neither smaller nor faster", "`wandazeta prune --pack true`", "0.56", "Ampere", "16-bit"):
        assert piece in REPORT.gain
    other = PruneReport({"sparsity_pattern": "4:8"}, "model.layers").gain
    assert "neither smaller nor faster" in other
    assert "for the 2:4 pattern only" in other
    assert "--pack" not in other


def test_method_and_pattern_may_be_unknown():
    unknown = PruneReport({}, "model.layers")
    assert (unknown.method_name, unknown.sparsity_pattern) == ("?", "?")
    assert (REPORT.method_name, REPORT.sparsity_pattern) == ("wanda++", "2:4")
