"""Plain PyTorch with mixed precision, accumulation, clipping and a schedule."""
from pathlib import Path

import torch
import torch.nn.functional as F
from curvlab.optimizers import KFAC, Categorical
from torch import nn


def main(make=lambda model: KFAC(model, lr=0.05, likelihood=Categorical()), steps=40, folder="runs/net", resume=False):
    device, half = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.bfloat16)
    inputs = torch.randn(128, 16, generator=torch.Generator().manual_seed(0)).to(device)
    targets = inputs[:, :4].argmax(1)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4)).to(device)
    optimizer = make(model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    scaler = torch.amp.GradScaler(device, enabled=half == torch.float16)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    checkpoint, losses = Path(folder) / "checkpoint.pt", []
    if resume:
        for name, state in torch.load(checkpoint, weights_only=True).items():
            parts[name].load_state_dict(state)
    for _ in range(scheduler.last_epoch, steps):
        for rows in torch.arange(128).split(64):  # the micro-batches of a step
            with torch.autocast(device, half):
                outputs = model(inputs[rows])
                loss = F.cross_entropy(outputs, targets[rows])
            optimizer.backward(scaler.scale(loss / 2), outputs, scale=scaler.get_scale())  # not loss.backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: part.state_dict() for name, part in parts.items()}, checkpoint)
    return model, losses
