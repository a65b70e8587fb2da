"""Reads ResNets of irregular widths, such as a pruning search finds, from a small JSON file.

    {"stem": 60,
     "stages": [[[40, 52, 232], [64, 64, 232], [64, 60, 232]], [...], [...], [...]]}

Each block of each of the four stages has a row: the output channels of its 1x1, 3x3 and 1x1
convolutions. The last is the same within a stage, since the outputs of its blocks are added up.
"""

from etils import epath

from slimconv_jax.errors import InputError
from slimconv_jax.files import read_json
from slimconv_jax.models.resnet import ResNetConfig


def read_channels(path: epath.PathLike) -> ResNetConfig:
    """Reads an architecture from a JSON file.

    Raises:
      ValueError: if the file does not exist or does not describe such an architecture.
    """
    content = read_json(path)
    try:
        if not isinstance(content, dict) or content.keys() != {"stem", "stages"}:
            found = list(content) if isinstance(content, dict) else f"a {type(content).__name__}"
            raise InputError(f"its keys must be 'stem' and 'stages', not {found}")
        stages = content["stages"]
        if not isinstance(stages, list) or not all(isinstance(blocks, list) for blocks in stages):
            raise InputError("stages must be four lists of blocks, each a list of three channels")
        if len(stages) != 4:
            raise InputError(f"it must have four stages, not {len(stages)}")
        return ResNetConfig(tuple(map(len, stages)), channels=(content["stem"], stages))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
