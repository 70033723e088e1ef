"""Which prompt the demo asks with: the one with the best zero-shot accuracy on validation, of the pruned model.

    wandazeta fit -c configs/demo.yaml
    python benchmarks/prompts.py

The candidates are what the literature asks of movie reviews, all with two single-token answers.
"""

from records import ROOT, describe, write

from wandazeta.cli.main import PruningTrainer
from wandazeta.datamodules import PromptedClassificationDataModule
from wandazeta.modules import LanguageModel

CANDIDATES = (
    # Gao et al. 2021 (LM-BFF), and MeZO, for SST-2
    ("{text} It was", [" terrible", " great"]),
    # Schick and Schütze 2021 (PET), for Yelp: those of its patterns that end with the answer
    ("{text} All in all, it was", [" bad", " good"]),
    ("{text} In summary, the movie is", [" bad", " good"]),
    # Zhao et al. 2021 (contextual calibration), for SST-2
    ("Review: {text}\nSentiment:", [" negative", " positive"]),
)
NUM_EXAMPLES = 600


def main() -> None:
    """Measure every candidate and write the result file, the best first."""
    model = LanguageModel(str(ROOT / "runs" / "demo" / "pruned_model"))
    trainer = PruningTrainer(accelerator="auto", devices=1, logger=False, enable_checkpointing=False)
    records = []
    for template, options in CANDIDATES:
        data = PromptedClassificationDataModule(
            "sample:rotten-tomatoes", template, options, eval_batch_size=50, num_val=NUM_EXAMPLES
        )
        accuracy = trainer.validate(model, data, verbose=False)[0]["val/accuracy"]
        records.append({"template": template, "options": options, "accuracy": accuracy})
    records.sort(key=lambda record: -record["accuracy"])
    result = describe("prompts", records, source="sample:rotten-tomatoes", split="val", num_examples=NUM_EXAMPLES)
    write(ROOT / "benchmarks" / "results" / "prompts.json", result)
    for record in records:
        print(f"{record['accuracy']:.3f}  {record['template']!r} {record['options']}")


if __name__ == "__main__":
    main()
