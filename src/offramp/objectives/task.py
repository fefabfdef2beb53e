"""The task's own loss, as transformers defines it for each problem type."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def task_loss(scores: Tensor, labels: Tensor, problem_type: str) -> Tensor:
    """Mean loss of scores (rows, classes) against labels."""
    if problem_type == "regression":
        return functional.mse_loss(scores.float(), labels.float().view_as(scores))
    if problem_type == "multi_label_classification":
        return functional.binary_cross_entropy_with_logits(scores.float(), labels.float())
    return functional.cross_entropy(scores.float(), labels.long())


def row_losses(scores: Tensor, labels: Tensor, problem_type: str) -> Tensor:
    """`task_loss` of each row by itself, (rows,)."""
    scores = scores.float()
    if problem_type == "regression":
        return (scores - labels.float().view_as(scores)).square().mean(dim=-1)
    if problem_type == "multi_label_classification":
        loss = functional.binary_cross_entropy_with_logits
        return loss(scores, labels.float(), reduction="none").mean(dim=-1)
    return functional.cross_entropy(scores, labels.long(), reduction="none")


def distillation_loss(
    scores: Tensor, teacher: Tensor, problem_type: str, reverse: bool = False
) -> Tensor:
    """Mean loss of scores against a teacher's scores, both (rows, classes).

    KL(teacher || scores), per label for multi-label; squared error for regression.

    Args:
        reverse: KL(scores || teacher) instead.
    """
    scores, teacher = scores.float(), teacher.detach().float()
    if problem_type == "regression":
        return functional.mse_loss(scores, teacher)
    guess, truth = (teacher, scores) if reverse else (scores, teacher)
    if problem_type == "multi_label_classification":
        soft = functional.binary_cross_entropy_with_logits(guess, truth.sigmoid())
        return soft - functional.binary_cross_entropy_with_logits(truth, truth.sigmoid())
    return functional.kl_div(
        guess.log_softmax(dim=-1),
        truth.log_softmax(dim=-1),
        reduction="batchmean",
        log_target=True,
    )
