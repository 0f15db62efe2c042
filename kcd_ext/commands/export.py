"""The `kcd export` command: write the student of a finished run for other programs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import FlagCreatePairsOff, Positional, arg

from .. import terminal
from ..exporting import FORMATS, export, export_format
from ..students import load_student


@dataclass(frozen=True)
class Export:
    """Export the student of a finished run to safetensors, ONNX or torch.export.

    The model takes images (b, channels, height, width) float32 and returns logits (b, classes), for any b. The command
    reads the file back and compares its logits with the network's.
    """

    run_folder: Annotated[
        Positional[Path | None], arg(metavar="RUN", help="The run folder of kcd distill, kcd teacher or kcd demo.")
    ] = None
    format: Annotated[str, arg(help=f"One of {', '.join(FORMATS)}. safetensors holds the weights only.")] = "onnx"
    output: Path | None = None
    """The file to write. It must not exist. None: student.onnx, student.pt2 or student.safetensors."""
    include_normalisation: Annotated[bool, FlagCreatePairsOff] = False
    """Put the normalisation into the model: it then takes pixels, float32 from 0 to 255."""

    def run(self) -> None:
        """Load the student, write the file and print how far its outputs are from the network's.

        Raises:
            TypeError, ValueError: an option is invalid, the run is damaged, or the network cannot be exported.
            FileExistsError: the output exists.
            OSError: there is no such run, or the file cannot be written.
        """
        if self.run_folder is None:
            raise ValueError("kcd export needs a run folder: kcd export RUN --format FORMAT")
        student = load_student(self.run_folder)
        output = Path(f"student{export_format(self.format).suffix}") if self.output is None else self.output
        difference = export(student, output, self.format, include_normalisation=self.include_normalisation)
        size = student.preprocess
        takes = "pixels from 0 to 255" if self.include_normalisation else "normalised pixels"
        terminal.print_lines(
            f"{output}: {output.stat().st_size:,} bytes; x: float32 (b, {size.channels}, {size.height}, {size.width}), "
            f"{takes}; largest difference of a logit from the network's: {difference:.2g}"
        )
