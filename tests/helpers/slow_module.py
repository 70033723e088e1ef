"""Modules whose blocks take their time, so that a signal finds them at work."""

import time

from wandazeta.models.blocks import find_blocks
from wandazeta.modules import LanguageModel, ZerothOrderModule


def _slow(module, seconds):
    _, blocks = find_blocks(module.backbone)
    for block in blocks:
        block.register_forward_pre_hook(lambda *_: time.sleep(seconds))


class SlowZerothOrderModule(ZerothOrderModule):
    def __init__(self, model_name_or_path: str, seconds: float = 0.0, num_queries: int = 4):
        from wandazeta.adapters import TensorTrainAdapters
        from wandazeta.zeroth_order import ConstantSchedule

        super().__init__(
            model_name_or_path,
            schedule=ConstantSchedule(num_queries),
            trainable=TensorTrainAdapters(rank=2, bottleneck=8),
            query_chunk_size=1,
        )
        _slow(self, seconds)


class SlowLanguageModel(LanguageModel):
    def __init__(self, model_name_or_path: str, seconds: float = 0.0):
        super().__init__(model_name_or_path)
        _slow(self, seconds)
