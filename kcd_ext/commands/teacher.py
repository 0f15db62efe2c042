"""`kcd teacher`: a network trained by its labels."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import FlagCreatePairsOff, arg

from .. import models, processes
from ..training.loop import build_method
from . import presets
from .options import ALONE, NETWORKS, Images, RecipeArgs, as_json, checked_threads, slug
from .study import TEACHER, Run, Study


@dataclass(frozen=True)
class Train:
    """Trains a teacher with cross entropy. Its folder is what --teacher of `kcd distill` takes."""

    network: Annotated[
        str | None,
        arg(
            help=f"A network: {NETWORKS}, or module:function, which takes in_channels and num_classes. None: that which goes "
            "with the data (digits, mnist5k)."
        ),
    ] = None
    output: Path | None = None
    """The folder for the results. None: runs/DATA-NETWORK-teacher-SEED."""
    resume: Annotated[bool, FlagCreatePairsOff] = False
    """Goes on with what an interrupted command of the same options has left there."""
    threads: int | None = None
    """Threads of torch on the CPU. None: those of the run that goes on, else one for every 16 GFLOPs of a training step."""
    images: Annotated[Images, arg(name="")] = field(default_factory=Images)
    recipe: Annotated[RecipeArgs, arg(name="")] = field(default_factory=lambda: RecipeArgs(method=ALONE))

    def defaults(self) -> "Train":
        """The defaults of all options that are not given."""
        return Train(recipe=replace(self.recipe.defaults(), method=ALONE))

    def run(self) -> None:
        """As `Distill.run`."""
        with processes.report_on_rank_zero():
            study = self.study().checked()
        study.run()

    def study(self) -> Study:
        """Return the run that the options ask for. Raises as `Distill.run` does."""
        data, pair = self.images.load(), presets.OF_DATA.get(self.images.data)
        network = pair.teacher if self.network is None and pair else models.canonical(self.network)
        if network is None:
            raise ValueError(f"--network must be given: none goes with data {self.images.data!r}")
        recipe = replace(self.recipe.resolve_method(), name=self.recipe.name or TEACHER)
        if build_method(recipe).needs_teacher:
            raise ValueError(f"method {recipe.method!r} needs a teacher: take {ALONE}, or kcd distill")
        name = "-".join((self.images.slug, slug(network), TEACHER, str(recipe.seed)))
        output = Path("runs") / name if self.output is None else self.output
        return Study(
            command="kcd teacher",
            options=as_json(self),
            data=data,
            data_options=self.images.as_json(),
            runs=[Run(network, recipe, output)],
            output=output,
            resume=self.resume,
            threads=checked_threads(self.threads),
        )
