"""Where the stages leave their results; dvc.yaml names the same places."""

from pathlib import Path

CHECKED = Path("artifacts/checked.json")
MANIFEST = Path("artifacts/manifest.json")
CALIBRATION = Path("artifacts/calibration")  # one folder per set of samples
SENSITIVITY = Path("artifacts/sensitivity.json")  # loss of each part quantized alone
ALLOCATION = Path("artifacts/allocation")  # bits of every weight, one file per recipe
CHECKPOINTS = Path("artifacts/checkpoints")  # one folder per recipe
QUANTIZED = Path("artifacts/quantize")  # how each checkpoint was made, one file per recipe
SCRATCH = Path(
    "artifacts/scratch"
)  # unfinished work, one folder per stage; nothing in it is an out
LOCKS = Path("artifacts/locks")  # one file per stage, locked while it runs; no outs either
RELEASES = Path("artifacts/release")  # one folder per recipe, for others
EMBEDDINGS = Path("artifacts/embeddings")  # one file per recipe, and that of the original
BENCHMARKS = Path("artifacts/benchmark")  # what was timed, one file per recipe
SPEED = Path("artifacts/speed")  # timings of this machine, one file per checkpoint; no outs
HEATMAPS = Path("artifacts/heatmaps")  # of the queries that got worse, one folder per recipe
VERDICTS = Path("artifacts/gate")  # one file per recipe
REPORT = Path("artifacts/report")
METRICS = Path("metrics")
MODEL_METRICS = METRICS / "model.json"
QUALITY_METRICS = METRICS / "quality"  # one file per recipe, as in the folders below
QUANTIZE_METRICS = METRICS / "quantize"
SUMMARIES = METRICS / "summary"
QUERY_METRICS = METRICS / "queries"
INDEX_METRICS = METRICS / "index"  # what formats of page vectors cost
PLOTS = METRICS / "plots"
NDCG_PLOT = PLOTS / "ndcg.json"
SENSITIVITY_PLOT = PLOTS / "sensitivity.json"
LOSS_PLOT = PLOTS / "loss.json"
RANK_PLOT = PLOTS / "ranks.json"
REFERENCE = METRICS / "reference"  # the authors' results; only stages.tools.reference writes there
