"""Masks are a pure function of (seed, epoch, row index), with the rates that were asked for."""

import numpy as np
import pytest

from neobert.data.batch import IGNORED
from neobert.data.mlm.pipeline import Masker

SPECIAL = frozenset({0, 1, 2, 3, 4, 1000})  # 1000 is inert: beyond the real vocabulary


def masker(**changed):
    return Masker(
        **{
            "seed": 3,
            "probability": 0.15,
            "mask_all": False,
            "mask_id": 4,
            "special_ids": SPECIAL,
            "num_real": 1000,
            **changed,
        }
    )


def rows(count=64, length=256, seed=0):
    ids = np.random.default_rng(seed).integers(0, 1000, (count, length))
    return ids, np.zeros(count, dtype=int), np.arange(count)


def test_a_row_is_masked_the_same_in_any_batch():
    ids, epochs, indices = rows()
    inputs, labels = masker()(ids, epochs, indices)
    for chosen in ([5], [60, 2, 17]):
        again, labels_again = masker()(ids[chosen], epochs[chosen], indices[chosen])
        assert np.array_equal(again, inputs[chosen])
        assert np.array_equal(labels_again, labels[chosen])
    longer = np.pad(ids[:1], ((0, 0), (0, 40)))
    assert np.array_equal(masker()(longer, epochs[:1], indices[:1])[0][:, :256], inputs[:1])


@pytest.mark.parametrize("change", ["seed", "epoch", "row"])
def test_masks_change_with(change):
    ids, epochs, indices = rows(1)
    base = masker()(ids, epochs, indices)[1]
    other = masker(seed=4 if change == "seed" else 3)(ids, epochs + (change == "epoch"), indices + (change == "row"))[1]
    assert not np.array_equal(base, other)


def test_rates():
    ids, epochs, indices = rows(800)
    inputs, labels = masker()(ids, epochs, indices)
    selected = labels != IGNORED
    maskable = ~np.isin(ids, list(SPECIAL))
    assert not selected[~maskable].any()
    assert selected[maskable].mean() == pytest.approx(0.15, abs=0.003)
    assert np.array_equal(labels[selected], ids[selected])
    assert np.array_equal(inputs[~selected], ids[~selected])
    kinds = inputs[selected] == 4, inputs[selected] == labels[selected]
    assert kinds[0].mean() == pytest.approx(0.8, abs=0.01)
    assert kinds[1].mean() == pytest.approx(0.1, abs=0.01)
    drawn = inputs[selected][~kinds[0] & ~kinds[1]]
    assert not np.isin(drawn, list(SPECIAL)).any()
    assert len(np.unique(drawn)) > 800


def test_mask_all():
    ids, epochs, indices = rows()
    inputs, labels = masker(mask_all=True)(ids, epochs, indices)
    assert (inputs[labels != IGNORED] == 4).all()
