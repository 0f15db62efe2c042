"""Sets of random logits that calls use in turn."""

import torch
from torch import Tensor

from .candidates import IGNORED, Candidate
from .cases import Shape


class Produced(torch.autograd.Function):
    """`Produced.apply(anchor, logits)`: the logits as if a model had produced them, without a copy.

    The result is not a leaf, so its memory may be reused for the gradient. `anchor` is any tensor that requires grad.
    """

    @staticmethod
    def forward(ctx, anchor: Tensor, logits: Tensor) -> Tensor:
        """Return another tensor over the same memory."""
        return logits.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, None]:
        """Stop the gradient."""
        return None, None


class Rotation:
    """Random logits of one shape: one set, or several that calls use in turn."""

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
        """Start again with the first set."""
        self._next = 0

    def keep_original(self) -> None:
        """Copy the students' logits, so that `restore` can undo in-place calls."""
        self._original = self._student.clone()

    def restore(self) -> None:
        """Restore the students' logits from the copy, if `keep_original` made one."""
        if self._original is not None:
            self._student.copy_(self._original)

    def forget_original(self) -> None:
        """Free the copy."""
        self._original = None

    def loss(self, candidate: Candidate, keep: float, *, backward: bool) -> Tensor:
        """Return the candidate's loss on the next set."""
        i, self._next = self._next, (self._next + 1) % len(self.students)
        self._last = self._leaves[i]
        student = self._last if backward else self.students[i]
        if backward and candidate.inplace:
            student = Produced.apply(self._anchor, self.students[i])
        return candidate.loss(student, self.teachers[i], self.labels[i], keep)

    def free_gradient(self) -> None:
        """Free the gradient of the last call."""
        self._last.grad = None

    def call(self, candidate: Candidate, keep: float, *, backward: bool) -> Tensor:
        """Call the candidate on the next set and return its loss. Frees the gradient unless it overwrites the logits."""
        loss = self.loss(candidate, keep, backward=backward)
        if backward:
            loss.backward()
            self.free_gradient()
        return loss


def _labels(shape: Shape) -> Tensor:
    """Return random labels, int64 (rows,), with the requested fraction ignored at random rows."""
    labels = torch.randint(shape.classes, (shape.rows,))
    labels[torch.randperm(shape.rows)[: shape.n_ignored]] = IGNORED
    return labels
