"""Contrastive representation distillation (Tian et al., ICLR 2020): a sample's two embeddings against all others."""

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
    """loss = ce_weight * CE + crd_weight * CRD of the penultimate features; value: student's entropy.

    Two linear layers, trained with the student, embed both networks' features as unit vectors s_i and t_i. Two memory
    banks hold an embedding of every sample of the training set. With K negatives j drawn for sample i from the samples
    of other classes, and h(a) = e^(a/T) / (e^(a/T) + Z K/N) (Eq. 19; K/N is the noise's density times K),

        CRD = mean_i -log h(s_i . teacher_memory_i) - sum_j log(1 - h(s_i . teacher_memory_j))
            + the same of t_i and student_memory.

    Each direction's Z is N times the mean of e^(a/T) over the first batch, and stays (over its padding, if it holds
    nothing else). After every batch the memory of its samples becomes momentum * memory + (1 - momentum) * embedding,
    scaled to length 1. Where condensation has dropped samples they go on to be drawn as negatives, with the embeddings
    they had when they were dropped.

    As RepDistiller's code. Different, on purpose:

    - Negatives are drawn uniformly with replacement: noise-contrastive estimation takes them for independent draws of
      its noise. Theirs draws without, as long as there are enough.
    - h is computed as a logistic function of a/T - log(Z K/N), which cannot overflow; theirs adds 1e-7 to denominators.
    - Rows with index -1, which only pad, take no part. Of several rows of one sample in a batch the last one is
      remembered. (There, which one is remembered depends on the device.)
    - With several processes (torch.distributed's default group) all remember the rows of all, and Z is the mean over
      all: their banks are equal. Every process must call with equally many rows.

    Buffers `student_memory` and `teacher_memory` are float32 (N + 1, dimension): by index, and one row of zeros that takes
    what is not remembered. `log_z` (2,) is NaN before the first batch.

    Args:
        dimension: of the embeddings.
        negatives: K, the number of them for every sample.
        temperature: T > 0.
        momentum: in [0, 1].
        ce_weight, crd_weight: finite; 1 and 0.8 in the comparison of RepDistiller, which KCD builds on.
        batch_keep: the fraction of every batch that the teacher is asked about, that is contrasted and remembered, in
            (0, 1], by the student's entropy, the highest first (`selection.select_batch_rows`). 1: all.
        student_layer, teacher_layer: whose input the features are (`features.Tap`); None: the last linear layer's.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.
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
    ):
        super().__init__(student_layer, teacher_layer, batch_keep)
        self.dimension = check_int("dimension", dimension, 1)
        self.negatives = check_int("negatives", negatives, 1)
        self.set_options(check_positive, temperature=temperature)
        self.set_options(check_unit_interval, momentum=momentum)
        self.set_options(check_finite, ce_weight=ce_weight, crd_weight=crd_weight)
        # Whether `log_z` is known to hold numbers, without a look at it: not before a batch here, and not after a load.
        self._has_z = False
        self.register_load_state_dict_post_hook(_look_again)

    def prepare(self, student: nn.Module, teacher: nn.Module | None, samples: Iterable[Batch]) -> None:
        """Builds embeddings and memory, and learns which samples are of which class.

        Raises ValueError where all samples are of one class, or `samples` are not each sample once by ascending index.
        """
        super().prepare(student, teacher, samples)
        label = _labels_of(samples)
        n, device = len(label), label.device
        size = label.bincount()
        if (size > 0).sum() < 2:
            raise ValueError(
                f"crd draws negatives from samples of other classes, got {n} samples all of class {int(label[0])}"
            )
        # Sample by class, so that those of a class lie side by side: what a resumed run finds again is not saved.
        self.register_buffer("by_class", label.argsort(stable=True), persistent=False)
        self.register_buffer("class_size", size, persistent=False)
        self.register_buffer("class_start", size.cumsum(0) - size, persistent=False)

        self.student_embedding = nn.Linear(self.student_width, self.dimension).to(device)
        self.teacher_embedding = nn.Linear(self.teacher_width, self.dimension).to(device)
        for name in ("student_memory", "teacher_memory"):
            # Uniform, of length 1 in the mean square, as published.
            memory = (torch.rand(n + 1, self.dimension) * 2 - 1) * math.sqrt(3 / self.dimension)
            memory[n] = 0
            self.register_buffer(name, _of_first_process(memory.to(device)))
        self.register_buffer("log_z", torch.full((2,), math.nan, device=device))
        self._has_z = False

    def forward(self, student: nn.Module, teacher: nn.Module | None, batch: Batch) -> Outcome:
        """`terms["crd"]`: CRD without its weight."""
        logits, features = self.student_forward(student, batch.x)
        rows = select_batch_rows(logits, self.batch_keep)
        _, target = self.teacher_forward(teacher, take_rows(batch.x, rows))
        with full_precision(logits):
            embeddings = (
                unit_rows(self.student_embedding(take_rows(features, rows).float())),
                unit_rows(self.teacher_embedding(target.float())),
            )
            crd = self._contrast(embeddings, take_rows(batch.index, rows), take_rows(batch.label, rows))
        loss = self.ce_weight * functional.cross_entropy(logits, batch.label) + self.crd_weight * crd
        return Outcome(loss, logits.detach(), entropy(logits), {"crd": crd.detach()})

    def draw(self, label: Tensor) -> Tensor:
        """Negatives for samples of these classes (b,): indices (b, K), uniform over the samples of other classes."""
        own = self.class_size[label][:, None]
        others = len(self.by_class) - own
        # The remainder of so many numbers favours no sample by more than N / 2^62.
        place = torch.randint(2**62, (len(label), self.negatives), device=label.device) % others
        place += own * (place >= self.class_start[label][:, None])  # over the samples of its own class
        return self.by_class[place]

    # A sample's scores against the whole memory are one product of matrices, and the negatives are counted among them:
    # per direction 4 N dimension bytes are read and a few times 4 N b touched, 26 and 13 MB for the 50,000 samples of CIFAR-100
    # and batches of 64. To gather the vectors of the negatives, as published code does, is to write 4 b (K + 1) dimension bytes
    # and to read them twice, 537 MB each time, whatever N is. The two are even near a million samples. And every sum here
    # has a fixed order, backward too, where a sample drawn twice would else be added up in any.

    def _contrast(self, embeddings: tuple[Tensor, Tensor], index: Tensor, label: Tensor) -> Tensor:
        """CRD (), of unit vectors (b, dimension) of the student and the teacher; remembers them."""
        padding = index < 0
        own = index.masked_fill(padding, 0)[:, None]
        share = ~padding / (~padding).sum().clamp(min=1)  # (b,) of the mean over the rows that are no padding
        negatives = self.draw(label)
        counts = self.log_z.new_zeros(len(index), len(self.by_class))
        counts.scatter_add_(1, negatives, counts.new_ones(()).expand_as(negatives))  # whole numbers: exact in any order

        # Each student's embedding against the teacher's memory, and the other way round.
        banks = [memory[:-1] for memory in (self.teacher_memory, self.student_memory)]
        with torch.no_grad():
            scores = [anchor @ bank.T / self.temperature for anchor, bank in zip(embeddings, banks, strict=True)]
            if not self._has_z:
                found = torch.stack([_log_mean_exp(score, counts.scatter(1, own, 1), ~padding) for score in scores])
                self.log_z.copy_(torch.where(self.log_z.isnan(), found + math.log(len(self.by_class)), self.log_z))
                self._has_z = True
            offset = self.log_z + math.log(self.negatives / len(self.by_class))
        losses = [
            _NoiseContrast.apply(anchor, bank, score.sub_(shift), own, counts, share, self.temperature)
            for anchor, bank, score, shift in zip(embeddings, banks, scores, offset, strict=True)
        ]
        self._remember(index, *embeddings)
        return losses[0] + losses[1]

    @torch.no_grad()
    def _remember(self, index: Tensor, student: Tensor, teacher: Tensor) -> None:
        """Moves the memory of samples `index` (b,) towards embeddings (b, dimension), on all processes that of all of them."""
        index, student, teacher = (_of_all(x).flatten(0, 1) for x in (index, student, teacher))
        superseded = (index[:, None] == index).triu(1).any(1)  # a later row is of the same sample
        kept = (index >= 0) & ~superseded
        place = index.where(kept, len(self.by_class))
        for memory, embedding in ((self.student_memory, student), (self.teacher_memory, teacher)):
            moved = unit_rows(self.momentum * memory[place] + (1 - self.momentum) * embedding)
            # All that is not kept goes to the last row as zeros, so that no order of writing shows.
            memory.index_copy_(0, place, moved.where(kept[:, None], 0))


class _NoiseContrast(torch.autograd.Function):
    """The loss of one direction, with its gradient computed at once: the memory changes before the backward pass.

    Args of `apply`:
        anchor: (b, dimension), differentiable.
        memory: (N, dimension).
        score: (b, N) log of h / (1 - h).
        own: (b, 1) the positive's place.
        counts: (b, N) how often each negative was drawn; 0 at `own`.
        share: (b,) what a row's loss is multiplied by.
        temperature: of score = anchor . memory / temperature - a constant.
    """

    @staticmethod
    def forward(ctx, anchor, memory, score, own, counts, share, temperature):
        positive = score.gather(1, own)
        loss = functional.softplus(-positive).squeeze(1) + (counts * functional.softplus(score)).sum(1)
        slope = (counts * score.sigmoid()).scatter(1, own, -(-positive).sigmoid())
        ctx.save_for_backward((slope * (share / temperature)[:, None]) @ memory)
        return (share * loss).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        (gradient,) = ctx.saved_tensors
        return grad_output * gradient, None, None, None, None, None, None


def _labels_of(samples: Iterable[Batch]) -> Tensor:
    """(n,) of the whole training set: those in memory, or those of all batches. See `Method.prepare`."""
    label = getattr(samples, "labels", None)
    if label is not None:
        return label
    labels, indices = zip(*((batch.label, batch.index) for batch in samples), strict=True)
    index = torch.cat(indices)
    if not torch.equal(index, torch.arange(len(index), device=index.device)):
        raise ValueError("samples must be every sample of the training set once, by ascending index")
    return torch.cat(labels)


def _log_mean_exp(score: Tensor, counts: Tensor, rows: Tensor) -> Tensor:
    """log of the mean of e^score, each counted so often, over these rows of all processes: ().

    Over all rows where no process has any of these: there is a number to go on with in any case.
    """
    chosen = torch.stack([rows, torch.ones_like(rows)])
    log_sum = (score + counts.log()).logsumexp(1).where(chosen, -math.inf).logsumexp(1)
    number = (counts.sum(1) * chosen).sum(1)
    log_sums, numbers = _of_all(torch.stack([log_sum, number])).unbind(1)
    of_these, of_all = (log_sums.logsumexp(0) - numbers.sum(0).log()).unbind()
    return of_these.where(numbers[:, 0].sum() > 0, of_all)


def _several_processes() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _of_all(x: Tensor) -> Tensor:
    """x of every process, the same everywhere: (processes, *x.shape)."""
    if not _several_processes():
        return x[None]
    parts = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, x.contiguous())
    return torch.stack(parts)


def _of_first_process(x: Tensor) -> Tensor:
    if _several_processes():
        torch.distributed.broadcast(x, src=0)
    return x


def _look_again(method: ContrastiveRepresentationDistillation, _) -> None:
    method._has_z = False
