import dataclasses

import pytest

from wandazeta.pruning.options import PruneOptions


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "snip"}, "`method` to be one of magnitude, wanda"),
        ({"sparsity_pattern": "4:2"}, "`sparsity_pattern`"),
        ({"sparsity_pattern": "2:2"}, "`sparsity_pattern`"),
        ({"sparsity_pattern": "0:4"}, "`sparsity_pattern`"),
        ({"sparsity_pattern": 124}, "quoted in YAML"),
        ({"sparsity_pattern": "unstructured"}, "`sparsity`"),
        ({"sparsity_pattern": "unstructured", "sparsity": 50}, "between 0 and 1"),
        ({"sparsity": 0.6}, "fixes it to 0.5"),
        ({"alpha": -1.0}, "`alpha`"),
        ({"sparsity_slope": 0.1}, "`sparsity_slope`"),
        ({"sparsity_pattern": "unstructured", "sparsity": 0.6, "sparsity_slope": 0.8}, "`sparsity_slope`"),
        ({"sparsity_pattern": "unstructured", "sparsity": 0.4, "sparsity_slope": -0.8}, "`sparsity_slope`"),
        ({"sparsity_pattern": "unstructured", "sparsity": 0.4, "sparsity_slope": float("nan")}, "`sparsity_slope`"),
        ({"alpha": float("nan")}, "`alpha`"),
        ({"alpha": "automatic"}, "`alpha`"),
        ({"rounds": -1}, "`rounds`"),
        ({"rounds": 1.5}, "`rounds`"),
        ({"samples_per_round": 0}, "`samples_per_round`"),
        ({"optimizer": "sgd"}, "rmsprop, adamw"),
        ({"learning_rate": 0.0}, "`learning_rate`"),
        ({"target": "dense"}, "dense_block, dense_stream"),
        ({"lr_schedule": "cosine"}, "constant, linear"),
        ({"start": "wanda"}, "score, sparsegpt"),
        ({"compute_dtype": "float16"}, "model, bfloat16"),
        ({"samples_per_step": 0}, "`samples_per_step`"),
        ({"samples_per_round": 6, "samples_per_step": 4}, "to divide `samples_per_round`"),
        ({"exclude_modules": "lm_head"}, "`exclude_modules` to be a list"),
        ({"exclude_modules": ("(",)}, "regular expressions"),
        ({"seed": -1}, "`seed`"),
    ],
)
def test_wrong_options_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        PruneOptions(**change)


def test_the_methods_switch_their_parts():
    parts = {
        method: (o.uses_calibration, o.uses_gradients, o.uses_optimisation, o.uses_gram)
        for method in ("magnitude", "wanda", "rgs", "ro", "wanda++", "sparsegpt")
        for o in [PruneOptions(method=method)]
    }
    assert parts == {
        "magnitude": (False, False, False, False),
        "wanda": (True, False, False, False),
        "rgs": (True, True, False, False),
        "ro": (True, False, True, False),
        "wanda++": (True, True, True, False),
        "sparsegpt": (True, False, False, True),
    }
    assert PruneOptions(start="sparsegpt").uses_gram
    assert not PruneOptions(method="wanda", start="sparsegpt").uses_gram


def test_defaults_are_the_papers():
    assert dataclasses.asdict(PruneOptions()) == {
        "method": "wanda++",
        "sparsity_pattern": "2:4",
        "sparsity": None,
        "sparsity_slope": 0.0,
        "alpha": 100.0,
        "rounds": 5,
        "samples_per_round": 32,
        "optimizer": "rmsprop",
        "learning_rate": 3e-7,
        "lr_schedule": "constant",
        "start": "score",
        "target": "dense_block",
        "samples_per_step": 1,
        "generated_copies": 0,
        "mask_mode": "free",
        "compute_dtype": "model",
        "exclude_modules": (),
        "seed": 0,
    }


def test_lists_from_yaml_make_equal_options():
    options = PruneOptions(exclude_modules=["q_proj"])
    assert hash(options) == hash(PruneOptions(**options.to_dict()))
    assert PruneOptions(**options.to_dict()) == options


def test_labels():
    assert PruneOptions(sparsity_pattern="1:4").pattern_label == "1:4"
    assert PruneOptions(sparsity_pattern="1:4").target_sparsity == 0.75
    assert PruneOptions(sparsity_pattern="unstructured", sparsity=0.6).pattern_label == "60%"
    assert PruneOptions(sparsity_pattern="2:4", sparsity=0.5).group == (2, 4)
