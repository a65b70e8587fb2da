"""A small classifier, saved with the names of its classes and its preprocessing."""

from randomize import randomized

from slimconv_jax import save_model
from slimconv_jax.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from slimconv_jax.models.zoo import abstract_model

NAMES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]


def build_classifier():
    return randomized(lambda: abstract_model("sc_resnet14", width=8, num_classes=7, stem="cifar"))


def save_classifier(model, path):
    preprocessing = {"image_size": 16, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    save_model(model, path, info={"class_names": NAMES, "preprocessing": preprocessing})
    return path
