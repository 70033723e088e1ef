import pytest

from wandazeta.utilities.arguments import check_at_least, check_choice, check_positive, check_range, closest_names


def test_an_error_names_argument_value_and_what_is_expected():
    with pytest.raises(ValueError, match=r"^Expected argument `rate` to be above 0, but got -1$"):
        check_range("rate", -1, False, "above 0")
    with pytest.raises(ValueError, match=r"^Expected argument `mode` to be one of fast, slow, but got 'slwo'$"):
        check_choice("mode", "slwo", ("fast", "slow"))
    with pytest.raises(ValueError, match=r"^Expected argument `size` to be an integer of at least 3, but got 2$"):
        check_at_least("size", 2, 3)
    with pytest.raises(ValueError, match=r"^Expected argument `size` to be an integer larger than 0, but got 0$"):
        check_positive(length=1, size=0)


@pytest.mark.parametrize("value", [True, 1.0, "1"])
def test_what_is_no_integer_is_refused(value):
    with pytest.raises(ValueError, match="`size` to be an integer"):
        check_positive(size=value)


def test_values_that_fit_and_those_that_were_not_given_pass():
    check_range("rate", 1, True, "above 0")
    check_choice("mode", "fast", ("fast", "slow"))
    check_at_least("seed", 0, 0)
    check_positive(size=1, length=None)


def test_an_unknown_name_gets_the_closest_ones():
    assert closest_names("up_prj", ["up_proj", "gate"]) == "did you mean `up_proj`?"
    assert closest_names("x", ["first", "second"]) == "did you mean `first` or `second`?"
    assert closest_names("x", []) == "there is none"
