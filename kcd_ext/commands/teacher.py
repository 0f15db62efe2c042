"""The `kcd teacher` command: train a network on labels."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from .. import models
from ..training.setup import build_method
from . import presets, teachers
from .options import NETWORKS, TEACHER_METHOD, RecipeArgs, TrainingOptions
from .study import TEACHER, PlannedRun, Study


@dataclass(frozen=True)
class Train(TrainingOptions):
    """Train a teacher with cross entropy. Pass its run folder to `kcd distill --teacher`."""

    network: Annotated[
        str | None,
        arg(help=f"The network: {NETWORKS}. None: the default for the data (digits, mnist5k)."),
    ] = None
    weights: Annotated[
        Path | None,
        arg(
            help="A weights file or a finished run's folder to start from; a head for another number of classes starts from the "
            "seed. None: the weights in the folder of an hf: network, else all from the seed."
        ),
    ] = None
    recipe: Annotated[RecipeArgs, arg(name="")] = field(default_factory=lambda: RecipeArgs(method=TEACHER_METHOD))

    def defaults(self) -> "Train":
        """Return the defaults of all options, which depend on the method."""
        return Train(recipe=replace(self.recipe.defaults(), method=TEACHER_METHOD))

    def study(self) -> Study:
        """Return the teacher's run. Raises as `run` does."""
        data, pair = self.images.load(), presets.DEFAULT_PAIRS.get(self.images.data)
        network = pair.teacher if self.network is None and pair else models.canonical(self.network)
        if network is None:
            raise ValueError(f"--network is required: there is no default network for data {self.images.data!r}")
        start = teachers.find_start(network, self.weights, "weights")
        data = self.images.normalised_for(start, data)
        recipe = replace(self.recipe.resolve_method(), name=self.recipe.name or TEACHER)
        if build_method(recipe).needs_teacher:
            raise ValueError(f"method {recipe.method!r} needs a teacher: use {TEACHER_METHOD}, or run kcd distill")
        output = self.folder(network, TEACHER, recipe.seed)
        return self.study_of("kcd teacher", data, [PlannedRun(network, recipe, output, start=start)], output)
