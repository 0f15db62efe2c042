"""Checks of data, networks and methods before anything is trained."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import Dataset, default_collate

from ..data import IndexedDataset
from ..data.images import ImageSet
from ..data.loading import load_item
from ..describe import one_line
from ..methods import Batch, Method, Outcome
from ..module_state import is_dense
from ..networks import OutputError, check_network, logits_alone
from .batches import flat_labels
from .recipe import Recipe


def indexed(name: str, dataset: Dataset) -> IndexedDataset | ImageSet:
    """The data set with original indices; an `IndexedDataset` or `ImageSet` as it is."""
    try:
        wrapped = dataset if isinstance(dataset, IndexedDataset | ImageSet) else IndexedDataset(dataset)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from error
    if len(wrapped) == 0:
        raise ValueError(f"{name} must hold at least one sample, got none")
    return wrapped


def check_method(method: Method, recipe: Recipe) -> None:
    """Raises ValueError where the method cannot do what the recipe's selection asks of it."""
    condenser = recipe.condense.example(recipe.epochs)
    if condenser.measure == "losses" and recipe.condense.batch_keep < 1:
        raise ValueError(
            f"condense.batch_keep={recipe.condense.batch_keep} cannot go with selection {recipe.condense.selection!r}, which "
            f"compares losses: a sample that the teacher is not asked about has only a part of its loss"
        )
    if method.lr_factor(0, recipe.epochs) is not None:
        for option in ("milestones", "gamma"):
            chosen, usual = getattr(recipe, option), Recipe.__dataclass_fields__[option].default
            if chosen != usual:
                raise ValueError(
                    f"{option}={chosen!r} has no effect with method {recipe.method!r}, which has a schedule of its own"
                )
    if condenser.sample_weight is not None and not method.weighs_samples:
        raise ValueError(
            f"condense.selection {recipe.condense.selection!r} multiplies every sample's loss by a weight, which method "
            f"{recipe.method!r} does not: take another method or selection"
        )


def check_networks(
    student: nn.Module,
    teacher: nn.Module | None,
    train: IndexedDataset | ImageSet,
    test: IndexedDataset | ImageSet,
    device: torch.device,
) -> int:
    """One sample of each set through each network, in evaluation mode: what does not fit costs nothing yet.

    Returns the number of classes. Raises TypeError or ValueError.
    """
    networks = {"student": student} if teacher is None else {"student": student, "teacher": teacher}
    for name, network in networks.items():
        check_network(name, network)
        for path, parameter in network.named_parameters():
            if not is_lazy(parameter) and parameter.is_inference():
                raise ValueError(
                    f"{name}'s {path} was made inside torch.inference_mode(), so nothing can change it: make the network "
                    f"outside, or inside torch.no_grad()"
                )
    if teacher is not None and not {*map(id, student.parameters())}.isdisjoint(map(id, teacher.parameters())):
        raise ValueError("student and teacher share parameters, so the teacher would be trained too: copy.deepcopy one")
    for part, dataset in (("train", train), ("test", test)):
        x, label = _sample(part, dataset)
        classes = {name: _classes(name, network, x.to(device), part) for name, network in networks.items()}
        if classes.get("teacher", classes["student"]) != classes["student"]:
            raise ValueError(f"teacher_logits have {classes['teacher']} classes, student_logits {classes['student']}")
        # Of images in memory all of them; else those of one sample, for the others are not loaded yet.
        for found in (label.min().item(), label.max().item()):
            if not 0 <= found < classes["student"]:
                raise ValueError(f"{part} must give labels in [0, {classes['student']}), got {found}")
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise ValueError("student has no parameters to train: all of them have requires_grad=False, or there are none")
    return classes["student"]


def check_storable(name: str, network: nn.Module) -> None:
    """Raises TypeError where a checkpoint cannot hold the network, before an epoch is spent on it."""
    for key, part in network.state_dict().items():
        if not isinstance(part, Tensor) or not is_dense(part):
            got = f"{part.dtype} {part.layout}" if isinstance(part, Tensor) else type(part).__name__
            raise TypeError(f"{name} must have a state_dict of dense tensors to be written, got {got} {key!r}")


def check_outcome(outcome: Outcome, batch: Batch, measure: str, method: str) -> None:
    """Raises TypeError or ValueError where a method's outcome is not what `Outcome` says; looks at no number."""
    if not isinstance(outcome, Outcome):
        raise TypeError(f"method {method!r} must give an Outcome, got {type(outcome).__name__}")
    if not isinstance(outcome.terms, Mapping):
        raise TypeError(f"method {method!r} must give terms as a mapping, got {type(outcome.terms).__name__}")
    shapes = {"loss": (outcome.loss, ()), measure: (getattr(outcome, measure), (len(batch.label),))}
    shapes |= {f"terms[{name!r}]": (term, ()) for name, term in outcome.terms.items()}
    for name, (tensor, shape) in shapes.items():
        if not isinstance(tensor, Tensor) or tensor.shape != shape:
            got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"method {method!r} must give {name} of shape {shape}, got {got}")
        if name == measure and not tensor.is_floating_point():
            raise TypeError(f"method {method!r} must give {name} of a floating-point dtype, got {tensor.dtype}")
        if tensor.requires_grad != (name == "loss"):
            raise ValueError(f"method {method!r} must give {name} {'with' if name == 'loss' else 'without'} a gradient")
    logits, rows = outcome.logits, len(batch.label)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != rows or logits.requires_grad:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"method {method!r} must give logits ({rows}, classes), detached, got {got}")


def check_same_parts(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming the first difference, where a checkpoint is of another student or method."""
    for name in [*own, *sorted(saved)]:
        shapes = [tuple(state[name].shape) if name in state else None for state in (saved, own)]
        if shapes[0] != shapes[1]:
            was, is_ = ("missing" if shape is None else f"of shape {shape}" for shape in shapes)
            raise ValueError(f"student is not the one of the checkpoint: {name} is {was} there, {is_} here")
        if saved[name].dtype != own[name].dtype:
            dtypes = f"{saved[name].dtype} there, {own[name].dtype} here"
            raise ValueError(f"student is not the one of the checkpoint: {name} is {dtypes}")


def _sample(part: str, dataset: IndexedDataset | ImageSet) -> tuple[Tensor, Tensor]:
    """Return the first sample as a batch of one, and its label; of images in memory all labels."""
    if isinstance(dataset, ImageSet):
        images, labels = dataset.tensors(torch.device("cpu"))
        return dataset.views.normalize(images[:1]), labels
    x, label, _ = default_collate([load_item(part, dataset, 0)])
    if not isinstance(x, Tensor):
        raise TypeError(f"{part} must give items that collate to one tensor, got {type(x).__name__}")
    if not isinstance(label, Tensor) or label.dtype != torch.int64 or label.shape not in ((1,), (1, 1)):
        got = f"{label.dtype} {tuple(label.shape)}" if isinstance(label, Tensor) else type(label).__name__
        raise ValueError(f"{part} must give labels that collate to int64 (b,) or (b, 1), got {got} for b = 1")
    return x, flat_labels(label)


def _classes(name: str, network: nn.Module, x: Tensor, part: str) -> int:
    try:
        with torch.no_grad(), logits_alone(name, network.to(x.device)) as output:
            logits = output.network.eval()(x)
    except OutputError as error:
        raise ValueError(f"{error} for x of {x.dtype} {tuple(x.shape)} from {part}") from error
    except Exception as error:  # so are the networks
        raise ValueError(
            f"{name} does not take x of {x.dtype} {tuple(x.shape)} from {part}: {one_line(error)}"
        ) from error
    if len(logits) != 1:
        raise ValueError(f"{name} must give logits (b, classes), got {tuple(logits.shape)} for b = 1")
    return logits.shape[1]
