"""wandazeta: prune language models with Wanda++, fine-tune them with forward passes alone (AdaZeta)."""

__version__ = "0.1.0"
