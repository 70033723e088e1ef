import pytest
import torch
from torch import nn

from wandazeta.models.modes import evaluation_mode, frozen


def test_each_module_returns_to_its_own_mode():
    modules = [nn.Dropout(), nn.Dropout().eval()]
    with evaluation_mode(modules):
        assert not any(module.training for module in modules)
    assert [module.training for module in modules] == [True, False]
    with pytest.raises(ZeroDivisionError), evaluation_mode(modules):
        raise ZeroDivisionError
    assert [module.training for module in modules] == [True, False]


def test_only_parameters_that_required_gradients_require_them_again():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    with frozen(model):
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not model(torch.ones(1, 2)).requires_grad
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, True, False, False]
    with pytest.raises(ZeroDivisionError), frozen(model):
        raise ZeroDivisionError
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, True, False, False]
