"""Training steps to be timed: the head of this package, typical research code, and the bare products."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from partialfc import HeadOutput, PartialFC, RowSGD, losses

from .measure import Bench
from .products import into_float32, plain

SCALE, MARGIN = 64.0, 0.5
_PRODUCT_ROWS = 65_536  # of one chunk of the bare products

OptimizerMaker = Callable[[Any], torch.optim.Optimizer]
SGD: OptimizerMaker = partial(RowSGD, lr=0.1)


class HeadStep:
    """A step of ArcFace in PartialFC with an optimizer on rows: forward, backward, update."""

    def __init__(
        self,
        bench: Bench,
        classes: int,
        dim: int,
        batch: int,
        optimizer: OptimizerMaker = SGD,
        micro_batches: int = 1,
        **options: Any,
    ) -> None:
        self._bench, self._micro_batches = bench, micro_batches
        self.head = PartialFC(classes, dim, losses.ArcFace(SCALE, MARGIN), device=bench.device, **options)
        self.optimizer = optimizer(list(self.head.parameters()))
        self._out: HeadOutput | None = None
        self.set_batch(batch)

    def set_batch(self, batch: int) -> None:
        """Draw another batch, of this size."""
        device = self._bench.device
        self._embeddings = self._bench.randn(batch, self.head.embedding_dim).requires_grad_()
        self._labels = torch.randint(0, self.head.num_classes, (batch,), device=device)

    def forward(self) -> None:
        self._embeddings.grad = None
        self._out = self.head(self._embeddings, self._labels)

    def backward(self) -> None:
        assert self._out is not None
        self._out.loss.backward()
        self._out = None

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def __call__(self) -> None:
        for _ in range(self._micro_batches):
            self.forward()
            self.backward()
        self.update()


class PlainStep:
    """Step of InsightFace's partial_fc_v2 on one GPU: it indexes the sampled rows, forms all logits at once, runs
    autograd back through them, and walks the whole weight with dense SGD. The margin touches the targets only, and it
    and the softmax work in place: the fast and frugal end of such code.

    Args:
        fp16: form the logits under autocast to fp16 (bf16 on a CPU).
    """

    def __init__(self, bench: Bench, classes: int, dim: int, batch: int, rate: float, fp16: bool) -> None:
        self._bench, self._rate, self._fp16 = bench, rate, fp16
        self._weight = torch.nn.Parameter(bench.randn(classes, dim).mul_(0.01))
        self._optimizer = torch.optim.SGD([self._weight], lr=0.1, momentum=0.9, weight_decay=5e-4)
        self._embeddings = bench.randn(batch, dim).requires_grad_()
        self._labels = torch.randint(0, classes, (batch,), device=bench.device)
        self._samples = torch.arange(batch, device=bench.device)

    def forward(self) -> None:
        self._embeddings.grad = None
        weight: Tensor = self._weight
        labels = self._labels
        if self._rate < 1:
            chance = torch.rand(len(weight), device=weight.device)
            chance[labels] = 2.0
            rows = chance.topk(int(self._rate * len(weight))).indices.sort().values
            labels = torch.searchsorted(rows, labels)
            weight = weight[rows]
        half = torch.float16 if self._bench.cuda else torch.bfloat16
        with torch.autocast(self._bench.device.type, half, enabled=self._fp16):
            cosines = F.linear(F.normalize(self._embeddings), F.normalize(weight))
        cosines = cosines.float().clamp(-1, 1)
        with torch.no_grad():
            angle = torch.acos(cosines[self._samples, labels].clamp(-1 + 1e-7, 1 - 1e-7))
            cosines[self._samples, labels] = torch.cos(angle + MARGIN)
        self._logits = cosines.mul_(SCALE)
        gradient = self._logits.detach()
        gradient.sub_(gradient.amax(1, keepdim=True)).exp_()
        gradient.div_(gradient.sum(1, keepdim=True))
        gradient[self._samples, labels] -= 1.0
        self._gradient = gradient.div_(len(gradient))

    def backward(self) -> None:
        self._logits.backward(self._gradient)
        del self._logits, self._gradient

    def update(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()


def bare_products_ms(bench: Bench, active: int, dim: int, batch: int, sixteen_bit: bool) -> float:
    """Return milliseconds of the four products that a step without stored logits needs: logits, dX, logits again, dW.

    Measured on one chunk of rows; 16-bit ones have float32 results where those are summed up further.
    """
    rows = min(active, _PRODUCT_ROWS)
    x, w, p = bench.unit(batch, dim), bench.unit(rows, dim), torch.rand(batch, rows, device=bench.device)
    narrow = into_float32(torch.bfloat16) if sixteen_bit else plain(torch.float32)
    logits = into_float32(torch.float16)(x, w.t()) if sixteen_bit else narrow(x, w.t())
    products = [logits, narrow(p, w), logits, narrow(p.t(), x)]
    del p

    def all_four() -> None:
        for product in products:
            product.multiply()

    return bench.ms(all_four, seconds=0.5) * active / rows


def head_seconds(active: float, batch: int) -> float:
    """Estimate a head step on an H100 in float32, to decide if there is time to measure it."""
    return 0.01 + active * (20e-9 + 91e-12 * batch)


def short(number: float) -> str:
    """Return a short ``number`` of classes, such as 100k."""
    power = 0 if number < 1000 else min(2, int(math.log10(number) // 3))
    return f"{number / 1000**power:.3g}{('', 'k', 'M')[power]}"
