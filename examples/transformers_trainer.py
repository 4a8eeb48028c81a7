"""GPT-2 and the Trainer of transformers, which calls `loss.backward()` itself, with padding and accumulation."""
import torch
from curvlab.optimizers import KFAC, Categorical
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments


def sentences(count=64, length=12):
    """Counting from somewhere, modulo 30, for a while; then padding, which labels of -100 leave out."""
    rows = []
    for first, end in zip(torch.arange(count) * 7 % 30, 4 + torch.arange(count) * 5 % (length - 3), strict=True):
        mask = (torch.arange(length) < end).long()
        tokens = (first + torch.arange(length)) % 30 * mask
        rows.append({"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)})
    return rows


def main(make=lambda model: KFAC(model, lr=0.05, likelihood=Categorical()), steps=40, folder="runs/gpt2", resume=False):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=12, n_embd=16, n_layer=2, n_head=2))
    optimizer = make(model)
    optimizer.follow_model(scale=lambda: trainer.accelerator.scaler.get_scale() if trainer.accelerator.scaler else 1.0)
    arguments = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=8, gradient_accumulation_steps=2, bf16=True,
        logging_steps=1, save_steps=20, report_to="none", use_cpu=not torch.cuda.is_available(),
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    trainer = Trainer(model, arguments, train_dataset=sentences(), optimizers=(optimizer, scheduler))
    trainer.train(resume_from_checkpoint=resume)
    return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
