"""Train strobe-tiny: one command from the text to a Hugging Face folder.

    python examples/train_tiny/train.py --out strobe-tiny

It needs torch, tokenizers and safetensors. It takes a minute on a GPU and a night on two CPU cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from corpus import BOS_ID, TEXT, as_chat, as_play, speeches, split, train_tokenizer
from export import write_model
from network import Network, Shape
from tokenizers import Tokenizer
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


@dataclass(frozen=True)
class Recipe:
    """How long, how fast and with how much noise the network is trained."""

    seed: int = 1
    steps: int = 1500
    batch: int = 16
    learning_rate: float = 4e-3
    warmup: int = 100
    weight_decay: float = 1.5
    dropout: float = 0.3
    bpe_dropout: float = 0.15  # at the first step; it falls to none at the last
    chat_share: float = 0.2  # of the crops: written as turns of a chat
    ema: float = 0.996
    respell_every: int = 25  # steps between two draws of the BPE dropout
    score_every: int = 100
    patience: int = 600  # steps without a better held-out loss before training stops


class Crops:
    """Random crops of the training text: each begins with the BOS token and a speech's first token."""

    def __init__(self, tokenizer: Tokenizer, text: str, length: int, recipe: Recipe) -> None:
        self.tokenizer, self.text, self.length, self.recipe = tokenizer, text, length, recipe
        self.random = torch.Generator().manual_seed(recipe.seed)
        self.spell(recipe.bpe_dropout)

    def spell(self, bpe_dropout: float) -> None:
        """Draw new spellings. The tokenizers library seeds this draw itself: runs differ in it."""
        spelled = speeches(self.tokenizer, self.text, bpe_dropout)
        self.play, self.chat = as_play(self.tokenizer, spelled), as_chat(spelled)

    def draw(self) -> tuple[Tensor, Tensor]:
        """(inputs, targets), each [batch, length]. A crop that reaches the end goes on at the beginning."""
        rows = []
        for is_chat in torch.rand(self.recipe.batch, generator=self.random) < self.recipe.chat_share:
            ids, starts = self.chat if is_chat else self.play
            start = starts[torch.randint(len(starts), (), generator=self.random)]
            rows.append(ids[(start + torch.arange(self.length)) % len(ids)])
        targets = torch.stack(rows)
        return F.pad(targets[:, :-1], (1, 0), value=BOS_ID), targets


@torch.no_grad()
def held_out_nats(network: torch.nn.Module, ids: Tensor, length: int) -> float:
    """Summed negative log-likelihood of ids [tokens].

    Windows of `length` overlap by half and each token is scored once, so that all but the first half window
    is predicted from at least length / 2 tokens before it.
    """
    network.eval()
    total, scored = 0.0, 0
    for start in range(0, max(1, len(ids) - length // 2), length // 2):
        window = ids[start : start + length]
        logits = network(F.pad(window[:-1], (1, 0), value=BOS_ID)[None])[0].float()
        new = slice(scored - start, None)
        total += F.cross_entropy(logits[new], window[new], reduction="sum").item()
        scored = start + len(window)
    return total


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine down to zero."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / (recipe.steps - recipe.warmup)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def train(shape: Shape, recipe: Recipe, tokenizer: Tokenizer, device: torch.device) -> dict[str, Tensor]:
    """The averaged weights that scored best on the held-out text."""
    training_text, held_out_text = split(TEXT.read_text(encoding="utf-8"))
    held_out = torch.tensor(tokenizer.encode(held_out_text, add_special_tokens=False).ids, device=device)
    crops = Crops(tokenizer, training_text, shape.context, recipe)
    torch.manual_seed(recipe.seed)
    network = Network(shape, recipe.dropout).to(device)
    averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema))
    matrices = [p for p in network.parameters() if p.dim() == 2]
    gains = [p for p in network.parameters() if p.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": gains, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)

    best_loss, best_step, best_weights = math.inf, 0, {}
    begin = time.perf_counter()
    for step in range(recipe.steps):
        if step and step % recipe.respell_every == 0:
            crops.spell(recipe.bpe_dropout * (1 - step / recipe.steps))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        inputs, targets = (ids.to(device, non_blocking=True) for ids in crops.draw())
        network.train()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = F.cross_entropy(network(inputs).flatten(0, 1).float(), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        averaged.update_parameters(network)
        if (step + 1) % recipe.score_every == 0 or step + 1 == recipe.steps:
            nats = held_out_nats(averaged.module, held_out, shape.context)
            if nats < best_loss:
                best_loss, best_step = nats, step
                weights = averaged.module.state_dict()
                best_weights = {name: weight.to("cpu", copy=True) for name, weight in weights.items()}
            print(
                f"step {step + 1:5d}  training {loss.item():.3f}  held-out {nats / len(held_out):.4f} nats "
                f"a token, {nats / len(held_out_text):.4f} a character  {time.perf_counter() - begin:.0f} s",
                flush=True,
            )
            if step - best_step >= recipe.patience:
                break
    return best_weights


def options() -> argparse.Namespace:
    """Command line: --out, --device and one flag for each field of Shape and Recipe."""
    parser = argparse.ArgumentParser(description="Train strobe-tiny. A setting's help is its default.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for field in (*dataclasses.fields(Shape), *dataclasses.fields(Recipe)):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=type(field.default), default=field.default, help=f"{field.default}")
    return parser.parse_args()


def main() -> None:
    flags = vars(options())
    shape = Shape(**{field.name: flags[field.name] for field in dataclasses.fields(Shape)})
    recipe = Recipe(**{field.name: flags[field.name] for field in dataclasses.fields(Recipe)})
    device = torch.device(flags["device"])
    training_text, held_out_text = split(TEXT.read_text(encoding="utf-8"))
    tokenizer = train_tokenizer(training_text, shape.vocab_size)

    begin = time.perf_counter()
    weights = train(shape, recipe, tokenizer, device)
    seconds = time.perf_counter() - begin

    # What is shipped is scored, not what was trained: the weights rounded to bfloat16, in float32 arithmetic.
    weights = {name: weight.to(torch.bfloat16) for name, weight in weights.items()}
    shipped = Network(shape, dropout=0.0).to(device)
    shipped.load_state_dict({name: weight.float() for name, weight in weights.items()})
    held_out = torch.tensor(tokenizer.encode(held_out_text, add_special_tokens=False).ids, device=device)
    nats = held_out_nats(shipped, held_out, shape.context)
    record = {
        "recipe": dataclasses.asdict(recipe),
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "seconds": round(seconds),
        "parameters": sum(weight.numel() for weight in weights.values()),
        "training": {
            "characters": len(training_text),
            "tokens": len(tokenizer.encode(training_text, add_special_tokens=False)),
        },
        "held_out": {
            "characters": len(held_out_text),
            "tokens": len(held_out),
            "nats_per_token": round(nats / len(held_out), 4),
            "nats_per_character": round(nats / len(held_out_text), 4),
        },
    }
    write_model(flags["out"], shape, weights, tokenizer, record)
    print(f"{flags['out']}: {record['held_out']}")


if __name__ == "__main__":
    main()
