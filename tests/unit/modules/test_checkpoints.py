"""A checkpoint of one module that is given to another: one line that names the class it is of."""

import pytest
import torch
from helpers.causal_lms import save_tiny_lm, text_batch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from wandazeta.adapters import LoRAAdapters, PeftLoRA, TensorTrainAdapters, Weights
from wandazeta.modules import FirstOrderModule, LanguageModel, ZerothOrderModule

pytestmark = pytest.mark.filterwarnings("ignore")


class Foreign(LightningModule):
    def __init__(self, path):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)

    training_step = validation_step = lambda self, *args: self.layer.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


MODULES = {
    "LanguageModel": LanguageModel,
    "ZerothOrderModule (TensorTrainAdapters)": ZerothOrderModule,
    "ZerothOrderModule (LoRAAdapters)": lambda path: ZerothOrderModule(path, trainable=LoRAAdapters(rank=2)),
    "ZerothOrderModule (Weights)": lambda path: ZerothOrderModule(path, trainable=Weights()),
    "FirstOrderModule (PeftLoRA)": lambda path: FirstOrderModule(path, trainable=PeftLoRA(rank=2)),
    "FirstOrderModule (TensorTrainAdapters)": lambda path: FirstOrderModule(path, trainable=TensorTrainAdapters()),
    "FirstOrderModule (Weights)": lambda path: FirstOrderModule(path, trainable=Weights()),
    "another module": Foreign,
}


def loader():
    return DataLoader([text_batch(2)], batch_size=None)


def trainer():
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", max_steps=1, enable_checkpointing=False, num_sanity_val_steps=0, **quiet)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model directory, and a checkpoint of every kind of module on it."""
    folder = tmp_path_factory.mktemp("checkpoints")
    model = str(save_tiny_lm(folder / "model"))
    files = {}
    for name, make in MODULES.items():
        run, module = trainer(), make(model)
        if name == "LanguageModel":
            run.validate(module, loader(), verbose=False)
        else:
            run.fit(module, loader())
        files[name] = str(folder / f"{len(files)}.ckpt")
        run.save_checkpoint(files[name])
    return model, files


@pytest.mark.parametrize("given", MODULES)
@pytest.mark.parametrize("command", ["fit", "validate"])
@pytest.mark.parametrize("into", ["LanguageModel", *list(MODULES)[1::2]])
def test_every_direction(saved, into, given, command):
    model, files = saved
    if (into, command) in (("LanguageModel", "fit"), ("another module", "fit"), ("another module", "validate")):
        return  # it is not trained, or not ours
    run, module = trainer(), MODULES[into](model)
    # a model that was trained in full is a model
    fits = into == given or (into, given) == ("LanguageModel", "FirstOrderModule (Weights)")
    if fits:
        getattr(run, command)(module, loader(), ckpt_path=files[given])
        return
    with pytest.raises(ValueError, match="Expected") as error:
        getattr(run, command)(module, loader(), ckpt_path=files[given])
    assert "\n" not in str(error.value)
    if into.split()[0] != given.split()[0]:
        assert f"a checkpoint of {into.split()[0]}, but got one of {given}" in str(error.value)


def test_weights_of_another_shape(saved, tmp_path):
    _, files = saved
    other = LanguageModel(str(save_tiny_lm(tmp_path, vocab_size=310)))
    with pytest.raises(ValueError, match=r"`backbone.*` has shape \(300, 32\) there and \(310, 32\) here"):
        trainer().validate(other, loader(), ckpt_path=files["LanguageModel"])


def test_load_from_checkpoint(saved):
    model, files = saved
    with pytest.raises(ValueError, match=r"of LanguageModel, but got one of ZerothOrderModule \(TensorTrainAdapters\)"):
        LanguageModel.load_from_checkpoint(
            files["ZerothOrderModule (TensorTrainAdapters)"], model_name_or_path=model, strict=True
        )
    loaded = LanguageModel.load_from_checkpoint(files["LanguageModel"], model_name_or_path=model)
    assert torch.equal(loaded.backbone.lm_head.weight, LanguageModel(model).backbone.lm_head.weight)
