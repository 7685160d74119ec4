"""Conditions: operations on rows apply to all tensors."""

import pytest
import torch

from stages.networks.condition import Condition


@pytest.fixture
def condition():
    return Condition(3, {"text": torch.arange(12.0).view(3, 2, 2), "class": torch.tensor([5, 6, 5])})


def test_all_tensors_of_a_row_are_selected_together(condition):
    for index in (torch.tensor([2, 0]), slice(0, 3, 2)):
        found = condition.select(index)
        assert len(found) == 2 and len(found.tensors["text"]) == 2
    assert condition.select(torch.tensor([2, 0])).tensors["class"].tolist() == [5, 5]
    assert condition.select(slice(1, 9)).tensors["class"].tolist() == [6, 5]


def test_parts_of_a_condition_can_be_joined(condition):
    joined = Condition.cat([condition.select(slice(2)), condition.select(slice(2, 3))])
    assert len(joined) == 3 and joined.same_rows(condition).all()


def test_one_row_is_expanded_to_many(condition):
    many = condition.select(slice(1)).expand(4)
    assert len(many) == 4 and many.tensors["text"].shape == (4, 2, 2) and many.tensors["class"].tolist() == [5] * 4


def test_rows_are_equal_if_all_their_tensors_are(condition):
    assert condition.same_rows(condition.select(torch.tensor([2, 1, 0]))).tolist() == [False, True, False]
    other = Condition(3, {**condition.tensors, "text": torch.zeros(3, 2, 2)})
    assert not condition.same_rows(other).any()


def test_only_floating_point_tensors_change_their_dtype(condition):
    half = condition.to(torch.zeros(1, dtype=torch.float16))
    assert half.tensors["text"].dtype == torch.float16 and half.tensors["class"].dtype == torch.int64


def test_an_unconditional_network_has_rows_without_tensors():
    none = Condition(3)
    assert len(Condition.cat([none, none])) == 6 and len(none.select(torch.tensor([0, 2]))) == 2
    assert len(Condition(1).expand(5)) == 5 and none.same_rows(none).tolist() == [True] * 3
