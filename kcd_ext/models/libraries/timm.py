"""Networks of timm: `timm:NAME`, with a name of `timm.list_models()`, a pretrained tag (`resnet18.a1_in1k`) or none."""

from torch import nn

from ...describe import did_you_mean, one_line
from ..normalisation import INTERPOLATIONS, NetworkInput
from . import Library, import_package


class Timm(Library):
    """A network of timm."""

    prefix = "timm"

    def make(self, in_channels: int, num_classes: int) -> nn.Module:
        """Return a new network. Raises ValueError if the name is unknown or the network cannot be built."""
        timm = import_package("timm", str(self))
        self._check_name(timm)
        try:
            return timm.create_model(self.name, pretrained=False, in_chans=in_channels, num_classes=num_classes)
        except Exception as error:  # each network checks its arguments in its own way
            raise ValueError(f"network {str(self)!r} cannot be built: {one_line(error)}") from error

    def network_input(self) -> NetworkInput:
        """Return the images of timm's pretrained weights of this name; of its default tag if the name has none."""
        timm = import_package("timm", str(self))
        self._check_name(timm)
        found = timm.get_pretrained_cfg(self.name)
        if found is None:
            return NetworkInput()
        config = timm.data.resolve_data_config(pretrained_cfg=found.to_dict())
        interpolation = config["interpolation"]
        return NetworkInput(
            tuple(config["mean"]),
            tuple(config["std"]),
            tuple(config["input_size"][1:]),
            interpolation if interpolation in INTERPOLATIONS else "bicubic",  # lanczos is nearest to it
        )

    def _check_name(self, timm: object) -> None:
        architecture, _, tag = self.name.partition(".")
        if not timm.is_model(architecture):
            nearest = did_you_mean(architecture, timm.list_models())
            raise ValueError(f"unknown network {str(self)!r}{nearest or ':'} timm.list_models() has all names")
        try:
            timm.get_pretrained_cfg(self.name)
        except RuntimeError as error:
            tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*")]
            raise ValueError(
                f"unknown network {str(self)!r}: {architecture} has no pretrained tag {tag!r}, but {', '.join(tags) or 'none'}"
            ) from error
