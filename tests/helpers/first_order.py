"""Train tiny models with `FirstOrderModule`, and prune them by magnitude."""

import torch
from helpers.causal_lms import classification_batch, step_loader, text_batch
from helpers.loading import loading_of
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM

from wandazeta.adapters import PeftLoRA
from wandazeta.modules import FirstOrderModule


def prune(directory):
    """Set the two smallest of every four weights in the blocks to zero, in the files."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        for weight in block_weights(model).values():
            groups = weight.view(-1, 4)
            groups.scatter_(1, groups.abs().argsort(1)[:, :2], 0.0)
    model.save_pretrained(directory)
    return directory


def block_weights(model):
    return {
        name: w for name, w in model.named_parameters() if ".layers." in name and w.ndim == 2 and "lora" not in name
    }


def fit(directory, root, *callbacks, steps=4, text=False, resume=False, save=False, module=None, **options):
    options = {"trainable": PeftLoRA(2), "learning_rate": 1e-2, "seed": 3} | options
    module = module or FirstOrderModule(str(directory), loading_of(options), **options)
    saving = (
        [ModelCheckpoint(root, "step-{step}", save_top_k=-1, every_n_train_steps=2, save_last=True)] if save else []
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        logger=False,
        enable_checkpointing=save,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
        callbacks=[*callbacks, *saving],
    )
    batch = text_batch(20) if text else classification_batch(20)
    trainer.fit(module, step_loader(batch, 4, trainer), ckpt_path="last" if resume else None)
    return trainer, module
