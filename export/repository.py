"""The Triton model repository: the models of ``triton_repo/`` as the server wants them."""

import shutil
from pathlib import Path

MODELS = ("ensemble", "preprocessing", "d2sd", "tensorrt_llm_bls")
TWIN = "tensorrt_llm_bls"  # has the tensors of the ensemble
TEMPLATES = Path(__file__).resolve().parent.parent / "triton_repo"


def write_repository(folder: Path) -> None:
    """Write the model repository into an empty folder. Its models find the build in the folder's parent."""
    for model in MODELS:
        shutil.copytree(TEMPLATES / model, folder / model, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "ensemble" / "1").mkdir()  # the server demands a version, and an ensemble has nothing to put in it
    ensemble = (folder / "ensemble" / "config.pbtxt").read_text(encoding="utf-8")
    tensors = ensemble[ensemble.index("input [") : ensemble.index("ensemble_scheduling")]
    with (folder / TWIN / "config.pbtxt").open("a", encoding="utf-8") as config:
        config.write(tensors)
