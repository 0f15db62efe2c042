"""The program that section ncu profiles with Nsight Compute: one call, forward and backward, per important shape."""

import sys

import torch

import kcd_ext

SHAPES = ((8192, 32_000, torch.bfloat16), (4096, 1000, torch.float32), (65_536, 10, torch.float32))
KEEP = 0.7
KERNELS = ("forward_rows", "backward_rows")  # of a call, in order


def name(shape: tuple[int, int, torch.dtype]) -> str:
    """Return a readable name of a shape."""
    rows, classes, dtype = shape
    return f"{rows} × {classes} {str(dtype).removeprefix('torch.')}"


def main() -> int:
    """Print a line per shape."""
    for shape in SHAPES:
        rows, classes, dtype = shape
        student = torch.empty(rows, classes, dtype=dtype, device="cuda").normal_().requires_grad_()
        teacher = torch.empty(rows, classes, dtype=dtype, device="cuda").normal_()
        loss = kcd_ext.condensed_kd_loss(student, teacher, keep=KEEP)
        (gradient,) = torch.autograd.grad(loss, student)
        print(f"{name(shape)}: loss {loss.item():.6g}, gradient up to {gradient.abs().max().item():.3g}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
