import numpy as np
import pytest

from slimconv_jax.data.sources import load_source


def test_digits_are_split_once_and_evenly():
    train, test = load_source("digits", "train"), load_source("digits", "test")
    assert (len(train), len(test)) == (1437, 360)
    for source in (train, test):
        assert source.images.shape == (len(source), 32, 32, 3)
        assert source.images.dtype == np.uint8
        assert source.images.max() == 255 and source.images.min() == 0
        assert source.labels.dtype == np.int32
        assert source.class_names == tuple("0123456789")
    # Stratified: each class keeps its share, to within one image.
    counts = [np.bincount(source.labels, minlength=10) for source in (train, test)]
    np.testing.assert_allclose(counts[1], (counts[0] + counts[1]) * 360 / 1797, atol=1)
    np.testing.assert_array_equal(test.images, load_source("digits", "test").images)


def test_digits_are_the_ones_of_scikit_learn():
    from sklearn.datasets import load_digits

    def fingerprints(images):  # mean grey of the four quarters, which resizing keeps
        n = len(images)
        side = images.shape[1] // 2
        return images.reshape(n, 2, side, 2, side).mean(axis=(2, 4)).reshape(n, 4)

    ours = np.concatenate([load_source("digits", s).images[..., 0] for s in ("train", "test")])
    theirs = load_digits().images * (255 / 16)
    ours, theirs = fingerprints(ours), fingerprints(theirs)
    # Every digit of the one set is in the other, and as often.
    np.testing.assert_allclose(np.sort(ours.sum(1)), np.sort(theirs.sum(1)), atol=3)


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("mnist", "train", "unknown data set 'mnist'; there are: digits"),
        ("digits", "validation", "unknown split 'validation'; there are: train, test"),
    ],
)
def test_unknown_names(name, split, message):
    with pytest.raises(ValueError, match=message):
        load_source(name, split)
