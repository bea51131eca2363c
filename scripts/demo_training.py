"""How the scripts train small models: optimizer, schedule, steps, and putting a checkpoint in
place. Used by the scripts beside which it lies."""

import argparse
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

# Factors of the losses that keep routing even and its logits small.
BALANCE, LARGE_LOGITS = 0.01, 0.001
BIAS_STEP = 1e-3  # of a bias that keeps it even in their place (arXiv 2408.15664)


class Pace(Protocol):
    """How many steps, and how large."""

    @property
    def steps(self) -> int: ...
    @property
    def warmup_steps(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def gradient_clip(self) -> float: ...


class TextPace(Pace, Protocol):
    """The same on text, so many windows a step."""

    @property
    def batch(self) -> int: ...


class Descent:
    """Takes a model down its loss, step by step."""

    def __init__(self, model: torch.nn.Module, pace: Pace):
        self.model, self.pace = model, pace
        self.optimizer = build_optimizer(model, pace)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate_factor(step, pace)
        )

    def step(self, loss: Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.pace.gradient_clip)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)


def build_optimizer(model: torch.nn.Module, pace: Pace) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves norms, biases and sinks alone."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": pace.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=pace.learning_rate, betas=(0.9, 0.95))


def learning_rate_factor(step: int, pace: Pace) -> float:
    """Linear warm-up, then a cosine down to a hundredth."""
    if step < pace.warmup_steps:
        return (step + 1) / pace.warmup_steps
    progress = (step - pace.warmup_steps) / max(1, pace.steps - pace.warmup_steps)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))


def balance_loss(
    router_logits: Sequence[Tensor], experts: int, top_k: int, mask: Tensor | None = None
) -> Tensor:
    """Mean over layers of Hugging Face's balance loss.

    HF applies it to all layers pooled, which leaves a single layer free to use two experts only.
    """
    losses = [load_balancing_loss_func((one,), experts, top_k, mask) for one in router_logits]
    return torch.stack([torch.as_tensor(loss) for loss in losses]).mean()


def routers_of(model: torch.nn.Module, biased: bool) -> list[torch.nn.Module]:
    """Each `gate` of an MLP, of those with a choice bias or of the others."""
    gates = (module for name, module in model.named_modules() if name.endswith(".mlp.gate"))
    return [gate for gate in gates if hasattr(gate, "e_score_correction_bias") == biased]


def hear_routers(model: torch.nn.Module) -> list[Tensor]:
    """Filled by each call with the logits `[tokens, experts]` of routers that losses balance."""
    heard: list[Tensor] = []
    for router in routers_of(model, biased=False):
        router.register_forward_hook(lambda _, args, output: heard.append(output[0]))
    return heard


def balance_by_biases(model: torch.nn.Module) -> Callable[[], None]:
    """Balances without a loss those routers of Hugging Face's that have a choice bias, when it is
    called after a step: experts that got more tokens than the mean are ranked lower by BIAS_STEP,
    others higher."""
    counts: dict[torch.nn.Module, Tensor] = {}

    def count(router: torch.nn.Module, args: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
        experts = len(router.e_score_correction_bias)
        counts[router] = torch.bincount(output[2].flatten(), minlength=experts).float()

    for router in routers_of(model, biased=True):
        router.register_forward_hook(count)

    def step() -> None:
        for router, count in counts.items():
            router.e_score_correction_bias += BIAS_STEP * torch.sign(count.mean() - count)

    return step


def train_on_text(
    model: torch.nn.Module,
    predict: Callable[[Tensor], Tensor],
    windows: Iterator[Tensor],
    pace: TextPace,
    after_step: Callable[[], object] = lambda: None,
) -> None:
    """Train `model`, whose logits `[B, T, V]` of ids `[B, T]` are what `predict` gives, reporting
    to stderr. Its configuration says how many experts there are, and how many a token gets."""
    descent, heard, started = Descent(model, pace), hear_routers(model), monotonic()
    config = next(one.config for one in model.modules() if isinstance(one, PreTrainedModel))
    model.train()
    for step in range(1, pace.steps + 1):
        ids = torch.stack(list(islice(windows, pace.batch)))
        heard.clear()
        loss = F.cross_entropy(predict(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        routing = torch.zeros(())
        if heard:
            even = balance_loss(heard, config.num_experts, config.num_experts_per_tok)
            large = torch.stack([logits.logsumexp(-1).square().mean() for logits in heard]).mean()
            routing = BALANCE * even + LARGE_LOGITS * large
        descent.step(loss + routing)
        after_step()
        if step % 20 == 0:
            say(f"step {step}/{pace.steps}  loss {loss.item():.3f}  {monotonic() - started:.0f} s")


def save_checkpoint(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    """Save both in `folder`, the weights in float16."""
    model.half().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes it for its owner only
    tokenizer.save_pretrained(folder)


def replace_folder(new: Path, old: Path) -> None:
    """Put `new` in the place of `old`; both must lie on one disk."""
    retired = new.with_name(new.name + ".old")
    if old.exists():
        os.replace(old, retired)
    os.replace(new, old)
    shutil.rmtree(retired, ignore_errors=True)


def training_parser(description: str | None, out: Path, settings: Any) -> argparse.ArgumentParser:
    """The options that trainings share, and one for each field of the dataclass `settings`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=out, help="checkpoint folder (default: the package's)"
    )
    parser.add_argument(
        "--evaluate-only", action="store_true", help="measure OUT again and rewrite its card"
    )
    parser.add_argument("--threads", type=int, default=2, help="of the CPU; default: %(default)s")
    for name, default in asdict(settings).items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=type(default), default=default, help="default: %(default)s")
    return parser


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
