"""Losses and scores of language models and encoders."""
