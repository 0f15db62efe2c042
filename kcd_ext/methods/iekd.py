"""Inheritance and exploration (IE-KD, IE-DML; arXiv 2107.00181): half of the channels follow another network, half differ."""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import models
from ..checks import check_bool, check_choice, check_finite, check_int, check_non_negative, check_positive, check_used
from ..models.layers import initialise_convolutions
from ..networks import evaluation_mode
from .features import (
    FeatureMethod,
    Tap,
    at_least_float32,
    check_layer,
    full_precision,
    pool_to_common_size,
    stages_of,
    unit_rows,
)
from .kd import distill_if_weighted, distill_rows
from .protocol import Batch, Outcome, Pretraining
from .selection import select_batch_rows, take_rows

SLOPE = 0.1  # of each LeakyReLU


def l1_distance(one: Tensor, other: Tensor) -> Tensor:
    """Return d(a, b) = mean |a / ||a|| - b / ||b||| over all entries of all samples.

    Two tensors (b, ...) with n entries per sample -> (), at least float32. The result is in [0, 2 / sqrt(n)]: for unit
    vectors u and v, Cauchy-Schwarz gives sum |u_i - v_i| <= sqrt(n) ||u - v|| <= 2 sqrt(n). Opposite vectors whose entries
    all have one magnitude reach the upper bound. A sample of zeros has no direction: it stays zeros, without a gradient.
    """
    return (_directions(one) - _directions(other)).abs().mean()


def opposite_l1_distance(one: Tensor, other: Tensor) -> Tensor:
    """Return -d(a, b), in [-2 / sqrt(n), 0]; see `l1_distance`."""
    return -l1_distance(one, other)


def cosine_distance(one: Tensor, other: Tensor) -> Tensor:
    """Return the mean over the samples of 1 - cos(a, b), in [0, 2].

    Two tensors (b, ...) -> (), at least float32. Computed as half the squared length of the difference of unit vectors,
    which is equivalent, and exactly 0 for equal samples. A sample of zeros has no direction and no gradient; against a
    nonzero one it counts 1/2.
    """
    return (_directions(one) - _directions(other)).square().sum(1).mean() / 2


def absolute_cosine(one: Tensor, other: Tensor) -> Tensor:
    """Return the mean over the samples of |cos(a, b)|, in [0, 1]. Two tensors (b, ...) -> (), at least float32; 0 for zeros."""
    return (_directions(one) * _directions(other)).sum(1).abs().mean()


class Distances(NamedTuple):
    """The losses of the inheriting and the exploring factors."""

    inheritance: Callable[[Tensor, Tensor], Tensor]
    exploration: Callable[[Tensor, Tensor], Tensor]


DISTANCES = {
    "l1": Distances(l1_distance, opposite_l1_distance),
    "cosine": Distances(cosine_distance, absolute_cosine),
}


class FactorCoder(nn.Sequential):
    """An encoder or decoder: maps (b, in_channels, h, w) -> (b, out_channels, h, w), in its own dtype outside autocast.

    LeakyReLU(0.1), then three 3x3 convolutions without bias, each with BatchNorm and LeakyReLU(0.1): in_channels ->
    in_channels -> out_channels -> out_channels. The initial weights of a convolution to c channels are drawn from
    N(0, 2 / (9 c)) with torch's generator. BatchNorm starts with weights 1 and biases 0.
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
        """Return the coded maps. In training mode, maps of one pixel need at least two samples (`torch.nn.BatchNorm2d`)."""
        return super().forward(maps.to(self[1].weight.dtype))


class FactorAutoEncoder(nn.Module):
    """An auto-encoder: maps (b, channels, h, w) -> factors (b, channels / 2, h, w), and back. `channels` is even.

    Encoder and decoder are a `FactorCoder` each, so the decoder starts with its own LeakyReLU.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.encoder = FactorCoder(channels, channels // 2)
        self.decoder = FactorCoder(channels // 2, channels)

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors, and the reconstruction loss (), at least float32: mean |maps - decoder(factors)|."""
        factors = self.encoder(maps)
        reconstruction = self.decoder(factors)
        with full_precision(maps):
            return factors, (at_least_float32(maps) - at_least_float32(reconstruction)).abs().mean()


class SplitEncoder(nn.Module):
    """Two encoders, one for each half of the channels: maps (b, channels, h, w) -> twice factors (b, factor_channels, h, w).

    The channels are first permuted by the buffer `order`, (channels,) int64. None: natural order.
    """

    def __init__(self, channels: int, factor_channels: int, order: Tensor | None):
        super().__init__()
        self.inheritance = FactorCoder(channels // 2, factor_channels)
        self.exploration = FactorCoder(channels // 2, factor_channels)
        self.register_buffer("order", order)

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of the first half, which inherits, and of the second, which explores."""
        if self.order is not None:
            maps = maps.index_select(1, self.order)
        first, second = maps.chunk(2, 1)
        return self.inheritance(first), self.exploration(second)


class _MapTap(Tap):
    """A tap on a layer's output map (b, c, h, w). `path` None or "": the last of the network's `stages`."""

    def __init__(self, network: nn.Module, path: str | None, name: str):
        super().__init__(network, path or _last_stage(network, name), name, output=True)

    def pop(self) -> Tensor:
        """Return the map; see `pop_map`."""
        return self.pop_map()


class _FactorMethod(FeatureMethod):
    """The base of both methods here: it compares factors of two networks' maps."""

    takes_soft_labels = True
    flops_known = False  # the encoders add to the networks' FLOPs

    def set_factor_options(self, distance: str, split: str, split_seed: int) -> None:
        """Check and set the options for computing and comparing factors."""
        self.distance = check_choice("distance", distance, DISTANCES)
        self.split = check_choice("split", split, ("natural", "permuted"))
        self.split_seed = check_int("split_seed", split_seed, 0, 2**63 - 1)
        check_used("split_seed", split_seed, 0, split == "natural", "split='natural'")

    def make_tap(self, network: nn.Module, path: str | None, name: str) -> Tap:
        """Return a tap on a layer's output map."""
        return _MapTap(network, path, name)

    def make_split_encoder(self, channels: int, factor_channels: int) -> SplitEncoder:
        """Return a new encoder. Its permuted order depends on `split_seed` and the number of channels only."""
        generator = torch.Generator().manual_seed(self.split_seed)
        order = torch.randperm(channels, generator=generator) if self.split == "permuted" else None
        return SplitEncoder(channels, factor_channels, order)

    def factor_losses(self, factors: tuple[Tensor, Tensor], target: Tensor) -> dict[str, Tensor]:
        """Return the inheritance and exploration losses, () each, of both halves' factors against another network's."""
        with full_precision(target):
            inherited, explored, target = pool_to_common_size(*map(at_least_float32, (*factors, target)))
            losses = DISTANCES[self.distance]
            return {
                "inheritance": losses.inheritance(inherited, target),
                "exploration": losses.exploration(explored, target),
            }

    def weighted_sum(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum of the losses from `factor_losses`."""
        return self.inheritance_weight * losses["inheritance"] + self.exploration_weight * losses["exploration"]


class InheritanceExplorationDistillation(_FactorMethod):
    """Inheritance and exploration (IE-KD), arXiv 2107.00181: half of the student's channels follow the teacher, half differ.

        loss = ce_weight * CE + kd_weight * KD
             + inheritance_weight * INH + exploration_weight * EXP

    The knowledge value is the student's entropy.

    1. Before the student, train an auto-encoder (`pretraining`, `FactorAutoEncoder`). It reconstructs the teacher's maps f_T
       of one layer from factors F_T = Enc(f_T) with half as many channels. Afterwards it is constant.
    2. Split the channels of the student's maps of one layer in two halves. Two encoders, trained with the student, turn them
       into factors F_inh and F_exp (`SplitEncoder`).

    INH compares F_inh with F_T, EXP compares F_exp with F_T. Both are means over the samples. With a sample's factors as
    vectors a and b of n entries:

        d(a, b) = mean |a/||a|| - b/||b|||

        distance    INH              EXP            range of EXP
        l1          d(a, b)          -d(a, b)       [-2 / sqrt(n), 0]
        cosine      1 - cos(a, b)    |cos(a, b)|    [0, 1]

    So exploration, which moves away from the teacher, is bounded.

    From the authors' code, aliyun/Revisiting-Knowledge-Distillation-an-Inheritance-and-Exploration-Framework; on the same
    weights both compute the same numbers:

    - model/auto_encoder.py: each layer of encoder and decoder, and the distribution of their first weights.
    - loss/factor_transfer.py: both families of distances. loss/reconstruction.py: mean |f_T - Dec(F_T)|.
    - config/ie_kd.yaml: INH and EXP weigh 1 each in every epoch. The auto-encoder trains for 30 epochs at a constant learning
      rate of 0.1. 64 channels have 32 factors, and so has each half of 64 channels.
    - processors/IE_KD.py: CE weighs 1, and there is no KD. The maps come from the last stage, after the activation and before
      pooling. The split is natural or permuted. The auto-encoder is in evaluation mode while the student trains, and the
      student's encoders share the student's learning rate.

    Where their texts disagree, we chose:

    - The student is split, as in README.md and the paper. processors/IE_KD.py and config/ie_kd.yaml exchange the names: they
      split and train the "teacher", a resnet56, and encode the maps of the constant "student", a resnet20.
    - The weights are 1, as in config/ie_kd.yaml. Summaries of the paper say 50, which we could not check in the paper itself.
    - Both distances are "l1". processors/IE_KD.py reads one loss for each, and config/ie_kd.yaml names only FTLoss, which is
      "l1" for INH. DDTLoss, beside it in loss/factor_transfer.py, subtracts the same distance for EXP.

    Rebuilt, or our own:

    - There are half as many factors as channels, for any even number of channels. Their configurations of factor transfer have 32.
    - Factors of maps of different sizes are averaged (adaptive average pooling) to the smaller height and width; theirs must
      have the same size.
    - A sample of zeros gets no gradient, and its 1 - cos is 1/2; theirs is 1. A length below 1e-12 divides unchanged; theirs
      is raised to 1e-12.
    - The permuted order depends on `split_seed` only.
    - The optimizer is that of the run, without Nesterov momentum; theirs has it.
    - `batch_keep` and `kd_weight` are additions. We do not claim the paper's numbers.

    In training mode, maps of one pixel need at least two selected samples, for batch normalisation.

    Args:
        ce_weight: Weight of the cross entropy, finite.
        inheritance_weight: Weight of inheritance (INH), finite.
        exploration_weight: Weight of exploration (EXP), finite.
        kd_weight: Weight of KD = T^2 * mean KL(teacher || student); finite. 0: no KD.
        temperature: T of KD, > 0; any value but the default is refused if kd_weight is 0.
        distance: "l1" or "cosine".
        split: "natural", the first half of the channels inherits and the second explores, or "permuted", in a fixed random
            order.
        split_seed: Seed of the permuted order, >= 0; any value but 0 is refused with the natural split.
        factor_epochs: Epochs of the auto-encoder, >= 1, with SGD.
        factor_lr: Constant learning rate of the auto-encoder, >= 0.
        batch_keep: Fraction of each batch that the teacher runs on and whose factors are compared, in (0, 1]: the rows of
            highest student entropy (`selection.select_batch_rows`). 1: all rows.
        student_layer: The student's layer whose output (b, c, h, w) is compared, a name in `named_modules()`. None: the last
            of its `stages`, which every network in `kcd_ext.models` has.
        teacher_layer: The same for the teacher.
        label_smoothing: Label smoothing of the cross entropy, in [0, 1].
        standardize: Compare the z-scores of each row's logits in KD (`kd.standardized`, Sun et al., CVPR 2024). Refused if
            kd_weight is 0.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, or has no effect.
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
        label_smoothing: float = 0.0,
        standardize: bool = False,
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
        self.set_label_smoothing(label_smoothing, ce_weight)
        self.set_options(check_bool, standardize=standardize)
        check_used("temperature", temperature, 4, kd_weight == 0, "kd_weight=0")
        check_used("standardize", standardize, False, kd_weight == 0, "kd_weight=0")
        self.set_factor_options(distance, split, split_seed)
        self.factor_epochs = check_int("factor_epochs", factor_epochs, 1)
        self.set_options(check_non_negative, factor_lr=factor_lr)

    def prepare(self, student: nn.Module, teacher: nn.Module | None, samples: Iterable[Batch]) -> None:
        """Tap both networks and build the auto-encoder and the two encoders.

        Raises:
            ValueError: A layer does not exist, or has an odd number of channels.
            RuntimeError: A layer did not run, or its output is not a map.
        """
        self.release()
        x = next(iter(samples)).x[:1]
        maps = {name: self.probe(name, network, x)[1] for name, network in (("student", student), ("teacher", teacher))}
        _check_even_channels(self._taps, maps)
        self.student_width, self.teacher_width = (maps[name].shape[1] for name in ("student", "teacher"))
        self.auto_encoder = _to_channels_last(FactorAutoEncoder(self.teacher_width), x.device)
        self.student_encoder = _to_channels_last(
            self.make_split_encoder(self.student_width, self.teacher_width // 2), x.device
        )

    def pretraining(self) -> tuple[Pretraining, ...]:
        """Return the plan for the auto-encoder of the teacher's maps, at a constant learning rate."""
        plan = Pretraining(
            self.auto_encoder, self._reconstruction_loss, self.factor_epochs, self.factor_lr, milestones=()
        )
        return (plan,)

    def _reconstruction_loss(self, teacher: nn.Module | None, batch: Batch) -> Tensor:
        _, maps = self.teacher_forward(teacher, batch.x)
        return self.auto_encoder(maps)[1]

    def forward(self, student: nn.Module, teacher: nn.Module | None, batch: Batch) -> Outcome:
        """Return the loss of a batch.

        `terms` are "inheritance" and "exploration", INH and EXP without their weights. If `kd_weight` is not 0, also "kl", the
        mean KL divergence of the selected rows at temperature T, in nats, without its weight and T^2.
        """
        logits, maps = self.student_forward(student, batch.x)
        rows = select_batch_rows(logits, self.batch_keep)
        target_logits, target_maps = self.teacher_forward(teacher, take_rows(batch.x, rows))
        with torch.no_grad():
            target = self.auto_encoder.encoder(target_maps)
        losses = self.factor_losses(self.student_encoder(take_rows(maps, rows)), target)
        weights = {"temperature": self.temperature, "kd_weight": self.kd_weight, "ce_weight": self.ce_weight}
        weights |= {"label_smoothing": self.label_smoothing, "standardize": self.standardize}
        loss, value, kd_terms, kl = distill_if_weighted(logits, target_logits, batch.label, rows, **weights)
        terms = {name: x.detach() for name, x in losses.items()}
        return Outcome(self.weighted_sum(losses) + loss, logits.detach(), value, {**terms, **kd_terms}, kl=kl)


class InheritanceExplorationMutualLearning(_FactorMethod):
    """Mutual learning with inheritance and exploration (IE-DML): the student and a peer learn from each other, no teacher.

        loss = L(student, peer) + L(peer, student)
             + both auto-encoders' reconstruction

    The knowledge value is the student's entropy. In L(A, B), A's logits and maps are differentiable and B's are constant:

        L(A, B) = ce_weight * CE(A) + kl_weight * T^2 * mean KL(B || A)
                + inheritance_weight * INH(A_inh, F_B)
                + exploration_weight * EXP(A_exp, F_B)

    INH and EXP are those of `InheritanceExplorationDistillation`. Each network has an auto-encoder of its maps, which computes
    F. It trains beside the network, with the maps as constants, so no reconstruction loss reaches a network.

    The peer is a part of the method: trained, saved and resumed with it, and dropped at the end.

    The authors' repository has no IE-DML, so this is rebuilt:

    - From IE-KD: encoders, decoders, distances and the weights of 1.
    - From the repository's plain mutual learning (loss/mutual.py, processors/DML.py): T = 1 and the direction of the
      divergence. Its weight of 1 is in config/DML/cifar100/resnet56-20.yaml (main.py's default is 0). There the networks step
      in turn, and the second sees the first one's new weights; here both take one step together.
    - Our choice: whose factors are compared, and that the auto-encoders train beside the networks. Factors of different sizes
      are averaged as in IE-KD. We do not claim the paper's numbers.

    Args:
        ce_weight: Weight of the cross entropy, finite.
        kl_weight: Weight of the KL divergence, finite.
        inheritance_weight: Weight of inheritance (INH), finite.
        exploration_weight: Weight of exploration (EXP), finite.
        temperature: T of the KL divergence, > 0.
        distance: "l1" or "cosine".
        split: "natural", the first half of the channels inherits and the second explores, or "permuted", in a fixed random
            order. The channels of both networks are split.
        split_seed: Seed of the permuted order, >= 0; any value but 0 is refused with the natural split.
        peer: A network by name or `module:function`, built by `kcd_ext.models.build` for the student's input channels and
            classes. None: a copy of the student, with all weights redrawn from torch's generator by the `reset_parameters` of
            its modules; all of them are trained.
        student_layer: The student's layer whose output (b, c, h, w) is compared, a name in `named_modules()`. None: the last
            of its `stages`, which every network in `kcd_ext.models` has.
        peer_layer: The same for the peer.
        label_smoothing: Label smoothing of the cross entropy, in [0, 1], for both networks.
        standardize: Compare the z-scores of each row's logits in the KL divergence (`kd.standardized`, Sun et al., CVPR 2024).

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, or has no effect.
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
        label_smoothing: float = 0.0,
        standardize: bool = False,
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
        self.set_label_smoothing(label_smoothing, ce_weight)
        self.set_options(check_bool, standardize=standardize)
        self.set_factor_options(distance, split, split_seed)
        if peer is not None and not isinstance(peer, str):
            raise TypeError(f"peer must be a network's name, module:function or None, got {type(peer).__name__}")
        self.peer = peer
        self.peer_layer = check_layer("peer_layer", peer_layer)

    def prepare(self, student: nn.Module, teacher: nn.Module | None, samples: Iterable[Batch]) -> None:
        """Build the peer, tap both networks, and build their auto-encoders and encoders. `teacher` is ignored.

        Raises:
            TypeError: As `kcd_ext.models.build`.
            ValueError: As `kcd_ext.models.build`; the peer's logits have another shape than the student's; the copied
                student cannot be redrawn; a layer does not exist, or has an odd number of channels.
            RuntimeError: A layer did not run, or its output is not a map.
        """
        self.release()
        x = next(iter(samples)).x[:1]
        # Copied before the student is tapped, so without a hook.
        peer = _reinitialised_copy(student) if self.peer is None else None
        logits, maps = self.probe("student", student, x)
        if peer is None:
            peer = models.build(self.peer, in_channels=x.shape[1], num_classes=logits.shape[1])
        self.peer_network = _to_working_layout(peer, x).requires_grad_(True).train()
        peer_logits, peer_maps = self.probe("peer", self.peer_network, x)
        if peer_logits.shape != logits.shape:
            raise ValueError(
                f"peer must give logits of the student's shape {tuple(logits.shape)}, got {tuple(peer_logits.shape)}"
            )
        _check_even_channels(self._taps, {"student": maps, "peer": peer_maps})
        channels, peer_channels = maps.shape[1], peer_maps.shape[1]
        self.student_auto_encoder = _to_channels_last(FactorAutoEncoder(channels), x.device)
        self.peer_auto_encoder = _to_channels_last(FactorAutoEncoder(peer_channels), x.device)
        self.student_encoder = _to_channels_last(self.make_split_encoder(channels, peer_channels // 2), x.device)
        self.peer_encoder = _to_channels_last(self.make_split_encoder(peer_channels, channels // 2), x.device)

    def forward(self, student: nn.Module, teacher: nn.Module | None, batch: Batch) -> Outcome:
        """Return the loss of a batch.

        `terms` are, for the student, "inheritance", "exploration" and "kl" (in nats), without their weights and T^2; then
        "peer_ce", the peer's cross entropy, and "reconstruction", the sum of both auto-encoders' losses.
        """
        logits, maps = self.student_forward(student, batch.x)
        peer_logits, peer_maps = self._run("peer", self.peer_network, batch.x)
        factors, reconstruction = self.student_auto_encoder(maps.detach())
        peer_factors, peer_reconstruction = self.peer_auto_encoder(peer_maps.detach())
        losses = self.factor_losses(self.student_encoder(maps), peer_factors.detach())
        peer_losses = self.factor_losses(self.peer_encoder(peer_maps), factors.detach())
        weights = {"temperature": self.temperature, "kd_weight": self.kl_weight, "ce_weight": self.ce_weight}
        weights |= {"label_smoothing": self.label_smoothing, "standardize": self.standardize}
        distilled, value, kl = distill_rows(logits, peer_logits.detach(), batch.label, **weights)
        peer_distilled, _, _ = distill_rows(peer_logits, logits.detach(), batch.label, **weights)

        reconstruction = reconstruction + peer_reconstruction
        loss = distilled + self.weighted_sum(losses) + peer_distilled + self.weighted_sum(peer_losses) + reconstruction
        terms = {
            **{name: x.detach() for name, x in losses.items()},
            "kl": kl.mean(),
            "peer_ce": functional.cross_entropy(
                at_least_float32(peer_logits.detach()), batch.label, label_smoothing=self.label_smoothing
            ),
            "reconstruction": reconstruction.detach(),
        }
        return Outcome(loss, logits.detach(), value, terms, kl=kl)


def _convolution(in_channels: int, out_channels: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    return (
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.LeakyReLU(SLOPE),
    )


def _directions(x: Tensor) -> Tensor:
    """Return the directions (b, n) of samples (b, ...), at least float32."""
    return unit_rows(x.flatten(1), offset=0)


def _to_channels_last(part: nn.Module, device: torch.device) -> nn.Module:
    """Move a part to the device, in channels-last layout like the networks' maps."""
    return part.to(device, memory_format=torch.channels_last)


def _to_working_layout(network: nn.Module, x: Tensor) -> nn.Module:
    """Move a network to the device in channels-last layout, or in its own layout if it runs only in that."""
    original = copy.deepcopy(network)
    moved = _to_channels_last(network, x.device)
    try:
        with evaluation_mode(moved), torch.no_grad():
            moved(x)
    except RuntimeError:
        return original.to(x.device)
    return moved


def _last_stage(network: nn.Module, name: str) -> str:
    stages = stages_of(network)
    if not stages:
        raise ValueError(
            f"the {name} has no `stages`, a tuple of layer names, to take maps from: set {name}_layer to a name in "
            f"{name}.named_modules()"
        )
    return stages[-1]


def _check_even_channels(taps: Mapping[str, Tap], maps: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a network's number of channels is odd."""
    if any(x.shape[1] % 2 for x in maps.values()):
        found = " and ".join(f"{name}_layer {taps[name].path!r} gives {tuple(x.shape)}" for name, x in maps.items())
        raise ValueError(f"maps (b, c, h, w) must have an even number of channels, to be split in halves: {found}")


def _reinitialised_copy(network: nn.Module) -> nn.Module:
    """Return a copy with newly drawn weights. They are drawn on the CPU, so that they do not depend on the device."""
    fresh = copy.deepcopy(network).cpu()
    for path, module in fresh.named_modules():
        if callable(getattr(module, "reset_parameters", None)):
            module.reset_parameters()
        elif any(True for _ in module.parameters(recurse=False)):
            raise ValueError(
                f"peer must be a network's name or module:function: the weights of a copy of the student cannot be redrawn, "
                f"because its {path or 'outermost module'!r} ({type(module).__name__}) has parameters but no "
                f"reset_parameters()"
            )
    return fresh
