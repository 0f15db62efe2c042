"""`kcd teacher`: a network trained by its labels."""

from dataclasses import dataclass, field, replace
from typing import Annotated

from tyro.conf import arg

from .. import models
from ..training.loop import build_method
from . import presets
from .options import ALONE, NETWORKS, RecipeArgs, TrainingOptions
from .study import TEACHER, Run, Study


@dataclass(frozen=True)
class Train(TrainingOptions):
    """Trains a teacher with cross entropy. Its folder is what --teacher of `kcd distill` takes."""

    network: Annotated[
        str | None,
        arg(
            help=f"A network: {NETWORKS}, or module:function, which takes in_channels and num_classes. None: that which goes "
            "with the data (digits, mnist5k)."
        ),
    ] = None
    recipe: Annotated[RecipeArgs, arg(name="")] = field(default_factory=lambda: RecipeArgs(method=ALONE))

    def defaults(self) -> "Train":
        """The defaults of all options that are not given."""
        return Train(recipe=replace(self.recipe.defaults(), method=ALONE))

    def study(self) -> Study:
        """Return the teacher's run. Raises as `run` does."""
        data, pair = self.images.load(), presets.OF_DATA.get(self.images.data)
        network = pair.teacher if self.network is None and pair else models.canonical(self.network)
        if network is None:
            raise ValueError(f"--network must be given: none goes with data {self.images.data!r}")
        recipe = replace(self.recipe.resolve_method(), name=self.recipe.name or TEACHER)
        if build_method(recipe).needs_teacher:
            raise ValueError(f"method {recipe.method!r} needs a teacher: take {ALONE}, or kcd distill")
        output = self.folder(network, TEACHER, recipe.seed)
        return self.study_of("kcd teacher", data, [Run(network, recipe, output)], output)
