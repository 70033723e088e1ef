"""An encoder with a new classification head.

Legend: C classes, D hidden size, R rows run by the model, T tokens.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


class EncoderClassifier(nn.Module):
    """An encoder and a linear head on the mean of its last hidden states over the tokens.

    Sentence encoders are trained for this mean, and it needs no pooler, whose weights many checkpoints lack. The head
    starts at zero, so all classes are equally likely and no random numbers are drawn.

    Args:
        encoder: Encoder of transformers; the first of its outputs is `[R, T, D]`.
        num_classes: Number of classes.
    """

    def __init__(self, encoder: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        config: Any = encoder.config
        # float32 whatever the encoder is in: it is small and trained, and zeroth-order losses of two sides differ by
        # less than 16 bits resolve
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
        """The encoder's pooler, if it has one: never trained, and kept so that the encoder can be exported."""
        pooler = getattr(self.encoder, "pooler", None)
        return [] if pooler is None else [pooler]

    def get_output_embeddings(self) -> nn.Module:
        """Return the classification head, which takes the place of a language model's output embeddings."""
        return self.head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False) -> Any:
        """Classify sequences.

        Args:
            input_ids: Tokens `[R, T]`.
            attention_mask: One for tokens, zero for padding, `[R, T]`.
            use_cache: Ignored; accepted because language models are called with it.

        Returns:
            An object with `logits`, `[R, C]`.
        """
        hidden_RTD = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0].float()
        mask_RT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        # masked instead of multiplied: a non-finite state at a padded position must not reach the sum
        total_RD = hidden_RTD.masked_fill(mask_RT[..., None] == 0, 0.0).sum(1)
        mean_RD = total_RD / mask_RT.sum(1, keepdim=True)
        weight: Any = self.head.weight
        return SimpleNamespace(logits=self.head(mean_RD.to(weight.dtype)))
