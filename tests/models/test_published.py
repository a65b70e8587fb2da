import pytest

from slimconv_jax import count_params
from slimconv_jax.models.published import CIFAR100
from slimconv_jax.models.zoo import abstract_model, parse_model


@pytest.mark.long
def test_compression_on_cifar100():
    def params(name, k):
        return count_params(abstract_model(name, k=k, num_classes=100, stem="cifar"))

    whole = params("resnet50", None)
    for model, (compression, _) in CIFAR100.items():
        saved = 100 * (1 - params(*parse_model(model)) / whole)
        assert round(saved, 1) == compression, model
