"""Checks of data sets, networks and methods before anything is trained."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import Dataset, default_collate

from ..data import IndexedDataset
from ..data.images import LabelledImages
from ..data.loading import load_item
from ..describe import one_line
from ..methods import Batch, Method, Outcome
from ..module_state import is_dense
from ..networks import OutputError, check_network, logits_only
from .batches import flatten_labels
from .recipe import Recipe

# What the condenser may be fed with that a sample without a teacher's logits lacks, and why.
TEACHER_MEASURES = {
    "losses": "it compares losses, and samples that skip the teacher have only part of theirs",
    "kl": "samples that skip the teacher have no KL divergence",
}


def as_indexed(name: str, dataset: Dataset) -> IndexedDataset | LabelledImages:
    """Return the data set as an `IndexedDataset`; an `IndexedDataset` or images are returned unchanged.

    Raises:
        TypeError, ValueError: `dataset` is not a map-style data set, or it is empty.
    """
    try:
        wrapped = dataset if isinstance(dataset, IndexedDataset | LabelledImages) else IndexedDataset(dataset)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from error
    if len(wrapped) == 0:
        raise ValueError(f"{name} must hold at least one sample, got none")
    return wrapped


def check_validation(recipe: Recipe, val: Dataset | None) -> None:
    """Raise ValueError if an option of the recipe needs a validation set and there is none."""
    for option in ("keep_best", "patience"):
        value = getattr(recipe, option)
        if val is None and value != Recipe.__dataclass_fields__[option].default:
            raise ValueError(
                f"{option}={value!r} needs a validation set, got val=None: a result that the test set chose is no measurement "
                "(kcd: --val-fraction)"
            )


def check_method(method: Method, recipe: Recipe) -> None:
    """Raise ValueError if the method does not support an option of the recipe."""
    condenser = recipe.condense.example(recipe.epochs)
    if condenser.measure in TEACHER_MEASURES and recipe.condense.batch_keep < 1:
        raise ValueError(
            f"condense.batch_keep={recipe.condense.batch_keep} cannot be combined with "
            f"{_name_of_measure(recipe)}: {TEACHER_MEASURES[condenser.measure]}"
        )
    if method.lr_factor(0, recipe.epochs) is not None:
        for option in ("schedule", "milestones", "gamma"):
            value, default = getattr(recipe, option), Recipe.__dataclass_fields__[option].default
            if value != default:
                raise ValueError(
                    f"{option}={value!r} has no effect with method {recipe.method!r}, which sets its own learning rate"
                )
    for option in ("mixup", "cutmix"):
        if getattr(recipe, option) and not method.takes_soft_labels:
            raise ValueError(
                f"{option}={getattr(recipe, option)} gives every sample the shares of two classes as its label, which method "
                f"{recipe.method!r} does not take: choose another method, such as kd"
            )
    if condenser.sample_weight is not None and not method.weighs_samples:
        raise ValueError(
            f"condense.selection {recipe.condense.selection!r} weights every sample's loss, but method {recipe.method!r} does "
            f"not support weights: choose another method or selection"
        )
    if condenser.measure == "losses" and not method.weighs_samples:
        raise ValueError(
            f"{_name_of_measure(recipe)} needs every sample's loss, which method {recipe.method!r} does not give: choose "
            f"another method or value"
        )


def _name_of_measure(recipe: Recipe) -> str:
    """Return the option that chose what the condenser is fed with."""
    condense = recipe.condense
    return f"selection {condense.selection!r}" if condense.value == "entropy" else f"condense.value={condense.value!r}"


def check_networks(
    student: nn.Module,
    teacher: nn.Module | None,
    train: IndexedDataset | LabelledImages,
    held_out: Mapping[str, IndexedDataset | LabelledImages],
    device: torch.device,
) -> int:
    """Call every network with one sample of each set, in evaluation mode, and return the number of classes.

    Raises:
        TypeError, ValueError: A network or a data set does not fit.
    """
    networks = {"student": student} if teacher is None else {"student": student, "teacher": teacher}
    for name, network in networks.items():
        check_network(name, network)
        for path, parameter in network.named_parameters():
            if not is_lazy(parameter) and parameter.is_inference():
                raise ValueError(
                    f"{name}'s {path} was made inside torch.inference_mode() and cannot be changed: create the network "
                    f"outside it, or under torch.no_grad()"
                )
    if teacher is not None and not {*map(id, student.parameters())}.isdisjoint(map(id, teacher.parameters())):
        raise ValueError("student and teacher share parameters, so the teacher would be trained too: copy.deepcopy one")
    for part, dataset in ({"train": train} | held_out).items():
        x, label = first_sample(part, dataset)
        classes = {name: count_classes(name, network, x.to(device), part) for name, network in networks.items()}
        if classes.get("teacher", classes["student"]) != classes["student"]:
            raise ValueError(
                f"student and teacher must give logits of the same number of classes, got {classes['student']} and "
                f"{classes['teacher']}"
            )
        # Images: all labels. Otherwise the first sample's: the others are not loaded yet.
        for extreme in (label.min().item(), label.max().item()):
            if not 0 <= extreme < classes["student"]:
                raise ValueError(f"{part} must give labels in [0, {classes['student']}), got {extreme}")
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise ValueError("student has no parameters to train: it has none, or all have requires_grad=False")
    return classes["student"]


def check_storable(name: str, network: nn.Module) -> None:
    """Raise TypeError if a checkpoint cannot hold the network. Called before an epoch is spent on it."""
    for key, part in network.state_dict().items():
        if not isinstance(part, Tensor) or not is_dense(part):
            got = f"{part.dtype} {part.layout}" if isinstance(part, Tensor) else type(part).__name__
            raise TypeError(f"{name} must have a state_dict of dense tensors to be saved, got {got} {key!r}")


def check_outcome(outcome: Outcome, batch: Batch, measure: str, method: str) -> None:
    """Raise TypeError or ValueError if a method's outcome breaks the contract of `Outcome`. Reads no tensor's values.

    Args:
        outcome: The result of the method's forward pass.
        batch: The batch that the method got.
        measure: The field of `outcome` that the condenser needs: `value`, `kl` or `losses`.
        method: The method's name, for messages.
    """
    if not isinstance(outcome, Outcome):
        raise TypeError(f"method {method!r} must return an Outcome, got {type(outcome).__name__}")
    if not isinstance(outcome.terms, Mapping):
        raise TypeError(f"method {method!r} must return terms as a mapping, got {type(outcome.terms).__name__}")
    if measure in TEACHER_MEASURES and getattr(outcome, measure) is None:
        raise ValueError(
            f"method {method!r} gives no {measure} of every sample, which the condenser is to rank by: choose another method or "
            f"condense.value"
        )
    shapes = {"loss": (outcome.loss, ()), measure: (getattr(outcome, measure), (len(batch.label),))}
    shapes |= {f"terms[{name!r}]": (term, ()) for name, term in outcome.terms.items()}
    for name, (tensor, shape) in shapes.items():
        if not isinstance(tensor, Tensor) or tensor.shape != shape:
            got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"method {method!r} must return {name} of shape {shape}, got {got}")
        if name == measure and not tensor.is_floating_point():
            raise TypeError(f"method {method!r} must return {name} of a floating-point dtype, got {tensor.dtype}")
        if tensor.requires_grad != (name == "loss"):
            expected, fix = ("with", "") if name == "loss" else ("without", ": detach it")
            raise ValueError(f"method {method!r} must return {name} {expected} a gradient{fix}")
    logits, rows = outcome.logits, len(batch.label)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != rows or logits.requires_grad:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"method {method!r} must return logits ({rows}, classes), detached, got {got}")


def check_same_state(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming the first difference, if a checkpoint is of another student or method.

    Args:
        saved: The checkpoint's state_dict; its names start with `student.` or `method.`.
        own: This run's state_dict.
    """
    for name in [*own, *sorted(saved)]:
        mismatch = f"{name.partition('.')[0]} does not match the checkpoint: {name} is"
        shapes = [tuple(state[name].shape) if name in state else None for state in (saved, own)]
        if shapes[0] != shapes[1]:
            there, here = ("missing" if shape is None else f"of shape {shape}" for shape in shapes)
            raise ValueError(f"{mismatch} {there} there, {here} here")
        if saved[name].dtype != own[name].dtype:
            raise ValueError(f"{mismatch} {saved[name].dtype} there, {own[name].dtype} here")


def first_sample(part: str, dataset: IndexedDataset | LabelledImages) -> tuple[Tensor, Tensor]:
    """Return the first sample as a batch of one, and its label; for images, all labels."""
    if isinstance(dataset, LabelledImages):
        image, _ = dataset[0]
        return dataset.views.normalize(torch.from_numpy(image)[None]), torch.from_numpy(dataset.labels)
    x, label, _ = default_collate([load_item(part, dataset, 0)])
    if not isinstance(x, Tensor):
        raise TypeError(f"{part} must give x that collate to one tensor, got {type(x).__name__}")
    if not isinstance(label, Tensor) or label.dtype != torch.int64 or label.shape not in ((1,), (1, 1)):
        got = f"{label.dtype} {tuple(label.shape)}" if isinstance(label, Tensor) else type(label).__name__
        raise ValueError(f"{part} must give labels that collate to int64 (b,) or (b, 1), got {got} for b = 1")
    return x, flatten_labels(label)


def count_classes(name: str, network: nn.Module, x: Tensor, part: str) -> int:
    """Return the number of classes of a network's logits for a batch of one. Raises ValueError if it gives no logits for it."""
    try:
        with torch.no_grad(), logits_only(name, network.to(x.device)) as output:
            logits = output.network.eval()(x)
    except OutputError as error:
        raise ValueError(f"{error} for x of {x.dtype} {tuple(x.shape)} from {part}") from error
    except Exception as error:  # the network is the user's and may raise anything
        raise ValueError(
            f"{name} does not take x of {x.dtype} {tuple(x.shape)} from {part}: {one_line(error)}"
        ) from error
    if len(logits) != 1:
        raise ValueError(f"{name} must give logits (b, classes), got {tuple(logits.shape)} for b = 1")
    return logits.shape[1]
