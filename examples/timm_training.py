"""timm: its registry of optimizers and groups, its scaler, scheduler and checkpoints."""
from pathlib import Path

import torch
import torch.nn.functional as F
from curvlab.optimizers import KFAC, Categorical
from timm.models import VisionTransformer, resume_checkpoint
from timm.optim import OptimInfo, OptimizerRegistry
from timm.scheduler import CosineLRScheduler
from timm.utils import CheckpointSaver, NativeScaler


def main(
    make=lambda model, groups, **own: KFAC(model, groups, likelihood=Categorical(), **own),
    steps=40, folder="runs/timm", resume=False,
):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(device)
    targets = inputs.mean((2, 3)).argmax(1)
    model = VisionTransformer(8, 4, num_classes=3, embed_dim=16, depth=2, num_heads=2).to(device)
    registry = OptimizerRegistry()  # as create_optimizer_v2 has one
    registry.register(OptimInfo("ours", lambda groups, **own: make(model, groups, **own), has_eps=False))
    optimizer = registry.create_optimizer(model, "ours", lr=0.05, weight_decay=1e-4)
    scheduler = CosineLRScheduler(optimizer, t_initial=40)
    scaler = NativeScaler(device)
    Path(folder).mkdir(parents=True, exist_ok=True)
    saver = CheckpointSaver(model, optimizer, amp_scaler=scaler, checkpoint_dir=folder, recovery_dir=folder)
    losses, start = [], resume_checkpoint(model, f"{folder}/last.pth.tar", optimizer, scaler) if resume else 0
    for step in range(start, steps):
        scheduler.step(step)
        optimizer.zero_grad()
        for rows in torch.arange(64).split(32):
            with torch.autocast(device, torch.bfloat16):
                outputs = model(inputs[rows])
                loss = F.cross_entropy(outputs, targets[rows]) / 2
            loss = optimizer.before_backward(loss, outputs, scale=scaler._scaler.get_scale)
            scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters(), need_update=rows[0] > 0)
        losses.append(2 * loss.item())
    saver.save_checkpoint(steps - 1)
    return model, losses
