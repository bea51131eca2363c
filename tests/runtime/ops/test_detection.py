"""Non-maximum suppression, against boxes taken one by one, as coremltools' tests describe it."""

import coremltools as ct
import numpy as np
import pytest
from op_harness import assert_same, run

OLD, NEW = ct.target.iOS16, ct.target.iOS17


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boxes: centre x, centre y, width, height."""
    sides = [
        max(
            0.0,
            min(a[i] + a[i + 2] / 2, b[i] + b[i + 2] / 2)
            - max(a[i] - a[i + 2] / 2, b[i] - b[i + 2] / 2),
        )
        for i in (0, 1)
    ]
    shared = sides[0] * sides[1]
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)


def kept(
    boxes: np.ndarray, scores: np.ndarray, iou: float, least: float, most: int, by_class: bool
) -> list[int]:
    best, classes = scores.max(-1), scores.argmax(-1)
    order = [int(i) for i in np.argsort(-best, kind="stable")]
    chosen: list[int] = []
    for i in (i for i in order if best[i] >= least):
        rivals = [j for j in chosen if not by_class or classes[i] == classes[j]]
        if all(overlap(boxes[i], boxes[j]) <= iou for j in rivals):
            chosen.append(i)
    return chosen[:most] or order[:1]


@pytest.mark.parametrize("by_class", [True, False])
@pytest.mark.parametrize(
    "iou, least, most", [(0.3, 0.0, 4), (0.1, -9, 30), (0.7, 0.5, 12), (0.5, 99, 3)]
)
def test_suppression_keeps_the_boxes_that_no_better_one_overlaps(
    iou: float, least: float, most: int, by_class: bool
) -> None:
    rng = np.random.default_rng(most)
    boxes = np.concatenate(
        [rng.uniform(0, 10, (2, 20, 2)), rng.uniform(2, 6, (2, 20, 2))], -1
    ).astype(np.float32)
    scores = rng.standard_normal((2, 20, 3)).astype(np.float32)
    params = {
        "iou_threshold": np.float32(iou),
        "max_boxes": most,
        "per_class_suppression": by_class,
    }
    out = run(
        "non_maximum_suppression",
        {"boxes": boxes, "scores": scores},
        params | {"score_threshold": np.float32(least)},
        OLD,
    )
    for n in range(2):
        chosen = kept(boxes[n], scores[n], iou, least, most, by_class)
        rest = most - len(chosen)
        assert out[2][n].tolist() == chosen + [-1] * rest and out[3][n] == len(chosen)
        assert_same(out[0][n], np.concatenate([boxes[n, chosen], np.zeros((rest, 4), np.float32)]))
        assert_same(out[1][n], np.concatenate([scores[n, chosen], np.zeros((rest, 3), np.float32)]))
    if least == -9:  # the newer op has no threshold of scores
        last = {
            name: value.swapaxes(1, 2) for name, value in (("boxes", boxes), ("scores", scores))
        }
        newer = run("non_maximum_suppression", last, params, NEW)
        for ours, older in zip(
            newer, (out[0].swapaxes(1, 2), out[1].swapaxes(1, 2), out[2]), strict=True
        ):
            assert_same(ours, older)
