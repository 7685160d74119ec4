"""The two-alternative forced choice (2AFC) score: how often a distance agrees with the votes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stages.metrics import two_afc
from stages.perceptual.seen import SeenTriplets

BATCH = 64

Metrics = dict[str, Callable[[Tensor, Tensor], Tensor]]
"""Name -> a distance between the samples of two batches, (B,). The first metric is tested, the others are baselines."""


@torch.no_grad()
def judged(metrics: Metrics, triplets: SeenTriplets, device: torch.device) -> dict[str, Any]:
    """Return the 2AFC scores of metrics for each category, and for all triplets together.

    Each entry has the number of triplets, whether the category is unseen (not in the calibration), and each metric's
    score with its standard error. For the other metrics, it also has the score of the first metric minus theirs on the
    same triplets. If people voted, it also has the human ceiling.
    """
    scores = {name: _scores(metric, triplets, device) for name, metric in metrics.items()}
    first = next(iter(scores))
    found: dict[str, Any] = {}
    for category, places in {**triplets.categories, "all": range(len(triplets.votes))}.items():
        index = slice(places.start, places.stop)
        votes = triplets.votes[index]
        found[category] = {"count": len(places), "unseen": category in triplets.unseen, "metrics": {}}
        if ((votes > 0) & (votes < 1)).any():  # only people disagree
            found[category]["human_ceiling"] = two_afc.human_ceiling(votes)
        for name, values in scores.items():
            score, error = two_afc.score_with_error(values[index])
            entry = {"score": score, "score_se": error}
            if name != first:
                below, error = two_afc.difference_with_error(scores[first][index], values[index])
                entry |= {"below": below, "below_se": error}
            found[category]["metrics"][name] = entry
    return found


def _scores(metric: Callable[[Tensor, Tensor], Tensor], triplets: SeenTriplets, device: torch.device) -> np.ndarray:
    parts = []
    for start in range(0, len(triplets.votes), BATCH):
        batch = {name: x.to(device) for name, x in triplets.batch(slice(start, start + BATCH)).items()}
        d0, d1 = (metric(batch["reference"], batch[name]).cpu().double().numpy() for name in ("first", "second"))
        parts.append(two_afc.scores(d0, d1, triplets.votes[start : start + BATCH]))
    return np.concatenate(parts)
