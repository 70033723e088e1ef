"""A tiny model, text to calibrate on, and the configuration of `wandazeta prune` for them."""

import yaml
from helpers.prune_options import method_arguments
from helpers.tiny_model import save_tiny_llama


def write_prune_config(root, num_blocks=3, **options):
    """Write `model/`, `text.txt` and `config.yaml`; the run is to be started in a folder beside them."""
    (root / "text.txt").write_text("\n\n".join(f"paragraph {index} " * 8 for index in range(60)))
    save_tiny_llama(root / "model", num_blocks=num_blocks)
    method = method_arguments(rounds=2, samples_per_round=4, learning_rate=1e-4)
    small = {"method": method, "num_calibration_samples": 6, "output_dir": "progress"}
    pruning = {"class_path": "WandaPPPruneCallback", "init_args": small | options}
    config = {
        "model": {"class_path": "LanguageModel", "init_args": {"model_name_or_path": "../model"}},
        "data": {"class_path": "TextDataModule", "init_args": {"source": "../text.txt", "sequence_length": 16}},
        "trainer": {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "callbacks": [pruning]},
    }
    (root / "config.yaml").write_text(yaml.safe_dump(config))
