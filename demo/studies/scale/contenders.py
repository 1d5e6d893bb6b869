"""What is compared: ways to choose the rounding, each at several bits and seeds."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from colqwen3.checkpoint.layout import VISION_PARTS, quantizable, tensors
from stages.budget.knapsack import HEADER_BYTES

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
    hessian : str
        ``layer`` or ``model``, of GPTQ.
    weights : Mapping or None
        What the recipe says of widths, as params.yaml does; ``bytes`` is the name of the contender
        of the frontier whose size it may take. None: one width for all, the run's.
    """

    queries: int = 0
    pages: int = 0
    passages: int = 0
    deepstack: bool = True
    many_seeds: bool = False
    method: str = "autoround"
    end_to_end: int = 0
    codes: bool = True
    hessian: str = "layer"
    weights: Mapping[str, Any] | None = None

    @property
    def has_budget(self) -> bool:
        """Whether its widths are chosen by the sensitivity of each part."""
        weights = self.weights or {}
        return "bytes" in weights or isinstance(weights.get("bits"), float)

    @property
    def quantizes_vision(self) -> bool:
        """Whether it quantizes linears of the vision tower, or may."""
        return bool({"bytes", "vision"} & set(self.weights or {}))

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
    "gptq-e2e": Contender(queries=96, pages=48, method="gptq", end_to_end=200, many_seeds=True),
    "mixed-e2e-600": Contender(queries=96, pages=48, end_to_end=600),
    "gptq-e2e-600": Contender(queries=96, pages=48, method="gptq", end_to_end=600),
    "gptq-passages32-e2e": Contender(
        queries=96, pages=48, passages=32, method="gptq", end_to_end=200, many_seeds=True
    ),
    "gptq-model": Contender(queries=96, pages=48, method="gptq", hessian="model"),
    "gptq-model-e2e": Contender(
        queries=96, pages=48, method="gptq", hessian="model", end_to_end=200, many_seeds=True
    ),
    "gptq-model-passages32-e2e": Contender(
        queries=96,
        pages=48,
        passages=32,
        method="gptq",
        hessian="model",
        end_to_end=200,
        many_seeds=True,
    ),
    "w3g64": Contender(
        queries=96,
        pages=48,
        passages=64,
        method="gptq",
        hessian="model",
        end_to_end=200,
        weights={"bits": 3, "group_size": 64},
    ),
    "mixed-e2e-scales": Contender(queries=96, pages=48, end_to_end=200, codes=False),
    "gptq-e2e-scales": Contender(queries=96, pages=48, method="gptq", end_to_end=200, codes=False),
}
"""By name, those that say most first."""


def _default(**weights: Any) -> Contender:
    """Return the default way to tune, with other widths."""
    return Contender(queries=96, pages=48, weights=weights)


SMALL = {"bits": 4, "token_embeddings": 8, "vision": 8}
FRONTIER = {
    "w4": _default(bits=4),
    "w3": _default(bits=3),
    "w2": _default(bits=2),
    "small": _default(**SMALL),
    "attention8": _default(bits=4, token_embeddings=8, vision={"attention": 8, "mergers": 8}),
    "e4": _default(**SMALL | {"token_embeddings": 4}),
    "b35": _default(bits=3.5),
    "b30": _default(bits=3.0001),
    "b25": _default(bits=2.5),
    "bytes-w3": _default(bytes="w3"),
    "bytes-small": _default(bytes="small"),
    "bytes-e4": _default(bytes="e4"),
    "small-e2e": Contender(queries=96, pages=48, method="gptq", end_to_end=200, weights=SMALL),
}
"""What loss against bytes is measured on: one width, more parts of the model, and budgets."""
ALL_CONTENDERS = {**CONTENDERS, **FRONTIER}


@dataclass(frozen=True)
class Run:
    """One recipe to make and measure.

    Attributes
    ----------
    contender : str
        Name in `ALL_CONTENDERS`.
    bits : int or None
        Of a weight; None where the contender itself says.
    seed : int
        Draws the samples and orders them.
    """

    contender: str
    bits: int | None
    seed: int

    @property
    def name(self) -> str:
        """What the pipeline calls the recipe."""
        seed = f"-seed{self.seed}" if ALL_CONTENDERS[self.contender].tuned else ""
        width = "" if self.bits is None else f"-w{self.bits}"
        return f"{self.contender}{width}{seed}"

    @property
    def samples(self) -> str:
        """What the pipeline calls its set of samples."""
        contender = ALL_CONTENDERS[self.contender]
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
    widths = tuple(bits)
    wanted = [
        (name, width)
        for name in names
        for width in (widths if ALL_CONTENDERS[name].weights is None else (None,))
    ]
    return [
        Run(name, width, seed)
        for seed in (first, *others)
        for name, width in wanted
        if seed == first or ALL_CONTENDERS[name].many_seeds
    ]


def group_size(config: Mapping[str, Any], vision: bool = False) -> int:
    """Return the largest group of weights that fits all linears of the language model.

    Parameters
    ----------
    config : Mapping
        Contents of the model's config.json.
    vision : bool
        Whether it must fit those of the vision tower as well.

    Raises
    ------
    ValueError
        If none of 128, 64 and 32 does.
    """
    text = config["text_config"]
    inputs = [
        text["hidden_size"],
        text["intermediate_size"],
        text["num_attention_heads"] * text["head_dim"],
    ]
    if vision:
        tower = config["vision_config"]
        merged = tower["hidden_size"] * tower["spatial_merge_size"] ** 2
        inputs += [tower["hidden_size"], tower["intermediate_size"], merged]
    for size in GROUP_SIZES:
        if all(width % size == 0 for width in inputs):
            return size
    raise ValueError(f"no group of {GROUP_SIZES} weights divides all of {tuple(inputs)}")


def byte_budgets(
    runs: Iterable[Run], expected: Mapping[str, Any], config: Mapping[str, Any], group: int
) -> dict[str, int]:
    """Return the budget of each contender that has one in bytes: another contender just fits it.

    Parameters
    ----------
    runs : iterable of Run
        The recipes.
    expected : Mapping
        What `colqwen3 inspect` foretells: ``expected_bytes`` and ``expected_savings``.
    config : Mapping
        Contents of the model's config.json.
    group : int
        Weights that share a scale.
    """
    savings = expected["expected_savings"][f"g{group}"]
    # as `stages.budget.knapsack` counts them: three tensors for each weight that may be quantized
    headers = HEADER_BYTES * (len(tensors(config)) + 2 * len(quantizable(config)))

    def size(weights: Mapping[str, Any]) -> int:
        whole = headers + int(expected["expected_bytes"][f"w{weights['bits']}g{group}"])
        vision = weights.get("vision", {})
        if not isinstance(vision, Mapping):
            vision = dict.fromkeys(VISION_PARTS, vision)
        widths = {f"vision_{part}": bits for part, bits in vision.items()}
        if "token_embeddings" in weights:
            widths["token_embeddings"] = weights["token_embeddings"]
        return whole - sum(int(savings[part][str(bits)]) for part, bits in widths.items())

    named = {
        run.contender: (ALL_CONTENDERS[run.contender].weights or {}).get("bytes") for run in runs
    }
    return {
        name: size(ALL_CONTENDERS[other].weights or {}) for name, other in named.items() if other
    }


def pipeline_params(
    base: Mapping[str, Any],
    runs: Iterable[Run],
    model: str,
    calibration: str,
    group: int,
    iters: int,
    shrink: int,
    device: str,
    budgets: Mapping[str, int] | None = None,
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
    budgets : Mapping or None
        Bytes of the contenders with such a budget, see `byte_budgets`.
    """
    values = {key: dict(section) for key, section in base.items()}
    values |= {"fallbacks": {}, "release": {}}
    values["model"] |= {"source": model, "revision": None}
    values["compute"] |= {"device": device}
    values["sensitivity"] |= {"calibration": "none"}
    recipes: dict[str, Any] = {}
    sets: dict[str, Any] = {}
    for run in runs:
        contender = ALL_CONTENDERS[run.contender]
        recipe: dict[str, Any] = {"group_size": group, "sym": True}
        recipe |= {"bits": run.bits} if contender.weights is None else contender.weights
        if "bytes" in recipe:
            recipe["bytes"] = (budgets or {})[run.contender]
        if contender.has_budget and values["sensitivity"]["calibration"] == "none":
            values["sensitivity"] |= {"calibration": run.samples, "group_size": group}
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
            if contender.hessian != "layer":
                recipe["hessian"] = contender.hessian
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
