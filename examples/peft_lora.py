"""LoRA of PEFT on a GPT-2 whose own weights stay as they are; what is saved is the adapter and the optimizer."""
from pathlib import Path

import torch
from curvlab.optimizers import KFAC, Categorical
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel


def main(make=lambda model: KFAC(model, lr=0.05, likelihood=Categorical()), steps=40, folder="runs/lora", resume=False):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = (torch.arange(12) + torch.arange(32).unsqueeze(1) * 7).to(device) % 30
    torch.manual_seed(0)  # of the weights that would be downloaded
    base = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=12, n_embd=16, n_layer=2, n_head=2))
    if resume:
        model = PeftModel.from_pretrained(base, folder, is_trainable=True)
    else:
        names = ["c_attn", "c_proj", "c_fc"]
        model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=names, fan_in_fan_out=True))
    model.to(device).train()
    optimizer = make(model)  # which finds what is to be trained
    if resume:
        optimizer.load_state_dict(torch.load(Path(folder) / "optimizer.pt", weights_only=True))
    losses = []
    for step in range(optimizer.steps, steps):
        torch.manual_seed(step)  # of dropout
        rows = tokens[16 * (step % 2) : 16 * (step % 2) + 16]
        result = model(input_ids=rows, labels=rows)
        optimizer.backward(result.loss, result.logits)  # in place of result.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(result.loss.item())
    model.save_pretrained(folder)
    torch.save(optimizer.state_dict(), Path(folder) / "optimizer.pt")
    return model, losses
