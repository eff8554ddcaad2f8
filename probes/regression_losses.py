"""Softmax and one-vs-rest losses of a linear model: values, probabilities, residuals and curvature, safe in float32.

Shapes: b rows, K classes. Everything is computed from margins, so that a loss or residual far below float32's
resolution of 1 keeps its relative precision: at weak regularisation the whole gradient consists of those.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


class SoftmaxLoss:
    """Cross-entropy of one class index a row."""

    @staticmethod
    def evaluate(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses [b] and probabilities [b, K] of logits [b, K] (overwritten) and class indices [b]."""
        column = targets[:, None]
        margins = logits.sub_(logits.gather(1, column)).scatter_(1, column, -torch.inf)
        top = margins.amax(dim=1, keepdim=True).clamp_(min=0)
        others = margins.sub_(top).exp_()
        wrong, right = others.sum(dim=1, keepdim=True), (-top).exp()
        total = wrong + right
        # log(1 + wrong) keeps tiny losses where the target leads; elsewhere the usual form does not overflow.
        losses = torch.where(top > 0, top + total.log(), wrong.log1p())[:, 0]
        return losses, others.scatter_(1, column, right).div_(total)

    @staticmethod
    def residual(probability: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Gradient [b, K] by the logits: p - y, with p_y - 1 summed from the other classes."""
        column = targets[:, None]
        others = probability.scatter(1, column, 0)
        return others.scatter_(1, column, -others.sum(dim=1, keepdim=True))

    @staticmethod
    def curve(probability: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        """Change [b, K] of the residual with a change [b, K] of the logits: (diag(p) - p p') v."""
        weighted = probability * change
        return weighted.addcmul_(probability, weighted.sum(dim=1, keepdim=True), value=-1)

    @staticmethod
    def constant_logits(totals: torch.Tensor, weight: float) -> torch.Tensor:
        """Logits [K] of the best classifier without features, from class totals [K]."""
        return (totals / weight).log()


class BinaryLoss:
    """Sum over classes of the logistic loss of each class against the rest; targets are 0 or 1, [b, K]."""

    @staticmethod
    def evaluate(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses [b] and probabilities [b, K] of logits [b, K] and targets [b, K]."""
        losses = F.softplus(torch.where(targets > 0, -logits, logits), threshold=80).sum(dim=1)
        return losses, logits.sigmoid()

    @staticmethod
    def residual(probability: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Gradient [b, K] by the logits: p - y."""
        return probability - targets

    @staticmethod
    def curve(probability: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        """Change [b, K] of the residual with a change [b, K] of the logits."""
        return probability * (1 - probability) * change

    @staticmethod
    def constant_logits(totals: torch.Tensor, weight: float) -> torch.Tensor:
        """Logits [K] of the best classifier without features, from class totals [K]."""
        return torch.logit(totals / weight)


Loss = SoftmaxLoss | BinaryLoss
LOSSES: dict[str, Loss] = {"softmax": SoftmaxLoss(), "bce": BinaryLoss()}
"""Losses by the name that callers give."""
