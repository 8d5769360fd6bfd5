"""A training step with MuonClip against one with AdamW, and Muon's update against a plain loop over matrices.

768 wide, 12 layers, 12 heads, packed rows of 512 tokens, 32,768 tokens per step in microbatches of 8,192: the same model,
batches and precision for both, in turn. A clip step also looks at the logits of the last microbatch. `plain loop` is the same
update (momentum, Polar Express, weights) one matrix after the other, as torch.optim.Muon does it. `--quick`: 512 x 2.
"""

import math
import time
from functools import partial

import torch
from _bench import alternate, arguments, bar, finish, table

from neobert.checkpoints.layouts import FUSED
from neobert.data.batch import Batch
from neobert.model.modeling_neobert import NeoBERTConfig, NeoBERTForMaskedLM
from neobert.optim.build import OptimizerSettings, build_optimizer
from neobert.optim.muon import SCALE, MuonSettings, quintics
from neobert.optim.qk_clip import QKClip, QKClipSettings
from neobert.training.loop import Setup, Window, train_step
from neobert.training.runtime import build_runtime

ROWS, LENGTH, VOCABULARY = 16, 512, 30_528
PARTS = {name: len(parts) for name, parts in FUSED.items()}


def batches(count: int) -> list[Batch]:
    """Packed rows of documents of 40 to 400 tokens, 15 % of them masked."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        lengths: list[int] = []
        for _ in range(ROWS):
            left = LENGTH
            while left:
                length = min(left, int(torch.randint(40, 400, (), generator=generator)))
                lengths.append(length)
                left -= length
        ids = torch.randint(5, VOCABULARY, (ROWS, LENGTH), generator=generator)
        labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.15, ids, -100)
        targets = int((labels != -100).sum())
        made.append(Batch(ids, labels, None, torch.tensor(lengths), targets, ids.numel(), 0))
    return made


def window_of(micro: list[Batch]) -> Window:
    return Window(micro, sum(batch.num_targets for batch in micro), 0)


class Contestant:
    """A model of its own with one optimizer; `step(update)` times a training step."""

    def __init__(self, name: str, config: NeoBERTConfig, micro: list[Batch]):
        torch.manual_seed(0)
        self.runtime = build_runtime(use_cpu=True, mixed_precision="bf16", tf32=False)
        self.model = NeoBERTForMaskedLM(config)
        self.window = window_of(micro)
        muon = MuonSettings(dtype=self.runtime.dtype or torch.float32)
        settings = OptimizerSettings(name, lr=1e-4, weight_decay=0.01, betas=(0.9, 0.98), muon=muon, fused=PARTS)
        self.optimizer = build_optimizer(self.model.named_parameters(), settings)
        clip = QKClip(self.model, QKClipSettings(interval=10), pad_id=0) if name == "muonclip" else None
        self.setup = Setup(
            self.model, self.optimizer, self.runtime, lr=lambda step: 1e-4, gradient_clipping=1.0, clip=clip
        )

    def step(self, update: int) -> float:
        start = time.perf_counter()
        train_step(self.setup, self.window, update - 1)
        return time.perf_counter() - start


def optimizer_part(contestant: Contestant) -> tuple[float, float]:
    """Seconds of Muon's update of all encoder matrices, and of the same update as a plain loop."""
    optimizer, dtype = contestant.optimizer, contestant.runtime.dtype or torch.float32
    [group] = [group for group in optimizer.param_groups if group["algorithm"] == "muon"]
    for parameter in group["params"]:
        parameter.grad = torch.randn_like(parameter) * 1e-3
    momenta = [torch.zeros_like(parameter) for parameter in group["params"]]

    def ours() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            optimizer._muon_step(group)
        return time.perf_counter() - start

    def plain() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            for parameter, parts, momentum in zip(group["params"], group["parts"], momenta, strict=True):
                momentum.lerp_(parameter.grad, 1 - optimizer.settings.momentum)
                for weight, update in zip(parameter.chunk(parts), momentum.chunk(parts), strict=True):
                    scale = SCALE * math.sqrt(max(weight.shape))
                    weight.add_(textbook(update, dtype), alpha=-group["lr"] * scale)
        return time.perf_counter() - start

    seconds = alternate({"ours": ours, "plain": plain}, 5)
    return seconds["ours"], seconds["plain"]


def textbook(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Polar Express as torch.optim.Muon writes its iteration: two-dimensional products, tall matrices transposed."""
    x = matrix.to(dtype)
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    x = x / (x.norm() * 1.01 + 1e-7)
    for a, b, c in quintics("polar_express", 5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


def main() -> None:
    options = arguments(__doc__)
    width, layers = (512, 2) if options.quick else (768, 12)
    config = NeoBERTConfig(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64,
        intermediate_size=4 * width, max_position_embeddings=LENGTH,
    )  # fmt: skip
    micro = batches(4)
    adamw, muonclip = (Contestant(name, config, micro) for name in ("adamw", "muonclip"))
    for contestant in (adamw, muonclip):
        contestant.window = window_of(micro[:1])
        contestant.step(1)
        contestant.window = window_of(micro)
    steps = {
        "adamw": partial(adamw.step, 1),
        "muonclip": partial(muonclip.step, 1),
        "muonclip, clip step": partial(muonclip.step, 10),
    }
    for contestant in (adamw, muonclip):
        contestant.setup.stopwatch.lap()
    repeats = 3 if options.quick else 2
    seconds = alternate(steps, repeats)
    parts = [
        adamw.setup.stopwatch.lap()["optimizer"] / repeats,
        muonclip.setup.stopwatch.lap()["optimizer"] / repeats / 2,
    ]
    rows = [(name, f"{value:.2f}", f"{value / seconds['adamw']:.3f}x") for name, value in seconds.items()]
    table([(f"{width} x {layers}, {4 * ROWS * LENGTH:,} tokens", "seconds", "of adamw"), *rows])
    print(f"optimizer alone, with gradient clipping: adamw {parts[0]:.2f} s, muonclip {parts[1]:.2f} s")
    mine, plain = optimizer_part(muonclip)
    table([("update of the matrices", "seconds", ""), ("ours", f"{mine:.3f}", ""), ("plain loop", f"{plain:.3f}", "")])
    bar("muonclip_step", seconds["muonclip"] / seconds["adamw"], 1.15, at_most=True)
    bar("muonclip_clip_step", seconds["muonclip, clip step"] / seconds["adamw"], 1.25, at_most=True)
    bar("muon_update", plain / mine, 1.5)
    finish()


if __name__ == "__main__":
    main()
