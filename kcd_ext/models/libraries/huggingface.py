"""Image classifiers of transformers: `hf:FOLDER`, written by `save_pretrained`, or `hf:NAME` of the Hugging Face hub.

Weights are read as safetensors only, and no code from the folder runs.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from ...describe import describe_error, one_line
from ...files import read_json
from ..normalisation import NetworkInput
from . import RGB, Library, import_package

CONFIG = "config.json"
PREPROCESSOR = ("preprocessor_config.json", "processor_config.json")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
DOWNLOADED = [CONFIG, *PREPROCESSOR, "model.safetensors*", "model-*.safetensors"]
# Pillow's filters, by number, as the nearest one of `INTERPOLATIONS`: lanczos is bicubic, box and hamming are bilinear.
RESAMPLING = {0: "nearest", 1: "bicubic", 2: "bilinear", 3: "bicubic", 4: "bilinear", 5: "bilinear"}


class HuggingFace(Library):
    """A classifier of transformers, in a folder or on the hub.

    Args:
        name: The path of a folder, or a name of the hub.
        config: The result of `config`; None: it is read.
    """

    prefix = "hf"

    def __init__(self, name: str, config: Mapping[str, object] | None = None):
        super().__init__(name)
        self._given = config

    def make(self, in_channels: int, num_classes: int) -> nn.Module:
        """Return a new network, whose output is its logits. Raises ValueError if it is no image classifier."""
        transformers, kind = self._import(), self._content["config"]["model_type"]
        try:
            config = self._config_object()
            config.num_labels = num_classes
            if hasattr(config, "num_channels"):
                config.num_channels = in_channels
            with _silent(transformers):
                network = transformers.AutoModelForImageClassification.from_config(config, trust_remote_code=False)
        except Exception as error:  # each model checks its configuration in its own way
            raise ValueError(
                f"network {str(self)!r} of model_type {kind!r} cannot be built as an image classifier: {one_line(error)}"
            ) from error
        network.register_forward_hook(_logits)
        return network

    @property
    def source(self) -> str:
        """The file that describes its images."""
        return f"as {PREPROCESSOR[0]} says"

    def channels(self, in_channels: int) -> int:
        """Return `in_channels` if the configuration has a number of channels, else 3."""
        try:
            return in_channels if hasattr(self._config_object(), "num_channels") else RGB
        except Exception:  # `make` raises it again
            return in_channels

    def network_input(self) -> NetworkInput:
        """Return the images that the folder's preprocessor_config.json describes.

        Raises:
            ValueError: The file is damaged, or it turns images to BGR.
        """
        side, found = self._content["config"].get("image_size"), self._content["preprocessor"]
        try:
            size = None if side is None else _size({"size": side})
            return NetworkInput(size=size) if found is None else _parse(found, size)
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(
                f"network {str(self)!r}: its {PREPROCESSOR[0]} cannot be used: {describe_error(error)}"
            ) from error

    def config(self) -> dict[str, object]:
        """Return the contents of config.json and preprocessor_config.json, None for the latter if there is none.

        Raises ValueError if there is no such folder or if transformers did not write it.
        """
        return dict(self._content)

    def weights(self) -> Mapping[str, Tensor] | None:
        """Return the folder's weights, in float32; None: it has only a configuration.

        Raises:
            ValueError: They are not safetensors, are damaged, or are of another network than the configuration's.
        """
        if not any((self._folder / name).exists() for name in WEIGHTS):
            others = [path.name for path in sorted(self._folder.glob("*.bin"))]
            if others:
                raise ValueError(
                    f"network {str(self)!r} must have its weights as safetensors, got {others[0]}: load it with transformers and "
                    f"call save_pretrained"
                )
            return None
        transformers = self._import()
        try:
            with _silent(transformers):
                network, found = transformers.AutoModelForImageClassification.from_pretrained(
                    self._folder,
                    use_safetensors=True,
                    local_files_only=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,
                )
        except Exception as error:  # each model checks its configuration in its own way
            raise ValueError(f"weights of network {str(self)!r} cannot be read: {one_line(error)}") from error
        absent = {*found["missing_keys"], *(entry[0] for entry in found["mismatched_keys"])}
        return {name: tensor for name, tensor in network.float().state_dict().items() if name not in absent}

    @cached_property
    def _content(self) -> Mapping[str, object]:
        """The result of `config`, given or read."""
        if self._given is not None:
            return self._given
        path = self._folder / CONFIG
        if not path.exists():
            raise ValueError(f"network {str(self)!r}: {self._folder} has no {CONFIG}, which save_pretrained writes")
        config = read_json(path)
        if not isinstance(config.get("model_type"), str):
            raise ValueError(f"network {str(self)!r}: transformers did not write {path}: it has no model_type")
        found = [read_json(path) for path in (self._folder / name for name in PREPROCESSOR) if path.exists()]
        preprocessor = [each.get("image_processor", each) for each in found]
        return {"config": config, "preprocessor": preprocessor[0] if preprocessor else None}

    def _config_object(self) -> object:
        """Return the configuration as an object of transformers. Raises its errors."""
        given = copy.deepcopy(dict(self._content["config"]))
        return self._import().AutoConfig.for_model(given.pop("model_type"), **given)

    def folder(self) -> Path:
        """Return the folder, in the hub's cache for a name of the hub. Raises ValueError if there is none."""
        return self._folder

    @cached_property
    def _folder(self) -> Path:
        """The folder; for a name of the hub its folder in the cache, to which it is downloaded if it is not there."""
        path = Path(self.name)
        if path.is_dir():
            return path
        if path.exists() or path.is_absolute() or self.name.startswith(".") or self.name.count("/") > 1:
            raise ValueError(f"network {str(self)!r}: there is no folder {self.name}")
        self._import()  # names the extra if it is missing
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(self.name, allow_patterns=DOWNLOADED))
        except Exception as error:  # the hub's client has dozens of errors, for no network, no such name, no permission
            raise ValueError(
                f"network {str(self)!r} is neither a folder here nor in the cache, and cannot be fetched from the Hugging Face "
                f"hub: {describe_error(error)}"
            ) from error

    def _import(self) -> ModuleType:
        return import_package("transformers", str(self))


def is_folder(path: Path) -> bool:
    """Return whether `save_pretrained` of transformers wrote this folder."""
    if not (path / CONFIG).is_file():
        return False
    try:
        return "model_type" in read_json(path / CONFIG)
    except ValueError:
        return False


@contextmanager
def _silent(transformers: ModuleType) -> Iterator[None]:
    """Turn off the log and the progress bars of transformers inside the context."""
    logging = transformers.utils.logging
    verbosity, shows_progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shows_progress:
            logging.enable_progress_bar()


def _logits(network: nn.Module, arguments: tuple, output: object) -> Tensor:
    """Return the logits of a `ModelOutput`."""
    return output if isinstance(output, torch.Tensor) else output.logits


def _parse(found: Mapping, size: tuple[int, int] | None) -> NetworkInput:
    """Return the images that a preprocessor's configuration describes; `size` if it does not resize."""
    if found.get("do_flip_channel_order"):
        raise ValueError("do_flip_channel_order turns images to BGR, which kcd does not")
    factor = float(found.get("rescale_factor", 1 / 255)) if found.get("do_rescale", True) else 1.0
    mean, std = (0.0,), (1.0,)
    if found.get("do_normalize", True) and found.get("image_mean") is not None:
        mean, std = _numbers(found["image_mean"]), _numbers(found["image_std"])
        if found.get("include_top"):  # EfficientNet's: images are divided by the std once more
            std = tuple(number**2 for number in std)
    if found.get("rescale_offset"):  # EfficientNet's: 1 is subtracted after the factor
        mean = tuple(number + 1 for number in mean)
    # (pixels * factor - mean) / std, written for pixels / 255
    mean, std = (tuple(number / (255 * factor) for number in numbers) for numbers in (mean, std))
    if found.get("do_center_crop") and found.get("crop_size"):
        size = _size({"size": found["crop_size"]})
    elif found.get("do_resize", True) and found.get("size"):
        size = _size(found)
    return NetworkInput(mean, std, size, RESAMPLING[int(found.get("resample", 2))])


def _numbers(value: object) -> tuple[float, ...]:
    return tuple(map(float, value)) if isinstance(value, list | tuple) else (float(value),)


def _size(found: Mapping) -> tuple[int, int]:
    """Return height and width from the entry `size`: a number, two, or a dictionary."""
    size = found["size"]
    if isinstance(size, Mapping):
        size = [size["height"], size["width"]] if "height" in size else size["shortest_edge"]
    return (int(size), int(size)) if isinstance(size, int | float) else (int(size[0]), int(size[1]))
