"""AutoRound on one decoder layer at a time, by its ``quantize_block``.

Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent", arXiv:2309.05516.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from stages.quantization.activations import Hidden, Sample, SamplesLostError, unflatten
from stages.quantization.recipes import AutoRoundRecipe


class _Quiet(logging.Filter):
    """Drops AutoRound's remarks on options that are set on purpose, and on data it does not use."""

    REMARKS = (
        "Passing '",
        "Using default calibration dataset",
        "Deterministic algorithms are enabled",
        "'enable_torch_compile' is disabled",
        "`torch.compile` is disabled",
    )

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.REMARKS)


def calm_log(library_logger: logging.Logger) -> None:
    """Keep AutoRound's remarks and its colour codes out of the log."""
    if not any(isinstance(item, _Quiet) for item in library_logger.filters):
        library_logger.addFilter(_Quiet())
        for handler in library_logger.handlers:
            handler.setFormatter(logging.Formatter("%(levelname)s auto_round: %(message)s"))


class Holder(nn.Module):
    """What AutoRound takes for a model: one decoder layer."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([block])
        self.config = SimpleNamespace(model_type="decoder_layer", architectures=["Holder"])
        self.name_or_path = ""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer."""
        return self.layers[0](*args, **kwargs)


def run_autoround(
    layer: nn.Module,
    inputs: Sequence[Sample],
    hidden: Hidden,
    quantized: Hidden | None,
    recipe: AutoRoundRecipe,
    bits: Mapping[str, int],
    device: torch.device,
) -> tuple[Hidden | None, Hidden | None]:
    """Quantize one decoder layer in place with AutoRound; see `tune_layer`.

    Returns
    -------
    tuple
        Outputs of the layer before (None where AutoRound needs no data) and after (None without
        tuning).

    Raises
    ------
    SamplesLostError
        If AutoRound lost a sample.
    """
    from auto_round import AutoRound
    from auto_round.logger import logger as library_logger

    calm_log(library_logger)
    options: dict[str, Any] = {}
    if recipe.iters:
        options = {
            "gradient_accumulate_steps": recipe.gradient_accumulate_steps,
            "lr": recipe.step_size,
            # "best" would compare sums over different samples: a step that drew short ones wins
            "not_use_best_mse": True,
        }
    most, _ = Counter(bits.values()).most_common(1)[0]
    own = {f"layers.0.{name}": {"bits": width} for name, width in bits.items() if width != most}
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear) and name not in bits:
            own[f"layers.0.{name}"] = {"bits": 16}
    if own:
        options["layer_config"] = own
    rounder = AutoRound(
        Holder(layer),
        tokenizer="",  # only there to be looked at
        scheme="W4A16",
        bits=most,
        group_size=recipe.group_size,
        sym=recipe.sym,
        nsamples=len(hidden),
        batch_size=1,  # samples are of unequal lengths, and unpadded; a pack is one of them
        # AutoRound collects its result before the last step, so one more makes `iters` steps
        iters=recipe.iters + 1 if recipe.iters else 0,
        seed=recipe.seed,
        device_map=0 if device.type == "cuda" else "cpu",
        amp=next(layer.parameters()).dtype != torch.float32,  # float32 stays so, on any device
        enable_torch_compile=False,  # other bits, and minutes of compiling on a CPU
        enable_deterministic_algorithms=True,
        **options,
    )
    rounder.post_init()
    # only a run over a whole model hands this down
    rounder.alg_composer.block_forward.batch_size = 1
    # else every output makes a detour over the CPU
    rounder.alg_composer.block_forward.cache_device = device
    calls = []
    for state, others in zip(hidden, inputs, strict=True):
        kwargs = unflatten(others)
        kwargs["hidden_states"] = state
        calls.append((((), kwargs),))
    after, before = rounder.quantize_block(
        layer, calls, q_input=None if quantized is None else list(quantized), device=str(device)
    )
    for outputs in (before, after):
        if outputs is not None and len(outputs) != len(hidden):
            raise SamplesLostError(
                f"quantize: AutoRound was given {len(hidden)} calibration samples and used "
                f"{len(outputs)}; its log above may say why"
            )
    return None if before is None else list(before), None if after is None else list(after)
