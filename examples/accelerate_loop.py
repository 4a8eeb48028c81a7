"""BERT in a loop of accelerate, whose `accelerator.backward` divides and scales the loss before its backward pass."""
import torch
from accelerate import Accelerator
from curvlab.optimizers import KFAC, Categorical
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification


def sentences(count=64, length=12):  # which third of the words is the first one from? Behind it others, and padding
    draw = torch.Generator().manual_seed(0)
    for _ in range(count):
        mask = (torch.arange(length) < torch.randint(4, length + 1, (), generator=draw)).long()
        tokens = torch.randint(1, 31, (length,), generator=draw) * mask
        yield {"input_ids": tokens, "attention_mask": mask, "labels": (tokens[0] - 1) // 10}


def main(make=lambda model: KFAC(model, lr=0.05, likelihood=Categorical()), steps=40, folder="runs/bert", resume=False):
    accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=2)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForSequenceClassification(BertConfig(vocab_size=31, max_position_embeddings=12, num_labels=3, **sizes))
    own = make(model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(own, 40)
    loader = DataLoader(list(sentences()), batch_size=16)
    model, optimizer, loader, scheduler = accelerator.prepare(model, own, loader, scheduler)
    if resume:
        accelerator.load_state(folder)
    losses, scale = [], accelerator.scaler.get_scale if accelerator.scaler else 1.0
    while scheduler.scheduler.last_epoch < steps:
        for batch in loader:
            with accelerator.accumulate(model):
                result = model(**batch)
                loss = own.before_backward(result.loss, result.logits, scale=scale)
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                losses.append(loss.item())
    accelerator.save_state(folder)
    return accelerator.unwrap_model(model), losses
