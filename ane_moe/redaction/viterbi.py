"""The best legal sequence of BIOES labels.

A span of one token is S-x; a longer one begins with B-x, goes on with I-x, and ends with E-x; O is
outside. The decoder maximises the sum of the tokens' scores and of the transitions' biases over all
sequences that are spelt so (Viterbi 1967; the constraints and the six biases are those of the
`ViterbiCRFDecoder` that the privacy filter was published with). Raw scores do: what normalising
adds is the same for all labels of a token.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from ane_moe.errors import UserError

OUTSIDE = "O"
INSIDE_A_SPAN = ("B", "I")
CALIBRATION = "viterbi_calibration.json"
PREFIX = "transition_bias_"  # of the biases' names in that file


@dataclass(frozen=True)
class Biases:
    """What is added to the score of a transition, in units of the scores (nats)."""

    background_stay: float = 0.0  # O to O
    background_to_start: float = 0.0  # O to B or S
    inside_to_continue: float = 0.0  # B or I to I
    inside_to_end: float = 0.0  # B or I to E
    end_to_background: float = 0.0  # E or S to O
    end_to_start: float = 0.0  # E or S to B or S


# A span has one transition into it and one out of it, whatever its length.
PRESETS = {
    "default": Biases(),
    "precision": Biases(background_to_start=-2.0, end_to_start=-2.0),
    "recall": Biases(background_stay=-1.0, background_to_start=1.0, end_to_start=1.0),
}


class Decoder:
    """Decodes the scores of one label set, with one set of biases."""

    def __init__(self, labels: Sequence[str], biases: Biases = PRESETS["default"]) -> None:
        """`labels` are the model's, in the order of its scores. Raises UserError unless they are O
        and B-, I-, E-, S- of every kind of span."""
        _require_bioes(labels)
        tags, kinds = [label[0] for label in labels], [label[2:] for label in labels]
        pairs = [
            [_bias(a, b, kinds[i] == kinds[j], biases) for j, b in enumerate(tags)]
            for i, a in enumerate(tags)
        ]
        self.labels = tuple(labels)
        self._transitions = np.array(pairs, np.float64)  # (L, L) from, to
        self._starts = np.array([_edge(tag in ("O", "B", "S")) for tag in tags])
        self._ends = np.array([_edge(tag in ("O", "E", "S")) for tag in tags])
        self._plain = biases == Biases()  # what scores highest is best, where it is legal

    def decode(self, scores: np.ndarray) -> np.ndarray:
        """The indices `[N]` of the best legal sequence for `scores` `[N, L]`; the first of equals.

        Raises UserError when a score is not finite.
        """
        if not np.isfinite(scores).all():
            raise UserError("the model's scores are not finite", "NaN or infinity", "run verify")
        count, width = scores.shape
        if not count:
            return np.zeros(0, np.intp)
        highest = scores.argmax(axis=1)
        if self._plain and self._is_legal(highest):
            return highest
        best = scores[0] + self._starts  # (L)
        came_from = np.empty((count, width), np.intp)
        columns = np.arange(width)
        for token in range(1, count):
            reached = best[:, None] + self._transitions  # (L, L)
            came_from[token] = reached.argmax(axis=0)
            best = reached[came_from[token], columns] + scores[token]
        path = np.empty(count, np.intp)
        path[-1] = (best + self._ends).argmax()
        for token in range(count - 1, 0, -1):
            path[token - 1] = came_from[token, path[token]]
        return path

    def _is_legal(self, path: np.ndarray) -> bool:
        between = self._transitions[path[:-1], path[1:]]
        return bool(np.isfinite(self._starts[path[0]] + self._ends[path[-1]] + between.sum()))


def decoder_of(labels: Sequence[str]) -> Decoder | None:
    """The decoder of a label set, without biases; None unless that is BIOES."""
    try:
        return Decoder(labels)
    except UserError:
        return None


def read_biases(folder: Path) -> Biases:
    """The model's own biases: the `default` operating point of its calibration file, zeros where
    the folder has none. Raises UserError for a file that cannot be understood."""
    path = folder / CALIBRATION
    try:
        document = json.loads(path.read_bytes())
        given = document["operating_points"]["default"]["biases"]
        return Biases(**{one.name: float(given[PREFIX + one.name]) for one in fields(Biases)})
    except FileNotFoundError:
        return Biases()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} holds no biases", f"{type(error).__name__}: {error}") from None


def _bias(a: str, b: str, same_kind: bool, biases: Biases) -> float:
    """What a transition from tag `a` to tag `b` adds; minus infinity when it is illegal."""
    if a in INSIDE_A_SPAN:
        inside = {"I": biases.inside_to_continue, "E": biases.inside_to_end}
        return inside.get(b, -np.inf) if same_kind else -np.inf
    if b in ("I", "E"):
        return -np.inf
    if a == OUTSIDE:
        return biases.background_stay if b == OUTSIDE else biases.background_to_start
    return biases.end_to_background if b == OUTSIDE else biases.end_to_start


def _edge(legal: bool) -> float:
    return 0.0 if legal else -np.inf


def _require_bioes(labels: Sequence[str]) -> None:
    kinds = {label[2:] for label in labels if label != OUTSIDE}
    wanted = {OUTSIDE} | {f"{tag}-{kind}" for kind in kinds for tag in "BIES"}
    if set(labels) != wanted or len(labels) != len(wanted) or "" in kinds:
        raise UserError(
            "the model's labels are not BIOES",
            f"{len(labels)} labels",
            "give a token classifier with O and B-, I-, E-, S- of every kind",
        )
