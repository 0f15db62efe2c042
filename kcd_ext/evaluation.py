"""Whether a distillation worked: how like its teacher a student answers, and how good the answers of both are.

    evaluation = evaluate(student, teacher, held_out_batches)
    evaluation.agreement, evaluation.worst_class_change

Every metric is a function of logits, (n, classes) of any floating-point dtype, and of labels, (n,) int64, over all samples
at once; all of them compute in float64. A logit may be -inf, a class that is ruled out. Probabilities are softmaxes at
temperature 1 where nothing else is said; of classes that tie, the first is the top class.

A number of no sample is NaN, one that nothing bounds may be infinite; in JSON both are null.
"""

import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import asdict, dataclass, is_dataclass
from typing import get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from .checks import check_float, check_int, check_percent
from .describe import describe, some
from .methods.features import Tap, stages_of
from .networks import check_network, evaluation_mode, logits_alone, usual_modes

TEMPERATURES = (1.0, 4.0)
COLDEST, HOTTEST = 1e-3, 1e3  # beyond, probabilities are those of the top class alone, or all alike
BINS = 15  # of the top class's probability, as in Guo et al.
LOST_MOST = 10  # classes that are named
POINTS = 300  # samples whose log-odds are kept to be drawn
WIDEST = 8192  # features of a layer: a pair of layers keeps three sums of products, each of up to half a GiB
BLOCK = 512  # features whose products are summed at once: of a symmetric sum one half is enough
PENULTIMATE, LOGITS = "penultimate", "logits"  # layers of any network, beside its own paths
LISTED = 8  # paths of a network that an error names
LARGEST = 1e100  # of a number that is read: float32 logits stay far below, and what is drawn must be finite throughout


@dataclass(frozen=True)
class Bin:
    """Samples whose top class has a probability in (low, high]; all in percent."""

    low: float
    high: float
    count: int
    confidence: float
    """The mean probability of the top class; NaN without samples, as the next."""
    accuracy: float


@dataclass(frozen=True)
class Quality:
    """What probabilities at a temperature are worth against the labels."""

    temperature: float
    nll: float
    """Mean negative log-likelihood of the label, nats."""
    brier: float
    """Mean over the samples of sum_c (p_c - [c is the label])^2, in [0, 2]."""


@dataclass(frozen=True)
class Scores:
    """What one network's answers are worth."""

    accuracy: float
    """Percent."""
    ece: float
    """Expected calibration error, percentage points."""
    bins: tuple[Bin, ...]
    quality: tuple[Quality, ...]
    """At each temperature."""


@dataclass(frozen=True)
class Divergence:
    """The mean KL(teacher || student) at a temperature, nats."""

    temperature: float
    kl: float


@dataclass(frozen=True)
class LayerSimilarity:
    """Linear CKA of what comes out of a layer of each, in [0, 1]."""

    student: str
    """The layer's path; `penultimate`: what goes into the last linear layer; `logits`: what the network gives. (A path of
    the network that is called so comes first.)"""
    teacher: str
    cka: float
    """NaN where the features of either are the same for all samples."""


@dataclass(frozen=True)
class ClassAccuracy:
    """The accuracy of both on the samples of a class, percent; NaN for a class without samples."""

    label: int
    name: str
    count: int
    student: float
    teacher: float

    @property
    def lost(self) -> float:
        """The teacher's accuracy minus the student's, percentage points."""
        return self.teacher - self.student


@dataclass(frozen=True)
class Exaggeration:
    """The student's log-odds of the teacher's top class against the teacher's own; see `exaggeration`."""

    count: int
    """Samples with finite log-odds of both, which the rest is made of."""
    slope: float
    intercept: float
    median: float
    """Of the teacher's log-odds."""
    below: float
    """Mean difference, student's minus teacher's, where the teacher's are below their median."""
    above: float
    """The same where they are above."""
    points: tuple[tuple[float, float], ...]
    """(teacher's, student's) of at most 300 samples, evenly spread over the set, to be drawn."""

    @property
    def exaggerates(self) -> bool:
        """Whether the student is less sure than its teacher in the lower half, and surer in the upper one."""
        return self.below < 0 < self.above


@dataclass(frozen=True)
class Evaluation:
    """A student beside its teacher on held-out data."""

    samples: int
    agreement: float
    """Percent of the samples for which both have the same top class."""
    divergence: tuple[Divergence, ...]
    """At each temperature."""
    student: Scores
    teacher: Scores
    layers: tuple[LayerSimilarity, ...]
    """From the first layer to the last."""
    classes: tuple[ClassAccuracy, ...]
    """By label."""
    exaggeration: Exaggeration

    @property
    def lost_most(self) -> tuple[ClassAccuracy, ...]:
        """The classes on which the student is worse than its teacher, at most 10, the greatest loss first."""
        worse = [one for one in self.classes if one.lost > 0]
        return tuple(sorted(worse, key=lambda one: -one.lost)[:LOST_MOST])

    @property
    def worst_class_change(self) -> float:
        """The lowest of all classes' changes, student's accuracy minus teacher's, percentage points."""
        changes = (one.student - one.teacher for one in self.classes)  # and not -lost, which may be -0
        return min((change for change in changes if math.isfinite(change)), default=math.nan)

    @property
    def worst_class_accuracy(self) -> tuple[float, float]:
        """The student's accuracy on the class that it knows least, and the teacher's on that which it knows least."""
        held = [(one.student, one.teacher) for one in self.classes if one.count]
        return (math.nan, math.nan) if not held else tuple(map(min, zip(*held, strict=True)))

    def as_json(self) -> dict[str, object]:
        """All fields and, for whoever reads them, the properties; null for what is not finite."""
        student, teacher = self.worst_class_accuracy
        derived = {
            "worst_class_change": self.worst_class_change,
            "worst_class_accuracy": {"student": student, "teacher": teacher},
            "lost_most": [{"label": one.label, "name": one.name, "lost": one.lost} for one in self.lost_most],
        }
        return _without_nan({**asdict(self), **derived})

    @classmethod
    def from_json(cls, found: object) -> "Evaluation":
        """Return what `as_json` made it of; null becomes NaN.

        Raises KeyError, TypeError or ValueError where it is anything else.
        """
        evaluation = _decoded(cls, found)
        _check_consistent(evaluation)
        return evaluation


@usual_modes()
def evaluate(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Sequence[Tensor]],
    *,
    temperatures: Sequence[float] = TEMPERATURES,
    layers: Sequence[tuple[str, str]] | None = None,
    class_names: Sequence[str] = (),
) -> Evaluation:
    """Runs both networks once over held-out data, without gradients, in evaluation mode; modes are restored.

    The logits of all samples are kept, on the CPU; all else is batch by batch.

    Args:
        student, teacher: a batch of x -> logits (b, classes), on the device of the batches. Of networks that give more the
            logits are used, with a UserWarning (`kcd_ext.networks.LogitsAlone`). They are called in the precision of their
            weights: the caller's autocast, gradient and inference modes, default dtype and device have no effect.
        batches: (x, labels) or more, as a `Batch`; labels (b,) int64 in [0, classes). Each sample once.
        temperatures: those of the divergence and of the quality of the probabilities; in [0.001, 1000], different.
        layers: (student's path, teacher's path) of layers whose outputs are compared, by `named_modules()`, or
            `penultimate`, what goes into the last linear layer, or `logits`. None: the stages of both
            (`kcd_ext.models.features`), paired from the last one backwards as far as both have any, then the
            penultimate features and the logits; of networks without stages, or without a linear layer, what there is.
            Maps (b, c, h, w) are averaged over h and w, all others flattened.
        class_names: what the labels stand for; empty: `class 0` and so on.

    Raises:
        TypeError, ValueError: an argument does not fit; there is no sample; a network gives other logits than said, or
            NaN, or infinity; a label is no class.
        RuntimeError: a layer is not passed, or gives no features of so many samples.
    """
    temperatures = checked_temperatures(temperatures)
    logits, labels = ([], []), []
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        compared = _compared(student, teacher, layers, stack)
        for network in (student, teacher):
            stack.enter_context(evaluation_mode(network))
        outputs = [
            stack.enter_context(logits_alone(name, network))
            for name, network in (("student", student), ("teacher", teacher))
        ]
        networks = [output.network.eval() for output in outputs]
        for x, label, *_ in batches:
            given = tuple(called(x) for called in networks)
            for name, kept, one in zip(("student", "teacher"), logits, given, strict=True):
                _check_logits(name, one, label)
                kept.append(one.cpu())
            labels.append(label.cpu())
            for pair in compared:
                pair.catch(*given)
            for pair in compared:
                pair.add()
        for output in outputs:
            output.report()
    if not any(map(len, labels)):
        raise ValueError("batches must hold at least one sample, got none")
    of_student, of_teacher, labels = torch.cat(logits[0]), torch.cat(logits[1]), torch.cat(labels)
    _check_all(of_student, of_teacher, labels, class_names)
    return Evaluation(
        samples=len(labels),
        agreement=agreement(of_student, of_teacher),
        divergence=tuple(Divergence(t, divergence(of_student, of_teacher, t)) for t in temperatures),
        student=_scores(of_student, labels, temperatures),
        teacher=_scores(of_teacher, labels, temperatures),
        layers=tuple(pair.similarity for pair in compared),
        classes=class_accuracies(of_student, of_teacher, labels, class_names),
        exaggeration=exaggeration(of_student, of_teacher),
    )


# --- metrics of logits ------------------------------------------------------------------------------------------------


@usual_modes()
def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Percent of the samples whose label is the top class."""
    return _percent(logits.argmax(-1) == labels)


@usual_modes()
def agreement(student: Tensor, teacher: Tensor) -> float:
    """Percent of the samples for which both have the same top class (Stanton et al., 2021, arXiv 2106.05945)."""
    return _percent(student.argmax(-1) == teacher.argmax(-1))


@usual_modes()
def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> float:
    """The mean over the samples of KL(teacher || student) = sum_c p_c (log p_c - log q_c), in nats, without T^2.

    A class of teacher's probability 0 adds 0; one that the student alone rules out makes it infinite. (Stanton et al.,
    2021, arXiv 2106.05945, at temperature 1.)
    """
    log_q, log_p = _log_softmax(student, temperature), _log_softmax(teacher, temperature)
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0).sum(-1).mean().item()


@usual_modes()
def quality(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Quality:
    """Negative log-likelihood and Brier score of the probabilities at a temperature.

    That a teacher helps by the quality of its probabilities, rather than by its accuracy, is of Menon et al., 2020
    (arXiv 2005.10419); labels stand in here for the true probabilities, which nobody has.
    """
    log_p = _log_softmax(logits, temperature)
    of_label = log_p.gather(1, labels[:, None])
    error = log_p.exp().scatter_add(1, labels[:, None], torch.full_like(of_label, -1))
    return Quality(float(temperature), -of_label.mean().item(), error.square().sum(-1).mean().item())


@usual_modes()
def calibration(logits: Tensor, labels: Tensor, bins: int = BINS) -> tuple[float, tuple[Bin, ...]]:
    """The expected calibration error in percentage points, and its bins (Guo et al., 2017, arXiv 1706.04599, Eq. 3).

    Bin m of M holds the samples whose top class has a probability in ((m - 1) / M, m / M]; the error is the mean over
    all samples of |accuracy - mean confidence| of their bin. Empty bins add nothing.
    """
    confidence, right = _log_softmax(logits, 1.0).amax(-1).exp(), (logits.argmax(-1) == labels).double()
    edges = torch.arange(bins + 1, dtype=torch.float64) / bins
    place = torch.bucketize(confidence, edges[1:-1])
    counts = torch.bincount(place, minlength=bins)
    means = [100 * torch.bincount(place, weights=x, minlength=bins) / counts for x in (confidence, right)]  # 0/0: NaN
    gaps = (means[0] - means[1]).abs()
    error = (counts * gaps)[counts > 0].sum() / len(labels)
    edges = (100 * edges).tolist()
    columns = (edges[:-1], edges[1:], counts.tolist(), *(x.tolist() for x in means))
    return error.item(), tuple(Bin(*row) for row in zip(*columns, strict=True))


@usual_modes()
def class_accuracies(
    student: Tensor, teacher: Tensor, labels: Tensor, class_names: Sequence[str] = ()
) -> tuple[ClassAccuracy, ...]:
    """The accuracy of both class by class.

    That a student may lose in some classes what it wins in the mean is of Lukasik et al., 2021 (arXiv 2106.10494), who
    compare it with a student of the labels; that it is compared with its teacher here is ours.
    """
    classes = student.shape[1]
    counts = torch.bincount(labels, minlength=classes)
    right = [
        100 * torch.bincount(labels, weights=(x.argmax(-1) == labels).double(), minlength=classes) / counts
        for x in (student, teacher)
    ]
    names = class_names or [f"class {label}" for label in range(classes)]
    columns = (range(classes), names, counts.tolist(), *(x.tolist() for x in right))
    return tuple(ClassAccuracy(*row) for row in zip(*columns, strict=True))


def log_odds(logits: Tensor, classes: Tensor) -> Tensor:
    """log(p / (1 - p)) of one class of every sample, classes (n,) int64: (n,) float64.

    It is the class's logit minus the logsumexp of all others, which is exact where p rounds to 1. Infinite where the
    class, or all others, are ruled out.
    """
    logits, place = logits.double(), classes[:, None]
    return logits.gather(1, place)[:, 0] - logits.scatter(1, place, -math.inf).logsumexp(-1)


@usual_modes()
def exaggeration(student: Tensor, teacher: Tensor) -> Exaggeration:
    """Whether the student is surer than its teacher where that is sure, and less sure where it is not.

    Log-odds of both networks at the teacher's top class are what Nagarajan et al., 2023 (arXiv 2301.12923) plot against
    each other. Ours are the numbers made of them: the slope and intercept of the student's on the teacher's by least
    squares over all samples, and the mean difference below and above the teacher's median. A slope above 1 is steeper
    than the teacher's, which may come of a student that is less sure everywhere; one exaggerates that is less sure below
    the median and surer above it. Samples for which either is infinite are left out of all of them.
    """
    top = teacher.argmax(-1)
    x, y = log_odds(teacher, top), log_odds(student, top)
    finite = x.isfinite() & y.isfinite()
    x, y = x[finite], y[finite]
    median, slope, intercept = math.nan, math.nan, math.nan
    if len(x):
        ordered = x.sort().values
        median = (ordered[(len(x) - 1) // 2] + ordered[len(x) // 2]).item() / 2
        if ordered[0] < ordered[-1]:  # all alike, rounding would make up a slope
            dx, dy = x - x.mean(), y - y.mean()
            slope = ((dx * dy).sum() / dx.square().sum()).item()
            intercept = (y.mean() - slope * x.mean()).item()
    below, above = ((y - x)[part].mean().item() for part in (x < median, x > median))
    drawn = torch.linspace(0, max(len(x) - 1, 0), min(len(x), POINTS)).long()
    points = tuple(zip(x[drawn].tolist(), y[drawn].tolist(), strict=True))
    return Exaggeration(len(x), slope, intercept, median, below, above, points)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    logits = logits.double()
    return ((logits - logits.amax(-1, keepdim=True)) / temperature).log_softmax(-1)  # no T makes the largest infinite


def _percent(true: Tensor) -> float:
    return 100 * true.sum().item() / len(true)


def _scores(logits: Tensor, labels: Tensor, temperatures: Sequence[float]) -> Scores:
    ece, bins = calibration(logits, labels)
    return Scores(accuracy(logits, labels), ece, bins, tuple(quality(logits, labels, t) for t in temperatures))


# --- layers -----------------------------------------------------------------------------------------------------------


class LinearCKA:
    """Linear centred kernel alignment (Kornblith et al., 2019, arXiv 1905.00414) of features that come batch by batch.

    Over all samples, with every feature centred, CKA = ||Y'X||_F^2 / (||X'X||_F ||Y'Y||_F), X (n, d), Y (n, e). Products
    are summed in float64 around the mean so far, whose moves are made up for, so that a large mean costs no digits. Of
    X'X and Y'Y, which are symmetric, the upper triangles are.
    """

    def __init__(self):
        self._count = 0

    def update(self, x: Tensor, y: Tensor) -> None:
        """Takes features (b, d) and (b, e) of the same samples. Raises ValueError where they are of other shapes."""
        if x.dim() != 2 or y.dim() != 2 or len(x) != len(y):
            raise ValueError(f"x and y must be features (b, d) and (b, e), got {tuple(x.shape)} and {tuple(y.shape)}")
        if not len(x):
            return
        features, sizes = torch.cat([x.double(), y.double()], 1), (x.shape[1], y.shape[1])
        if not self._count:
            self._sizes, self._origin = sizes, features[0].clone()
            self._mean = torch.zeros_like(self._origin)
            self._products = [features.new_zeros(len(a), len(b)) for a, b in self._parts(self._mean)]
        elif sizes != self._sizes:
            raise ValueError(f"x and y must have {self._sizes} features as before, got {sizes}")
        features = features - self._origin  # what never changes is exactly 0
        mean, count = features.mean(0), self._count + len(x)
        step = mean - self._mean
        moved = math.sqrt(self._count * len(x) / count) * step  # one more row, which makes up for it
        parts = self._parts(torch.cat([features - mean, moved[None]]))
        for total, (a, b) in zip(self._products, parts, strict=True):
            _add_products(total, a, b)
        self._mean, self._count = self._mean + step * (len(x) / count), count

    def value(self) -> float:
        """In [0, 1] up to rounding; NaN where either's features are the same for all samples, or there are none."""
        if not self._count:
            return math.nan
        xx, yy = (_norm_of_symmetric(product) for product in self._products[:2])
        yx = torch.linalg.matrix_norm(self._products[2])
        return ((yx / xx) * (yx / yy)).item()

    def _parts(self, features: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """The factors of X'X, Y'Y and Y'X out of features (..., d + e)."""
        x, y = features.split(self._sizes, dim=-1)
        return (x, x), (y, y), (y, x)


def _add_products(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds A'B to total (d, e), A (b, d), B (b, e); where A is B, in blocks, and below the diagonal not all of it."""
    if a is not b:
        total.addmm_(a.T, b)
        return
    for start in range(0, len(total), BLOCK):
        total[start : start + BLOCK, start:].addmm_(a[:, start : start + BLOCK].T, a[:, start:])


def _norm_of_symmetric(total: Tensor) -> Tensor:
    """The Frobenius norm of a matrix whose upper triangle this is."""
    return torch.hypot(math.sqrt(2) * total.triu(1).norm(), total.diagonal().norm())


class _Pooled(Tap):
    """A tap whose features are vectors, whatever the layer."""

    def take_pooled(self, samples: int) -> Tensor:
        """(b, d): maps averaged over h and w, all others flattened. Raises RuntimeError where there are no such features."""
        features = self._take()
        if not isinstance(features, Tensor) or features.dim() < 2 or len(features) != samples:
            raise RuntimeError(
                f"{self._told(features)}: layers must give features ({samples}, ...) of {samples} samples"
            )
        features = features.double()
        return features.mean((2, 3)) if features.dim() == 4 else features.flatten(1)


class _Pair:
    """A layer of each network, and what their features have come to so far. A tap of None is for the logits.

    `like` is a pair whose features may be the same, as what the last stage gives is often what goes into the classifier:
    as long as they are, its sums are not made twice.
    """

    def __init__(
        self, names: tuple[str, str], taps: tuple[_Pooled | None, _Pooled | None], like: "_Pair | None" = None
    ):
        self.names = names
        self._taps = taps
        self._like = like
        self._cka = LinearCKA()
        self._features: list[Tensor] = []

    def catch(self, *logits: Tensor) -> None:
        """What the last forward pass of both has left; every pair catches before any adds."""
        self._features = [
            one if tap is None else tap.take_pooled(len(one)) for tap, one in zip(self._taps, logits, strict=True)
        ]
        for role, name, one in zip(("student", "teacher"), self.names, self._features, strict=True):
            if one.shape[1] > WIDEST:
                raise ValueError(
                    f"layers: the {role}'s {name} has {one.shape[1]} features, and products of all pairs are summed: take "
                    f"layers with at most {WIDEST}, maps averaged over h and w"
                )
        if self._like is not None and not all(map(_alike, self._features, self._like._features)):
            self._cka, self._like = deepcopy(self._like.cka), None  # up to here they were

    def add(self) -> None:
        """Takes what was caught into the sums."""
        if self._like is None:
            self._cka.update(*self._features)

    @property
    def cka(self) -> LinearCKA:
        """Of all that was added."""
        return self._cka if self._like is None else self._like.cka

    @property
    def similarity(self) -> LayerSimilarity:
        return LayerSimilarity(*self.names, self.cka.value())


def _alike(x: Tensor, y: Tensor) -> bool:
    """Whether features differ by no more than float32 rounds: means may have been made in other orders."""
    return x.shape == y.shape and bool(((x - y).abs().amax() <= 1e-6 * x.abs().amax()).item() if x.numel() else True)


def _compared(
    student: nn.Module, teacher: nn.Module, layers: Sequence[tuple[str, str]] | None, stack: ExitStack
) -> list[_Pair]:
    """The pairs of layers, tapped until the stack closes. Raises ValueError where `layers` names what there is not."""
    networks = {"student": student, "teacher": teacher}
    for role, network in networks.items():
        check_network(role, network)

    def tapped(names: tuple[str | None, str | None]) -> tuple[_Pooled | None, _Pooled | None]:
        pairs = zip(networks.items(), names, strict=True)
        return tuple(_tap(network, name, role, stack) for (role, network), name in pairs)

    if layers is not None:
        _check_layers(networks, layers)
        return [_Pair(names, tapped(names)) for names in map(tuple, layers)]
    logits = _Pair((LOGITS, LOGITS), (None, None))
    if any(isinstance(network, torch.jit.ScriptModule) for network in networks.values()):
        return [logits]  # which takes no hooks
    stages = [_stages(network) for network in networks.values()]
    depth = min(map(len, stages))
    last = zip(*(paths[len(paths) - depth :] for paths in stages), strict=True)
    pairs = [_Pair(names, tapped(names)) for names in last]
    if all(map(_has_linear, networks.values())):
        pairs.append(_Pair((PENULTIMATE, PENULTIMATE), tapped((None, None)), pairs[-1] if pairs else None))
    return [*pairs, logits]


def _tap(network: nn.Module, name: str | None, role: str, stack: ExitStack) -> _Pooled | None:
    """Return what catches a layer's features until the stack closes; None for the logits.

    A path comes before the other two names; no name is for the penultimate features.
    """
    is_path = name in dict(network.named_modules())
    if name == LOGITS and not is_path:
        return None
    tap = _Pooled(network, name if is_path else None, role, output=is_path)
    stack.callback(tap.remove)
    return tap


def _has_linear(network: nn.Module) -> bool:
    return any(isinstance(module, nn.Linear) for module in network.modules())


def _stages(network: nn.Module) -> tuple[str, ...]:
    """Those that the network has, if it has all that it names."""
    stages, known = stages_of(network), dict(network.named_modules())
    return stages if all(path and path in known for path in stages) else ()


def _check_layers(networks: dict[str, nn.Module], layers: Sequence[tuple[str, str]]) -> None:
    if not layers:
        raise ValueError("layers must be one or more pairs of a path in the student and one in the teacher, got none")
    for pair in layers:
        if isinstance(pair, str) or len(pair) != 2:
            raise ValueError(
                f"layers must be pairs of a path in the student and one in the teacher, got {describe(pair)}"
            )
        for (role, network), path in zip(networks.items(), pair, strict=True):
            paths = [name for name, _ in network.named_modules() if name]
            if path in paths or path == LOGITS:
                continue
            if path != PENULTIMATE:
                shallow = sorted(paths, key=lambda path: path.count("."))
                raise ValueError(
                    f"layers must name a path in {role}.named_modules(), {PENULTIMATE} or {LOGITS}; the {role} has no "
                    f"{path!r}, but {some(shallow, LISTED)}"
                )
            if not _has_linear(network):
                raise ValueError(f"layers: the {role} has no torch.nn.Linear, which {PENULTIMATE} features go into")


# --- checks -----------------------------------------------------------------------------------------------------------


def checked_temperatures(temperatures: Sequence[float]) -> tuple[float, ...]:
    """One or more different numbers in [0.001, 1000]. Raises TypeError or ValueError for others."""
    checked = tuple(
        check_float("temperatures", t, f"numbers in [{COLDEST}, {HOTTEST:g}]", COLDEST, HOTTEST) for t in temperatures
    )
    if not checked or len(set(checked)) < len(checked):
        raise ValueError(f"temperatures must be one or more different numbers, got {describe(checked)}")
    return checked


def _check_logits(name: str, logits: object, label: Tensor) -> None:
    if not isinstance(logits, Tensor) or logits.dim() != 2 or not logits.is_floating_point():
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"{name} must give logits (b, classes), got {got}")
    if label.dtype != torch.int64 or label.shape != logits.shape[:1]:
        raise ValueError(f"labels must be int64 ({len(logits)},), got {label.dtype} {tuple(label.shape)}")


def _check_all(student: Tensor, teacher: Tensor, labels: Tensor, class_names: Sequence[str]) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher must have as many classes, got {student.shape[1]} and {teacher.shape[1]}"
        )
    for name, logits in (("student", student), ("teacher", teacher)):
        top = logits.amax(-1) if logits.shape[1] else logits.new_full((1,), math.nan)  # NaN where any is
        if not top.isfinite().all():
            raise ValueError(f"{name} must give logits that are finite, or -inf for a part of the classes, got others")
    low, high = labels.min().item(), labels.max().item()
    if low < 0 or high >= student.shape[1]:
        raise ValueError(f"labels must lie in [0, {student.shape[1]}), got {low} to {high}")
    if class_names and len(class_names) != student.shape[1]:
        raise ValueError(f"class_names must hold {student.shape[1]} names, got {len(class_names)}")


def _check_consistent(found: Evaluation) -> None:
    """Raises ValueError where the parts of an evaluation that was read cannot be of one."""
    temperatures = [one.temperature for one in found.divergence]
    checked_temperatures(temperatures)
    if not found.samples or not found.layers or not found.classes:
        raise ValueError("evaluation must have samples, layers and classes")
    if sum(one.count for one in found.classes) != found.samples:
        raise ValueError(f"evaluation.classes must hold all {found.samples} samples")
    check_percent("evaluation.agreement", found.agreement)
    for role in ("student", "teacher"):
        scores: Scores = getattr(found, role)
        check_percent(f"evaluation.{role}.accuracy", scores.accuracy)
        if sum(one.count for one in scores.bins) != found.samples:
            raise ValueError(f"evaluation.{role}.bins must hold all {found.samples} samples")
        if [one.temperature for one in scores.quality] != temperatures:
            raise ValueError(f"evaluation.{role}.quality must be at temperatures {temperatures}")


# --- JSON -------------------------------------------------------------------------------------------------------------


def _without_nan(value: object) -> object:
    """As JSON: null for what is not finite, or no reader would take."""
    if isinstance(value, dict):
        return {name: _without_nan(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not abs(value) <= LARGEST else value


def _decoded(kind: type, found: object) -> object:
    """Return JSON as a value of this kind: one of the classes above, or what their fields are."""
    if is_dataclass(kind):
        return kind(**{name: _decoded(hint, found[name]) for name, hint in get_type_hints(kind).items()})
    if get_origin(kind) is tuple:
        first, last = get_args(kind)
        if not isinstance(found, list) or (last is not ... and len(found) != 2):
            raise TypeError(f"expected a list, got {describe(found)}")
        return tuple(_decoded(first, part) for part in found)
    if kind is str:
        if not isinstance(found, str) or found != found.encode(errors="replace").decode():  # lone surrogates
            raise TypeError(f"expected text, got {describe(found)}")
        return found
    if kind is int:
        return check_int("a count", found, 0)
    return math.nan if found is None else check_float("a number", found, "finite or null", -LARGEST, LARGEST)
