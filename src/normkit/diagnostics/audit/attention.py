"""The logits of attention as torch's operators get them, in eager and in fused attention alike."""

from __future__ import annotations

import math
import re
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from normkit.engine.onlooker import Onlooker

_ATTENDS = re.compile("att(e)?n|mha", re.IGNORECASE)
_SOFTMAX = ("aten._softmax.default", "aten._safe_softmax.default")
_MASKED = -9e3  # most models add -1e4 or less to a masked logit; where it is -100, the largest is not among those
_QUERIES = 256  # of each head, evenly spaced: a largest logit needs no more, and all would be a second attention


class Logits(Onlooker):
    """Sees the largest logit and the entropy of attention, by the module that attends."""

    def __init__(self, model: nn.Module, stack: ExitStack) -> None:
        super().__init__()
        self._scope: list[tuple[str, bool]] = []
        self._seen: dict[str, list[tuple[float, float]]] = {}
        for name, module in model.named_modules():
            entry = name, bool(_ATTENDS.search(type(module).__name__))
            stack.callback(module.register_forward_pre_hook(lambda *_, e=entry: self._scope.append(e)).remove)
            stack.callback(module.register_forward_hook(lambda *_: self._leave(), always_call=True).remove)

    def _leave(self) -> None:
        if self._scope:
            self._scope.pop()

    def found(self) -> dict[str, tuple[float, float]]:
        """The largest logit and the mean entropy, relative to that of uniform weights, by module."""
        return {name: (max(a for a, _ in got), sum(b for _, b in got) / len(got)) for name, got in self._seen.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name in _SOFTMAX:
            if args[0].dim() > 2 and any(attends for _, attends in self._scope):
                rows = args[0].detach().flatten(0, -2)
                self._take(rows[:: max(1, len(rows) // 4096)])
        elif "scaled_dot_product" in name and "backward" not in name:
            query, key, scale = args[0].detach(), args[1].detach().float(), (kwargs or {}).get("scale")
            if query.shape[-3] != key.shape[-3]:  # grouped queries
                key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
            query = query[..., :: max(1, query.shape[-2] // _QUERIES), :].float()
            self._take(query @ key.transpose(-1, -2) * (scale or query.shape[-1] ** -0.5))
        return func(*args, **(kwargs or {}))

    def _take(self, logits: Tensor) -> None:
        wide, keys = logits.float(), logits.shape[-1]
        seen = wide > _MASKED
        if keys > 1 and seen.any():
            inner = [name for name, attends in self._scope if attends] or [name for name, _ in self._scope] or [""]
            entropy = torch.special.entr(wide.masked_fill(~seen, -math.inf).softmax(-1)).sum(-1) / math.log(keys)
            self._seen.setdefault(inner[-1], []).append((float(wide[seen].max()), float(entropy.nanmean())))
