"""DeepSpeed on the CPU, for tests: nothing but a check of the accelerator is in its way."""

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DeepSpeedStrategy


class CPUDeepSpeedStrategy(DeepSpeedStrategy):
    """Lightning's strategy with gloo instead of NCCL."""

    def __init__(self, stage=2, **options):
        import deepspeed.ops

        # would be compiled at first use, with a compiler that a test machine need not have
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # tiny models are below the default threshold and would never be sharded
        options.setdefault("process_group_backend", "gloo")
        super().__init__(stage=stage, **options)
        if stage == 3:
            self.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0

    def setup_environment(self):
        self.accelerator.setup_device(self.root_device)
        self.setup_distributed()

    def setup_distributed(self):
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self):
        return torch.device("cpu", 0)  # DeepSpeed wants an index
