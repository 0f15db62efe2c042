"""Export of a student to files that other programs read. What was written is read back and compared with the network."""

from __future__ import annotations

import importlib
import io
import json
import logging
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import files
from .describe import describe_error
from .networks import evaluation_mode, logits_in, usual_modes
from .registry import resolve, unknown_name_error
from .students import Student

FORMATS = {
    "onnx": "kcd_ext.exporting:OnnxFormat",
    "safetensors": "kcd_ext.exporting:SafetensorsFormat",
    "torch-export": "kcd_ext.exporting:TorchExportFormat",
}
BATCHES = (1, 3)  # sizes of the batches on which outputs are compared
RELATIVE_TOLERANCE = 1e-4  # of the largest logit: other programs sum in another order


class DifferentOutputError(ValueError):
    """The error for a file whose outputs differ from the network's."""


class ExportFormat(ABC):
    """A file format. Its methods work in memory, so that a failed export leaves no file."""

    suffix: str
    """The usual suffix of such files."""
    has_graph = True
    """Whether the file contains the computation, not only the weights."""

    @abstractmethod
    def content(self, network: nn.Module, example: Tensor, about: dict[str, str]) -> bytes:
        """Return the content of the file for a network that maps x like `example` to logits, for any batch size."""

    @abstractmethod
    def outputs(self, content: bytes, network: nn.Module, x: Tensor) -> Tensor:
        """Return the logits that the file gives for x."""


class SafetensorsFormat(ExportFormat):
    """The weights, under the network's own names, with the description of the student in the metadata."""

    suffix = ".safetensors"
    has_graph = False

    def content(self, network: nn.Module, example: Tensor, about: dict[str, str]) -> bytes:
        """Return the content of the file. It does not depend on `example`."""
        save = _package("safetensors.torch", "train").save
        return save({name: x.detach().cpu().contiguous().clone() for name, x in network.state_dict().items()}, about)

    def outputs(self, content: bytes, network: nn.Module, x: Tensor) -> Tensor:
        """Return the logits of a copy of the network with the weights in the file."""
        copy = deepcopy(network)
        copy.load_state_dict(_package("safetensors.torch", "train").load(content))
        with evaluation_mode(copy):
            return copy(x)


class TorchExportFormat(ExportFormat):
    """An `ExportedProgram` of torch.export, which torch.export.load reads and AOTInductor compiles."""

    suffix = ".pt2"

    def content(self, network: nn.Module, example: Tensor, about: dict[str, str]) -> bytes:
        """Return the content of the file, with the description of the student in its extra files."""
        # Two samples, because torch.export makes a batch of one constant.
        program = torch.export.export(network, (example[:1].repeat(2, 1, 1, 1),), dynamic_shapes=_batch_dimension())
        written = io.BytesIO()
        torch.export.save(program, written, extra_files=about)
        return written.getvalue()

    def outputs(self, content: bytes, network: nn.Module, x: Tensor) -> Tensor:
        """Return the logits of the program in the file."""
        return torch.export.load(io.BytesIO(content)).module()(x)


class OnnxFormat(ExportFormat):
    """An ONNX model with the input `x` and the output `logits`. Needs the extra `export`."""

    suffix = ".onnx"

    def content(self, network: nn.Module, example: Tensor, about: dict[str, str]) -> bytes:
        """Return the content of the file, with the description of the student in `metadata_props`."""
        for package in ("onnx", "onnxscript", "onnxruntime"):
            _package(package, "export")
        program = torch.onnx.export(
            network,
            (example[:1].repeat(2, 1, 1, 1),),
            dynamo=True,
            verbose=False,
            external_data=False,
            input_names=["x"],
            output_names=["logits"],
            dynamic_shapes=_batch_dimension(),
        )
        model = program.model_proto
        for name, text in about.items():
            model.metadata_props.add(key=name, value=text)
        return model.SerializeToString()

    def outputs(self, content: bytes, network: nn.Module, x: Tensor) -> Tensor:
        """Return the logits of the model in the file, computed by onnxruntime on the CPU."""
        session = _package("onnxruntime", "export").InferenceSession(content, providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(["logits"], {"x": x.numpy()})[0])


class _Logits(nn.Module):
    """The exported computation: from x, or from pixels, to logits."""

    def __init__(self, network: nn.Module, student: Student | None):
        super().__init__()
        self.network = network
        self.normalises = student is not None
        if student is not None:
            mean, std = (
                255 * torch.tensor(part).view(1, -1, 1, 1) for part in (student.preprocess.mean, student.preprocess.std)
            )
            self.register_buffer("mean", mean)
            self.register_buffer("std", std)

    def forward(self, x: Tensor) -> Tensor:
        if self.normalises:
            x = (x - self.mean) / self.std
        return logits_in(self.network(x))[0]


def export(student: Student, path: str | os.PathLike, format: str, *, include_normalisation: bool = False) -> float:
    """Write a student to a file, and compare what the file computes with what the network computes.

    The model takes x (b, channels, height, width) float32, for any b, as `student.preprocess` gives it, and returns logits
    (b, classes). The file also contains the description of the student (the content of model.json), under the key `kcd_ext`.

    Args:
        student: The student. Its network is not changed.
        path: The file. It must not exist.
        format: onnx, torch-export or safetensors (the weights only).
        include_normalisation: Put the normalisation into the model. It then takes pixels, float32 from 0 to 255.

    Returns:
        The largest absolute difference between a logit of the file and the network's, for random images in batches of one
        and three.

    Raises:
        FileExistsError: The file exists.
        ValueError: The format is unknown, `include_normalisation` has no effect, the network cannot be exported, or the
            outputs differ by more than 1e-4 of the largest logit. No file has been written.
        ImportError: A package is missing; names the extra that installs it.
        OSError: The file cannot be written.
    """
    path, writer = Path(path), export_format(format)
    if include_normalisation and not writer.has_graph:
        raise ValueError(f"include_normalisation has no effect with format {format!r}, which holds weights only")
    if path.exists():
        raise FileExistsError(f"{path} already exists: choose another path")
    with usual_modes(), torch.no_grad():
        module = deepcopy(student.module).cpu().eval()
        network = _Logits(module, student if include_normalisation else None).eval()
        images = _random_inputs(student, include_normalisation)
        target = network if writer.has_graph else module
        with _one_line_errors(format):
            content = writer.content(target, images, {"kcd_ext": json.dumps(_about(student, include_normalisation))})
            pairs = [(writer.outputs(content, target, images[:n]), network(images[:n])) for n in BATCHES]
        difference = max(float((got - expected).abs().max()) for got, expected in pairs)
        largest = max(float(expected.abs().max()) for _, expected in pairs)
    if not difference <= RELATIVE_TOLERANCE * max(1.0, largest):
        raise DifferentOutputError(
            f"format {format!r}: the exported model's logits differ from the network's by up to {difference:.2g}, and the "
            f"largest logit is {largest:.2g}; nothing was written"
        )
    files.write_bytes(path, content)
    return difference


def export_format(name: str) -> ExportFormat:
    """Return the format of this name. Raises ValueError for an unknown one."""
    if name not in FORMATS:
        raise unknown_name_error("format", name, FORMATS)
    return resolve("format", name, FORMATS)()


def _batch_dimension() -> tuple[dict[int, Any]]:
    return ({0: torch.export.Dim("batch")},)


def _random_inputs(student: Student, pixels: bool) -> Tensor:
    """Return random images, always the same, as the exported model takes them."""
    preprocess = student.preprocess
    shape = (max(BATCHES), preprocess.height, preprocess.width, preprocess.channels)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return images.permute(0, 3, 1, 2).float() if pixels else torch.stack([preprocess(image) for image in images])


def _about(student: Student, pixels: bool) -> dict[str, object]:
    """Return what a reader of the file must know: the input, its preprocessing and the class names."""
    return {
        "input": "pixels from 0 to 255" if pixels else "normalised pixels",
        "preprocessing": student.preprocess.as_json(),
        "class_names": list(student.class_names),
    }


def _package(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f'this format needs the package {name}: pip install "kcd-ext[{extra}]"', name=name) from error


@contextmanager
def _one_line_errors(format: str) -> Iterator[None]:
    """Turn an error of an exporter into a ValueError of one line, and silence the exporters' progress."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # the exporters raise many types, with messages of many lines
        raise ValueError(f"the network cannot be exported as {format}: {describe_error(error)}") from error
    finally:
        logging.disable(disabled)
