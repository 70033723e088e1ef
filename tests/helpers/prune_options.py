"""Pruning options from flat names, whatever component they belong to."""

from dataclasses import fields

from wandazeta.pruning import PruneOptions, RegionalOptimisation, make_method

OF_OPTIMISATION = {field.name for field in fields(RegionalOptimisation)}
OF_METHODS = {"alpha", *OF_OPTIMISATION}


def make_options(method="wanda++", **options):
    """Options of a pruning; those of methods are left out where this method does not have them."""
    known = make_method(method).to_dict()
    kept = {name: value for name, value in options.items() if name in known or name not in OF_METHODS}
    return PruneOptions.from_dict({"method": method, **kept})


def method_arguments(class_path="wandazeta.pruning.WandaPP", **options):
    """The same for a configuration: a method as `class_path` and `init_args`."""
    optimisation = {name: value for name, value in options.items() if name in OF_OPTIMISATION}
    others = {name: value for name, value in options.items() if name not in OF_OPTIMISATION}
    return {"class_path": class_path, "init_args": others | {"optimisation": optimisation}}
