import json

import pytest
import torch
from helpers.causal_lms import tiny_lm
from helpers.reports import made_up
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from wandazeta.pruning.export.pretrained import export_pretrained
from wandazeta.pruning.records import PruneReport

NAME = "model.layers.0.mlp.up_proj.weight"


def pruned_lm():
    model = tiny_lm()
    mask = torch.tensor([True, False, False, True] * 8).expand(48, 32).clone()
    with torch.no_grad():
        model.get_parameter(NAME).masked_fill_(~mask, 0.0)
    return model, {NAME: mask}


def test_a_model_pruned_by_anything_is_written(tmp_path):
    model, masks = pruned_lm()
    export_pretrained(model, None, tmp_path / "out", made_up(), masks, key="0123", pack=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert torch.equal(load_file(tmp_path / "out" / "sparsity" / "masks.safetensors")[NAME], masks[NAME])
    assert json.loads((tmp_path / "out" / "prune_report.json").read_text())["key"] == "0123"
    card = (tmp_path / "out" / "README.md").read_text()
    for piece in ("AutoTokenizer", "base_model"):
        assert piece not in card
    for piece in ("25.00% of the weights in 6 Linear layers", "`sparsity/model.2of4.safetensors`:", "| `seed` | `0` |"):
        assert piece in card
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_card_says_when_no_data_were_used(tmp_path):
    report = made_up(num_samples=0, num_tokens=0, options={"method": "magnitude", "sparsity_pattern": "4:8"})
    export_pretrained(*pruned_lm()[:1], None, tmp_path / "out", report, {})
    card = (tmp_path / "out" / "README.md").read_text()
    assert "method `magnitude`, pattern `4:8`" in card
    assert "No calibration data were used." in card
    assert "model.2of4" not in card


def test_a_mask_that_does_not_belong_is_refused(tmp_path):
    model = tiny_lm()
    report = PruneReport({}, "model.layers")
    with pytest.raises(ValueError, match="a pruned weight is not zero"):
        export_pretrained(model, None, tmp_path / "out", report, {NAME: torch.zeros(48, 32, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"there is none for `layer\.weight`"):
        export_pretrained(model, None, tmp_path / "out", report, {"layer.weight": torch.ones(1, dtype=torch.bool)})
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_fails_leaves_the_one_before(tmp_path):
    model, masks = pruned_lm()
    export_pretrained(model, None, tmp_path / "out", made_up(), masks)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="a pruned weight is not zero"):
        export_pretrained(tiny_lm(), None, tmp_path / "out", made_up(), masks)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
