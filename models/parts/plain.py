"""Models out of plain layers: what an optimizer learns by looking at layers needs layers that are called, and alone.

Curvature is gathered from the inputs and the output gradients of ``Linear``, ``Conv`` and norm modules. Some modules
hide them: ``nn.MultiheadAttention`` multiplies by packed weights and never calls its layers, and a norm that applies
its activation too has the activation's output for its own. ``plain_layers`` puts modules in their place that compute
the same numbers out of plain layers and load the weights of either.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Layers of timm and torchvision that do more, or nothing else, in `forward` than the plain layer that they derive from.
PLAIN: dict[str, type[nn.Module]] = {
    "BatchNormAct2d": nn.BatchNorm2d,
    "Conv2dSame": nn.Conv2d,
    "GroupNorm": nn.GroupNorm,
    "GroupNorm1": nn.GroupNorm,
    "GroupNorm1Act": nn.GroupNorm,
    "GroupNorm1NoBias": nn.GroupNorm,
    "GroupNormAct": nn.GroupNorm,
    "LayerNorm": nn.LayerNorm,
    "LayerNorm2d": nn.LayerNorm,
    "LayerNorm2dNoBias": nn.LayerNorm,
    "LayerNormAct": nn.LayerNorm,
    "LayerNormAct2d": nn.LayerNorm,
    "Linear": nn.Linear,
}


def plain_layers(model: nn.Module) -> nn.Module:
    """Replace, in place, the modules that hide a layer by modules of plain layers; the outputs stay what they were.

    In the state dict ``in_proj_weight`` and ``in_proj_bias`` of an ``nn.MultiheadAttention`` become
    ``{q,k,v}_proj.weight`` and ``{q,k,v}_proj.bias``, and the ``weight`` of a layer with something before or after it
    becomes ``layer.weight``. Loading takes the old names too.

    Args:
        model: any module but one of those that would be replaced itself.

    Returns:
        The model.

    Raises:
        ValueError: for an attention with learned or zero keys added to the others.
    """
    replaced: dict[nn.Module, nn.Module] = {}  # one replacement for a module that is used in several places
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # a shortcut of evaluation that reads the packed weights
        if module not in replaced and (plain := _plain(module)) is not None:
            replaced[module] = plain.train(module.training)
        if module in replaced:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, replaced[module])
    return model


def _plain(module: nn.Module) -> nn.Module | None:
    """The replacement of a module, or None where it stays (its class made the plain one, if that is all)."""
    kind = type(module)
    if isinstance(module, nn.MultiheadAttention):
        return SeparateAttention(module)
    if kind.__name__ not in PLAIN or not kind.__module__.startswith(("timm.", "torchvision.")):
        return None
    after = [part for part in (getattr(module, "drop", None), getattr(module, "act", None)) if part is not None]
    module._modules.clear()
    module.__class__ = PLAIN[kind.__name__]
    before: list[nn.Module] = [PadSame(module)] if isinstance(module, nn.Conv2d) else []
    if "2d" in kind.__name__ and isinstance(module, nn.LayerNorm):
        from torchvision.ops import Permute  # the package of such a layer is there already

        before, after = [Permute([0, 2, 3, 1])], [Permute([0, 3, 1, 2]), *after]
    after = [part for part in after if not isinstance(part, nn.Identity)]
    return Around(module, before, after) if before or after else None


class Around(nn.Module):
    """A plain layer, with what a package does before and after it in one module.

    Args:
        layer: the layer; its weights are called ``layer.weight``, ... here, and ``weight``, ... in the package.
        before: modules in front of it.
        after: modules behind it.
    """

    def __init__(self, layer: nn.Module, before: list[nn.Module], after: list[nn.Module]) -> None:
        super().__init__()
        self.before, self.layer, self.after = nn.Sequential(*before), layer, nn.Sequential(*after)
        self.register_load_state_dict_pre_hook(_rename)

    def rename(self, weights: dict[str, Any], prefix: str) -> None:
        """Give the package's weights, in place, the names that they have here.

        Args:
            weights: a state dict.
            prefix: this module's name in it, with a full stop.
        """
        for key in self.layer.state_dict():
            if prefix + key in weights:
                weights[f"{prefix}layer.{key}"] = weights.pop(prefix + key)

    def forward(self, x: Tensor) -> Tensor:
        """The layer with its surroundings."""
        return self.after(self.layer(self.before(x)))


class PadSame(nn.Module):
    """The padding in front of a convolution that leaves ``ceil(side / stride)`` pixels, as TensorFlow's "same".

    Args:
        conv: the convolution, itself without padding.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.shape = list(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """The padded images; an odd pixel goes to the end."""
        amounts: list[int] = []
        for side, (kernel, stride, dilation) in zip(x.shape[-2:], self.shape, strict=True):
            total = max((-(-side // stride) - 1) * stride + (kernel - 1) * dilation + 1 - side, 0)
            amounts = [total // 2, total - total // 2, *amounts]  # F.pad begins with the last dimension
        return F.pad(x, amounts)


class SeparateAttention(nn.Module):
    """``nn.MultiheadAttention`` (Vaswani et al., 2017) with a Linear each for queries, keys, values and outputs.

    It is called like the original and computes the same.

    Args:
        packed: the module to take the place of; its weights are copied.

    Raises:
        ValueError: learned or zero keys are added to the others (``add_bias_kv``, ``add_zero_attn``).
    """

    # What torch's encoder layers ask before they take a shortcut that reads the packed weights.
    _qkv_same_embed_dim = False
    in_proj_bias = None

    def __init__(self, packed: nn.MultiheadAttention) -> None:
        super().__init__()
        if packed.bias_k is not None or packed.add_zero_attn:
            raise ValueError("add_bias_kv and add_zero_attn have no equivalent out of plain layers: leave them out")
        self.num_heads, self.dropout, self.batch_first = packed.num_heads, packed.dropout, packed.batch_first
        width, bias = packed.embed_dim, packed.in_proj_bias is not None
        like: dict[str, Any] = {"device": packed.out_proj.weight.device, "dtype": packed.out_proj.weight.dtype}
        self.q_proj = nn.Linear(width, width, bias, **like)
        self.k_proj = nn.Linear(packed.kdim or width, width, bias, **like)
        self.v_proj = nn.Linear(packed.vdim or width, width, bias, **like)
        self.out_proj = nn.Linear(width, width, packed.out_proj.bias is not None, **like)
        self.register_load_state_dict_pre_hook(_rename)
        self.load_state_dict(packed.state_dict())

    def rename(self, weights: dict[str, Any], prefix: str) -> None:
        """See ``Around``: unpack the weights of ``nn.MultiheadAttention``."""
        for kind in ("weight", "bias"):
            if (packed := weights.pop(f"{prefix}in_proj_{kind}", None)) is not None:
                for letter, part in zip("qkv", packed.chunk(3), strict=True):
                    weights[f"{prefix}{letter}_proj.{kind}"] = part
        for letter in "qkv":  # packed apart where keys or values have another width
            if (alone := weights.pop(f"{prefix}{letter}_proj_weight", None)) is not None:
                weights[f"{prefix}{letter}_proj.weight"] = alone

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See ``nn.MultiheadAttention.forward``.

        Args:
            query: ``[batch, length, width]``, or as ``batch_first`` and a missing batch dimension have it.
            key: in the same layout, of any length.
            value: as long as the keys.
            key_padding_mask: ``[batch, keys]``; true, or -inf, where a key is none.
            need_weights: return the attention weights, too.
            attn_mask: ``[queries, keys]`` or ``[batch * heads, queries, keys]``; true where attention is forbidden, or
                what is added to the scores.
            average_attn_weights: over the heads.
            is_causal: a hint that ``attn_mask``, which must be given, is the causal one.

        Returns:
            The outputs in the layout of the query, and the weights or None.
        """
        single = query.dim() == 2
        if single:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:  # before the projections, whose rows are then examples
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q, k, v = (
            projection(t).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection, t in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * q.shape[-1] ** -0.5) @ k.mT
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            out = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if single:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def _mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
        """What is added to the scores ``[batch, heads, queries, keys]``."""
        total = None
        if attn_mask is not None:
            by_head = attn_mask.dim() == 3
            total = _added(attn_mask.unflatten(0, (-1, self.num_heads)) if by_head else attn_mask, q.dtype)
        if key_padding_mask is not None:
            padding = _added(key_padding_mask, q.dtype)[:, None, None]
            total = padding if total is None else total + padding
        return total


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as a number to add to the scores."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask


def _rename(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """The form in which torch calls ``rename`` before it loads a state dict."""
    assert isinstance(module, Around | SeparateAttention)
    module.rename(state_dict, prefix)
