"""Image classifiers of torchvision: `torchvision:NAME`, with a name of `torchvision.models.list_models()`."""

from types import ModuleType

from torch import nn

from ...describe import did_you_mean, one_line
from ..normalisation import INTERPOLATIONS, NetworkInput
from . import RGB, Library, import_package

# With torchvision's own weights these change their input from the normalisation of ImageNet to this one inside (their option
# transform_input). Built without weights they do not, so they must be given it.
GIVEN_HALF = ("googlenet", "inception_v3")


class TorchVision(Library):
    """A classifier of torchvision. It takes images of three channels."""

    prefix = "torchvision"

    def make(self, in_channels: int, num_classes: int) -> nn.Module:
        """Return a new network for three channels. Raises ValueError if the name is unknown or it cannot be built."""
        models = self._models()
        try:
            return models.get_model(self.name, weights=None, num_classes=num_classes)
        except Exception as error:  # each network checks its arguments in its own way
            raise ValueError(f"network {str(self)!r} cannot be built: {one_line(error)}") from error

    def channels(self, in_channels: int) -> int:
        """Return 3."""
        return RGB

    def network_input(self) -> NetworkInput:
        """Return the images of torchvision's default weights."""
        transforms = self._models().get_model_weights(self.name).DEFAULT.transforms()
        half, interpolation = (0.5,) * RGB, transforms.interpolation.value
        mean, std = (half, half) if self.name in GIVEN_HALF else (tuple(transforms.mean), tuple(transforms.std))
        size = tuple(transforms.crop_size) * (2 // len(transforms.crop_size))
        return NetworkInput(mean, std, size, interpolation if interpolation in INTERPOLATIONS else "bicubic")

    def _models(self) -> ModuleType:
        models = import_package("torchvision", str(self)).models
        names = models.list_models(module=models)
        if self.name not in names:
            nearest = did_you_mean(self.name, names)
            raise ValueError(
                f"unknown network {str(self)!r}{nearest or ':'} torchvision.models.list_models(torchvision.models) has all names"
            )
        return models
