"""At which distance differences of losses are slopes: SmolLM2-135M, by precision and by where the adapters start.

    python benchmarks/epsilon.py

Default adapters, `wandazeta diagnose` on the demo's prompts. Finished records are kept, so it can be stopped and
started again.
"""

import itertools
from typing import Literal

from lightning.pytorch import seed_everything
from records import ROOT, describe, finished, is_finished, write

from wandazeta.adapters import TensorTrainAdapters
from wandazeta.cli.main import PruningTrainer
from wandazeta.datamodules import PromptedClassificationDataModule
from wandazeta.models.loading import LoadingOptions
from wandazeta.modules import ZerothOrderModule
from wandazeta.modules.diagnose import EpsilonDiagnosis

MODEL = ".cache/wandazeta/smollm2-135m"
RESULT = ROOT / "benchmarks" / "results" / "epsilon.json"
BATCH_SIZE = 4


def measure(dtype: Literal["bfloat16", "float32"], identity_start: bool) -> EpsilonDiagnosis:
    """Measure one setting."""
    seed_everything(0)
    model = ZerothOrderModule(
        str(ROOT / MODEL),
        LoadingOptions(dtype),
        trainable=TensorTrainAdapters(identity_start=identity_start),
        query_chunk_size=8,
    )
    data = PromptedClassificationDataModule(
        "sample:rotten-tomatoes",
        "{text} In summary, the movie is",
        [" bad", " good"],
        batch_size=BATCH_SIZE,
        num_train=64,
        num_val=10,
        num_test=10,
    )
    diagnosis = EpsilonDiagnosis(num_batches=2, num_queries=16)
    trainer = PruningTrainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, num_sanity_val_steps=0,
        callbacks=[diagnosis],
    )  # fmt: skip
    trainer.fit(model, data)
    return diagnosis


def main() -> None:
    """Measure what the result file lacks."""
    records = finished(RESULT)
    for identity_start, dtype in itertools.product((True, False), ("bfloat16", "float32")):
        settings = {"model": MODEL, "dtype": dtype, "batch": BATCH_SIZE, "identity_start": identity_start}
        if not is_finished(settings, records):
            records.append(settings | measure(dtype, identity_start).to_dict())
            write(RESULT, describe("epsilon", records))
        print(settings, records[-1]["recommended"])


if __name__ == "__main__":
    main()
