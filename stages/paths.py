"""Where the stages leave their results; dvc.yaml names the same places."""

from pathlib import Path

MANIFEST = Path("artifacts/manifest.json")
CALIBRATION = Path("artifacts/calibration")  # one folder a set of samples
CHECKPOINTS = Path("artifacts/checkpoints")  # one folder a recipe
SCRATCH = Path("artifacts/scratch")  # unfinished work, one folder a stage; nothing in it is an out
LOCKS = Path("artifacts/locks")  # one file a stage, locked while it runs; no outs either
RELEASES = Path("artifacts/release")  # one folder a recipe, for others
EMBEDDINGS = Path("artifacts/embeddings")  # one file a recipe, and that of the original
METRICS = Path("metrics")  # <recipe>.json, and the folders below
QUANTIZE_METRICS = METRICS / "quantize"
SPEED_METRICS = METRICS / "speed"
PLOTS = METRICS / "plots"
# the ablation's own: not below METRICS, on which stages of the pipeline depend as a whole
ABLATION_METRICS = Path("ablation/metrics")  # one file a recipe
ABLATION_ORIGINALS = Path("artifacts/ablation/original")  # embeddings, one file a dataset
ABLATION_WORK = Path("artifacts/ablation/work")  # one folder a running recipe
