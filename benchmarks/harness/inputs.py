"""Random logits that calls take in turn."""

import torch
from torch import Tensor

from .candidates import IGNORED, Candidate
from .places import Shape


class Produced(torch.autograd.Function):
    """`Produced.apply(anchor, logits)`: the logits as if a model had made them, not copied.

    They are no leaf, so that the gradient may take their place.  The anchor is any tensor that requires grad.
    """

    @staticmethod
    def forward(ctx, anchor: Tensor, logits: Tensor) -> Tensor:
        """Another tensor over the same memory."""
        return logits.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, None]:
        """Ends here."""
        return None, None


class Rotation:
    """Random logits of one shape, one set or several that calls take in turn."""

    def __init__(self, shape: Shape, sets: int, device: str) -> None:
        size = (sets, shape.rows, shape.classes)
        self._student = torch.empty(size, dtype=shape.dtype, device=device).normal_()
        self._original: Tensor | None = None
        self.students = list(self._student)
        self.teachers = list(torch.empty(size, dtype=shape.dtype, device=device).normal_())
        self.labels = [_labels(shape).to(device) if shape.ignored is not None else None for _ in range(sets)]
        self._leaves = [x.detach().requires_grad_() for x in self.students]
        self._anchor = torch.ones((), device=device, requires_grad=True)
        self._last = self._leaves[0]
        self._next = 0

    def __len__(self) -> int:
        return len(self.students)

    def rewind(self) -> None:
        """The next call takes the first set."""
        self._next = 0

    def keep_original(self) -> None:
        """From now on `restore` undoes what calls overwrite."""
        self._original = self._student.clone()

    def restore(self) -> None:
        """The students' logits as they were when `keep_original` was called, if it was."""
        if self._original is not None:
            self._student.copy_(self._original)

    def forget_original(self) -> None:
        """Frees the copy."""
        self._original = None

    def loss(self, candidate: Candidate, keep: float, *, backward: bool) -> Tensor:
        """Of the next set."""
        i, self._next = self._next, (self._next + 1) % len(self.students)
        self._last = self._leaves[i]
        student = self._last if backward else self.students[i]
        if backward and candidate.inplace:
            student = Produced.apply(self._anchor, self.students[i])
        return candidate.loss(student, self.teachers[i], self.labels[i], keep)

    def free_gradient(self) -> None:
        """That of the last call."""
        self._last.grad = None

    def call(self, candidate: Candidate, keep: float, *, backward: bool) -> Tensor:
        """One call on the next set: its loss.  The gradient is freed, except where it takes the logits' place."""
        loss = self.loss(candidate, keep, backward=backward)
        if backward:
            loss.backward()
            self.free_gradient()
        return loss


def _labels(shape: Shape) -> Tensor:
    """int64 (rows,), the fraction of them that is to be ignored at random rows."""
    labels = torch.randint(shape.classes, (shape.rows,))
    labels[torch.randperm(shape.rows)[: shape.n_ignored]] = IGNORED
    return labels
