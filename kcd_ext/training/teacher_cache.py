"""A teacher on disk: fill a cache with the teacher's logits, check that it fits a run, and add its logits to the batches."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..cache import TeacherCache, TeacherCacheWriter
from ..checks import check_int, check_percent
from ..condensation.random_keys import MAX_SEED
from ..data import IndexedDataset
from ..data.images import LabelledImages
from ..data.views import Views
from ..methods import Batch, Method
from ..models.normalisation import renormalisation
from ..networks import evaluation_mode, logits_only, usual_modes
from ..randomness import seeded
from .batch_mixing import MIXES
from .batches import BatchSource, batch_source
from .checks import as_indexed, check_storable, count_classes, first_sample
from .diagnosis import teacher_warning
from .distributed import Accelerator, accelerator_on, sum_over_ranks
from .fingerprint import digest, digest_of_samples
from .recipe import Recipe
from .stored import differing_part, digests_of_stored

NORMALISATION = ("mean", "std")  # fields of views that the student may have otherwise than the teacher


def cache_teacher(
    teacher: nn.Module,
    train: Dataset,
    test: Dataset,
    output: str | Path,
    *,
    views: int = 0,
    seed: int = 0,
    dtype: str = "float16",
    batch_size: int = 250,
    device: str = "auto",
    num_workers: int = 0,
    about: Mapping[str, object] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TeacherCache:
    """Run the teacher on the training set and store its logits, so that `distill` needs no teacher.

    A call that was interrupted continues where it stopped; one on a complete cache only verifies it. With several processes
    (`torchrun`), each writes its share. The teacher runs in evaluation mode and in float32.

    Args:
        teacher: Any module that maps a batch of x to logits (b, classes). It ends on the device.
        train: The training set, as for `distill`.
        test: The test set, on which the teacher's accuracy is measured and recorded.
        output: The cache's folder.
        views: K > 0: store the logits of the views (`Views`) of epochs 0 to K - 1. The student's epoch e then has the views of
            epoch e mod K, so that student and teacher see the same pixels. 0: store the logits of the plain images, whatever
            views the student sees. Data sets that are loaded item by item have plain items alone, as their own transforms give
            them.
        seed: The seed of the views; that of the students' recipes.
        dtype: The dtype of the stored logits: float16, bfloat16 or float32.
        batch_size: Samples per batch.
        device: auto (CUDA if available), cpu or cuda.
        num_workers: Workers that load items.
        about: JSON on the teacher's origin, for readers of the cache. A call that continues a cache keeps the first one's.
        progress: Called on rank 0 after every batch with the number of samples that the cache has, and that of all.

    Returns:
        The complete cache.

    Raises:
        TypeError, ValueError: An argument does not fit; the teacher fails or gives logits that cannot be stored; or `output`
            holds a cache of another teacher, other data, views or dtype, or a damaged one. The message names what differs.
        OSError: A file cannot be written. What has been written is intact.

    Warns:
        UserWarning: The teacher is hardly better on `test` than the most frequent class. The items of `train` are random, so the
            student will see others than the teacher.
    """
    output, train, test = Path(output), as_indexed("train", train), as_indexed("test", test)
    check_int("views", views, 0)
    check_int("batch_size", batch_size, 1)
    check_int("seed", seed, 0, MAX_SEED)
    if views and not isinstance(train, LabelledImages):
        raise ValueError(f"views must be 0 for items with transforms of their own, got {views}: only images have views")
    with (
        usual_modes(),
        accelerator_on(device) as accelerator,
        logits_only("teacher", teacher) as hook,
        evaluation_mode(teacher),
        torch.no_grad(),
        seeded(seed, device=accelerator.device),
    ):
        network = hook.network.to(accelerator.device)
        classes = _check_teacher(network, train, test, accelerator.device)
        if accelerator.is_main_process and _has_random_items(train):
            warnings.warn(
                "train gives another x whenever it is read, so students will see other ones than the teacher: leave out random "
                "transforms",
                stacklevel=2,
            )
        earlier = _recorded(output, accelerator)
        facts = {
            "samples": len(train),
            "train_samples": digest_without_views(train, earlier.get("train_samples")),
            "train_stored": _check_stored(output, earlier, train),
            "test_samples": digest_without_views(test, earlier.get("test_samples")),
            "teacher": digest(teacher.state_dict()),
            "teacher_input": renormalisation(teacher),
            "views": describe_views(train, views, seed),
        }
        noted = {name: earlier[name] for name in ("accuracy", "source") if name in earlier}
        if "accuracy" not in noted:
            with closing(batch_source(test, None, accelerator.device, num_workers, name="test")) as source:
                accuracy = _measure(network, source, classes, batch_size, accelerator)
            noted = {"accuracy": accuracy, "source": dict(about or {})}
        with TeacherCacheWriter(output, classes=classes, dtype=dtype, about=facts | noted) as writer:
            missing = np.array([sample for sample in range(len(train)) if sample not in writer], np.int64)
            accelerator.wait_for_everyone()  # no rank may write before all have seen what is missing
            done, ranks = len(train) - len(missing), accelerator.num_processes
            own = missing[accelerator.process_index :: ranks]
            for part, inputs in _inputs(train, own, batch_size, views, seed, accelerator.device, num_workers):
                logits = [network(x) for x in inputs]
                writer.write_batch(part.tolist(), torch.stack(logits, 1) if views else logits[0])
                done += ranks * len(part)
                if progress is not None and accelerator.is_main_process:
                    progress(min(done, len(train)), len(train))
        accelerator.wait_for_everyone()
    cache = TeacherCache(output)
    _check_complete(cache, len(train))
    return cache


def _check_teacher(
    network: nn.Module,
    train: IndexedDataset | LabelledImages,
    test: IndexedDataset | LabelledImages,
    device: torch.device,
) -> int:
    """Return the teacher's number of classes. Raises TypeError or ValueError if a data set does not fit it."""
    check_storable("teacher", network)
    for part, dataset in (("train", train), ("test", test)):
        x, label = first_sample(part, dataset)
        classes = count_classes("teacher", network, x.to(device), part)
        for extreme in (label.min().item(), label.max().item()):
            if not 0 <= extreme < classes:
                raise ValueError(f"{part} must give labels in [0, {classes}), the teacher's classes, got {extreme}")
    return classes


def _has_random_items(train: IndexedDataset | LabelledImages) -> bool:
    """Return whether items that are loaded one by one depend on the state of random generators, judged by a few samples."""
    if isinstance(train, LabelledImages):
        return False
    return digest_of_samples(train) != digest_of_samples(train, seed=1)


def _recorded(output: Path, accelerator: Accelerator) -> Mapping[str, object]:
    """Return what an earlier call recorded, on every rank alike; empty if there is none. Raises ValueError for damage."""
    accelerator.wait_for_everyone()
    found = TeacherCache(output) if (output / "cache.json").exists() else None
    accelerator.wait_for_everyone()  # no rank may write a header before all have looked for one
    if found is None:
        return {}
    found.verify()
    return found.about


def _check_stored(path: Path, about: Mapping[str, object], train: IndexedDataset | LabelledImages) -> object:
    """Return the digests of what `train` stores: recorded ones if there are any. Raises ValueError if one differs."""
    own = digests_of_stored(train)
    if name := differing_part(recorded := about.get("train_stored", own), own):
        raise ValueError(f"{path} was made from other training data: train.{name} differs")
    return recorded


def _measure(network: nn.Module, source: BatchSource, classes: int, batch_size: int, accelerator: Accelerator) -> float:
    """Return the teacher's accuracy on the test set in percent, and warn if it is near chance."""
    counts = torch.zeros(2 + classes, dtype=torch.int64, device=accelerator.device)
    for batch in source.eval_batches(batch_size, accelerator.process_index, accelerator.num_processes):
        own = batch.index >= 0  # the others are padding repeats
        label = batch.label[own]
        correct = (network(batch.x).argmax(-1)[own] == label).sum()
        counts += torch.cat((torch.stack((correct, own.sum())), label.bincount(minlength=classes)))
    correct, samples, *labels = sum_over_ranks(accelerator, counts)
    accuracy = round(100 * correct / samples, 4)
    if (doubt := teacher_warning(accuracy, None, labels)) and accelerator.is_main_process:
        warnings.warn(doubt, stacklevel=3)  # the caller of cache_teacher
    return accuracy


def _inputs(
    train: IndexedDataset | LabelledImages,
    ids: np.ndarray,
    batch_size: int,
    views: int,
    seed: int,
    device: torch.device,
    num_workers: int,
) -> Iterator[tuple[np.ndarray, Iterable[Tensor]]]:
    """Yield the ids of each batch, and its input for each view, or its plain input."""
    parts = [slice(start, start + batch_size) for start in range(0, len(ids), batch_size)]
    with closing(batch_source(train, None, device, num_workers, name="train")) as source:
        if isinstance(train, LabelledImages):
            for part, (images, index) in zip(parts, source.raw_images(ids, parts), strict=True):
                plain = (train.views.normalize(images),)
                of_epochs = (train.views(images, index, seed=seed, epoch=view) for view in range(views))
                yield ids[part], of_epochs if views else plain
            return
        batches = source.epoch([(sample, sample) for sample in ids.tolist()], parts, seed, 0)
        for part, batch in zip(parts, batches, strict=True):
            yield ids[part], (batch.x,)


# --- what a cache is made of ---


def digest_without_views(dataset: IndexedDataset | LabelledImages, like: object = None) -> str:
    """Return `digest_of_samples`, of images whatever their views are."""
    if isinstance(dataset, LabelledImages):
        channels = len(dataset.views.mean)
        dataset = dataset.with_views(Views((0.0,) * channels, (1.0,) * channels))
    return digest_of_samples(dataset, like if isinstance(like, str) else None)


def describe_views(dataset: IndexedDataset | LabelledImages, views: int, seed: int) -> dict[str, object] | None:
    """Return all that decides the pixels of K views, as JSON; None for plain images. The normalisation is not part of it."""
    if not views:
        return None
    own = {name: getattr(dataset.views, name) for name in view_options(dataset)}
    return {"count": views, "seed": seed, **own}


def view_options(dataset: LabelledImages) -> list[str]:
    """Return the names of the fields of a data set's views that decide which pixels a network sees."""
    return [option.name for option in fields(dataset.views) if option.name not in NORMALISATION]


def recorded_accuracy(cache: TeacherCache, test: IndexedDataset | LabelledImages) -> float | None:
    """Return the teacher's accuracy in percent that a cache recorded; None if it recorded none, or that of another test set."""
    recorded = cache.about.get("test_samples")
    if cache.about.get("accuracy") is None or recorded != digest_without_views(test, recorded):
        return None
    return check_percent(f"accuracy in {cache.path}", cache.about["accuracy"])


# --- checks ---


def check_cache(
    cache: TeacherCache, method: Method, recipe: Recipe, train: IndexedDataset | LabelledImages, classes: int
) -> None:
    """Raise ValueError, in one line that names what differs, if a cache is damaged or cannot be the teacher of a run.

    What a cache does not record, such as one that a `TeacherCacheWriter` of yours made, is not checked.
    """
    if not method.needs_teacher:
        raise ValueError(
            f"teacher cache {cache.path} has no effect with method {recipe.method!r}, which uses no teacher"
        )
    if not method.teacher_logits_suffice:
        raise ValueError(
            f"method {recipe.method!r} needs the teacher itself, not only its logits: give the teacher instead of the cache "
            f"{cache.path}"
        )
    _check_unmixed(recipe)
    if cache.classes != classes:
        raise ValueError(f"{cache.path} has logits of {cache.classes} classes, the student gives {classes}")
    earlier = cache.about.get("train_samples")
    recorded = {"samples": len(train), "train_samples": digest_without_views(train, earlier)}
    for name, own in recorded.items():
        if (there := cache.about.get(name, own)) != own:
            raise ValueError(f"{cache.path} was made from other training data: {name}={there!r} there, {own!r} here")
    _check_stored(cache.path, cache.about, train)
    _check_complete(cache, len(train))
    check_views(cache, train, recipe.seed)
    cache.verify()


def check_views(cache: TeacherCache, train: IndexedDataset | LabelledImages, seed: int) -> None:
    """Raise ValueError unless the views of a cache, if it has any, are those of a run with this training set and seed."""
    if views := count_views(cache):
        if not isinstance(train, LabelledImages):
            raise ValueError(
                f"{cache.path} has {views} views of each image, but train gives items with transforms of their own"
            )
        there = cache.about.get("views")
        if not isinstance(there, Mapping):
            raise ValueError(
                f"{cache.path} has {views} views of each sample and does not record which (about['views'])"
            )
        for name, own in describe_views(train, views, seed).items():
            if there.get(name) != own:
                raise ValueError(
                    f"{cache.path} was made with {name}={there.get(name)!r} of its views, got {name}={own!r}"
                )


def _check_unmixed(recipe: Recipe) -> None:
    """Raise ValueError if the student is shown mixed images, for which a cache has no logits."""
    epsilon = recipe.condense.example(recipe.epochs).config.get("epsilon", 0)
    options = {"condense.epsilon": epsilon if recipe.condense.drops_samples else 0}
    options |= {name: getattr(recipe, name) for name in MIXES}
    for name, value in options.items():
        if value:
            raise ValueError(f"{name} must be 0 with a teacher cache, which has no logits of mixed images, got {value}")


def _check_complete(cache: TeacherCache, samples: int) -> None:
    """Raise ValueError unless a cache has a record of every sample, all with the same number of rows."""
    if missing := np.setdiff1d(np.arange(samples), cache.ids).tolist():
        raise ValueError(
            f"{cache.path} is not complete: it lacks {len(missing)} of {samples} samples, such as {missing[0]}; run the command "
            "that made it again"
        )
    if len(np.unique(cache.lengths)) > 1:
        low, high = cache.lengths.min(), cache.lengths.max()
        raise ValueError(f"{cache.path} must have records of one length, got {low} and {high}")


def count_views(cache: TeacherCache) -> int:
    """Return the number of views of each sample; 0 for the plain images."""
    return max([0, *cache.lengths[:1].tolist()])


def is_plain_beside_views(cache: TeacherCache, train: LabelledImages) -> bool:
    """Return whether a cache has logits of plain images, while the student's views of them are random."""
    plain = Views(train.views.mean, train.views.std)
    return not count_views(cache) and any(
        getattr(train.views, name) != getattr(plain, name) for name in view_options(train)
    )


# --- batches ---


class WithTeacherLogits:
    """A batch source whose training batches have the teacher's logits. Otherwise it is the given source.

    Args:
        source: The source of the training set.
        cache: A cache that `check_cache` has accepted.
        device: The device of the batches.
    """

    def __init__(self, source: BatchSource, cache: TeacherCache, device: torch.device):
        self.source = source
        self.cache = cache
        self.device = device
        self.views = count_views(cache)
        self.labels = getattr(source, "labels", None)
        self.entries, self.eval_batches, self.close = source.entries, source.eval_batches, source.close

    def epoch(self, entries: Sequence, batches: Sequence[slice], seed: int, epoch: int) -> Iterator[Batch]:
        """Yield the training batches of these entries. With K views, epoch e has the views of epoch e mod K."""
        view = epoch % self.views if self.views else 0
        samples = _samples(entries)
        loaded = self.source.epoch(entries, batches, seed, view if self.views else epoch)
        for batch, part in zip(loaded, batches, strict=True):
            yield batch._replace(teacher_logits=self._logits(samples[part], view))

    def first(self, count: int) -> Batch:
        """Return the first `count` samples, or all if there are fewer, with the logits of their first view."""
        batch = self.source.first(count)
        return batch._replace(teacher_logits=self._logits(np.arange(len(batch.label)), 0))

    def _logits(self, samples: np.ndarray, view: int) -> Tensor:
        stored = self.cache.rows(samples, view)
        if self.device.type == "cuda":
            stored = stored.pin_memory()  # a step must not wait for the copy
        return stored.to(self.device, non_blocking=True).float()


def _samples(entries: Sequence) -> np.ndarray:
    """Return the samples of an epoch's entries, int64 (n,): of arrays (index, sample), or of (index, unmixed sample) pairs."""
    if isinstance(entries, tuple):
        return torch.as_tensor(entries[1]).cpu().numpy()
    return np.array([sample for _, sample in entries], np.int64)
