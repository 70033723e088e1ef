"""Separate the options of loading from others."""

from dataclasses import fields


def loading_of(options):
    """Take the fields of `LoadingOptions` out of a dictionary of options and return them as one."""
    from wandazeta.models.loading import LoadingOptions

    names = {field.name for field in fields(LoadingOptions)} & options.keys()
    return LoadingOptions(**{name: options.pop(name) for name in names})
