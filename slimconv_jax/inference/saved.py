"""Opens saved models with their preprocessing and classes, for evaluation, prediction, export."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from etils import epath
from flax.typing import Dtype

from slimconv_jax.data.loader import ResidentDataset, StreamedDataset, load_dataset
from slimconv_jax.data.preprocessing import Preprocessing, normalize, preprocessing_of
from slimconv_jax.data.sources import Source
from slimconv_jax.data.transforms import Transform
from slimconv_jax.devices import batch_sharded
from slimconv_jax.errors import InputError
from slimconv_jax.models.resnet import ResNet
from slimconv_jax.storage.model_directory import load_model, read_info


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """A model that was opened, in evaluation mode.

    Attributes:
      path: of the directory.
      model: the model.
      preprocessing: what comes before the model.
      info: the rest of model.json.
      class_names: the name of each class, None if they do not have names.
    """

    path: epath.PathLike
    model: ResNet
    preprocessing: Preprocessing
    info: dict[str, Any]
    class_names: list[str] | None

    @property
    def normalize(self) -> Callable[[jax.Array], jax.Array]:
        """The function from pixels to what the model takes, on the device."""
        return functools.partial(
            normalize, mean=self.preprocessing.mean, std=self.preprocessing.std
        )

    def dataset(
        self, source: Source, mesh: jax.sharding.Mesh, *, on_error: str, max_pixels: int
    ) -> ResidentDataset | StreamedDataset:
        """Loads the images of a source as the model takes them, except for normalisation.

        Raises:
          ValueError: as `Transform` and `load_dataset`.
        """
        return load_dataset(
            source,
            Transform(
                self.preprocessing.image_size,
                crop_ratio=self.preprocessing.crop_ratio,
                max_pixels=max_pixels,
            ),
            training=False,
            sharding=batch_sharded(mesh),
            on_device=False,  # each image is needed once
            on_error=on_error,
        )


def open_model(
    path: epath.PathLike,
    *,
    dtype: Dtype | None = None,
    checkpoint: int | None = None,
    ema: bool = False,
    average: int = 1,
    **changes: Any,
) -> SavedModel:
    """Opens what `save_model`, `convert` or `train` wrote.

    Args:
      path: the directory; of a training run, the work directory.
      dtype: dtype of the computation.
      checkpoint: of a training run, the step whose checkpoint to load; None for the newest.
      ema: of a training run, whether to load the averaged weights.
      average: of a training run, the number of checkpoints whose weights are averaged.
      **changes: of the preprocessing: `image_size`, `crop_ratio`, `mean`, `std`.

    Raises:
      ValueError: if there is no complete model.
    """
    info = read_info(path)
    preprocessing = preprocessing_of(info, **changes)
    model = load_model(path, dtype=dtype, checkpoint=checkpoint, ema=ema, average=average)
    names, count = info.get("class_names"), model.config.num_classes
    if names is not None and len(names) != count:
        raise InputError(f"model.json is damaged: it names {len(names)} classes, not {count}")
    return SavedModel(path, model, preprocessing, info, names)
