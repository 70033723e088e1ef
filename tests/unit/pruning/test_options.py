import pytest

from wandazeta.pruning import METHODS, RGS, PruneOptions, SparsityPattern, TunedRO, make_method


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "snip"}, "`method` to be one of magnitude, wanda"),
        ({"pattern": "4:2"}, "`sparsity_pattern`"),
        ({"compute_dtype": "float16"}, "model, bfloat16"),
        ({"exclude_modules": "lm_head"}, "`exclude_modules` to be a list"),
        ({"exclude_modules": ("(",)}, "regular expressions"),
        ({"seed": -1}, "`seed`"),
    ],
)
def test_wrong_options_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        PruneOptions(**change)


def test_defaults():
    assert PruneOptions() == PruneOptions(TunedRO(), SparsityPattern("2:4"), (), "model", 0)


def test_names_are_converted():
    assert PruneOptions("rgs", "4:8") == PruneOptions(RGS(), SparsityPattern("4:8"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", [SparsityPattern("2:4"), SparsityPattern("unstructured", 0.6, 0.2)], ids=str)
def test_a_dictionary_and_back(method, pattern):
    options = PruneOptions(make_method(method), pattern, exclude_modules=["q_proj"], compute_dtype="bfloat16", seed=3)
    again = PruneOptions.from_dict(options.to_dict())
    assert again == options
    assert hash(again) == hash(options), "a list from YAML, too"


def test_an_option_that_the_method_does_not_use_cannot_be_given():
    with pytest.raises(ValueError, match="options of method='wanda', but got `alpha`"):
        PruneOptions.from_dict({"method": "wanda", "alpha": 5.0})
    with pytest.raises(ValueError, match="but got `round`; did you mean `rounds`"):
        PruneOptions.from_dict({"method": "ro", "round": 5})
