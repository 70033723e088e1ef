"""Strategies on the CPU from options that a JSON file can hold."""


def make_strategy(options, devices):
    """Lightning's strategy: `None`, options of DeepSpeed such as `{"stage": 3}`, or `{"fsdp2": {}}`."""
    if options is None:
        return "auto"
    if "fsdp2" in options:
        from lightning.pytorch.strategies import ModelParallelStrategy

        sizes = {"data_parallel_size": devices, "tensor_parallel_size": 1, "save_distributed_checkpoint": False}
        return ModelParallelStrategy(**sizes | options["fsdp2"])
    from helpers.cpu_deepspeed import CPUDeepSpeedStrategy

    return CPUDeepSpeedStrategy(**options)
