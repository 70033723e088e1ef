"""Small tasks for lm-evaluation-harness, made from the offline samples.

- `sample_reviews`: is a sentence of a film review positive? Accuracy over 400 sentences of Rotten Tomatoes.
- `sample_wikipedia`: perplexity on the beginnings of Wikipedia articles.

`wandazeta evaluate --tasks` knows them by name; for the harness's own command line, this folder is the
`--include_path`.
"""

from pathlib import Path

__all__ = ["FOLDER"]

FOLDER = Path(__file__).parent
"""Folder of the tasks' YAML files."""
