"""Train the demonstration retriever.

``python -m demo.training.train --out DIR [--shape 39m] [--fonts DIR ...] [--minutes N] [--device cuda]``

Three losses share one forward pass over pages and queries: reading (which letter stands at each
point of a patch), alignment (which cells show the letters of a query token) and retrieval (MaxSim
of a query with its own page against the other pages of the batch).  The reading head is dropped
when the model is saved.
"""

import argparse
import json
import math
import os
import platform
import sys
import time
from collections import Counter, defaultdict, deque
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from demo.drawing.text import harvest, held_out
from demo.training.feed import Drawing, Replay, Stage
from demo.training.network import (
    PATCH,
    Retriever,
    initialise,
    published_config,
    save_published,
)
from demo.training.samples import CLASSES, SLOTS, Batch, Difficulty, PageMaker, find_fonts
from demo.training.score import max_sim, ndcg
from demo.training.shapes import SIZES, Size, named_size
from demo.training.tokenizer import train_tokenizer

HELD_OUT_FONTS = ("Carlito", "Caladea")
LAST_SECONDS = 20.0
"""What `--wall-minutes` leaves for the last measurement and for saving."""
MAX_LOG_SCALE = math.log(100.0)


@dataclass(frozen=True)
class Preset:
    """Settings that depend on the machine.

    Attributes
    ----------
    stages : tuple of Stage
        The curriculum.
    rate : float
        Peak learning rate.
    uses : int
        How often a drawn batch is used at most.
    remember : int
        About how many pages of the last batches are kept as wrong answers.
    """

    stages: tuple[Stage, ...]
    rate: float
    uses: int
    remember: int


SMALL = 256, 128
MEDIUM = 256, 256
LARGE = ((448, 576), (512, 384), (640, 448), (384, 512))
LARGEST = 672, 864


def mixed(small: float, large: float, plain: float) -> tuple[Difficulty, ...]:
    """Return medium pages and, three times as often, larger ones; some pages have twins."""
    sizes = (*[MEDIUM] * 3, *LARGE * 2, LARGEST)
    return tuple(Difficulty(small, large, 999, 1, *size, plain, 0.25) for size in sizes)


def stages(patches: int) -> tuple[Stage, ...]:
    """Return the curriculum for batches of about so many patches."""
    return (
        # Lines on a grid of patches and few fonts: letters are first seen at few offsets.
        Stage(0.05, (Difficulty(14, 18, 4, 16, *SMALL),), patches, 0),
        Stage(0.13, (Difficulty(12, 19, 16, 1, *SMALL),), patches, 0),
        Stage(
            0.35,
            (Difficulty(12, 20, 30, 1, *SMALL), Difficulty(11, 20, 30, 1, *MEDIUM)),
            patches,
            2,
        ),
        Stage(0.6, mixed(10.5, 20, 0.25), patches, 3, True),
        # Half of the pages in the built-in font: the demonstration's own pages are set in it.
        Stage(1.0, mixed(10, 18, 0.5), patches, 3, True),
    )


PRESETS = {
    "cpu": Preset(stages(3072), 2e-3, 3, 96),
    "cuda": Preset(stages(49152), 1.5e-3, 6, 512),
}


def fit(preset: Preset, size: Size) -> Preset:
    """Return a preset with the batches and the learning rate of a size."""
    plan = tuple(
        replace(stage, patches=round(stage.patches * size.batch)) for stage in preset.stages
    )
    return replace(preset, stages=plan, rate=preset.rate * size.rate)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, for the weight matrices of the blocks.

    The update is scaled so that its size matches AdamW's; one learning rate serves both.
    Matrices of one shape are updated together.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, decay: float) -> None:
        super().__init__(params, {"lr": lr, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter once."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    shapes[weight.shape].append(weight)
            for shape, weights in shapes.items():
                gradient = torch.stack([weight.grad for weight in weights])  # type: ignore[misc]
                state = self.state[weights[0]]
                if not state:
                    state["momentum"] = torch.zeros_like(gradient)
                momentum = state["momentum"].mul_(0.95).add_(gradient)
                update = orthogonal(gradient + 0.95 * momentum)
                size = 0.2 * max(shape) ** 0.5
                torch._foreach_mul_(weights, 1 - group["lr"] * group["decay"])
                torch._foreach_add_(weights, list(update), alpha=-group["lr"] * size)


def orthogonal(matrices: Tensor) -> Tensor:
    """Return the nearest matrices with singular values near 1, by Newton-Schulz iteration."""
    flip = matrices.shape[-2] > matrices.shape[-1]
    x: Tensor = matrices.mT if flip else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in ((3.4445, -4.7750, 2.0315),) * 5:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if flip else x


class Losses(nn.Module):
    """The three losses and what only they need: the reading head and two score scales."""

    def __init__(self, vision_hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(vision_hidden)
        self.read = nn.Linear(vision_hidden, SLOTS * CLASSES)
        self.log_scales = nn.Parameter(torch.full((2,), math.log(20.0)))
        weight = torch.ones(CLASSES)
        weight[0] = 0.05  # most of a page is blank
        self.register_buffer("weight", weight, persistent=False)
        self.earlier: deque[tuple[int, Tensor]] = deque()

    def forward(self, model: Retriever, batch: Batch, remember: int) -> dict[str, Tensor]:
        """Return the losses ``read``, ``align``, ``rank`` and ``spell``, and rates of success.

        ``letters`` is the share of letters read right, ``hits`` the share of query tokens whose
        best cell of the whole batch shows their letters on their page, ``top`` the share of
        queries that find their page, ``shown`` the mean cosine of cells to their spelling.  About
        ``remember`` pages of the last batches are wrong answers too: a batch of large pages alone
        holds few.
        """
        pixels = batch.pages.float() / 127.5 - 1
        if not len(batch.ids):
            return self._reading(model.vision(pixels)[2], batch)
        pages, patches = model.pages(pixels)
        queries = model.queries(batch.ids)
        # Near-duplicates differ by less than bfloat16 can tell.
        with torch.autocast(pages.device.type, enabled=False):
            finding = self._finding(model, batch, pages.float(), queries.float(), remember)
        return {**self._reading(patches, batch), **finding}

    def _finding(
        self, model: Retriever, batch: Batch, pages: Tensor, queries: Tensor, remember: int
    ) -> dict[str, Tensor]:
        scales = self.log_scales.clamp(max=MAX_LOG_SCALE).exp()
        begin, cells = len(model.prefix), batch.cell_spelling.shape[1]
        shown = pages[:, begin : begin + cells]
        asked = queries[batch.tokens[:, 0], batch.tokens[:, 1]]
        scaled = asked @ shown.reshape(-1, shown.shape[-1]).T * scales[0]
        right = torch.zeros_like(scaled, dtype=torch.bool)
        right[batch.here[:, 0], batch.here[:, 1]] = True
        same = scaled.new_zeros(batch.words, scaled.shape[1], dtype=torch.bool)
        same[batch.same[:, 0], batch.same[:, 1]] = True
        # Another copy of the same word is neither right nor wrong.
        allowed = right | ~same[batch.word]
        low = torch.finfo(scaled.dtype).min
        every = scaled.masked_fill(~allowed, low)
        align = (every.logsumexp(1) - scaled.masked_fill(~right, low).logsumexp(1)).mean()
        hits = right.gather(1, every.argmax(1, keepdim=True)).float().mean()

        size = batch.mask.sum(1)[:, None] / scales[1]
        score = max_sim(queries, batch.mask, pages) / size
        mine = functional.one_hot(batch.owner, len(pages)).bool()
        # Nor is another page with all words of the query.
        score = score.masked_fill(batch.also & ~mine, low)
        by_page = score.log_softmax(0).gather(1, batch.owner[:, None]).mean()
        if remember:
            # A batch seen again must not meet its own pages as wrong answers.
            others = [part for number, part in self.earlier if number != batch.number]
            wrong = [max_sim(queries, batch.mask, part) / size for part in others]
            score = torch.cat([score, *wrong], dim=1)
            self.earlier.append((batch.number, pages.detach()))
            while sum(len(part) for _, part in self.earlier) > remember + len(pages):
                self.earlier.popleft()
        rank = 0.5 * (functional.cross_entropy(score, batch.owner) - by_page)
        top = (score.argmax(1) == batch.owner).float().mean()
        cosine = functional.cosine_similarity(shown, batch.cell_spelling, dim=-1)
        written = batch.cell_spelling.any(-1)
        close = (cosine * written).sum() / written.sum().clamp(min=1)
        spell = (
            2.0 - close - functional.cosine_similarity(asked, batch.token_spelling, dim=-1).mean()
        )
        return {
            "align": align,
            "rank": rank,
            "spell": spell,
            "hits": hits,
            "top": top,
            "shown": close.detach(),
        }

    def _reading(self, patches: Tensor, batch: Batch) -> dict[str, Tensor]:
        logits = self.read(self.norm(patches)).view(-1, CLASSES)
        target = batch.letters.view(-1).long()
        weight: Tensor = self.weight  # type: ignore[assignment]
        seen = target > 0
        right = ((logits.argmax(-1) == target) & seen).sum() / seen.sum().clamp(min=1)
        return {"read": functional.cross_entropy(logits, target, weight), "letters": right}


def patch_filters(maker: PageMaker, level: Difficulty, count: int) -> Tensor:
    """Return the ``count`` principal components of rendered patches ``[count, 256]``.

    Blank patches are left out; filters are scaled so that each gives values of about unit size,
    the weak ones at most 6 times amplified.  Beyond the 256th they are turned mixtures of the
    first ones.
    """
    pages = maker.batch(level, 200, 1).pages.float() / 127.5 - 1
    patches = pages.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).reshape(-1, PATCH * PATCH)
    patches = patches[patches.std(1) > 0.05]
    patches = patches - patches.mean(0)
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    spread = values.flip(0)[:count].clamp(min=1e-8).sqrt()
    filters: Tensor = vectors.flip(1)[:, :count].T / spread.clamp(min=spread[0] / 6)[:, None]
    more = count - len(filters)
    if more > 0:
        generator = torch.Generator().manual_seed(count)
        turn, _ = torch.linalg.qr(torch.randn(more, more, generator=generator))
        filters = torch.cat([filters, turn @ filters[:more]])
    return filters


@torch.no_grad()
def measure(model: Retriever, batches: list[Batch]) -> dict[str, float]:
    """Rank the pages of all batches (of one size) for each of their queries."""
    model.eval()
    pages = [
        model.pages(part.float() / 127.5 - 1)[0]
        for b in batches
        for part in torch.split(b.pages, 4)
    ]
    before = 0
    scores, owners = [], []
    for batch in batches:
        embeddings = model.queries(batch.ids)
        parts = zip(torch.split(embeddings, 8), torch.split(batch.mask, 8), strict=True)
        for embedded, mask in parts:
            scores.append(torch.cat([max_sim(embedded, mask, p) for p in pages], dim=1))
        owners.append(batch.owner + before)
        before += len(batch.pages)
    model.train()
    relevant = functional.one_hot(torch.cat(owners), before).bool()
    return {
        **ndcg(torch.cat(scores).cpu(), relevant.cpu()),
        "pages": before,
        "queries": len(relevant),
    }


def rate(done: float, warm_ups: tuple[tuple[float, float], ...] = ((0.0, 0.02),)) -> float:
    """Return the share of the peak learning rate at a fraction of the training.

    It rises, stays, and falls to nearly zero, fast at first.  At the beginning of each of
    ``warm_ups`` it rises from 2 % again, over the given fraction.
    """
    warm = [(done - begin) / length + 0.02 for begin, length in warm_ups if done >= begin]
    return min(1.0, *warm, math.pow(max(0.0, 1.0 - done) / 0.42, 1.5) + 0.01)


def build_optimisers(model: Retriever, losses: Losses, peak: float) -> list[torch.optim.Optimizer]:
    """Give the vision blocks' matrices to Muon and all else to AdamW.

    Muon for the text tower and the mergers too made steps dearer and learned no faster.
    """
    matrices, rest, patch = [], [], []
    for name, weight in [*model.named_parameters(), *losses.named_parameters()]:
        if "patch_embed.proj.weight" in name:
            patch.append(weight)
        elif weight.ndim == 2 and "visual.blocks." in name:
            matrices.append(weight)
        else:
            rest.append(weight)
    # Six equal copies of a patch filter add up, so each takes a sixth of the step.
    groups = [{"params": rest, "lr": peak}, {"params": patch, "lr": peak / 6}]
    fused = rest[0].is_cuda
    adam = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), weight_decay=0.01, fused=fused)
    return [Muon(matrices, 2 * peak, 0.01), adam]


def machine(device: str) -> str:
    """Say what trains, as the log has it."""
    cores = f"{os.cpu_count()} CPU cores"
    return cores if device == "cpu" else f"1 {torch.cuda.get_device_name()}, {cores}"


def to_device(batch: Batch, device: str) -> Batch:
    """Return the batch on a device."""
    moved: dict[str, Any] = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in vars(batch).items()
    }
    return Batch(**moved)


def main() -> None:
    """Train, measure now and then, and save the model in the published layout."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, required=True, help="folder of the saved model")
    parser.add_argument("--log", type=Path, help="JSON file for the course of the training")
    parser.add_argument("--library", type=Path, help="standard library to take the text from")
    parser.add_argument("--workers", type=int, help="drawing processes; two cores stay free")
    parser.add_argument("--fonts", type=Path, nargs="*", default=[], help="folders with fonts")
    parser.add_argument("--device", choices=sorted(PRESETS), default="cpu")
    parser.add_argument(
        "--shape", type=named_size, default="demo", metavar="SIZE",
        help=f"{', '.join(SIZES)}, or a JSON file of sizes, see demo/training/shapes.py",
    )  # fmt: skip
    parser.add_argument("--minutes", type=float, default=90.0, help="of training steps")
    parser.add_argument(
        "--wall-minutes",
        type=float,
        default=math.inf,
        help="end by then even so: from the start of the program until the model is saved",
    )
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--checkpoint", type=Path, help="file to save to and to continue from")
    parser.add_argument("--every", type=int, default=25, help="steps between printed lines")
    parser.add_argument("--measure-minutes", type=float, default=8.0)
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.wall_minutes - LAST_SECONDS

    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    size, device = options.shape.size, options.device
    preset, shape = fit(PRESETS[device], size), size.shape
    corpus = harvest(options.seed, options.library)
    tokenizer = train_tokenizer(corpus, shape.vocab, options.seed)
    fonts, other_fonts = find_fonts(options.fonts, HELD_OUT_FONTS)
    maker = PageMaker(corpus, fonts, tokenizer, options.seed + 1)
    model = Retriever(published_config(shape, tokenizer), tokenizer)
    filters = patch_filters(maker, preset.stages[1].levels[0], shape.vision_hidden)
    initialise(model, tokenizer, filters, options.seed)
    model.to(device)
    losses = Losses(shape.vision_hidden).to(device)
    optimisers = build_optimisers(model, losses, preset.rate)
    unseen = PageMaker(held_out(corpus), other_fonts or fonts, tokenizer, options.seed + 2)
    sizes = {
        "small_pages": (Difficulty(13, 18, 999, 1, *SMALL), 24, 4),
        "large_pages": (Difficulty(12, 18, 999, 1, *LARGE[0]), 10, 10),
    }
    tests = {
        name: [to_device(unseen.batch(level, pages, 2), device) for _ in range(repeats)]
        for name, (level, pages, repeats) in sizes.items()
    }
    workers = options.workers or max(1, (os.cpu_count() or 1) - 2)
    log: dict[str, Any] = {
        "size": options.shape.name,
        "seed": options.seed,
        "machine": machine(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "minutes": options.minutes,
        "workers": workers,
        "preset": {"patches": preset.stages[0].patches, "rate": preset.rate, "uses": preset.uses},
        "fonts": len(fonts),
        "held_out_fonts": len(other_fonts),
        "shape": asdict(shape),
        "parameters": {
            "vision": sum(p.numel() for p in model.vlm.model.visual.parameters()),
            "text": sum(p.numel() for p in model.vlm.model.language_model.parameters()),
            "projection": sum(p.numel() for p in model.embedding_proj_layer.parameters()),
        },
        "steps": [],
        "held_out": [],
    }
    step, spent, seen, drawn = 0, 0.0, 0, 0
    if options.checkpoint and options.checkpoint.exists():
        state = torch.load(options.checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        losses.load_state_dict(state["losses"])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        log, step, spent, seen, drawn = (
            state[k] for k in ("log", "step", "spent", "seen", "drawn")
        )

    total = options.minutes * 60
    stage = next(i for i, s in enumerate(preset.stages) if spent / total < s.until)
    source = (corpus, fonts, tokenizer.to_str())
    drawing = Drawing(workers, source, options.seed + 100 + step, preset.stages, stage)
    replay = Replay(drawing.pages, preset.uses, options.seed, device)
    sums: dict[str, Tensor] = {}
    counts: Counter[str] = Counter()
    bar = tqdm(total=round(total), initial=round(spent), unit="s", disable=not sys.stderr.isatty())
    drawing.wait()
    last = time.monotonic()
    measured = spent

    def note() -> None:
        result = {name: measure(model, batches) for name, batches in tests.items()}
        log["held_out"].append({"step": step, "seconds": round(spent), **result})
        log.update(wall_seconds=round(spent), page_views=seen, pages_drawn=drawn + replay.drawn)
        print(json.dumps(log["held_out"][-1]), flush=True)
        save_published(model, tokenizer, options.out)
        if options.log:
            options.log.write_text(json.dumps(log, indent=1) + "\n", "utf-8")
        if options.checkpoint:
            state = {
                "model": model.state_dict(),
                "losses": losses.state_dict(),
                "optimisers": [o.state_dict() for o in optimisers],
                "log": log,
                "step": step,
                "spent": spent,
                "seen": seen,
                "drawn": drawn + replay.drawn,
            }
            torch.save(state, options.checkpoint)

    if not step:
        note()
        last = time.monotonic()
    while spent < (total := min(total, spent + deadline - last)):
        done = spent / total
        stage = next(i for i, s in enumerate(preset.stages) if done < s.until)
        drawing.stage.value = stage
        batch = replay.next(stage)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group.setdefault("peak", group["lr"])
                group["lr"] = group["peak"] * rate(done, size.warm_ups)
            optimiser.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            parts = losses(model, batch, preset.remember * preset.stages[stage].remember)
        reading = 1.5 if done < 0.7 else 0.5
        loss = reading * parts["read"]
        if "align" in parts:
            # Fixed spelling vectors bring both towers together; they matter less and less.
            common = 3.0 * min(1.0, (1.1 - done) / 0.5)
            loss = loss + parts["align"] + parts["rank"] + common * parts["spell"]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        for optimiser in optimisers:
            optimiser.step()
        step += 1
        seen += len(batch.pages)
        for name, value in parts.items():
            # Added up on the device: reading a number there would wait for it.
            sums[name] = sums.get(name, torch.zeros((), device=device)) + value.detach()
            counts[name] += 1
        now = time.monotonic()
        spent += now - last
        bar.update(round(spent) - bar.n)
        last = now
        if step % options.every == 0:
            line = {name: round(float(value) / counts[name], 4) for name, value in sums.items()}
            if not all(math.isfinite(value) for value in line.values()):
                raise ArithmeticError(f"training broke at step {step}: {line}")
            entry = {
                "step": step,
                "seconds": round(spent),
                "stage": stage,
                "views": seen,
                "drawn": drawn + replay.drawn,
                **line,
            }
            log["steps"].append(entry)
            if bar.disable:
                print(json.dumps(entry), flush=True)
            else:
                bar.set_postfix(line)
            sums.clear()
            counts.clear()
        if spent - measured > 60 * options.measure_minutes:
            note()
            measured, last = spent, time.monotonic()
    note()
    drawing.close()


if __name__ == "__main__":
    main()
