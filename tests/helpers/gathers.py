"""Count what DeepSpeed gathers of a sharded model in a step, and how much of it a rank holds at once."""

from lightning.pytorch import Callback


class WatchGathers(Callback):
    """Counts how often each parameter is gathered, from the second step on: DeepSpeed traces the first."""

    def __init__(self):
        self.counts = {}
        self.steps = 0
        self.live = 0
        """Largest number of bytes of gathered weights at once."""
        self.own = 0
        """Bytes of the shards of this rank."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 1:
            self._watch({name: p for name, p in module.backbone.named_parameters() if hasattr(p, "ds_id")})
        self.steps += trainer.global_step >= 1

    def _watch(self, parameters):
        names = {parameter.ds_id: name for name, parameter in parameters.items()}
        self.counts = dict.fromkeys(parameters, 0)
        self.own = sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in parameters.values())
        self.total = sum(p.ds_numel * p.element_size() for p in parameters.values())

        def wrapped(gather):
            def counted(group, *args, **kwargs):
                result = gather(group, *args, **kwargs)
                for parameter in group:
                    self.counts[names[parameter.ds_id]] += 1
                live = (
                    p.ds_numel * p.element_size() for p in parameters.values() if p.ds_status.name != "NOT_AVAILABLE"
                )
                self.live = max(self.live, sum(live))
                return result

            return counted

        for parameter in parameters.values():
            parameter.all_gather_coalesced = wrapped(parameter.all_gather_coalesced)

    def result(self):
        """Gathers of a step by parameter, and bytes."""
        per_step = {name: count / self.steps for name, count in self.counts.items()}
        return {"live": self.live, "own": self.own, "total": self.total, "per_step": per_step}
