import pytest

from wandazeta.pruning import SparsityPattern


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity_pattern": "4:2"}, "`sparsity_pattern`"),
        ({"sparsity_pattern": "2:2"}, "`sparsity_pattern`"),
        ({"sparsity_pattern": "0:4"}, "`sparsity_pattern`"),
        ({"sparsity_pattern": 124}, "quoted in YAML"),
        ({"sparsity": 0.0}, "`sparsity`"),
        ({"sparsity_pattern": "unstructured", "sparsity": 50}, "between 0 and 1"),
        ({"sparsity_pattern": "2:4", "sparsity": 0.6}, "fixes it to 0.5"),
        ({"sparsity_pattern": "2:4", "sparsity_slope": 0.1}, "`sparsity_slope`"),
        ({"sparsity_pattern": "unstructured", "sparsity": 0.6, "sparsity_slope": 0.8}, "`sparsity_slope`"),
        ({"sparsity_pattern": "unstructured", "sparsity": 0.4, "sparsity_slope": -0.8}, "`sparsity_slope`"),
        ({"sparsity_pattern": "unstructured", "sparsity": 0.4, "sparsity_slope": float("nan")}, "`sparsity_slope`"),
    ],
)
def test_wrong_patterns_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        SparsityPattern(**change)


def test_labels_and_fractions():
    assert SparsityPattern("1:4").label == "1:4"
    assert SparsityPattern("1:4").target_sparsity == 0.75
    assert SparsityPattern("unstructured", sparsity=0.6).label == "60%"
    assert SparsityPattern("unstructured", sparsity=0.6).group is None
    assert SparsityPattern("2:4", sparsity=0.5).group == (2, 4)


def test_only_arguments_with_an_effect_are_recorded():
    assert SparsityPattern("2:4", sparsity=0.5).to_dict() == {"sparsity_pattern": "2:4"}
    pattern = SparsityPattern("unstructured", 0.6, 0.2)
    assert SparsityPattern(**pattern.to_dict()) == pattern
