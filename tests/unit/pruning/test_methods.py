import pytest

from wandazeta.pruning import METHODS, RGS, RO, Magnitude, RegionalOptimisation, SparseGPT, Wanda, WandaPP, make_method


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": -1}, "`rounds`"),
        ({"rounds": 1.5}, "`rounds`"),
        ({"rounds": True}, "`rounds`"),
        ({"samples_per_round": 0}, "`samples_per_round`"),
        ({"learning_rate": 0.0}, "`learning_rate`"),
    ],
)
def test_wrong_options_of_the_optimisation_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        RegionalOptimisation(**change)


@pytest.mark.parametrize("method", [RGS, WandaPP])
@pytest.mark.parametrize("alpha", [-1.0, float("nan"), float("inf"), "automatic"])
def test_a_wrong_alpha_is_named(method, alpha):
    with pytest.raises(ValueError, match="`alpha`"):
        method(alpha=alpha)


def test_methods_say_what_they_need():
    parts = {
        name: (m.uses_calibration, m.uses_gradients, m.active_optimisation is not None, m.uses_gram)
        for name in METHODS
        for m in [make_method(name)]
    }
    assert parts == {
        "magnitude": (False, False, False, False),
        "wanda": (True, False, False, False),
        "rgs": (True, True, False, False),
        "ro": (True, False, True, False),
        "wanda++": (True, True, True, False),
        "sparsegpt": (True, False, False, True),
        "tuned-ro": (True, False, False, True),
    }
    assert not WandaPP(alpha=0.0).uses_gradients
    assert WandaPP(alpha="auto").uses_gradients
    assert RO(RegionalOptimisation(rounds=0)).active_optimisation is None


def test_names_and_objects():
    assert make_method("wanda") == Wanda()
    assert make_method(RGS(5.0)) == RGS(5.0)
    with pytest.raises(
        ValueError, match=r"`method` to be one of magnitude, wanda, .*, or a PruningMethod, but got 'sn"
    ):
        make_method("snip")


def test_defaults_are_the_papers():
    assert WandaPP().to_dict() == {
        "method": "wanda++",
        "alpha": 100.0,
        "rounds": 5,
        "samples_per_round": None,
        "learning_rate": 3e-7,
    }
    assert WandaPP().for_samples(128).to_dict()["samples_per_round"] == 32


def test_only_options_of_the_method_are_recorded():
    assert [method.to_dict() for method in (Magnitude(), Wanda(), SparseGPT())] == [
        {"method": name} for name in ("magnitude", "wanda", "sparsegpt")
    ]
    assert repr(RGS(5).to_dict()) == "{'method': 'rgs', 'alpha': 5.0}"
    assert "alpha" not in RO().to_dict()


def test_rounds_take_all_samples_where_there_are_few():
    assert WandaPP().for_samples(8).optimisation.samples_per_round == 8
    assert WandaPP(optimisation=RegionalOptimisation(samples_per_round=4)).for_samples(8).to_dict()["rounds"] == 5
    with pytest.raises(ValueError, match=r"`samples_per_round` to be at most .* \(8\), but got 9"):
        RO(RegionalOptimisation(samples_per_round=9)).for_samples(8)
    with pytest.raises(ValueError, match="calibration samples for method='wanda'"):
        Wanda().for_samples(0)
    assert Magnitude().for_samples(0) == Magnitude()
