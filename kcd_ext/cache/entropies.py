"""The teacher's entropy of each row, in one byte."""

import math

import numpy as np
import torch
from torch import Tensor

LEVELS = 255


def encode(logits: Tensor, temperature: float) -> np.ndarray:
    """Return round(255 · H / log V) of rows (n, V), uint8 (n,): H is the entropy of softmax(logits / temperature) in nats."""
    classes = logits.shape[-1]
    if classes == 1:
        return np.zeros(len(logits), np.uint8)
    entropy = torch.special.entr((logits.double() / temperature).softmax(-1)).sum(-1)
    return (LEVELS * entropy / math.log(classes)).round().clamp(0, LEVELS).to(torch.uint8).numpy()


def decode(codes: np.ndarray, classes: int) -> Tensor:
    """Return entropies in nats, float32, to within log(V) / 510."""
    return torch.from_numpy(codes.astype(np.float32)) * (math.log(classes) / LEVELS)
