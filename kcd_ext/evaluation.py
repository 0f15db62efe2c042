"""The evaluation of a distillation: how closely a student matches its teacher, and how good the predictions of both are.

    evaluation = evaluate(student, teacher, held_out_batches)
    evaluation.agreement, evaluation.worst_class_change

Every metric is a function of logits, (n, classes) of any floating-point dtype, and labels, (n,) int64, over all samples at
once. All metrics compute in float64.

- A logit of -inf rules a class out.
- Probabilities are softmaxes at temperature 1 unless a temperature is named.
- If classes tie, the first is the top class.
- A metric over no samples is NaN. Unbounded metrics may be infinite. In JSON both are null.
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
from .describe import describe, join_names
from .methods.features import Tap, stages_of
from .networks import check_network, evaluation_mode, logits_only, usual_modes

TEMPERATURES = (1.0, 4.0)
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-3, 1e3  # beyond, only the top class has a probability, or all have the same
NUM_BINS = 15  # bins of the top class's probability, as in Guo et al.
MAX_LOST_MOST = 10  # classes listed in `lost_most`
MAX_POINTS = 300  # samples whose log-odds are kept for the figure
MAX_FEATURES = 8192  # of a layer: a pair of layers keeps three sums of products, each up to half a GiB
BLOCK_SIZE = 512  # features whose products are summed at once; of a symmetric sum only one half is computed
PENULTIMATE, LOGITS = "penultimate", "logits"  # layers that any network has, in addition to its own paths
MAX_LISTED_PATHS = 8  # in an error
MAX_JSON_NUMBER = 1e100  # read from JSON; float32 logits stay far below, and computations for figures stay finite


@dataclass(frozen=True)
class Bin:
    """A bin of the samples whose top class has a probability in (low, high]. All fields but `count` are in percent."""

    low: float
    high: float
    count: int
    confidence: float
    """The mean probability of the top class; NaN without samples, as is `accuracy`."""
    accuracy: float


@dataclass(frozen=True)
class Quality:
    """The quality of the probabilities at a temperature, measured against the labels."""

    temperature: float
    nll: float
    """The mean negative log-likelihood of the label, in nats."""
    brier: float
    """The mean over the samples of sum_c (p_c - [c is the label])^2, in [0, 2]."""


@dataclass(frozen=True)
class Scores:
    """The scores of one network."""

    accuracy: float
    """In percent."""
    ece: float
    """The expected calibration error, in percentage points."""
    bins: tuple[Bin, ...]
    """The bins of the calibration error, in order of confidence."""
    quality: tuple[Quality, ...]
    """One entry per temperature."""


@dataclass(frozen=True)
class Divergence:
    """The mean KL(teacher || student) at a temperature, in nats."""

    temperature: float
    kl: float


@dataclass(frozen=True)
class LayerSimilarity:
    """The linear CKA of one layer of each network, in [0, 1]."""

    student: str
    """The layer's path, `penultimate` (the input of the last linear layer) or `logits` (the output). If the network has a
    path of that name, the path wins."""
    teacher: str
    cka: float
    """NaN if either network's features are the same for all samples."""


@dataclass(frozen=True)
class ClassAccuracy:
    """The accuracy of both networks on one class, in percent; NaN for a class without samples."""

    label: int
    name: str
    count: int
    student: float
    teacher: float

    @property
    def lost(self) -> float:
        """The teacher's accuracy minus the student's, in percentage points."""
        return self.teacher - self.student


@dataclass(frozen=True)
class Exaggeration:
    """The log-odds of the teacher's top class, student against teacher; see `exaggeration`."""

    count: int
    """The number of samples with finite log-odds in both networks. All other fields use only these."""
    slope: float
    """The slope of the least-squares fit of the student's log-odds on the teacher's."""
    intercept: float
    """The intercept of the same fit."""
    median: float
    """The median of the teacher's log-odds."""
    below: float
    """The mean difference, student's minus teacher's, over the samples where the teacher's are below their median."""
    above: float
    """The same over the samples where they are above."""
    points: tuple[tuple[float, float], ...]
    """(teacher's, student's) for at most 300 samples, evenly spread over the set, for the figure."""

    @property
    def exaggerates(self) -> bool:
        """Whether the student is less confident than its teacher below the median, and more confident above it."""
        return self.below < 0 < self.above


@dataclass(frozen=True)
class Evaluation:
    """The comparison of a student with its teacher on held-out data."""

    samples: int
    """The number of samples."""
    agreement: float
    """The share of samples with the same top class in both networks, in percent."""
    divergence: tuple[Divergence, ...]
    """One entry per temperature."""
    student: Scores
    """The student's scores."""
    teacher: Scores
    """The teacher's scores."""
    layers: tuple[LayerSimilarity, ...]
    """In order, from the first layer to the last."""
    classes: tuple[ClassAccuracy, ...]
    """In order of the labels."""
    exaggeration: Exaggeration
    """The confidence of the student compared with the teacher's."""

    @property
    def lost_most(self) -> tuple[ClassAccuracy, ...]:
        """The classes where the student is worse than its teacher, largest loss first, at most 10."""
        worse = [one for one in self.classes if one.lost > 0]
        return tuple(sorted(worse, key=lambda one: -one.lost)[:MAX_LOST_MOST])

    @property
    def worst_class_change(self) -> float:
        """The lowest change over the classes, student's accuracy minus teacher's, in percentage points."""
        changes = (one.student - one.teacher for one in self.classes)  # not -lost, which may be -0
        return min((change for change in changes if math.isfinite(change)), default=math.nan)

    @property
    def worst_class_accuracy(self) -> tuple[float, float]:
        """The lowest per-class accuracy of student and teacher, in percent (not necessarily of the same class)."""
        accuracies = [(one.student, one.teacher) for one in self.classes if one.count]
        return (math.nan, math.nan) if not accuracies else tuple(map(min, zip(*accuracies, strict=True)))

    def as_json(self) -> dict[str, object]:
        """Return all fields, and the properties for human readers; null for non-finite numbers."""
        student, teacher = self.worst_class_accuracy
        derived = {
            "worst_class_change": self.worst_class_change,
            "worst_class_accuracy": {"student": student, "teacher": teacher},
            "lost_most": [{"label": one.label, "name": one.name, "lost": one.lost} for one in self.lost_most],
        }
        return _null_if_not_finite({**asdict(self), **derived})

    @classmethod
    def from_json(cls, found: object) -> "Evaluation":
        """Return the evaluation that `as_json` wrote; null becomes NaN.

        Raises KeyError, TypeError or ValueError for anything else.
        """
        evaluation = _decode(cls, found)
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
    """Compare a student with its teacher on held-out data.

    Run both networks once over the batches, in evaluation mode and without gradients, and restore their modes. The logits of
    all samples are kept on the CPU; everything else is processed batch by batch.

    Args:
        student: A network that maps x to logits (b, classes), on the device of the batches. If it returns more than logits,
            the logits are used, with a UserWarning (`kcd_ext.networks.LogitsOnly`). It runs in the precision of its weights:
            your autocast, gradient and inference modes, default dtype and default device have no effect.
        teacher: The same.
        batches: (x, labels, ...), such as a `Batch`; labels are (b,) int64 in [0, classes). Each sample once.
        temperatures: For the divergence and the quality of the probabilities; distinct numbers in [0.001, 1000].
        layers: Pairs (student's layer, teacher's layer) whose outputs are compared: a name in `named_modules()`,
            `penultimate` (the input of the last linear layer) or `logits`. Maps (b, c, h, w) are averaged over h and w, other
            outputs flattened. None: the stages of both networks (`kcd_ext.models.features`), paired from the last one
            backwards as far as both have stages, then the penultimate features and the logits. Stages or penultimate
            features that one of the networks lacks are skipped; with a TorchScript network only the logits are compared.
        class_names: One name per label; empty: `class 0` and so on.

    Returns:
        All metrics, over all samples.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is invalid; there is no sample; a network's logits have the wrong shape, are NaN or
            +inf, or are -inf for all classes of a sample; a label is not a class.
        RuntimeError: A layer did not run, or its output is not a tensor (b, ...) of features of the batch's b samples.
    """
    temperatures = check_temperatures(temperatures)
    logits, labels = ([], []), []
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        pairs = _layer_pairs(student, teacher, layers, stack)
        for network in (student, teacher):
            stack.enter_context(evaluation_mode(network))
        outputs = [
            stack.enter_context(logits_only(name, network))
            for name, network in (("student", student), ("teacher", teacher))
        ]
        networks = [output.network.eval() for output in outputs]
        for x, label, *_ in batches:
            batch_logits = tuple(network(x) for network in networks)
            for name, collected, one in zip(("student", "teacher"), logits, batch_logits, strict=True):
                _check_logits(name, one, label)
                collected.append(one.cpu())
            labels.append(label.cpu())
            for pair in pairs:
                pair.capture(*batch_logits)
            for pair in pairs:
                pair.accumulate()
        for output in outputs:
            output.report()
    if not any(map(len, labels)):
        raise ValueError("batches must hold at least one sample, got none")
    student_logits, teacher_logits, labels = torch.cat(logits[0]), torch.cat(logits[1]), torch.cat(labels)
    _check_samples(student_logits, teacher_logits, labels, class_names)
    return Evaluation(
        samples=len(labels),
        agreement=agreement(student_logits, teacher_logits),
        divergence=tuple(Divergence(t, divergence(student_logits, teacher_logits, t)) for t in temperatures),
        student=_scores(student_logits, labels, temperatures),
        teacher=_scores(teacher_logits, labels, temperatures),
        layers=tuple(pair.similarity for pair in pairs),
        classes=class_accuracies(student_logits, teacher_logits, labels, class_names),
        exaggeration=exaggeration(student_logits, teacher_logits),
    )


# --- metrics of logits ------------------------------------------------------------------------------------------------


@usual_modes()
def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the share of samples whose top class is the label, in percent."""
    return _percent(logits.argmax(-1) == labels)


@usual_modes()
def agreement(student: Tensor, teacher: Tensor) -> float:
    """Return the share of samples with the same top class, in percent (Stanton et al., 2021, arXiv 2106.05945)."""
    return _percent(student.argmax(-1) == teacher.argmax(-1))


@usual_modes()
def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> float:
    """Return the mean over the samples of KL(teacher || student) = sum_c p_c (log p_c - log q_c), in nats, without T^2.

    A class with the teacher's probability 0 adds 0. A class that only the student rules out makes it infinite. (Stanton et
    al., 2021, arXiv 2106.05945, at temperature 1.)
    """
    log_q, log_p = _log_softmax(student, temperature), _log_softmax(teacher, temperature)
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0).sum(-1).mean().item()


@usual_modes()
def quality(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Quality:
    """Return negative log-likelihood and Brier score of the probabilities at a temperature.

    According to Menon et al., 2020 (arXiv 2005.10419), a teacher helps through the quality of its probabilities rather than
    its accuracy. Labels stand in here for the true probabilities, which are unknown.
    """
    log_p = _log_softmax(logits, temperature)
    of_label = log_p.gather(1, labels[:, None])
    error = log_p.exp().scatter_add(1, labels[:, None], torch.full_like(of_label, -1))
    return Quality(float(temperature), -of_label.mean().item(), error.square().sum(-1).mean().item())


@usual_modes()
def calibration(logits: Tensor, labels: Tensor, bins: int = NUM_BINS) -> tuple[float, tuple[Bin, ...]]:
    """Return the expected calibration error in percentage points, and its bins (Guo et al., 2017, arXiv 1706.04599, Eq. 3).

    Bin m of M contains the samples whose top class has a probability in ((m - 1) / M, m / M]. The error is the mean over
    all samples of |accuracy - mean confidence| of their bin. Empty bins add nothing.
    """
    confidence, right = _log_softmax(logits, 1.0).amax(-1).exp(), (logits.argmax(-1) == labels).double()
    edges = torch.arange(bins + 1, dtype=torch.float64) / bins
    bin_index = torch.bucketize(confidence, edges[1:-1])
    counts = torch.bincount(bin_index, minlength=bins)
    # NaN for an empty bin, from 0/0.
    means = [100 * torch.bincount(bin_index, weights=x, minlength=bins) / counts for x in (confidence, right)]
    gaps = (means[0] - means[1]).abs()
    error = (counts * gaps)[counts > 0].sum() / len(labels)
    edges = (100 * edges).tolist()
    columns = (edges[:-1], edges[1:], counts.tolist(), *(x.tolist() for x in means))
    return error.item(), tuple(Bin(*row) for row in zip(*columns, strict=True))


@usual_modes()
def class_accuracies(
    student: Tensor, teacher: Tensor, labels: Tensor, class_names: Sequence[str] = ()
) -> tuple[ClassAccuracy, ...]:
    """Return the accuracy of both networks for each class.

    A student may lose in some classes what it gains on average (Lukasik et al., 2021, arXiv 2106.10494). They compare it
    with a student trained on labels; comparing it with its teacher is our choice.
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
    """Return log(p / (1 - p)) of one class per sample: classes (n,) int64 -> (n,) float64.

    Computed as the class's logit minus the logsumexp of all others, which stays exact when p rounds to 1. Infinite if the
    class, or all others, are ruled out.
    """
    logits, column = logits.double(), classes[:, None]
    return logits.gather(1, column)[:, 0] - logits.scatter(1, column, -math.inf).logsumexp(-1)


@usual_modes()
def exaggeration(student: Tensor, teacher: Tensor) -> Exaggeration:
    """Measure whether the student is more confident than its teacher on confident samples, and less on the others.

    Nagarajan et al., 2023 (arXiv 2301.12923) plot the log-odds of both networks at the teacher's top class. The numbers are
    our own: slope and intercept of a least-squares fit of the student's on the teacher's log-odds over all samples, and the
    mean difference below and above the teacher's median.

    A slope above 1 does not prove exaggeration, because a student that is less confident everywhere can have one too. A
    student exaggerates if it is less confident below the median and more confident above it. Samples where either log-odds
    are infinite are left out of all numbers.
    """
    top = teacher.argmax(-1)
    x, y = log_odds(teacher, top), log_odds(student, top)
    finite = x.isfinite() & y.isfinite()
    x, y = x[finite], y[finite]
    median, slope, intercept = math.nan, math.nan, math.nan
    if len(x):
        ordered = x.sort().values
        median = (ordered[(len(x) - 1) // 2] + ordered[len(x) // 2]).item() / 2
        if ordered[0] < ordered[-1]:  # if all are equal, rounding would produce a slope
            dx, dy = x - x.mean(), y - y.mean()
            slope = ((dx * dy).sum() / dx.square().sum()).item()
            intercept = (y.mean() - slope * x.mean()).item()
    below, above = ((y - x)[part].mean().item() for part in (x < median, x > median))
    chosen = torch.linspace(0, max(len(x) - 1, 0), min(len(x), MAX_POINTS)).long()
    points = tuple(zip(x[chosen].tolist(), y[chosen].tolist(), strict=True))
    return Exaggeration(len(x), slope, intercept, median, below, above, points)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    logits = logits.double()
    centred = logits - logits.amax(-1, keepdim=True)  # the largest is 0, so no T makes it infinite
    return (centred / temperature).log_softmax(-1)


def _percent(true: Tensor) -> float:
    return 100 * true.sum().item() / len(true)


def _scores(logits: Tensor, labels: Tensor, temperatures: Sequence[float]) -> Scores:
    ece, bins = calibration(logits, labels)
    return Scores(accuracy(logits, labels), ece, bins, tuple(quality(logits, labels, t) for t in temperatures))


# --- layers -----------------------------------------------------------------------------------------------------------


class LinearCKA:
    """Linear centred kernel alignment (Kornblith et al., 2019, arXiv 1905.00414) of features that arrive in batches.

    With every feature centred over all samples, CKA = ||Y'X||_F^2 / (||X'X||_F ||Y'Y||_F), X (n, d), Y (n, e). Products are
    summed in float64 around the running mean, with a correction when the mean moves, so a large mean costs no precision. Of
    the symmetric X'X and Y'Y only the upper triangles are summed.
    """

    def __init__(self):
        self._count = 0

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add features (b, d) and (b, e) of the same samples. Raises ValueError for other shapes."""
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
            raise ValueError(f"x and y must have {self._sizes} features as in earlier batches, got {sizes}")
        features = features - self._origin  # a constant feature is exactly 0
        mean, count = features.mean(0), self._count + len(x)
        step = mean - self._mean
        correction = math.sqrt(self._count * len(x) / count) * step  # one more row, for the moved mean
        parts = self._parts(torch.cat([features - mean, correction[None]]))
        for total, (a, b) in zip(self._products, parts, strict=True):
            _add_products(total, a, b)
        self._mean, self._count = self._mean + step * (len(x) / count), count

    def value(self) -> float:
        """Return CKA, in [0, 1] up to rounding; NaN without samples, or if either's features are the same for all samples."""
        if not self._count:
            return math.nan
        xx, yy = (_norm_of_symmetric(product) for product in self._products[:2])
        yx = torch.linalg.matrix_norm(self._products[2])
        return ((yx / xx) * (yx / yy)).item()

    def _parts(self, features: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """Return the factors of X'X, Y'Y and Y'X from features (..., d + e)."""
        x, y = features.split(self._sizes, dim=-1)
        return (x, x), (y, y), (y, x)


def _add_products(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add A'B to total (d, e), for A (b, d) and B (b, e). If A is B, skip the blocks below the diagonal."""
    if a is not b:
        total.addmm_(a.T, b)
        return
    for start in range(0, len(total), BLOCK_SIZE):
        total[start : start + BLOCK_SIZE, start:].addmm_(a[:, start : start + BLOCK_SIZE].T, a[:, start:])


def _norm_of_symmetric(total: Tensor) -> Tensor:
    """Return the Frobenius norm of a symmetric matrix, given its upper triangle."""
    return torch.hypot(math.sqrt(2) * total.triu(1).norm(), total.diagonal().norm())


class _PooledTap(Tap):
    """A tap that reduces the features of any layer to vectors."""

    def pop_pooled(self, samples: int) -> Tensor:
        """Return features (b, d): maps averaged over h and w, others flattened. Raises RuntimeError for any others."""
        features = self._pop()
        if not isinstance(features, Tensor) or features.dim() < 2 or len(features) != samples:
            raise RuntimeError(
                f"{self._describe_pass(features)}: layers must give features ({samples}, ...) for {samples} samples"
            )
        features = features.double()
        return features.mean((2, 3)) if features.dim() == 4 else features.flatten(1)


class _LayerPair:
    """One layer of each network and the CKA of their features so far. A tap of None stands for the logits.

    `twin` is a pair that may have the same features: often the last stage's output is the classifier's input. While they
    are equal, the sums are computed only once, by the twin.
    """

    def __init__(
        self,
        names: tuple[str, str],
        taps: tuple[_PooledTap | None, _PooledTap | None],
        twin: "_LayerPair | None" = None,
    ):
        self.names = names
        self._taps = taps
        self._twin = twin
        self._cka = LinearCKA()
        self._features: list[Tensor] = []

    def capture(self, *logits: Tensor) -> None:
        """Take the features of the last forward pass. Every pair captures before any pair accumulates."""
        self._features = [
            one if tap is None else tap.pop_pooled(len(one)) for tap, one in zip(self._taps, logits, strict=True)
        ]
        for role, name, one in zip(("student", "teacher"), self.names, self._features, strict=True):
            if one.shape[1] > MAX_FEATURES:
                raise ValueError(
                    f"layers: the {role}'s {name} has {one.shape[1]} features, and CKA sums the products of all pairs: choose "
                    f"layers with at most {MAX_FEATURES}, counting maps averaged over h and w"
                )
        if self._twin is not None and not all(map(_equal_up_to_rounding, self._features, self._twin._features)):
            self._cka, self._twin = deepcopy(self._twin.cka), None  # equal until now

    def accumulate(self) -> None:
        """Add the captured features to the sums."""
        if self._twin is None:
            self._cka.update(*self._features)

    @property
    def cka(self) -> LinearCKA:
        """The CKA of all accumulated features."""
        return self._cka if self._twin is None else self._twin.cka

    @property
    def similarity(self) -> LayerSimilarity:
        """The result for this pair."""
        return LayerSimilarity(*self.names, self.cka.value())


def _equal_up_to_rounding(x: Tensor, y: Tensor) -> bool:
    """Return whether features differ by float32 rounding at most, as means computed in different orders do."""
    return x.shape == y.shape and bool(((x - y).abs().amax() <= 1e-6 * x.abs().amax()).item() if x.numel() else True)


def _layer_pairs(
    student: nn.Module, teacher: nn.Module, layers: Sequence[tuple[str, str]] | None, stack: ExitStack
) -> list[_LayerPair]:
    """Return the pairs of layers, tapped until the stack closes. Raises ValueError if a layer does not exist."""
    networks = {"student": student, "teacher": teacher}
    for role, network in networks.items():
        check_network(role, network)

    def tapped(names: tuple[str | None, str | None]) -> tuple[_PooledTap | None, _PooledTap | None]:
        pairs = zip(networks.items(), names, strict=True)
        return tuple(_make_tap(network, name, role, stack) for (role, network), name in pairs)

    if layers is not None:
        _check_layers(networks, layers)
        return [_LayerPair(names, tapped(names)) for names in map(tuple, layers)]
    logits = _LayerPair((LOGITS, LOGITS), (None, None))
    if any(isinstance(network, torch.jit.ScriptModule) for network in networks.values()):
        return [logits]  # TorchScript takes no hooks
    stages = [_existing_stages(network) for network in networks.values()]
    depth = min(map(len, stages))
    last = zip(*(paths[len(paths) - depth :] for paths in stages), strict=True)
    pairs = [_LayerPair(names, tapped(names)) for names in last]
    if all(map(_has_linear, networks.values())):
        pairs.append(_LayerPair((PENULTIMATE, PENULTIMATE), tapped((None, None)), pairs[-1] if pairs else None))
    return [*pairs, logits]


def _make_tap(network: nn.Module, name: str | None, role: str, stack: ExitStack) -> _PooledTap | None:
    """Return a tap on a layer until the stack closes; None for the logits.

    A path wins over `penultimate` and `logits`. The name None means the penultimate features.
    """
    is_path = name in dict(network.named_modules())
    if name == LOGITS and not is_path:
        return None
    tap = _PooledTap(network, name if is_path else None, role, output=is_path)
    stack.callback(tap.remove)
    return tap


def _has_linear(network: nn.Module) -> bool:
    return any(isinstance(module, nn.Linear) for module in network.modules())


def _existing_stages(network: nn.Module) -> tuple[str, ...]:
    """Return the network's stages if all of them exist, else ()."""
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
                    f"{path!r}, only {join_names(shallow, MAX_LISTED_PATHS)}"
                )
            if not _has_linear(network):
                raise ValueError(
                    f"layers: the {role} has no torch.nn.Linear, whose input would be the {PENULTIMATE} features"
                )


# --- checks -----------------------------------------------------------------------------------------------------------


def check_temperatures(temperatures: Sequence[float]) -> tuple[float, ...]:
    """Return one or more distinct numbers in [0.001, 1000]. Raises TypeError or ValueError for others."""
    takes = f"numbers in [{MIN_TEMPERATURE}, {MAX_TEMPERATURE:g}]"
    checked = tuple(check_float("temperatures", t, takes, MIN_TEMPERATURE, MAX_TEMPERATURE) for t in temperatures)
    if not checked or len(set(checked)) < len(checked):
        raise ValueError(f"temperatures must be one or more distinct numbers, got {list(checked) or 'none'}")
    return checked


def _check_logits(name: str, logits: object, label: Tensor) -> None:
    if not isinstance(logits, Tensor) or logits.dim() != 2 or not logits.is_floating_point():
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"{name} must give logits (b, classes), got {got}")
    if label.dtype != torch.int64 or label.shape != logits.shape[:1]:
        raise ValueError(f"labels must be int64 ({len(logits)},), got {label.dtype} {tuple(label.shape)}")


def _check_samples(student: Tensor, teacher: Tensor, labels: Tensor, class_names: Sequence[str]) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher must have the same number of classes, got {student.shape[1]} and {teacher.shape[1]}"
        )
    for name, logits in (("student", student), ("teacher", teacher)):
        top = logits.amax(-1) if logits.shape[1] else logits.new_full((1,), math.nan)  # NaN if any logit is
        if not top.isfinite().all():
            raise ValueError(
                f"{name} must give logits that are finite, or -inf for some of the classes, got NaN or infinite ones"
            )
    low, high = labels.min().item(), labels.max().item()
    if low < 0 or high >= student.shape[1]:
        raise ValueError(f"labels must be in [0, {student.shape[1]}), got {low} to {high}")
    if class_names and len(class_names) != student.shape[1]:
        raise ValueError(f"class_names must have {student.shape[1]} names, got {len(class_names)}")


def _check_consistent(found: Evaluation) -> None:
    """Raise ValueError if the parts of an evaluation from a file contradict each other."""
    temperatures = [one.temperature for one in found.divergence]
    check_temperatures(temperatures)
    if not found.samples or not found.layers or not found.classes:
        raise ValueError("evaluation must have samples, layers and classes")
    if sum(one.count for one in found.classes) != found.samples:
        raise ValueError(f"evaluation.classes must count {found.samples} samples in total")
    check_percent("evaluation.agreement", found.agreement)
    for role in ("student", "teacher"):
        scores: Scores = getattr(found, role)
        check_percent(f"evaluation.{role}.accuracy", scores.accuracy)
        if sum(one.count for one in scores.bins) != found.samples:
            raise ValueError(f"evaluation.{role}.bins must count {found.samples} samples in total")
        if [one.temperature for one in scores.quality] != temperatures:
            raise ValueError(f"evaluation.{role}.quality must have temperatures {temperatures}")


# --- JSON -------------------------------------------------------------------------------------------------------------


def _null_if_not_finite(value: object) -> object:
    """Return a value for JSON, with null for numbers that are not finite or that `from_json` would refuse."""
    if isinstance(value, dict):
        return {name: _null_if_not_finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_null_if_not_finite(part) for part in value]
    return None if isinstance(value, float) and not abs(value) <= MAX_JSON_NUMBER else value


def _decode(kind: type, found: object) -> object:
    """Return JSON as a value of type `kind`: one of the classes above, or a type of their fields."""
    if is_dataclass(kind):
        return kind(**{name: _decode(hint, found[name]) for name, hint in get_type_hints(kind).items()})
    if get_origin(kind) is tuple:
        first, last = get_args(kind)
        if not isinstance(found, list) or (last is not ... and len(found) != 2):
            raise TypeError(f"expected a list, got {describe(found)}")
        return tuple(_decode(first, part) for part in found)
    if kind is str:
        if not isinstance(found, str) or found != found.encode(errors="replace").decode():  # lone surrogates
            raise TypeError(f"expected text, got {describe(found)}")
        return found
    if kind is int:
        return check_int("a count", found, 0)
    if found is None:
        return math.nan
    return check_float("a number", found, "finite or null", -MAX_JSON_NUMBER, MAX_JSON_NUMBER)
