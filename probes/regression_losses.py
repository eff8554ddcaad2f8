"""Softmax and one-vs-rest losses of a linear model: values, probabilities, residuals and curvature, safe in float32.

Shapes: b rows, K classes. Everything is computed from margins, so that a loss or residual far below float32's
resolution of 1 keeps its relative precision: at weak regularisation the whole gradient consists of those.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

TINY = 1e-300
"""Stands for float64 probabilities that underflow."""


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
    def bias_curvature(probability: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        """Hessian [K, K] by the biases, summed over rows of weights [b, 1]."""
        weighted = probability if weights is None else probability * weights
        return torch.diag(weighted.sum(dim=0)) - weighted.T @ probability

    @staticmethod
    def balance(
        probability: torch.Tensor, surplus: torch.Tensor, totals: torch.Tensor, weight: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Loss`. A share of each class of surplus goes to the classes that lack, as much as each of them lacks."""
        share = surplus.clamp(min=0) / (totals + surplus)  # [K]
        lack = (-surplus).clamp(min=0)
        moved = (probability @ share)[:, None] * (lack / lack.sum().clamp(min=TINY))  # [b, K]
        return _divergence(probability, moved, share).sum(dim=1), moved - probability * share

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
    def bias_curvature(probability: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        """Hessian [K, K] by the biases, summed over rows of weights [b, 1]."""
        variance = probability * (1 - probability)
        return torch.diag((variance if weights is None else variance * weights).sum(dim=0))

    @staticmethod
    def balance(
        probability: torch.Tensor, surplus: torch.Tensor, totals: torch.Tensor, weight: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Loss`. Yes and no are two classes, one of which has the surplus that the other lacks."""
        yes, no = surplus.clamp(min=0) / (totals + surplus), (-surplus).clamp(min=0) / (weight - totals - surplus)
        gained, lost = (1 - probability) * no, probability * yes  # [b, K]; one of the two is 0
        of_class = _divergence(probability, gained, yes) + _divergence(1 - probability, lost, no)
        return of_class.sum(dim=1), gained - lost

    @staticmethod
    def constant_logits(totals: torch.Tensor, weight: float) -> torch.Tensor:
        """Logits [K] of the best classifier without features, from class totals [K]."""
        return torch.logit(totals / weight)


def _divergence(probability: torch.Tensor, gained: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Terms p' log(p' / p) - p' + p, each at least 0, of p' = p + gained - share * p, where one of the two is 0."""
    probability = probability.clamp(min=TINY)
    relative = gained / probability - share
    return probability * ((1 + relative) * relative.log1p() - relative)


Loss = SoftmaxLoss | BinaryLoss
LOSSES: dict[str, Loss] = {"softmax": SoftmaxLoss(), "bce": BinaryLoss()}
"""Losses by the name that callers give.

`balance(probability [b, K], surplus [K], totals [K], weight)` gives, in float64, rows of probabilities that predict
every class as often as it occurs: their divergence from the given ones [b], and what is added to these [b, K].
`surplus` is how much the given ones, summed with weights over all rows, exceed the class totals; `weight` is the sum of
weights."""
