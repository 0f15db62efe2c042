"""Inheritance and exploration (IE-KD, arXiv 2107.00181): half a student's channels follow another network, half differ."""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import models
from ..checks import check_choice, check_finite, check_int, check_non_negative, check_positive, check_used
from ..models.layers import initialise_convolutions
from ..networks import evaluation_mode
from .features import (
    FeatureMethod,
    Tap,
    at_least_float32,
    check_layer,
    full_precision,
    stages_of,
    unit_rows,
)
from .kd import distill_optionally, distill_rows
from .protocol import Batch, Outcome, Pretraining
from .selection import select_batch_rows, take_rows

SLOPE = 0.1  # of every LeakyReLU


def l1_distance(one: Tensor, other: Tensor) -> Tensor:
    """d(a, b) = mean |a / ||a|| - b / ||b||| over all entries of all samples.

    (b, ...) twice, a sample of n entries -> (), at least float32. For unit vectors u and v the Cauchy-Schwarz inequality
    gives sum |u_i - v_i| <= sqrt(n) ||u - v|| <= 2 sqrt(n), so 0 <= d <= 2 / sqrt(n); the upper bound is that of
    opposite ones with all entries of one size. A sample of zeros has no direction: it stays zeros, without a gradient.
    """
    return (_directions(one) - _directions(other)).abs().mean()


def opposite_l1_distance(one: Tensor, other: Tensor) -> Tensor:
    """-d(a, b), in [-2 / sqrt(n), 0]; see `l1_distance`."""
    return -l1_distance(one, other)


def cosine_distance(one: Tensor, other: Tensor) -> Tensor:
    """The mean over the samples of 1 - cos(a, b), in [0, 2].

    (b, ...) twice -> (), at least float32. Computed as half the squared length of the difference of unit vectors, which is
    the same, and is exactly 0 where the two are equal. A sample of zeros has no direction and no gradient; beside another
    one it counts 1/2.
    """
    return (_directions(one) - _directions(other)).square().sum(1).mean() / 2


def absolute_cosine(one: Tensor, other: Tensor) -> Tensor:
    """The mean over the samples of |cos(a, b)|, in [0, 1]: (b, ...) twice -> (), at least float32. Of zeros it is 0."""
    return (_directions(one) * _directions(other)).sum(1).abs().mean()


class Distances(NamedTuple):
    """What is minimised: of factors that are to inherit, and of those that are to explore."""

    inheritance: Callable[[Tensor, Tensor], Tensor]
    exploration: Callable[[Tensor, Tensor], Tensor]


DISTANCES = {
    "l1": Distances(l1_distance, opposite_l1_distance),
    "cosine": Distances(cosine_distance, absolute_cosine),
}


def at_one_size(*maps: Tensor) -> list[Tensor]:
    """Maps (b, c, h, w) of several sizes -> all of the least height and width among them, by adaptive average pooling."""
    size = tuple(min(sides) for sides in zip(*(x.shape[-2:] for x in maps), strict=True))
    return [x if x.shape[-2:] == size else functional.adaptive_avg_pool2d(x, size) for x in maps]


class FactorCoder(nn.Sequential):
    """Maps (b, in_channels, h, w) -> (b, out_channels, h, w), of the dtype of its weights outside autocast.

    LeakyReLU(0.1), then three 3x3 convolutions without bias, each with BatchNorm and LeakyReLU(0.1): in_channels ->
    in_channels -> out_channels -> out_channels. The weights of a convolution to c channels start as draws from
    N(0, 2 / (9 c)), by torch's generator; those of BatchNorm as 1, its biases as 0.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(
            nn.LeakyReLU(SLOPE),
            *_convolution(in_channels, in_channels),
            *_convolution(in_channels, out_channels),
            *_convolution(out_channels, out_channels),
        )
        initialise_convolutions(self)

    def forward(self, maps: Tensor) -> Tensor:
        """In training mode maps of one pixel need at least two samples: see `torch.nn.BatchNorm2d`."""
        return super().forward(maps.to(self[1].weight.dtype))


class FactorAutoEncoder(nn.Module):
    """Maps (b, channels, h, w) -> factors (b, channels / 2, h, w), and back. `channels` is even.

    The encoder and the decoder are a `FactorCoder` each, so the decoder begins with a LeakyReLU of its own.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.encoder = FactorCoder(channels, channels // 2)
        self.decoder = FactorCoder(channels // 2, channels)

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """The factors, and the reconstruction's loss (), at least float32: mean |maps - decoder(factors)|."""
        factors = self.encoder(maps)
        reconstruction = self.decoder(factors)
        with full_precision(maps):
            return factors, (at_least_float32(maps) - at_least_float32(reconstruction)).abs().mean()


class SplitEncoder(nn.Module):
    """Maps (b, channels, h, w) -> the factors (b, factor_channels, h, w) of one half of the channels, and of the other.

    The halves are those of the channels in the order of the buffer `order` (channels,) int64; None: as they come.
    """

    def __init__(self, channels: int, factor_channels: int, order: Tensor | None):
        super().__init__()
        self.inheritance = FactorCoder(channels // 2, factor_channels)
        self.exploration = FactorCoder(channels // 2, factor_channels)
        self.register_buffer("order", order)

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """The first half's factors, which are to inherit, and the second's, which are to explore."""
        if self.order is not None:
            maps = maps.index_select(1, self.order)
        first, second = maps.chunk(2, 1)
        return self.inheritance(first), self.exploration(second)


class _MapTap(Tap):
    """Catches the map (b, c, h, w) that comes out of a layer. `path` None or "": the last of the network's `stages`."""

    def __init__(self, network: nn.Module, path: str | None, name: str):
        super().__init__(network, path or _last_stage(network, name), name, output=True)

    def take(self) -> Tensor:
        """See `take_map`."""
        return self.take_map()


class _FactorMethod(FeatureMethod):
    """A method that compares factors of two networks' maps: what is common to both of this file."""

    flops_known = False  # the encoders are beside the networks

    def set_comparison(self, distance: str, split: str, split_seed: int) -> None:
        """Check and set the options by which factors are made and compared."""
        self.distance = check_choice("distance", distance, DISTANCES)
        self.split = check_choice("split", split, ("natural", "permuted"))
        self.split_seed = check_int("split_seed", split_seed, 0, 2**63 - 1)
        check_used("split_seed", split_seed, 0, split == "natural", "split='natural'")

    def tap(self, network: nn.Module, path: str | None, name: str) -> Tap:
        """Maps that come out of a layer."""
        return _MapTap(network, path, name)

    def split_encoder(self, channels: int, factor_channels: int) -> SplitEncoder:
        """Return a new one. Its permuted order is a function of `split_seed` and the number of channels alone."""
        generator = torch.Generator().manual_seed(self.split_seed)
        order = torch.randperm(channels, generator=generator) if self.split == "permuted" else None
        return SplitEncoder(channels, factor_channels, order)

    def compare(self, factors: tuple[Tensor, Tensor], target: Tensor) -> dict[str, Tensor]:
        """The losses of inheritance and exploration, () each, of the halves' factors against another network's."""
        with full_precision(target):
            inherited, explored, target = at_one_size(*map(at_least_float32, (*factors, target)))
            losses = DISTANCES[self.distance]
            return {
                "inheritance": losses.inheritance(inherited, target),
                "exploration": losses.exploration(explored, target),
            }

    def weigh(self, losses: Mapping[str, Tensor]) -> Tensor:
        """What `compare` gives, with its weights."""
        return self.inheritance_weight * losses["inheritance"] + self.exploration_weight * losses["exploration"]


class InheritanceExplorationDistillation(_FactorMethod):
    """loss = ce_weight * CE + inheritance_weight * INH + exploration_weight * EXP; value: student's entropy.

    An auto-encoder learns first (`pretraining`) to reconstruct the teacher's maps f_T of one layer from factors
    F_T = Enc(f_T) of half as many channels, and stays as it is from then on (`FactorAutoEncoder`). The student's maps of
    one layer are split in halves of their channels, and two encoders that train with the student make factors F_inh and
    F_exp of them (`SplitEncoder`). With a sample's factors as vectors a and b of n entries,

        distance    INH = mean of, F_inh against F_T       EXP = mean of, F_exp against F_T      EXP is in
        l1          d(a, b) = mean |a/||a|| - b/||b|||     -d(a, b)                              [-2 / sqrt(n), 0]
        cosine      1 - cos(a, b)                          |cos(a, b)|                           [0, 1]

    so that exploration, which grows away from the teacher, ends somewhere.

    The authors' code, aliyun/Revisiting-Knowledge-Distillation-an-Inheritance-and-Exploration-Framework, gives these; on the
    same weights both compute the same numbers:

    - model/auto_encoder.py: every layer of encoder and decoder, and the distribution of their first weights.
    - loss/factor_transfer.py: both families of distances. loss/reconstruction.py: mean |f_T - Dec(F_T)|.
    - config/ie_kd.yaml: INH and EXP weigh 1 each in every epoch. The auto-encoder trains for 30 epochs at a learning rate of
      0.1, which never falls. 64 channels have 32 factors, and so has each half of 64 channels.
    - processors/IE_KD.py: CE weighs 1, and there is no KD. The maps come from the last stage, after the activation and before
      pooling. The split is natural or permuted. The auto-encoder is in evaluation mode while the student trains, and the
      student's encoders share the student's learning rate.

    Where their texts disagree, the defaults are these:

    - README.md and the paper split the student, as this class does. processors/IE_KD.py and config/ie_kd.yaml exchange the
      names: they split and train the "teacher", a resnet56, and encode the maps of the constant "student", a resnet20.
    - The weights are 1, by config/ie_kd.yaml. Summaries of the paper say 50, which we could not check in the paper itself.
    - The distance is "l1" for both. processors/IE_KD.py reads one loss for each, and config/ie_kd.yaml names only FTLoss,
      which is "l1" for INH. DDTLoss, beside it in loss/factor_transfer.py, subtracts the same distance for EXP.

    The rest is rebuilt, or this package's own:

    - There are half as many factors as channels, whatever their number. Their configurations of factor transfer have 32.
    - Factors of maps of different sizes are averaged (adaptive average pooling) to the lesser height and width; theirs must
      have one size. An odd number of channels is refused.
    - A sample of zeros gets no gradient, and its 1 - cos is 1/2; theirs is 1. A length below 1e-12 divides as it is; theirs
      becomes 1e-12.
    - The permuted order depends on `split_seed` alone.
    - The optimizer is the run's, which has no Nesterov momentum; theirs has it.
    - `batch_keep` and `kd_weight` are additions. The paper's numbers are not claimed.

    In training mode, maps of one pixel need at least two chosen samples, for batch normalisation.

    Args:
        ce_weight, inheritance_weight, exploration_weight: finite.
        kd_weight: of KD = T^2 * mean KL(teacher || student), which is added; finite. 0: there is none.
        temperature: T > 0 of KD; chosen beside kd_weight = 0 it is refused, as split_seed is beside the natural split.
        distance: "l1" or "cosine".
        split: "natural", the first half of the channels inherits and the second explores, or "permuted", in a fixed order.
        split_seed: of the permuted order, >= 0.
        factor_epochs, factor_lr: of the auto-encoder, with the momentum and weight decay of the run.
        batch_keep: the fraction of every batch that the teacher is asked about and whose factors are compared, in
            (0, 1], by the student's entropy, the highest first (`selection.select_batch_rows`). 1: all.
        student_layer, teacher_layer: whose output (b, c, h, w) the maps are, names in named_modules(); None: the last of
            the network's `stages`, which every network of `kcd_ext.models` has.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.
    """

    def __init__(
        self,
        ce_weight: float = 1.0,
        inheritance_weight: float = 1.0,
        exploration_weight: float = 1.0,
        kd_weight: float = 0.0,
        temperature: float = 4.0,
        distance: str = "l1",
        split: str = "natural",
        split_seed: int = 0,
        factor_epochs: int = 30,
        factor_lr: float = 0.1,
        batch_keep: float = 1.0,
        student_layer: str | None = None,
        teacher_layer: str | None = None,
    ):
        super().__init__(student_layer, teacher_layer, batch_keep)
        self.set_options(
            check_finite,
            ce_weight=ce_weight,
            inheritance_weight=inheritance_weight,
            exploration_weight=exploration_weight,
            kd_weight=kd_weight,
        )
        self.set_options(check_positive, temperature=temperature)
        check_used("temperature", temperature, 4, kd_weight == 0, "kd_weight=0")
        self.set_comparison(distance, split, split_seed)
        self.factor_epochs = check_int("factor_epochs", factor_epochs, 1)
        self.set_options(check_non_negative, factor_lr=factor_lr)

    def prepare(self, student: nn.Module, teacher: nn.Module | None, samples: Iterable[Batch]) -> None:
        """Taps both networks and builds the auto-encoder and the two encoders.

        Raises ValueError where a layer does not exist or a number of channels is odd, RuntimeError where a layer is not
        passed or what comes out of it is no map.
        """
        self.release()
        x = next(iter(samples)).x[:1]
        maps = {name: self.probe(name, network, x)[1] for name, network in (("student", student), ("teacher", teacher))}
        _check_halves(self._taps, maps)
        self.student_width, self.teacher_width = (maps[name].shape[1] for name in ("student", "teacher"))
        self.auto_encoder = _placed(FactorAutoEncoder(self.teacher_width), x.device)
        self.student_encoder = _placed(self.split_encoder(self.student_width, self.teacher_width // 2), x.device)

    def pretraining(self) -> tuple[Pretraining, ...]:
        """The auto-encoder of the teacher's maps, at one learning rate for all its epochs."""
        plan = Pretraining(
            self.auto_encoder, self._reconstruction_loss, self.factor_epochs, self.factor_lr, milestones=()
        )
        return (plan,)

    def _reconstruction_loss(self, teacher: nn.Module | None, batch: Batch) -> Tensor:
        _, maps = self.teacher_forward(teacher, batch.x)
        return self.auto_encoder(maps)[1]

    def forward(self, student: nn.Module, teacher: nn.Module | None, batch: Batch) -> Outcome:
        """`terms`: "inheritance" and "exploration", INH and EXP without their weights; where `kd_weight` is not 0 also
        "kl", the mean KL divergence of the chosen rows at temperature T, in nats, without its weight and T^2."""
        logits, maps = self.student_forward(student, batch.x)
        rows = select_batch_rows(logits, self.batch_keep)
        target_logits, target_maps = self.teacher_forward(teacher, take_rows(batch.x, rows))
        with torch.no_grad():
            target = self.auto_encoder.encoder(target_maps)
        losses = self.compare(self.student_encoder(take_rows(maps, rows)), target)
        weights = {"temperature": self.temperature, "kd_weight": self.kd_weight, "ce_weight": self.ce_weight}
        loss, value, kd_terms = distill_optionally(logits, target_logits, batch.label, rows, **weights)
        terms = {name: x.detach() for name, x in losses.items()}
        return Outcome(self.weigh(losses) + loss, logits.detach(), value, {**terms, **kd_terms})


class InheritanceExplorationMutualLearning(_FactorMethod):
    """Two networks that learn from each other, the student and a peer: half of each one's channels follows the other.

    loss = L(student, peer) + L(peer, student) + both auto-encoders' reconstruction; value: student's entropy. With A's own
    logits and maps differentiable and all of B's constant,

        L(A, B) = ce_weight * CE(A) + kl_weight * T^2 * mean KL(B || A)
                + inheritance_weight * INH(A_inh, F_B) + exploration_weight * EXP(A_exp, F_B),

    INH and EXP as in `InheritanceExplorationDistillation`. Each network has an auto-encoder of its maps, which gives F and
    learns beside it from these maps as constants: no reconstruction reaches a network.

    The authors' repository has no IE-DML, so this is rebuilt on the parts of IE-KD: the same encoders, decoders and distances,
    and the weights of 1. Its plain mutual learning (loss/mutual.py, processors/DML.py) gives T = 1 and the direction of the
    divergence, and config/DML/cifar100/resnet56-20.yaml a weight of 1 for it (main.py's default is 0). There the networks
    take their steps in turn, and the second sees the first one's new weights; here both take one step together. This package
    chose whose factors are compared and that the auto-encoders learn beside the networks. Factors of different sizes are
    averaged as in IE-KD. The paper's numbers are not claimed.

    The peer is a part of the method: trained, saved and resumed with it, and not given to anybody in the end.

    Args:
        ce_weight, kl_weight, inheritance_weight, exploration_weight: finite.
        temperature: T > 0.
        distance, split, split_seed: as in `InheritanceExplorationDistillation`; each network's channels are split so.
        peer: a network by name or `module:function`, built by `kcd_ext.models.build` for the student's input channels and
            classes. None: the student's own kind, a copy of it with all weights drawn anew by the `reset_parameters` of
            its modules, from torch's generator; all of it is trained.
        student_layer, peer_layer: whose output (b, c, h, w) the maps are, names in named_modules(); None: the last of
            the network's `stages`, which every network of `kcd_ext.models` has.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.
    """

    needs_teacher = False

    def __init__(
        self,
        ce_weight: float = 1.0,
        kl_weight: float = 1.0,
        inheritance_weight: float = 1.0,
        exploration_weight: float = 1.0,
        temperature: float = 1.0,
        distance: str = "l1",
        split: str = "natural",
        split_seed: int = 0,
        peer: str | None = None,
        student_layer: str | None = None,
        peer_layer: str | None = None,
    ):
        super().__init__(student_layer)
        self.set_options(
            check_finite,
            ce_weight=ce_weight,
            kl_weight=kl_weight,
            inheritance_weight=inheritance_weight,
            exploration_weight=exploration_weight,
        )
        self.set_options(check_positive, temperature=temperature)
        self.set_comparison(distance, split, split_seed)
        if peer is not None and not isinstance(peer, str):
            raise TypeError(f"peer must be a network's name, module:function or None, got {type(peer).__name__}")
        self.peer = peer
        self.peer_layer = check_layer("peer_layer", peer_layer)

    def prepare(self, student: nn.Module, teacher: nn.Module | None, samples: Iterable[Batch]) -> None:
        """Builds the peer, taps both networks and builds their auto-encoders and encoders. There is no teacher.

        Raises TypeError or ValueError where the peer cannot be built or does not fit, ValueError where a layer does not
        exist or a number of channels is odd, RuntimeError where a layer is not passed or what comes out of it is no map.
        """
        self.release()
        x = next(iter(samples)).x[:1]
        peer = _fresh_copy(student) if self.peer is None else None  # before the student is tapped: without a hook
        logits, maps = self.probe("student", student, x)
        if peer is None:
            peer = models.build(self.peer, in_channels=x.shape[1], num_classes=logits.shape[1])
        self.peer_network = _placed_as_it_runs(peer, x).requires_grad_(True).train()
        peer_logits, peer_maps = self.probe("peer", self.peer_network, x)
        if peer_logits.shape != logits.shape:
            raise ValueError(
                f"peer must give logits as the student's, {tuple(logits.shape)}, got {tuple(peer_logits.shape)}"
            )
        _check_halves(self._taps, {"student": maps, "peer": peer_maps})
        channels, peer_channels = maps.shape[1], peer_maps.shape[1]
        self.student_auto_encoder = _placed(FactorAutoEncoder(channels), x.device)
        self.peer_auto_encoder = _placed(FactorAutoEncoder(peer_channels), x.device)
        self.student_encoder = _placed(self.split_encoder(channels, peer_channels // 2), x.device)
        self.peer_encoder = _placed(self.split_encoder(peer_channels, channels // 2), x.device)

    def forward(self, student: nn.Module, teacher: nn.Module | None, batch: Batch) -> Outcome:
        """`terms`: of the student "inheritance" and "exploration", and "kl" in nats, without their weights and T^2;
        "peer_ce", the peer's cross entropy, and "reconstruction", the sum of both auto-encoders' losses."""
        logits, maps = self.student_forward(student, batch.x)
        peer_logits, peer_maps = self._through("peer", self.peer_network, batch.x)
        factors, reconstruction = self.student_auto_encoder(maps.detach())
        peer_factors, peer_reconstruction = self.peer_auto_encoder(peer_maps.detach())
        losses = self.compare(self.student_encoder(maps), peer_factors.detach())
        peer_losses = self.compare(self.peer_encoder(peer_maps), factors.detach())
        weights = {"temperature": self.temperature, "kd_weight": self.kl_weight, "ce_weight": self.ce_weight}
        distilled, value, kl = distill_rows(logits, peer_logits.detach(), batch.label, **weights)
        peer_distilled, _, _ = distill_rows(peer_logits, logits.detach(), batch.label, **weights)

        reconstruction = reconstruction + peer_reconstruction
        loss = distilled + self.weigh(losses) + peer_distilled + self.weigh(peer_losses) + reconstruction
        terms = {
            **{name: x.detach() for name, x in losses.items()},
            "kl": kl,
            "peer_ce": functional.cross_entropy(at_least_float32(peer_logits.detach()), batch.label),
            "reconstruction": reconstruction.detach(),
        }
        return Outcome(loss, logits.detach(), value, terms)


def _convolution(in_channels: int, out_channels: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    return (
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.LeakyReLU(SLOPE),
    )


def _directions(x: Tensor) -> Tensor:
    """Samples (b, ...) -> their directions (b, n), at least float32."""
    return unit_rows(x.flatten(1), offset=0)


def _placed(part: nn.Module, device: torch.device) -> nn.Module:
    """On this device, and with a pixel's channels side by side, as the networks' maps have them."""
    return part.to(device, memory_format=torch.channels_last)


def _placed_as_it_runs(network: nn.Module, x: Tensor) -> nn.Module:
    """Return it as `_placed` does, or in the memory layout in which it came if it does not run in the other one."""
    as_it_was = copy.deepcopy(network)
    placed = _placed(network, x.device)
    try:
        with evaluation_mode(placed), torch.no_grad():
            placed(x)
    except RuntimeError:
        return as_it_was.to(x.device)
    return placed


def _last_stage(network: nn.Module, name: str) -> str:
    stages = stages_of(network)
    if not stages:
        raise ValueError(
            f"the {name} has no stages, a tuple of names whose last one its maps would come out of: set {name}_layer to a "
            f"name in {name}.named_modules()"
        )
    return stages[-1]


def _check_halves(taps: Mapping[str, Tap], maps: Mapping[str, Tensor]) -> None:
    """Raises ValueError where a network's channels are odd."""
    if any(x.shape[1] % 2 for x in maps.values()):
        told = " and ".join(f"{name}_layer {taps[name].path!r} gives {tuple(x.shape)}" for name, x in maps.items())
        raise ValueError(f"maps (b, c, h, w) must have an even number of channels, to be halved: {told}")


def _fresh_copy(network: nn.Module) -> nn.Module:
    """A copy with weights of its own, all drawn anew; on the CPU, so that they are the same whatever the device is."""
    fresh = copy.deepcopy(network).cpu()
    for path, module in fresh.named_modules():
        if callable(getattr(module, "reset_parameters", None)):
            module.reset_parameters()
        elif any(True for _ in module.parameters(recurse=False)):
            raise ValueError(
                f"peer must be a network's name or module:function: a copy of the student cannot have fresh weights, for "
                f"its {path or 'outermost module'!r} ({type(module).__name__}) has parameters and no reset_parameters()"
            )
    return fresh
