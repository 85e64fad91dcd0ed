"""The training loop of both stages: rates, finite checks, checkpoints."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from hybridlib.checks import check_int
from hybridlib.distill.graphs import Graphed, Update
from hybridlib.distill.settings import DistillationDiverged, History, _Settings

__all__ = ["check_finite", "load_checkpoint", "rate_at", "save_checkpoint", "train_steps"]

logger = logging.getLogger(__name__)


def train_steps(stage, model, tokens, num_tokens, settings, groups, step_loss: Callable, checkpoint, until=None,
                targets: Callable | None = None) -> History:
    """The loop. `step_loss` takes a share of the step, its rows and, if there are `targets`, what they make of them."""
    check_int("num_tokens", num_tokens, tokens.context)
    if until is not None:
        check_int("until", until, tokens.context)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and tokens.context > limit:
        raise ValueError(f"context={tokens.context} is beyond the teacher's {limit}; load tokens with a shorter one")
    device = next(model.parameters()).device
    rows = settings.step_rows(tokens.context)
    micro = max(1, (settings.micro_batch_tokens or settings.batch_tokens) // tokens.context)
    steps = max(1, num_tokens // (rows * tokens.context))
    every = max(1, settings.checkpoint_every // (rows * tokens.context))
    end = steps if until is None else min(steps, max(1, until // (rows * tokens.context)))
    named = [pair for params, _ in groups for pair in params]
    if not named:
        raise ValueError(f"the model has no linear layer, so there is nothing to {stage}; restore fewer layers")

    trained = {id(p) for _, p in named}
    frozen = [(p, p.requires_grad) for p in model.parameters()]
    for p, _ in frozen:
        p.requires_grad_(id(p) in trained)
    optimizer = torch.optim.AdamW([{"params": [p for _, p in params], "peak": rate} for params, rate in groups],
                                  lr=0.0, betas=settings.betas, weight_decay=settings.weight_decay,
                                  fused=device.type == "cuda")
    history, begun = History(stage), 0
    run = {"stage": stage, "num_tokens": num_tokens, "settings": settings.numbers(),
           "tokens": tokens.fingerprint, "weights": {n: list(p.shape) for n, p in named}}
    if checkpoint is not None and Path(checkpoint).exists():
        history, begun = load_checkpoint(Path(checkpoint), run, named, optimizer)
        if begun > end:
            raise ValueError(f"checkpoint={str(checkpoint)!r} is {history.tokens[-1]} tokens into the run, beyond "
                             f"until={until}; delete it to start anew")

    def gradients(*batch):
        optimizer.zero_grad(set_to_none=True)
        losses: dict = {}
        for part in zip(*(tensor.split(micro) for tensor in batch), strict=True):
            share = len(part[0]) / rows
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                for key, loss in step_loss(share, *part).items():
                    losses[key] = losses.get(key, 0) + loss * share
        norm = torch.nn.utils.clip_grad_norm_([p for _, p in named], settings.clip)
        return list(losses), torch.stack([*losses.values(), norm])  # to be read at once: each reading waits

    model.train()
    graphed = Graphed(gradients) if settings.cuda_graph and device.type == "cuda" else None
    gradients, update = graphed or gradients, Update(optimizer, graphed)
    started = time.perf_counter() - history.seconds
    with tqdm(total=steps * rows * tokens.context, initial=begun * rows * tokens.context, unit="tok", unit_scale=True,
              desc=stage, leave=False) as bar:
        for step in range(begun, end):
            ids = tokens.rows(step * rows, rows)
            batch = [ids.to(device, non_blocking=True)]
            if targets is not None:
                batch.append(torch.cat([targets(part) for part in ids.split(micro)]))
            keys, numbers = gradients(*batch)
            *losses, norm = numbers.tolist()
            values, loss = dict(zip(keys, losses, strict=True)), sum(losses) / len(losses)
            check_finite(stage, step, values, norm, named, history, settings)
            update(rate_at(step, steps, settings))
            history.tokens.append((step + 1) * rows * tokens.context)
            history.losses.append(loss)
            history.seconds = time.perf_counter() - started
            history.elapsed.append(history.seconds)
            history.layer_losses = {key: value for key, value in values.items() if key is not None}
            bar.update(rows * tokens.context)
            bar.set_postfix(loss=f"{loss:.4f}")
            if checkpoint is not None and ((step + 1) % every == 0 or step + 1 == end):
                save_checkpoint(Path(checkpoint), run, named, optimizer, history, step + 1)
    optimizer.zero_grad(set_to_none=True)
    update.release()
    if graphed:
        graphed.release()
    for p, flag in frozen:
        p.requires_grad_(flag)
    model.eval()
    return history


def rate_at(step: int, steps: int, settings: _Settings) -> float:
    """The share of its peak that a learning rate has at a step."""
    warmup = math.ceil(settings.warmup * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if settings.schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))


def check_finite(stage, step, values, norm, named, history, settings) -> None:
    """Raise `DistillationDiverged` where the losses (values, by layer) or the gradient's norm are not finite, or grew.

    `named` : (name, weight with its gradient) of all trained weights, to say where; `history` : the steps before.
    """
    advice = "try a lower learning rate, a longer warmup or a smaller clip"
    bad = [key for key, value in values.items() if not math.isfinite(value)]
    if bad or not math.isfinite(norm):
        layer = bad[0] if bad and bad[0] is not None else _first_bad_layer(named)
        where = "no single layer" if layer is None else f"layer {layer}"
        raise DistillationDiverged(f"{stage} met a number that is not finite at step {step} in {where}; {advice}")
    loss, first = sum(values.values()) / len(values), history.losses[:10]
    if len(first) == 10 and loss > settings.divergence_factor * max(sum(first) / 10, settings.loss_floor):
        layer = max(values, key=values.get)
        where = "" if layer is None else f", worst in layer {layer}"
        raise DistillationDiverged(f"{stage} diverged at step {step}: loss {loss:.3g} against {sum(first) / 10:.3g} "
                                   f"over the first ten steps{where}; {advice}")


def _first_bad_layer(named):
    for tensor_of in (lambda p: p, lambda p: p.grad):
        for name, p in named:
            tensor = tensor_of(p)
            if tensor is not None and not bool(tensor.isfinite().all()):
                return int(name.split(".")[2]) if name.startswith("model.layers.") else name
    return None


def save_checkpoint(path, run, named, optimizer, history, step):
    tensors = {f"weight/{n}": p.detach() for n, p in named}
    for n, p in named:
        tensors |= {f"{key}/{n}": value for key, value in optimizer.state.get(p, {}).items()}
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    state = {"run": run, "step": step, "history": {
        "tokens": history.tokens, "losses": history.losses, "elapsed": history.elapsed,
        "layer_losses": list(history.layer_losses.items()), "seconds": history.seconds}}
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, written, metadata={"state": json.dumps(state)})
        os.replace(written, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"could not save checkpoint {path}: {error}; the one before it, if any, is unchanged") from error
    finally:
        written.unlink(missing_ok=True)


@torch.no_grad()
def load_checkpoint(path, run, named, optimizer):
    try:
        with safe_open(path, "pt") as f:
            state = json.loads(f.metadata()["state"])
            tensors = {k: f.get_tensor(k) for k in f.keys()}
    except (SafetensorError, OSError, TypeError, KeyError, ValueError):
        raise ValueError(f"checkpoint={str(path)!r} is truncated or no checkpoint; delete it to start anew") from None
    for key, mine in run.items():
        if state["run"].get(key) != mine:
            raise ValueError(f"checkpoint={str(path)!r} belongs to another run ({key} differs); "
                             "delete it to start anew or give another file")
    for name, p in named:
        p.copy_(tensors[f"weight/{name}"])
        optimizer.state[p] = {key: tensors[f"{key}/{name}"].to(p.device if key != "step" else "cpu")
                              for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}/{name}" in tensors}
        if next(iter(optimizer.param_groups))["fused"]:
            optimizer.state[p]["step"] = optimizer.state[p]["step"].to(p.device)
    torch.set_rng_state(tensors["random/cpu"])
    if "random/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random/cuda"])
    kept = state["history"]
    history = History(run["stage"], kept["tokens"], kept["losses"], kept["elapsed"],
                      {int(k): v for k, v in kept["layer_losses"]}, kept["seconds"])
    logger.info("resumed %s at step %d from %s", run["stage"], state["step"], path)
    return history, state["step"]
