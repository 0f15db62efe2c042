"""Presets of `kcd distill`: the network pairs of the paper, and the default pair for the small data sets."""

from typing import NamedTuple


class Pair(NamedTuple):
    """A teacher, its student and their learning rates."""

    teacher: str
    student: str
    lr: float = 0.05
    teacher_lr: float = 0.05


LIGHT_LR = 0.01  # for MobileNetV2 and the ShuffleNets

# The CIFAR-100 comparison of Li et al., ECCV 2022. Its other settings are the defaults of `Recipe`.
CIFAR100 = (
    Pair("wrn_40_2", "wrn_16_2"),
    Pair("wrn_40_2", "wrn_40_1"),
    Pair("resnet56", "resnet20"),
    Pair("resnet32x4", "resnet8x4"),
    Pair("vgg13", "vgg8"),
    Pair("vgg13", "mobilenet_v2", LIGHT_LR),
    Pair("resnet50", "mobilenet_v2", LIGHT_LR),
    Pair("resnet50", "vgg8"),
    Pair("resnet32x4", "shufflenet_v1", LIGHT_LR),
    Pair("resnet32x4", "shufflenet_v2", LIGHT_LR),
    Pair("wrn_40_2", "shufflenet_v1", LIGHT_LR),
)
PRESETS = {f"cifar100-{pair.teacher}-{pair.student}": pair for pair in CIFAR100}

DEFAULT_PAIRS = dict.fromkeys(("digits", "mnist5k"), Pair("cnn_large", "cnn_small"))
