"""How distances are scored on triplets, and the standard errors of the scores."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.metrics.two_afc import difference_with_error, human_ceiling, score_with_error, scores

DISTANCES = st.floats(0.0, 1e6) | st.sampled_from([0.0, 1.0])
TRIPLET = st.tuples(DISTANCES, DISTANCES, st.floats(0.0, 1.0))


def columns(triplets):
    return np.array(triplets, dtype=np.float64).reshape(-1, 3).T


def test_perfect_constant_and_inverted_metrics():
    votes = np.array([1.0, 0.0, 1.0, 1.0], dtype=np.float32)
    first, second = votes, 1.0 - votes  # the voted one is nearer
    assert scores(first, second, votes).tolist() == [1.0] * 4
    assert scores(second, first, votes).tolist() == [0.0] * 4
    assert scores(np.ones(4), np.ones(4), votes).tolist() == [0.5] * 4


def test_a_score_is_the_share_of_people_who_agree():
    votes = np.array([0.8, 0.8, 0.8, 0.0])
    found = scores(np.array([2.0, 1.0, 1.0, 1.0]), np.array([1.0, 2.0, 1.0, 1.0]), votes)
    assert found == pytest.approx([0.8, 0.2, 0.5, 0.5])


@settings(max_examples=200, deadline=None)
@given(st.lists(TRIPLET, min_size=1, max_size=30))
def test_scoring_is_symmetric_and_sees_only_the_order(triplets):
    first, second, votes = columns(triplets)
    found = scores(first, second, votes)
    assert ((found >= 0.0) & (found <= 1.0)).all()
    assert scores(second, first, 1.0 - votes) == pytest.approx(found)
    assert scores(first, second, 1.0 - votes) == pytest.approx(1.0 - found)
    assert (scores(2.0 * first, 2.0 * second, votes) == found).all()
    assert (found <= np.maximum(votes, 1.0 - votes) + 1e-12).all()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=30))
def test_human_ceilings(votes):
    p = np.array(votes)
    majority = scores(p, 1.0 - p, p).mean()
    assert 0.5 <= human_ceiling(p) <= majority + 1e-12
    assert human_ceiling(p.round()) == 1.0


def test_a_known_ceiling():
    assert human_ceiling(np.array([0.0, 1.0, 0.5, 0.8])) == pytest.approx((1 + 1 + 0.5 + 0.68) / 4)


def test_standard_errors_are_the_deviation_over_new_triplets():
    rng = np.random.default_rng(0)
    runs = (rng.random((300, 400)) < 0.7).astype(np.float64)
    found = np.array([score_with_error(run) for run in runs])
    assert found[:, 0].std() == pytest.approx(found[:, 1].mean(), rel=0.1)
    assert score_with_error(np.array([0.0, 1.0])) == pytest.approx((0.5, 0.5))


def test_a_paired_difference_cancels_what_both_share():
    rng = np.random.default_rng(0)
    hard = (rng.random(1000) < 0.7).astype(np.float64)
    better = hard.copy()
    better[np.flatnonzero(hard == 0.0)[:20]] = 1.0
    mean, error = difference_with_error(better, hard)
    assert mean == pytest.approx(0.02) and error < score_with_error(hard)[1] / 2


def test_invalid_distances_and_votes_are_refused():
    one, two = np.ones(1), np.ones(2)
    with pytest.raises(ValueError, match="a distance is NaN"):
        scores(np.array([np.nan]), one, one)
    with pytest.raises(ValueError, match=r"first \(2,\), second \(1,\), votes \(2,\)"):
        scores(two, one, two)
    with pytest.raises(ValueError, match="at least two triplets, not 1"):
        score_with_error(one)
    with pytest.raises(ValueError, match="2 and 1 triplets"):
        difference_with_error(two, one)
