"""What is compared: ways to choose the rounding, each at several bits and seeds."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

GROUP_SIZES = (128, 64, 32)
BATCH_SIZE = 8
ROUNDING = "rounding"
TEXT = "text"


@dataclass(frozen=True)
class Contender:
    """A way to quantize.

    Attributes
    ----------
    queries, pages, passages : int
        Calibration samples of each kind; with none at all, plain rounding to nearest.
    deepstack : bool
        Whether layers are tuned on activations with the visual features between layers.
    many_seeds : bool
        Whether it runs with every seed, and not just the first.
    method : str
        ``autoround`` or ``gptq``; of no meaning without samples.
    end_to_end : int
        Steps of end-to-end tuning after the layers; 0 for none.
    codes : bool
        Whether these tune codes beside group scales.
    """

    queries: int = 0
    pages: int = 0
    passages: int = 0
    deepstack: bool = True
    many_seeds: bool = False
    method: str = "autoround"
    end_to_end: int = 0
    codes: bool = True

    @property
    def tuned(self) -> bool:
        """Whether it sees samples."""
        return self.queries + self.pages + self.passages > 0


CONTENDERS = {
    ROUNDING: Contender(),
    "mixed": Contender(queries=96, pages=48, many_seeds=True),
    TEXT: Contender(passages=16, many_seeds=True),
    "mixed-passages32": Contender(queries=96, pages=48, passages=32, many_seeds=True),
    "naive": Contender(queries=96, pages=48, deepstack=False),
    "mixed-passages64": Contender(queries=96, pages=48, passages=64),
    "gptq": Contender(queries=96, pages=48, method="gptq"),
    "gptq-passages32": Contender(queries=96, pages=48, passages=32, method="gptq"),
    "mixed-e2e": Contender(queries=96, pages=48, end_to_end=200),
    "gptq-e2e": Contender(queries=96, pages=48, method="gptq", end_to_end=200),
    "mixed-e2e-600": Contender(queries=96, pages=48, end_to_end=600),
    "gptq-e2e-600": Contender(queries=96, pages=48, method="gptq", end_to_end=600),
    "gptq-passages32-e2e": Contender(
        queries=96, pages=48, passages=32, method="gptq", end_to_end=200
    ),
    "mixed-e2e-scales": Contender(queries=96, pages=48, end_to_end=200, codes=False),
    "gptq-e2e-scales": Contender(queries=96, pages=48, method="gptq", end_to_end=200, codes=False),
}
"""By name, those that say most first."""


@dataclass(frozen=True)
class Run:
    """One recipe to make and measure.

    Attributes
    ----------
    contender : str
        Name in `CONTENDERS`.
    bits : int
        Of a weight.
    seed : int
        Draws the samples and orders them.
    """

    contender: str
    bits: int
    seed: int

    @property
    def name(self) -> str:
        """What the pipeline calls the recipe."""
        seed = f"-seed{self.seed}" if CONTENDERS[self.contender].tuned else ""
        return f"{self.contender}-w{self.bits}{seed}"

    @property
    def samples(self) -> str:
        """What the pipeline calls its set of samples."""
        contender = CONTENDERS[self.contender]
        if not contender.tuned:
            return "none"
        counts = (contender.queries, contender.pages, contender.passages)
        # tuned in another way, the samples are the same
        name = next(
            name
            for name, other in CONTENDERS.items()
            if (other.queries, other.pages, other.passages) == counts
        )
        return f"{name}-seed{self.seed}"


def plan(names: Iterable[str], bits: Iterable[int], seeds: Iterable[int]) -> list[Run]:
    """Return the runs of some contenders, the first seed's before the others'."""
    first, *others = seeds
    wanted = [(name, width) for name in names for width in bits]
    return [
        Run(name, width, seed)
        for seed in (first, *others)
        for name, width in wanted
        if seed == first or CONTENDERS[name].many_seeds
    ]


def group_size(config: Mapping[str, Any]) -> int:
    """Return the largest group of weights that fits all linears of the language model.

    Parameters
    ----------
    config : Mapping
        Contents of the model's config.json.

    Raises
    ------
    ValueError
        If none of 128, 64 and 32 does.
    """
    text = config["text_config"]
    inputs = (
        text["hidden_size"],
        text["intermediate_size"],
        text["num_attention_heads"] * text["head_dim"],
    )
    for size in GROUP_SIZES:
        if all(width % size == 0 for width in inputs):
            return size
    raise ValueError(f"no group of {GROUP_SIZES} weights divides all of {inputs}")


def pipeline_params(
    base: Mapping[str, Any],
    runs: Iterable[Run],
    model: str,
    calibration: str,
    group: int,
    iters: int,
    shrink: int,
    device: str,
) -> dict[str, Any]:
    """Return a params.yaml with the recipes of some runs and their sets of samples.

    Parameters
    ----------
    base : Mapping
        The repository's params.yaml, for all that the study leaves as it is.
    runs : iterable of Run
        The recipes.
    model, calibration : str
        Absolute paths of the model and of the calibration data.
    group : int
        Weights that share a scale.
    iters : int
        Tuning steps a layer.
    shrink : int
        What to divide the numbers of samples by, at least one of each kind being left.
    device : str
        ``auto``, ``cpu`` or ``cuda``.
    """
    values = {key: dict(section) for key, section in base.items()}
    values |= {"fallbacks": {}, "release": {}}
    values["model"] |= {"source": model, "revision": None}
    values["compute"] |= {"device": device}
    recipes: dict[str, Any] = {}
    sets: dict[str, Any] = {}
    for run in runs:
        contender = CONTENDERS[run.contender]
        recipe: dict[str, Any] = {"bits": run.bits, "group_size": group, "sym": True}
        if contender.tuned:
            recipe |= {
                "method": contender.method,
                "deepstack": contender.deepstack,
                "batch_size": BATCH_SIZE,
            }
            if contender.end_to_end:
                recipe["end_to_end"] = {
                    "steps": contender.end_to_end,
                    "seed": run.seed,
                    **({} if contender.codes else {"codes_lr": 0.0}),
                }
            if contender.method == "autoround":
                recipe |= {
                    "iters": iters,
                    "lr": None if iters >= 100 else 0.005,
                    "gradient_accumulate_steps": 1,
                    "seed": run.seed,
                }
            counts = {kind: getattr(contender, kind) for kind in ("queries", "pages", "passages")}
            sets[run.samples] = {
                **{kind: count and max(1, count // shrink) for kind, count in counts.items()},
                "seed": run.seed,
            }
        else:
            recipe["method"] = "rtn"
        recipes[run.name] = {**recipe, "calibration": run.samples}
    values["calibration"] |= {"dataset": calibration, "sets": sets}
    values["recipes"] = recipes
    return values
