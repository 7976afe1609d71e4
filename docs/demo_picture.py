"""Write docs/demo.png from the results of `make demo`: `python docs/demo_picture.py out/demo`.

First row: phantoms that the model has not seen. Second row: the same after the autoencoder. Third row: volumes generated from
their reports. Arrows show where the reports have a lesion.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ccella_fast.commands import lesion_marks
from ccella_fast.evaluation.reconstruction import reconstructions
from ccella_fast.evaluation.volumes import open_volumes
from ccella_fast.report.figures import COLUMNS, Panel, montage

OUT = Path(__file__).resolve().parent / "demo.png"


def main() -> None:
    """Write the picture."""
    folder = Path(sys.argv[1])
    marks = lesion_marks(folder / "fresh_studies" / "studies.csv")
    real = open_volumes(folder / "fresh", field="real")
    generated = {volume.prompt: volume for volume in open_volumes(folder / "samples", field="samples")}
    shown = [case for case in marks if case in generated][:COLUMNS]
    panels = []
    for name, volumes in (
        ("Phantom", {volume.id: volume for volume in real}),
        ("Reconstructed", {volume.id: volume for volume in reconstructions(real, folder / "vae")}),
        ("Generated", generated),
    ):
        for number, case in enumerate(shown, start=1):
            asked = "" if name == "Reconstructed" else ": " + " ".join(filter(None, marks[case]))
            panels.append(Panel(volumes[case].array, volumes[case].spacing, f"{name} {number}{asked}", marks[case]))
    OUT.write_bytes(montage(panels, window=(0.0, 1.0), planes=["axial"]))


if __name__ == "__main__":
    main()
