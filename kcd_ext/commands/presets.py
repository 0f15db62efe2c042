"""Teachers and students by name: the pairs that KCD is compared on, and the pair of networks that serves our data."""

from typing import NamedTuple


class Pair(NamedTuple):
    """A teacher, its student, and the learning rates that they are trained with."""

    teacher: str
    student: str
    lr: float = 0.05
    teacher_lr: float = 0.05


LIGHT = 0.01  # the learning rate of MobileNetV2 and ShuffleNets

# The CIFAR-100 comparison of Li et al., ECCV 2022, whose recipe is the default of `Recipe` in all else.
CIFAR100 = (
    Pair("wrn_40_2", "wrn_16_2"),
    Pair("wrn_40_2", "wrn_40_1"),
    Pair("resnet56", "resnet20"),
    Pair("resnet32x4", "resnet8x4"),
    Pair("vgg13", "vgg8"),
    Pair("vgg13", "mobilenet_v2", LIGHT),
    Pair("resnet50", "mobilenet_v2", LIGHT),
    Pair("resnet50", "vgg8"),
    Pair("resnet32x4", "shufflenet_v1", LIGHT),
    Pair("resnet32x4", "shufflenet_v2", LIGHT),
    Pair("wrn_40_2", "shufflenet_v1", LIGHT),
)
RECIPES = {f"cifar100-{pair.teacher}-{pair.student}": pair for pair in CIFAR100}

OF_DATA = dict.fromkeys(("digits", "mnist5k"), Pair("cnn_large", "cnn_small"))
