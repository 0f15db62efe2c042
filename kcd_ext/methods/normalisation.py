"""Batch normalisation of parts that methods train."""

from torch import Tensor, nn
from torch.nn import functional


class BatchNormalisation(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` that also trains on one value per channel, as of one sample whose maps have one pixel.

    A single value has no variance, so it is normalised by the running statistics, which stay as they are.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return x (b, c, h, w), normalised."""
        if x.shape[0] * x.shape[2] * x.shape[3] > 1:
            return super().forward(x)
        return functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
