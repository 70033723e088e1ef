"""Losses and scores of language models and encoders, and the objectives that are made of them."""
