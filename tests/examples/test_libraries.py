"""Models and trainers of other libraries: what is recorded of their layers, and what their losses are taken for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optimizers import EKFAC, KFAC, AdaFisherW, AdaHessian, Categorical, ExactNaturalGradient, FishLeg
from optimizers.testing import check_curvature
from tests import dense
from tests.examples.test_examples import INSTALL

transformers = pytest.importorskip("transformers", reason=f"transformers is not installed: {INSTALL}")

SHARED = "no dimension of its rows belongs to the examples"


def gpt2(**options: Any) -> nn.Module:
    sizes = {"vocab_size": 11, "n_positions": 6, "n_embd": 4, "n_layer": 1, "n_head": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ends, **options))


def bert(head: str) -> nn.Module:
    sizes = {"vocab_size": 11, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 8, "max_position_embeddings": 6, "num_labels": 3}
    return getattr(transformers, head)(transformers.BertConfig(**sizes))


def lora() -> nn.Module:
    peft = pytest.importorskip("peft", reason=f"peft is not installed: {INSTALL}")
    config = peft.LoraConfig(r=2, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    model = peft.get_peft_model(gpt2(), config)
    for name, p in model.named_parameters():
        if "lora_B" in name:  # which starts at zero: nothing would come through to the others
            nn.init.normal_(p)
    return model


def vit() -> nn.Module:
    return pytest.importorskip("timm").models.VisionTransformer(8, 4, num_classes=3, embed_dim=4, depth=1, num_heads=2)


def mobilenet() -> nn.Module:
    return pytest.importorskip("torchvision").models.MobileNetV2(3, 0.1, [[1, 8, 1, 1], [2, 8, 1, 1]])


def padded(count: int = 4) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs of unequal length, and labels that leave the padding out."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 11, (count, 6), generator=draw)
    mask = (torch.arange(6) < torch.tensor([6, 3, 5, 4][:count]).unsqueeze(1)).long()
    return {"input_ids": ids * mask, "attention_mask": mask}, ids.masked_fill(mask == 0, -100)


def shifted(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def images() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 1])


#: The model, what it is trained on, its loss, and what is left to the fallback, with the reason.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, Tensor]], Any, dict[str, str]]] = {
    "gpt2": (gpt2, padded, shifted, {"transformer.wte": "tied to lm_head", "transformer.wpe": SHARED}),
    "bert-masked": (
        partial(bert, "BertForMaskedLM"), padded, Categorical(),
        {
            "bert.embeddings.word_embeddings": "tied to cls.predictions.decoder",
            "bert.embeddings.position_embeddings": SHARED,
            "cls.predictions": "free parameter",
        },
    ),
    "bert-classes": (
        partial(bert, "BertForSequenceClassification"), lambda: (padded()[0], torch.tensor([0, 1, 2, 1])),
        Categorical(), {"bert.embeddings.position_embeddings": SHARED},
    ),
    "lora": (lora, padded, shifted, {}),
    "vit": (vit, images, Categorical(), {"": "free parameter"}),
    "mobilenet": (mobilenet, images, Categorical(0.1), {}),
}  # fmt: skip


@pytest.mark.parametrize("kind", [KFAC, AdaFisherW])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_recorded_is_what_each_example_alone_gives(name: str, kind: type) -> None:
    make, data, loss, left = MODELS[name]
    inputs, targets = data()
    optimizer = partial(kind, likelihood=Categorical()) if kind is KFAC else kind
    report = check_curvature(make(), optimizer, inputs, loss, targets=targets)
    report.raise_if_wrong()
    reasons = {line.module: line.reason for line in report.layers if line.reason not in ("", "frozen")}
    assert len(reasons) < len(report.layers) and reasons.keys() == left.keys()
    assert all(left[module] in reason for module, reason in reasons.items())


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("parts", [1, 2])
def test_curvature_of_a_language_model_is_that_of_its_own_loss(parts: int) -> None:
    """Labels are shifted, padding does not count, and parts of a batch are divided by the tokens of all of them."""
    model = gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    layer = model.transformer.h[0].attn.c_proj
    for p in model.parameters():
        p.requires_grad_(any(p is q for q in layer.parameters()))
    inputs, labels = padded()
    count = int((labels[:, 1:] != -100).sum())
    optimizer = ExactNaturalGradient(model, fisher="exact", lr=0.0, likelihood=Categorical())
    optimizer.follow_model()
    for rows in torch.arange(4).split([4] if parts == 1 else [1, 3]):
        own = {key: value[rows] for key, value in inputs.items()}
        divide = {} if parts == 1 else {"num_items_in_batch": count}
        model(**own, labels=labels[rows], **divide).loss.backward()
    optimizer.step()
    (found,) = optimizer.curvature_matrices().values()
    right = dense.gauss_newton(
        lambda ids: model(input_ids=ids, attention_mask=inputs["attention_mask"]).logits, shifted, inputs["input_ids"],
        labels, list(layer.parameters()),
    )  # fmt: skip
    turned = torch.cat([torch.arange(16).view(4, 4), 16 + torch.arange(4).unsqueeze(0)]).mT.flatten()
    right = right[turned][:, turned]
    assert (found - right).norm() <= 1e-5 * right.norm()  # the model's loss is computed in float32


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "make",
    [
        partial(EKFAC, lr=0.05, update_every=2, likelihood=Categorical()),
        partial(AdaFisherW, update_every=2, normalize="none"),
        partial(AdaHessian, lr=0.1),
        partial(FishLeg, aux_every=2, likelihood=Categorical()),
    ],
    ids=["ekfac", "adafisherw", "adahessian", "fishleg"],
)
def test_lightnings_backward_hook_and_its_stand_in_serve_as_well(make: Callable[..., Any]) -> None:
    pl = pytest.importorskip("lightning.pytorch", reason=f"lightning is not installed: {INSTALL}")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    x = torch.randn(32, 5, generator=torch.Generator().manual_seed(0))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x[:, :3].argmax(1)), batch_size=8)

    class Module(pl.LightningModule):
        def __init__(self, way: str) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.way, self.net = way, nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))

        def configure_optimizers(self) -> Any:
            return make(self.net)

        def training_step(self, batch: Any, index: int) -> Tensor:
            self.outputs = self.net(batch[0])
            loss = F.cross_entropy(self.outputs, batch[1])
            self.optimizers().update_every = 3
            return self.optimizers().before_backward(loss, self.outputs) if self.way == "told" else loss

        def backward(self, loss: Tensor) -> None:
            if self.way == "told":
                loss.backward()
            else:
                self.optimizers().backward(loss, self.outputs)

    found = []
    for way in ("told", "hook"):
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
        trainer = pl.Trainer(max_steps=6, accumulate_grad_batches=2, enable_model_summary=False, **quiet)
        trainer.fit(module := Module(way), loader)
        assert trainer.optimizers[0].update_every == 3 and trainer.optimizers[0].steps == 6
        found.append([p.detach() for p in module.net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
