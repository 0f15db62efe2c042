"""Contrastive representation distillation (Tian et al., ICLR 2020): a sample's two embeddings against all other samples."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..checks import check_finite, check_int, check_positive, check_unit_interval
from .features import FeatureMethod, full_precision, unit_rows
from .protocol import Batch, Outcome, entropy
from .selection import select_batch_rows, take_rows


class ContrastiveRepresentationDistillation(FeatureMethod):
    """Contrastive representation distillation (CRD) of the penultimate features, Tian et al., ICLR 2020.

        loss = ce_weight * CE + crd_weight * CRD

    The knowledge value is the student's entropy. Two linear layers, trained with the student, embed both networks' features
    as unit vectors s_i and t_i. Two memory banks hold an embedding of every training sample. For each sample i, draw K
    negatives j from the samples of other classes. With h(a) = e^(a/T) / (e^(a/T) + Z K/N) (Eq. 19; K/N is K times the
    density of the noise),

        CRD = mean_i (-log h(s_i . teacher_memory_i)
                      - sum_j log(1 - h(s_i . teacher_memory_j)))
            + the same of t_i and student_memory.

    Each direction has its own Z: N times the mean of e^(a/T) over the first batch, constant afterwards. (If that batch is
    all padding, the mean runs over the padding.) After each batch the memory of its samples becomes
    momentum * memory + (1 - momentum) * embedding, scaled to length 1. Samples that condensation has dropped are still drawn
    as negatives, with the embeddings they had when they were dropped.

    This follows RepDistiller's code, with these deliberate differences:

    - Negatives are drawn uniformly with replacement, because noise-contrastive estimation assumes independent draws of its
      noise. RepDistiller draws without replacement while there are enough.
    - h is a logistic function of a/T - log(Z K/N), which cannot overflow. RepDistiller adds 1e-7 to denominators.
    - Rows with index -1, which only pad, are ignored. If a batch contains a sample more than once, its last row is remembered;
      in RepDistiller that depends on the device.
    - With several ranks (torch.distributed's default group), each rank remembers the rows of all ranks, and Z is the mean
      over all ranks. So their banks are equal. Every rank must call with the same number of rows.

    Buffers: `student_memory` and `teacher_memory` are float32 (N + 1, dimension), by index; the last row, always zeros,
    absorbs the rows that are not remembered. `log_z` (2,) is NaN before the first batch.

    Args:
        dimension: Size of the embeddings, >= 1.
        negatives: K, the number of negatives for each sample, >= 1.
        temperature: T of the scores, > 0.
        momentum: Share of the old memory in the new one, in [0, 1].
        ce_weight: Weight of the cross entropy, finite; 1 in RepDistiller's comparison, which KCD builds on.
        crd_weight: Weight of the contrastive term, CRD, finite; 0.8 in the same comparison.
        batch_keep: Fraction of each batch that the teacher runs on, and that is contrasted and remembered, in (0, 1]: the
            rows of highest student entropy (`selection.select_batch_rows`). 1: all rows.
        student_layer: The student's layer whose input is embedded, a name in `named_modules()` (`features.Tap`). None: the last
            linear layer.
        teacher_layer: The same for the teacher.
        label_smoothing: Label smoothing of the cross entropy, in [0, 1].

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        dimension: int = 128,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        ce_weight: float = 1.0,
        crd_weight: float = 0.8,
        batch_keep: float = 1.0,
        student_layer: str | None = None,
        teacher_layer: str | None = None,
        label_smoothing: float = 0.0,
    ):
        super().__init__(student_layer, teacher_layer, batch_keep)
        self.dimension = check_int("dimension", dimension, 1)
        self.negatives = check_int("negatives", negatives, 1)
        self.set_options(check_positive, temperature=temperature)
        self.set_options(check_unit_interval, momentum=momentum)
        self.set_options(check_finite, ce_weight=ce_weight, crd_weight=crd_weight)
        self.set_label_smoothing(label_smoothing, ce_weight)
        # Avoids reading `log_z` from the device. False before the first batch and after loading a state.
        self._log_z_is_set = False
        self.register_load_state_dict_post_hook(_forget_log_z_is_set)

    def prepare(self, student: nn.Module, teacher: nn.Module | None, samples: Iterable[Batch]) -> None:
        """Build embeddings and memory, and index the samples by class.

        Raises:
            ValueError: All samples have one class, or `samples` does not yield each sample once by ascending index.
        """
        super().prepare(student, teacher, samples)
        label = _all_labels(samples)
        n, device = len(label), label.device
        size = label.bincount()
        if (size > 0).sum() < 2:
            raise ValueError(
                f"crd draws negatives from samples of other classes, but all {n} samples have class {int(label[0])}"
            )
        # Samples grouped by class. Not saved, because a resumed run computes them again.
        self.register_buffer("samples_by_class", label.argsort(stable=True), persistent=False)
        self.register_buffer("class_size", size, persistent=False)
        self.register_buffer("class_start", size.cumsum(0) - size, persistent=False)

        self.student_embedding = nn.Linear(self.student_width, self.dimension).to(device)
        self.teacher_embedding = nn.Linear(self.teacher_width, self.dimension).to(device)
        for name in ("student_memory", "teacher_memory"):
            # Uniform with a mean squared length of 1, as published.
            memory = (torch.rand(n + 1, self.dimension) * 2 - 1) * math.sqrt(3 / self.dimension)
            memory[n] = 0
            self.register_buffer(name, _from_rank_zero(memory.to(device)))
        self.register_buffer("log_z", torch.full((2,), math.nan, device=device))
        self._log_z_is_set = False

    def forward(self, student: nn.Module, teacher: nn.Module | None, batch: Batch) -> Outcome:
        """Return the loss of a batch. `terms["crd"]` is CRD without its weight."""
        logits, features = self.student_forward(student, batch.x)
        rows = select_batch_rows(logits, self.batch_keep)
        _, target = self.teacher_forward(teacher, take_rows(batch.x, rows))
        with full_precision(logits):
            embeddings = (
                unit_rows(self.student_embedding(take_rows(features, rows).float())),
                unit_rows(self.teacher_embedding(target.float())),
            )
            crd = self._crd_loss(embeddings, take_rows(batch.index, rows), take_rows(batch.label, rows))
        cross_entropy = functional.cross_entropy(logits, batch.label, label_smoothing=self.label_smoothing)
        loss = self.ce_weight * cross_entropy + self.crd_weight * crd
        return Outcome(loss, logits.detach(), entropy(logits), {"crd": crd.detach()})

    def draw_negatives(self, label: Tensor) -> Tensor:
        """Return indices (b, K) of negatives for classes (b,), drawn uniformly from the samples of other classes."""
        class_size = self.class_size[label][:, None]
        others = len(self.samples_by_class) - class_size
        # The modulo's bias is at most N / 2^62.
        position = torch.randint(2**62, (len(label), self.negatives), device=label.device) % others
        position += class_size * (position >= self.class_start[label][:, None])  # skip the sample's own class
        return self.samples_by_class[position]

    # All scores of a sample against the memory come from one matrix product; negatives are counted among them. For each
    # direction that reads 4 N dimension bytes and touches a few times 4 N b: 26 and 13 MB for CIFAR-100's 50,000 samples and
    # batches of 64. Published code gathers the negatives' vectors: it writes 4 b (K + 1) dimension bytes and reads them twice,
    # 537 MB each time, for any N. The two break even near a million samples. Also, every sum here has a fixed order, in
    # the backward pass too; with gathered vectors, gradients of a sample drawn twice would be added in any order.

    def _crd_loss(self, embeddings: tuple[Tensor, Tensor], index: Tensor, label: Tensor) -> Tensor:
        """Return CRD () of the student's and the teacher's unit vectors (b, dimension), then update the memory with them."""
        padding = index < 0
        positive = index.masked_fill(padding, 0)[:, None]
        row_weight = ~padding / (~padding).sum().clamp(min=1)  # (b,) for the mean over the rows that are not padding
        negatives = self.draw_negatives(label)
        counts = self.log_z.new_zeros(len(index), len(self.samples_by_class))
        counts.scatter_add_(1, negatives, counts.new_ones(()).expand_as(negatives))  # integers: exact in any order

        # The student's embeddings against the teacher's memory, and vice versa.
        banks = [memory[:-1] for memory in (self.teacher_memory, self.student_memory)]
        with torch.no_grad():
            scores = [anchor @ bank.T / self.temperature for anchor, bank in zip(embeddings, banks, strict=True)]
            if not self._log_z_is_set:
                log_mean = torch.stack(
                    [_log_mean_exp(score, counts.scatter(1, positive, 1), ~padding) for score in scores]
                )
                self.log_z.copy_(
                    torch.where(self.log_z.isnan(), log_mean + math.log(len(self.samples_by_class)), self.log_z)
                )
                self._log_z_is_set = True
            offset = self.log_z + math.log(self.negatives / len(self.samples_by_class))
        losses = [
            _NoiseContrastiveLoss.apply(anchor, bank, score.sub_(shift), positive, counts, row_weight, self.temperature)
            for anchor, bank, score, shift in zip(embeddings, banks, scores, offset, strict=True)
        ]
        self._update_memory(index, *embeddings)
        return losses[0] + losses[1]

    @torch.no_grad()
    def _update_memory(self, index: Tensor, student: Tensor, teacher: Tensor) -> None:
        """Move the memory of samples `index` (b,) towards their embeddings (b, dimension): on each rank, those of all ranks."""
        index, student, teacher = (_all_gather(x).flatten(0, 1) for x in (index, student, teacher))
        superseded = (index[:, None] == index).triu(1).any(1)  # the sample appears again in a later row
        remembered = (index >= 0) & ~superseded
        target_row = index.where(remembered, len(self.samples_by_class))
        for memory, embedding in ((self.student_memory, student), (self.teacher_memory, teacher)):
            moved = unit_rows(self.momentum * memory[target_row] + (1 - self.momentum) * embedding)
            # All other rows are written to the last row as zeros, so the order of the writes does not matter.
            memory.index_copy_(0, target_row, moved.where(remembered[:, None], 0))


class _NoiseContrastiveLoss(torch.autograd.Function):
    """The loss of one direction. Computes the gradient in the forward pass, because the memory changes before backward.

    Args of `apply`:
        anchor: (b, dimension), differentiable.
        memory: (N, dimension).
        score: (b, N), log of h / (1 - h).
        positive: (b, 1), index of the positive.
        counts: (b, N), how often each negative was drawn; 0 at `positive`.
        row_weight: (b,), factor of each row's loss.
        temperature: score = anchor . memory / temperature - a constant.
    """

    @staticmethod
    def forward(ctx, anchor, memory, score, positive, counts, row_weight, temperature):
        positive_score = score.gather(1, positive)
        loss = functional.softplus(-positive_score).squeeze(1) + (counts * functional.softplus(score)).sum(1)
        slope = (counts * score.sigmoid()).scatter(1, positive, -(-positive_score).sigmoid())
        ctx.save_for_backward((slope * (row_weight / temperature)[:, None]) @ memory)
        return (row_weight * loss).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        (gradient,) = ctx.saved_tensors
        return grad_output * gradient, None, None, None, None, None, None


def _all_labels(samples: Iterable[Batch]) -> Tensor:
    """Return the labels (n,) of the training set: `samples.labels` if present, else those of all batches."""
    label = getattr(samples, "labels", None)
    if label is not None:
        return label
    labels, indices = zip(*((batch.label, batch.index) for batch in samples), strict=True)
    index = torch.cat(indices)
    if not torch.equal(index, torch.arange(len(index), device=index.device)):
        raise ValueError("samples must yield every sample of the training set once, by ascending index")
    return torch.cat(labels)


def _log_mean_exp(score: Tensor, counts: Tensor, rows: Tensor) -> Tensor:
    """Return log mean e^score (), weighted by `counts`, over the rows in the mask `rows` on all ranks.

    If no rank has such a row, use all rows, so that the result is always a number.
    """
    chosen = torch.stack([rows, torch.ones_like(rows)])
    log_sum = (score + counts.log()).logsumexp(1).where(chosen, -math.inf).logsumexp(1)
    number = (counts.sum(1) * chosen).sum(1)
    log_sums, numbers = _all_gather(torch.stack([log_sum, number])).unbind(1)
    of_chosen, of_all = (log_sums.logsumexp(0) - numbers.sum(0).log()).unbind()
    return of_chosen.where(numbers[:, 0].sum() > 0, of_all)


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _all_gather(x: Tensor) -> Tensor:
    """Return x of every rank, the same on all: (world_size, *x.shape)."""
    if not _is_distributed():
        return x[None]
    parts = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, x.contiguous())
    return torch.stack(parts)


def _from_rank_zero(x: Tensor) -> Tensor:
    """Return rank 0's x on every rank."""
    if _is_distributed():
        torch.distributed.broadcast(x, src=0)
    return x


def _forget_log_z_is_set(method: ContrastiveRepresentationDistillation, _) -> None:
    method._log_z_is_set = False
