"""The examples: modules that know nothing of this project, pruned in five lines."""

import importlib.util
import subprocess
import sys

import lightning.pytorch as pl
import pytest
import torch


@pytest.fixture
def example(repository):
    def load(name):
        spec = importlib.util.spec_from_file_location(name, repository / "examples" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def assert_pruned(blocks, dense_blocks, trains):
    for block, dense in zip(blocks, dense_blocks, strict=True):
        for name, weight in block.named_parameters():
            if weight.ndim == 2:
                assert ((weight.view(weight.shape[0], -1, 4) != 0).sum(-1) == 2).all(), name
            elif not trains(name):
                assert torch.equal(weight, dense.get_parameter(name)), name


def test_a_plain_torch_transformer(example, tmp_path):
    plain = example("prune_plain_transformer")
    pruned = plain.main(str(tmp_path))
    pl.seed_everything(0)
    dense = plain.CharacterModel()
    assert_pruned(pruned.layers, dense.layers, trains=lambda name: False)
    for name in ("embedding.weight", "positions"):
        assert torch.equal(pruned.get_parameter(name), dense.get_parameter(name))
    assert not torch.equal(pruned.head.weight, dense.head.weight)


def test_a_transformers_model_built_in_configure_model(example, tmp_path):
    hand_written = example("prune_transformers_module")
    pruned = hand_written.main(str(tmp_path))
    pl.seed_everything(0)
    dense = hand_written.CausalModule()
    dense.configure_model()
    assert_pruned(pruned.model.model.layers, dense.model.model.layers, trains=lambda name: "norm" in name)
    assert torch.equal(pruned.model.lm_head.weight, dense.model.lm_head.weight)
    assert torch.equal(pruned.model.model.embed_tokens.weight, dense.model.model.embed_tokens.weight)


@pytest.mark.parametrize("name", ["prune_plain_transformer", "prune_transformers_module"])
def test_the_use_is_five_lines(repository, name):
    source = (repository / "examples" / f"{name}.py").read_text()
    foreign, _ = source.split("    from wandazeta")
    assert "wandazeta" not in foreign.split('"""', 2)[2]


@pytest.mark.slow
def test_an_example_runs_as_a_script_from_anywhere(repository, tmp_path):
    script = repository / "examples" / "prune_plain_transformer.py"
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "sparsity of the first block: 50%" in done.stdout
    assert not list(tmp_path.iterdir())
