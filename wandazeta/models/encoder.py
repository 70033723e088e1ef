"""An encoder with a classification head.

Legend: C classes, D hidden size, R rows run by the model, T tokens.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


class EncoderClassifier(nn.Module):
    """An encoder and a linear head on the mean of its last hidden states over the tokens.

    The mean is what sentence encoders are trained for, and it needs no pooler, whose weights many checkpoints lack. The
    head starts at zero: every class is as likely as another, without a draw that a run would have to repeat.

    Args:
        encoder: Encoder of transformers; it returns `[R, T, D]` first.
        num_classes: Number of classes.
    """

    def __init__(self, encoder: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        config: Any = encoder.config
        # fp32 whatever the encoder is in: small, trained, and the losses of two sides differ by less than 16 bits tell
        self.head = nn.Linear(config.hidden_size, num_classes)
        with torch.no_grad():
            for parameter in self.head.parameters():
                parameter.zero_()
        for module in self.unused_modules:
            module.requires_grad_(False)

    @property
    def config(self) -> Any:
        """The encoder's configuration."""
        return self.encoder.config

    @property
    def unused_modules(self) -> list[nn.Module]:
        """The pooler of the encoder, if it has one: it is exported with the encoder and never trained."""
        pooler = getattr(self.encoder, "pooler", None)
        return [] if pooler is None else [pooler]

    def get_output_embeddings(self) -> nn.Module:
        """Return the head, in the place that a language model has its own."""
        return self.head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False) -> Any:
        """Classify sequences.

        Args:
            input_ids: Tokens `[R, T]`.
            attention_mask: One for tokens, zero for padding, `[R, T]`.
            use_cache: Not used; language models are called with it, too.

        Returns:
            An object with `logits`, `[R, C]`.
        """
        hidden_RTD = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0].float()
        mask_RT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        # not a product: a non-finite state at a padded place must not spoil the sum
        total_RD = hidden_RTD.masked_fill(mask_RT[..., None] == 0, 0.0).sum(1)
        mean_RD = total_RD / mask_RT.sum(1, keepdim=True)
        weight: Any = self.head.weight
        return SimpleNamespace(logits=self.head(mean_RD.to(weight.dtype)))
