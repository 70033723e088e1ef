"""Recommended settings as YAML files: `wandazeta prune -c preset:best …`.

- `best`: the default method, which prunes best on the models that were tried (docs/results.md), in bfloat16.
- `paper`: the settings of the Wanda++ paper (arXiv 2503.04992), for its models of width 4096 and more.
"""

from pathlib import Path

from wandazeta.utilities.arguments import check_choice

__all__ = ["names", "path"]

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Return the names of all presets."""
    return sorted(file.stem for file in _FOLDER.glob("*.yaml"))


def path(name: str) -> Path:
    """Return the file of a preset, which the command line reads as `-c preset:NAME`.

    Args:
        name: Name of the preset.

    Raises:
        ValueError: If there is no such preset.

    Examples:
        >>> path("best").name
        'best.yaml'
    """
    check_choice("preset", name, names())
    return _FOLDER / f"{name}.yaml"
