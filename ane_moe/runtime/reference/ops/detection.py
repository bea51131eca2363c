"""Non-maximum suppression. Legend: n = batch, B = boxes, K = classes, M = max_boxes."""

import torch
from torch import Tensor

from ane_moe.runtime.reference.ops.table import Kernel, Op


def _overlaps(box: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of a box `[4]` with others `[B,4]`: centre x and y, width, height."""
    low, high = (
        torch.maximum(box[:2] - box[2:] / 2, others[:, :2] - others[:, 2:] / 2),
        torch.minimum(box[:2] + box[2:] / 2, others[:, :2] + others[:, 2:] / 2),
    )
    shared = (high - low).clamp(min=0).prod(-1)
    return shared / (box[2:].prod() + others[:, 2:].prod(-1) - shared)


def _chosen(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    score_threshold: float | None,
    max_boxes: int,
    per_class: bool,
) -> Tensor:
    """Indices of the boxes that stay, best first: of `boxes` `[B,4]` with `scores` `[B,K]`.

    The best box stays even where no score reaches the threshold: coremltools' tests expect it.
    """
    best, classes = scores.max(-1)
    order = torch.argsort(best, descending=True, stable=True)
    left = order if score_threshold is None else order[best[order] >= score_threshold]
    chosen: list[int] = []
    while left.numel() and len(chosen) < max_boxes:
        first, left = int(left[0]), left[1:]
        chosen.append(first)
        overlapping = _overlaps(boxes[first], boxes[left]) > iou_threshold
        if per_class:
            overlapping &= classes[left] == classes[first]
        left = left[~overlapping]
    return torch.tensor(chosen or order[: min(1, max_boxes)].tolist(), dtype=torch.int64)


def _suppression(
    iou_threshold: float, score_threshold: float | None, max_boxes: int, per_class: bool
) -> Kernel:
    """`[n,B,4]` and `[n,B,K]` -> boxes `[n,M,4]`, scores `[n,M,K]`, indices `[n,M]`, counts
    `[n]`."""

    def kernel(boxes: Tensor, scores: Tensor) -> tuple[Tensor, ...]:
        batch = boxes.shape[0]
        kept_boxes = boxes.new_zeros(batch, max_boxes, 4)
        kept_scores = scores.new_zeros(batch, max_boxes, scores.shape[-1])
        indices = torch.full((batch, max_boxes), -1, dtype=torch.int32)
        counts = torch.zeros(batch, dtype=torch.int32)
        for n in range(batch):
            stay = _chosen(
                boxes[n], scores[n], iou_threshold, score_threshold, max_boxes, per_class
            )
            counts[n] = len(stay)
            kept_boxes[n, : len(stay)], kept_scores[n, : len(stay)] = (
                boxes[n, stay],
                scores[n, stay],
            )
            indices[n, : len(stay)] = stay.to(torch.int32)
        return kept_boxes, kept_scores, indices, counts

    return kernel


def _boxes_first(
    iou_threshold: float,
    score_threshold: float,
    max_boxes: int,
    per_class_suppression: bool = False,
) -> Kernel:
    return _suppression(iou_threshold, score_threshold, max_boxes, per_class_suppression)


def _boxes_last(
    iou_threshold: float, max_boxes: int, per_class_suppression: bool = False
) -> Kernel:
    """As above with the boxes along the last axis, no score threshold and no counts."""
    suppress = _suppression(iou_threshold, None, max_boxes, per_class_suppression)

    def kernel(boxes: Tensor, scores: Tensor) -> tuple[Tensor, ...]:
        kept_boxes, kept_scores, indices, _ = suppress(
            boxes.transpose(1, 2), scores.transpose(1, 2)
        )
        return kept_boxes.transpose(1, 2), kept_scores.transpose(1, 2), indices

    return kernel


OPS = (
    Op(
        "non_maximum_suppression",
        _boxes_first,
        "boxes scores",
        note="padded with zeros, indices with -1; where no score reaches the threshold, "
        "the best box stays",
    ),
    Op("non_maximum_suppression", _boxes_last, "boxes scores", since=17),
)
