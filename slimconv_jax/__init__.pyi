from . import linen as linen
from .errors import InputError as InputError
from .errors import InputWarning as InputWarning
from .inference.evaluate import evaluate as evaluate
from .inference.export import export as export
from .inference.predict import predict as predict
from .inference.saved import open_model as open_model
from .models.complexity import count_macs as count_macs
from .models.complexity import count_params as count_params
from .models.resnet import ResNet as ResNet
from .models.resnet import ResNetConfig as ResNetConfig
from .models.slimconv import SlimConv as SlimConv
from .models.slimify import slimify as slimify
from .models.surgery import backbone as backbone
from .models.surgery import fold_batch_norm as fold_batch_norm
from .models.zoo import create_model as create_model
from .models.zoo import list_models as list_models
from .storage.model_directory import load_model as load_model
from .storage.model_directory import save_model as save_model
from .torch_interop.convert import from_torch as from_torch
from .torch_interop.convert import to_torch as to_torch
from .training.loop import train as train

__version__: str
