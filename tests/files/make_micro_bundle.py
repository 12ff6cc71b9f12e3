"""Makes tests/files/micro_bundle.zip: an exported bundle of all variants of the smallest model, with random weights.

    python tests/files/make_micro_bundle.py       two minutes on two slow cores; needs what hcmen-export needs

The tests of engines and of float16 graphs start from it, so that they need neither PyTorch nor the time of an export.
Make it again when the exporter, the ops or the manifest change; `tests/export/test_precision.py` says when it no longer
fits.
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
TARGET = HERE / "micro_bundle.zip"
# The oldest date that a zip file can hold: the same content makes the same file.
DATE = (1980, 1, 1, 0, 0, 0)


def main() -> None:
    sys.path.insert(0, str(HERE.parent))
    from helpers.micro import MICRO

    from hcmen.base.console import Console
    from hcmen.base.modalities import MODALITIES
    from hcmen.export.bundle import export_bundle
    from hcmen.models.hcmen.model import HCMEN
    from hcmen.training.checkpoint import save_checkpoint
    from hcmen.training.config import TrainConfig

    torch.manual_seed(0)
    model = HCMEN(MICRO).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.head.weight.mul_(6.0)  # scores of the size that sentiment has, or an absolute bound would prove little
    rng = np.random.default_rng(0)
    sizes = {m: MICRO.inputs.modality(m).features for m in MODALITIES}
    model.set_normalisation({m: (rng.normal(size=n), rng.uniform(0.5, 2, n)) for m, n in sizes.items()})
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "train").mkdir()
        save_checkpoint(root / "train", model, TrainConfig(), epoch=0, validation={}, dataset={"name": "none"})
        export_bundle(root / "train", root / "bundle", console=Console())
        TARGET.parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(TARGET, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for path in sorted(p for p in (root / "bundle").rglob("*") if p.is_file()):
                entry = zipfile.ZipInfo(path.relative_to(root / "bundle").as_posix(), DATE)
                entry.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(entry, path.read_bytes())
    print(f"{TARGET}: {TARGET.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
