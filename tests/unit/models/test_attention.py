import math
from contextlib import contextmanager

import pytest
import torch
from helpers.causal_lms import save_tiny_lm, tiny_lm
from lightning.pytorch import Trainer
from torch.nn import functional as F
from torch.utils.data import DataLoader

from wandazeta.adapters import Weights
from wandazeta.models.attention import differentiable_attention, is_faulty
from wandazeta.modules import FirstOrderModule
from wandazeta.pruning import PruneOptions, prune_model

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("version", "num_tokens", "faulty"),
    [
        ("2.11.0+cu130", 64, True),
        ("2.13.1", 192, True),
        ("2.11.0", None, True),
        ("2.13.0", 128, False),
        ("2.13.0", 2048, False),
        ("2.13.0", 63, False),
        ("2.10.2", 64, False),
        ("2.9.0", None, False),
    ],
)
def test_it_is_faulty_by_version_and_length(version, num_tokens, faulty):
    assert is_faulty(version, num_tokens) == faulty


@pytest.mark.parametrize(
    ("device", "version", "num_tokens", "gradients", "enabled"),
    [
        (CUDA, "2.11.0", 64, True, False),
        (CUDA, "2.11.0", None, True, False),
        (CUDA, "2.11.0", 128, True, True),
        (CUDA, "2.11.0", 64, False, True),
        (CUDA, "2.10.0", 64, True, True),
        (CPU, "2.11.0", 64, True, True),
    ],
)
def test_cudnn_is_avoided_where_it_is_faulty_alone(monkeypatch, device, version, num_tokens, gradients, enabled):
    monkeypatch.setattr(torch, "__version__", version)
    with torch.set_grad_enabled(gradients), differentiable_attention(device, num_tokens):
        assert torch.backends.cuda.cudnn_sdp_enabled() == enabled
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_a_users_choice_comes_back(monkeypatch):
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        with differentiable_attention(CPU):
            assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def test_pruning_and_back_propagation_ask_for_every_forward_pass_with_gradients(monkeypatch, tmp_path):
    inside, asked, seen = [], [], []

    @contextmanager
    def watched(device, num_tokens=None):
        asked.append((device, num_tokens))
        inside.append(True)
        yield
        inside.pop()

    attention = F.scaled_dot_product_attention

    def noted(*args, **kwargs):
        seen.append((torch.is_grad_enabled(), bool(inside)))
        return attention(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    monkeypatch.setattr("wandazeta.pruning.pruner.differentiable_attention", watched)
    monkeypatch.setattr("wandazeta.modules.first_order.differentiable_attention", watched)
    model = tiny_lm()
    batches = [{"input_ids": row} for row in torch.randint(300, (2, 10)).split(1)]
    options = PruneOptions.from_dict({"method": "wanda++", "rounds": 1})
    prune_model(model, lambda batch: model(**batch, use_cache=False), batches, options)
    with_gradients = {is_inside for gradients, is_inside in seen if gradients}
    assert with_gradients == {True}
    assert set(asked) == {(CPU, 10)}
    asked.clear(), seen.clear()
    module = FirstOrderModule(str(save_tiny_lm(tmp_path)), trainable=Weights())
    batch = batches[0] | {"attention_mask": torch.ones(1, 10, dtype=torch.long)}
    trainer = Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(module, DataLoader([batch], batch_size=None))
    assert set(asked) == {(CPU, None)}
    assert {is_inside for gradients, is_inside in seen if gradients} == {True}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gradients_of_rows_with_very_low_scores_are_finite():
    tokens, width = 704, 64
    q, k, v = (0.1 * torch.randn(1, 1, tokens, width, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    q[..., 0], k[..., 0] = 1.0, -120 * math.sqrt(width)  # every logarithm of a row's sum is about -120
    for tensor in (q, k, v):
        tensor.requires_grad_()
    mask = torch.ones(tokens, tokens, dtype=torch.bool, device="cuda").tril()[None, None]
    with differentiable_attention(CUDA, tokens):
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    output.backward(torch.randn_like(output))
    assert all(tensor.grad.isfinite().all() for tensor in (q, k, v))
