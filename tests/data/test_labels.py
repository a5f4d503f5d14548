"""Labels are categories, whatever their type."""

import datetime
from decimal import Decimal

import numpy as np
import pytest
import torch

from adadim_lightning.data import ImageData, MemoryImages
from adadim_lightning.data.labels import MOST_CLASSES, Categories
from tests.data.pictures import views

IDS = [2_480_000 + 137 * i for i in range(10)]
DAYS = [datetime.date(2020, 1, day) for day in (1, 2)]


@pytest.mark.parametrize(
    ("labels", "numbers", "names"),
    [
        ([0, 1, 2, 1], [0, 1, 2, 1], None),
        ([2, 0, 1, None], [2, 0, 1, -1], None),
        (IDS[::-1], list(range(9, -1, -1)), [str(x) for x in IDS]),
        ([2**63 + 1, 2**33, 2**33], [1, 0, 0], [str(2**33), str(2**63 + 1)]),
        ([0.0, float("nan"), 1.0, np.nan, 2.0], [0, -1, 1, -1, 2], None),
        ([0.5, 1.5, 0.5, 1.5], [0, 1, 0, 1], ["0.5", "1.5"]),
        ([Decimal(7), Decimal("5.0"), Decimal(7)], [1, 0, 1], ["5", "7"]),
        ([True, False], [1, 0], None),
        (["b", "a", None, "10", "9"], [3, 2, -1, 0, 1], ["10", "9", "a", "b"]),
        ([b"x", b"y"], [0, 1], ["x", "y"]),
        (["a", "", " ", b"", None], [0, -1, -1, -1, -1], ["a"]),
        ([-1, 0, 1], [-1, 0, 1], None),
        ([-1, 1, 1], [0, 1, 1], ["-1", "1"]),
        ([-5, -1, 3], [0, 1, 2], ["-5", "-1", "3"]),
        ([-1, -1], [-1, -1], None),
        ([0, 3, 1], [0, 2, 1], ["0", "1", "3"]),
        ([[1], [0], []], [1, 0, -1], None),
        ([np.int64(9), torch.tensor(4), np.str_("w")], [1, 0, 2], ["4", "9", "w"]),
        ([DAYS[1], DAYS[0], np.datetime64("NaT")], [1, 0, -1], ["2020-01-01", "2020-01-02"]),
    ],
)
def test_categories_number_the_distinct_values_in_their_order(labels, numbers, names) -> None:
    found = Categories.of(labels)
    assert found.tensor(labels).tolist() == numbers
    assert found.names == names
    assert found.number("never seen") == -1


def test_categories_refuse_what_has_too_many_values() -> None:
    for labels in (range(1000), [f"caption {i}" for i in range(200)], [0.37 * i for i in range(60)]):
        with pytest.raises(ValueError, match=r"has [\d,]+ different values.* in [\d,]+ images; labels are cat"):
            Categories.of(labels)
    with pytest.raises(ValueError, match="has 50,001 different values"):
        Categories.of(list(range(MOST_CLASSES + 1)) * 3)
    with pytest.raises(ValueError, match="several values for one image"):
        Categories.of([[1, 2]])
    assert Categories.of(list(range(10_000)) * 2).names is None


def test_image_data_refuses_ids_for_numbers_of_classes() -> None:
    images = MemoryImages(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([2**33, 2**33 + 1, 0, 0]))
    with pytest.raises(ValueError, match=r"at most 50,000 of them, got one of 8589934593: labels = labels.unique"):
        ImageData(images, None, views=views(), batch_size=2)
