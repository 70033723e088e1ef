"""`wandazeta recover`: killed and started again it ends with the same bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.fit_config import write_inputs
from safetensors.torch import load_file

import wandazeta
from wandazeta.cli.recover import recover
from wandazeta.data.sources import SourceOptions, read_documents

HELPER = Path(__file__).parents[1] / "helpers" / "killed_recover.py"
RUN = "recover pruned --teacher model --text text.txt --sequence_length 16 --batch_size 4 --tokens 1024"


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits_and_zeros_stay(tmp_path):
    write_inputs(tmp_path)
    options = {"num_samples": 8, "sequence_length": 16, "method": "wanda"}
    texts = [(tmp_path / "text.txt").read_text()]
    wandazeta.prune(str(tmp_path / "model"), None, texts, output_dir=tmp_path / "pruned", **options)
    subprocess.run(
        [sys.executable, HELPER, tmp_path, *RUN.split(), "--learning_rate", "3e-3"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        timeout=600,
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert (whole / "model.safetensors").read_bytes() == (killed / "model.safetensors").read_bytes()
    records = [json.loads((folder / "recovery.json").read_text()) for folder in (whole, killed)]
    for record in records:
        del record["seconds_since_start"]
    assert records[0] == records[1]
    assert records[0]["sparsity"] == 0.5
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "pruned", whole))
    masks = load_file(whole / "sparsity" / "masks.safetensors")
    assert masks.keys() == load_file(tmp_path / "pruned" / "sparsity" / "masks.safetensors").keys()
    for name, mask in masks.items():
        assert not bool(after[name][~mask].any())
        assert not torch.equal(after[name], before[name])
    assert "held out: " in (killed / "README.md").read_text()
    assert not (killed / "progress").exists()
    # what the runs say
    said = (tmp_path / "resumed.err").read_text()
    assert "16 steps of 4 x 16 tokens: 1,024 tokens, 0.172 times the text of 5,952" in said
    assert "A step takes" in said
    shown = (tmp_path / "repeated.out").read_text()
    assert "sparsity of the blocks 50.0%" in shown
    # after the progress bar
    assert (tmp_path / "resumed.out").read_text().endswith(shown)
    # of another model nothing is told that is known of this one
    texts = [document.text for document in read_documents(str(tmp_path / "text.txt"), SourceOptions())]
    options = {"sequence_length": 16, "batch_size": 4, "tokens": 1024, "learning_rate": 3e-3}
    assert recover(tmp_path / "pruned", tmp_path / "model", texts, killed, **options).items() >= records[1].items()
    with pytest.raises(ValueError, match="`model` was"):
        recover(whole, tmp_path / "model", texts, killed, **options)
