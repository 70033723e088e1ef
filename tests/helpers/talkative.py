"""A callback that speaks by every means, and fails where it is told to."""

import logging
import warnings

from lightning.pytorch import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info


class Talkative(Callback):
    """Every rank warns and logs once; the given one then fails."""

    def __init__(self, failing_rank: int | None = None):
        self.failing_rank = failing_rank

    def on_train_start(self, trainer, pl_module):
        from transformers.utils.logging import get_logger

        rank = trainer.global_rank
        warnings.warn(f"warning of {rank}", stacklevel=1)
        get_logger("transformers.talkative").warning(f"transformers of {rank}")
        logging.getLogger("some.library").warning(f"library of {rank}")
        logging.getLogger("some.library").error(f"error of {rank}")
        rank_zero_info(f"info of {rank}")
        if rank == self.failing_rank:
            raise RuntimeError(f"failure of {rank}")
