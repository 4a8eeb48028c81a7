"""The shape of torchvision's reference loop, with label smoothing and a GradScaler: one line is ours."""
from pathlib import Path

import torch
from curvlab.optimizers import KFAC, Categorical
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import MobileNetV2


def main(make=lambda model: KFAC(model, likelihood=Categorical(0.1)), steps=40, folder="runs/vision", resume=False):
    device, file = "cuda" if torch.cuda.is_available() else "cpu", Path(folder) / "checkpoint.pth"
    images = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(images, images.mean((2, 3)).argmax(1)), batch_size=32)
    model = MobileNetV2(3, 0.25, [[1, 16, 1, 1], [2, 24, 1, 2]], dropout=0.0).to(device)
    criterion, optimizer = nn.CrossEntropyLoss(label_smoothing=0.1), make(model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    scaler = torch.amp.GradScaler(device, enabled=device == "cuda")
    parts = {"model": model, "optimizer": optimizer, "lr_scheduler": scheduler, "scaler": scaler}
    if resume:
        for name, state in torch.load(file, map_location="cpu", weights_only=True).items():
            parts[name].load_state_dict(state)
    losses = []
    for _ in range(scheduler.last_epoch, steps // len(loader)):
        model.train()
        for image, target in loader:
            with torch.autocast(device, enabled=scaler.is_enabled()):
                output = model(image.to(device))
                loss = criterion(output, target.to(device))
            optimizer.zero_grad()
            loss = optimizer.before_backward(loss, output, scale=scaler.get_scale)  # the line
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
        scheduler.step()
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: part.state_dict() for name, part in parts.items()}, file)
    return model, losses
