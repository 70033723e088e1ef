"""A small residual network with adapters in float64, whose gradient autograd gives."""

import torch
from torch import nn

from wandazeta.adapters import inject_adapters


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)) for _ in range(2))
        self.double()

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def adapted_net():
    """Return a loss of vectors `(N, d)`, the vector of the adapters as they are, and its gradient."""
    model = Net()
    vector = inject_adapters(
        model, blocks=model.blocks, rank=2, bottleneck=4, identity_start=False, dtype=torch.float64
    )
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    target = torch.randn(3, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def loss_fn(theta_Nd):
        with vector.use(theta_Nd):
            y = model(x.repeat(len(theta_Nd), 1)).view(len(theta_Nd), *x.shape)
        return (y - target).square().mean((1, 2))

    theta = vector.theta.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_fn(theta[None]).sum(), theta)
    return loss_fn, vector.theta.clone(), gradient
