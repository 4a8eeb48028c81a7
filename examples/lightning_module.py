"""Automatic optimization of Lightning, which calls `loss.backward()` itself, mixed precision and accumulation."""
import torch
import torch.nn.functional as F
from curvlab.optimizers import KFAC, Categorical
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Classifier(LightningModule):
    def __init__(self, make):
        super().__init__()
        self.make, self.losses = make, []
        self.net = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4))

    def configure_optimizers(self):
        optimizer = self.make(self.net)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, batch, index):
        inputs, targets = batch
        outputs = self.net(inputs)
        loss = F.cross_entropy(outputs, targets)
        self.losses.append(loss.item())
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)  # of precision="16-mixed"
        return self.optimizers().before_backward(loss, outputs, scale=scaler.get_scale if scaler else 1.0)


def main(make=lambda net: KFAC(net, lr=0.05, likelihood=Categorical()), steps=40, folder="runs/net", resume=False):
    inputs = torch.randn(128, 16, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(inputs, inputs[:, :4].argmax(1)), batch_size=32)
    options = {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "gradient_clip_val": 1.0}
    save = ModelCheckpoint(folder, save_last=True, every_n_train_steps=2)
    trainer = Trainer(max_steps=steps, default_root_dir=folder, logger=False, callbacks=save, **options)
    module = Classifier(make)
    trainer.fit(module, loader, ckpt_path=f"{folder}/last.ckpt" if resume else None)
    return module.net, module.losses
