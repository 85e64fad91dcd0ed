"""Stage 2 of many layer sets at once.

Launching the kernels of a step takes a GPU longer than running them, where the teacher is small. Candidates, one for
each set of softmax layers, therefore share every launch: their weights are stacked, see `hybridlib.stacked`.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from .checks import check_int
from .distill import DistillationDiverged, History, MatchSettings, check_finite, rate_at
from .evaluate import compare, mean_stderr
from .graphs import Graphed
from .hybrid import check_layers, check_same_shape, linear_layers
from .objectives import divergence_from_hidden
from .passes import last_hidden
from .recall import RecallTask, encode_all, exact_match, generate_recall, judge, pad_left, recall_logits
from .stacked import stacked, stacked_weights

__all__ = ["match_sets"]


def match_sets(student, teacher, tokens, sets: Sequence[Iterable[int]], num_tokens: int, *,
               settings: MatchSettings | None = None, group: int | None = None, recall: RecallTask | None = None,
               recall_examples: int = 200, measure_at: Sequence[int] = ()) -> list[dict]:
    """Stage 2 and evaluation of many layer sets of one aligned student, a group of them at once.

    Each set is trained as ``match(restore(student, teacher, set), teacher, tokens, num_tokens)`` would train it, on the
    same rows in the same order, with its own gradient norm to clip, and measured as `evaluate` would measure it. The
    numbers differ by rounding only.

    Parameters
    ----------
    student : aligned and all linear, from `hybrid.linearize` and `distill.align`; it is left as it was.
    teacher : the model that it was made from, on the same device.
    tokens : from `corpus.load_tokens`; with a tokenizer, if `recall` is given.
    sets : for each candidate, the layers that are softmax: none to all, in any order.
    num_tokens : tokens to train each candidate on, at least one row.
    settings : of stage 2. `compile` is not offered here and `checkpoint_every` has no meaning.
    group : candidates at a time; the figures do not depend on it. None: as many as half of a GPU's free memory, or a
        quarter of a machine's memory, holds by an estimate: weights, gradients and AdamW's two moments, and for each
        layer and token of a micro batch four bytes times 16 widths, 10 widths of all heads and 4 of the MLP. Groups
        are then evened out.
    recall, recall_examples : a task to score as `evaluate` does, None to leave recall out, and examples of it.
    measure_at : tokens after which to measure on the way, 0 to `num_tokens`; rounded up to whole steps.

    Returns
    -------
    list of dict, one for each set in the order given
        ``layers``; ``kl``, ``kl_stderr``, ``perplexity``, ``top1_agreement``, ``recall_exact``, ``recall_stderr``, as
        in `evaluate.Evaluation`; ``tokens`` trained on; ``losses`` of the steps and ``loss_tokens``, the tokens at the
        end of each; ``curve``, for each of `measure_at` a dict of ``tokens``, ``kl``, ``recall_exact``; ``seconds``,
        wall time of its group divided by the group's size. Where `distill.match` would raise `DistillationDiverged`,
        the sentence is in ``error``, the figures are None, and losses and curve end before; the other candidates are
        not touched by that.

    Raises ValueError for arguments outside these, a student with softmax layers or a teacher of another shape.

    Cost: that of the single runs, less the launches that they share and all teacher's passes but one a group. Memory
    grows with the group. Meant for small teachers: a candidate that fills the GPU alone gains nothing.
    """
    settings = settings or MatchSettings()
    sets = _check(student, teacher, tokens, sets, num_tokens, settings, group, measure_at)
    examples = None
    if recall is not None:
        if tokens.tokenizer is None:
            raise ValueError("recall is given, but tokens has no tokenizer; load tokens with the teacher's")
        check_int("recall_examples", recall_examples, 1)
        examples = encode_all(generate_recall(recall, recall_examples, seed=1), tokens.tokenizer, student.config)
    size = group or _group_size(student, tokens, settings, len(sets))
    order = sorted(range(len(sets)), key=sets.__getitem__)  # neighbours share layers, and with them launches
    results = {}
    with tqdm(total=len(sets) * num_tokens, unit="tok", unit_scale=True, desc="match sets", leave=False) as bar:
        for members in _parts(order, -(-len(sets) // -(-len(sets) // size))):
            started = time.perf_counter()
            found = _match_group(student, teacher, tokens, [sets[i] for i in members], num_tokens, settings, examples,
                                 measure_at, bar)
            seconds = (time.perf_counter() - started) / len(members)
            results |= {i: result | {"seconds": seconds} for i, result in zip(members, found, strict=True)}
    return [results[i] for i in range(len(sets))]


def _check(student, teacher, tokens, sets, num_tokens, settings, group, measure_at):
    """`sets` as tuples, ascending, once all arguments are what they should be."""
    num_layers = student.config.num_hidden_layers
    if len(linear_layers(student.config)) != num_layers:
        raise ValueError("student has softmax layers; match_sets takes the all-linear student that linearize gave")
    check_same_shape(student, teacher)
    sets = [check_layers(layers, num_layers) for layers in sets]
    if not sets:
        raise ValueError("sets is empty; give at least one set of layers, () for the all-linear student")
    if not isinstance(settings, MatchSettings):
        raise ValueError(f"settings is a {type(settings).__name__}; it must be MatchSettings")
    if settings.compile:
        raise ValueError("compile=True is not offered by match_sets; use compile=False, with cuda_graph=True on a GPU")
    if student.config.attention_dropout:
        raise ValueError(f"the student's config has attention_dropout={student.config.attention_dropout}, which draws "
                         "other numbers for a group than for one candidate; set it to 0")
    check_int("num_tokens", num_tokens, tokens.context)
    if tokens.context > student.config.max_position_embeddings:
        raise ValueError(f"context={tokens.context} is beyond the teacher's {student.config.max_position_embeddings}; "
                         "load tokens with a shorter one")
    if group is not None:
        check_int("group", group, 1)
    for point in measure_at:
        check_int("measure_at", point, 0, num_tokens)
    return sets


def _group_size(student, tokens, settings, most):
    """How many candidates to train at once, by memory; see `match_sets`."""
    config, parameter = student.config, next(student.parameters())
    weights = sum(p.numel() for p in student.parameters())
    rows = max(1, (settings.micro_batch_tokens or settings.batch_tokens) // tokens.context)
    numbers = 16 * config.hidden_size + 10 * config.num_attention_heads * config.head_dim + 4 * config.intermediate_size
    held = rows * tokens.context * config.num_hidden_layers * numbers * 4 + 4 * weights * parameter.element_size()
    if parameter.is_cuda:
        kept = torch.cuda.memory_reserved(parameter.device) - torch.cuda.memory_allocated(parameter.device)
        memory = (torch.cuda.mem_get_info(parameter.device)[0] + kept) // 2
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    return max(1, min(most, memory // held))


def _match_group(student, teacher, tokens, sets, num_tokens, settings, examples, measure_at, bar):
    """Results of `match_sets`, but for their seconds, of sets that are trained at once."""
    device, count = next(student.parameters()).device, len(sets)
    stack = stacked(student, teacher, sets)
    weights = list(stacked_weights(stack))
    mixers = [p for name, p, _ in weights if ".self_attn.linear." in name]
    others = [p for name, p, _ in weights if ".self_attn.linear." not in name]
    groups = [(mixers, settings.mixer_learning_rate), (others, settings.learning_rate)]
    optimizer = torch.optim.AdamW([{"params": params, "peak": rate} for params, rate in groups if params], lr=0.0,
                                  betas=settings.betas, weight_decay=settings.weight_decay,
                                  fused=device.type == "cuda")
    rows = max(1, settings.batch_tokens // tokens.context)
    micro = max(1, (settings.micro_batch_tokens or settings.batch_tokens) // tokens.context)
    steps, each = max(1, num_tokens // (rows * tokens.context)), rows * tokens.context
    histories, errors = [History("match") for _ in sets], {}
    stops = [min(steps, -(-point // each)) for point in measure_at]
    measured = {}  # step: figures of each candidate

    def gradients(batch):
        optimizer.zero_grad(set_to_none=True)
        losses = torch.zeros(count, device=device)
        for part in batch.split(micro):
            share = len(part) / rows
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                with torch.no_grad():
                    target = last_hidden(teacher, part)
                loss = torch.stack([
                    divergence_from_hidden(target, teacher.lm_head.weight, hidden, head, kind=settings.divergence,
                                           alpha=settings.alpha, beta=settings.beta, temperature=settings.temperature)
                    for hidden, head in _candidates(stack, part, count)])
                (loss.sum() * share).backward()
            losses = losses + loss.detach() * share
        return losses, _clip(weights, count, settings.clip)

    def measure(step):
        if step not in measured:
            measured[step] = _figures(stack, teacher, tokens, examples, count)
            stack.train()

    stack.train()
    graphed = Graphed(gradients) if settings.cuda_graph and device.type == "cuda" else None
    compute = graphed or gradients
    for step in range(steps):
        if step in stops:
            measure(step)
        batch = tokens.rows(step * rows, rows).to(device, non_blocking=True)
        for param_group in optimizer.param_groups:
            param_group["lr"] = param_group["peak"] * rate_at(step, steps, settings)
        losses, norms = (x.tolist() for x in compute(batch))
        for c in set(range(count)) - set(errors):
            named = () if math.isfinite(losses[c] + norms[c]) else _own(weights, c)
            try:
                check_finite("match", step, {None: losses[c]}, norms[c], named, histories[c], settings)
            except DistillationDiverged as error:
                errors[c] = f"layers {sets[c]}: {error}"
            else:
                histories[c].tokens.append((step + 1) * each)
                histories[c].losses.append(losses[c])
        _silence(weights, errors)
        optimizer.step()
        bar.update(each * count)
        bar.set_postfix(loss=f"{min(losses):.4f} to {max(losses):.4f}")
    optimizer.zero_grad(set_to_none=True)
    if graphed:
        graphed.release()
    measure(steps)
    return [_result(sets[c], histories[c], errors.get(c), {step: m[c] for step, m in measured.items()}, stops, each)
            for c in range(count)]


def _result(layers, history, error, measured, stops, each):
    """A set's result; `measured` : figures by step, the last step among them."""
    done, figures = len(history.losses), measured[max(measured)]
    figures = dict.fromkeys(figures) if error else figures
    result = {"layers": layers, **figures, "tokens": done * each, "losses": history.losses,
              "loss_tokens": history.tokens,
              "curve": [{"tokens": step * each, "kl": measured[step]["kl"],
                         "recall_exact": measured[step]["recall_exact"]} for step in stops if step <= done]}
    return result | {"error": error} if error else result


@torch.no_grad()
def _figures(stack, teacher, tokens, examples, count, batch_tokens=8192):
    """The figures of `evaluate.evaluate` for each candidate."""
    device = next(stack.parameters()).device
    stack.eval()
    kl, sums = [[] for _ in range(count)], torch.zeros(count, 2, dtype=torch.float64)
    for ids in tokens.heldout.split(max(1, batch_tokens // tokens.context)):
        ids = ids.to(device).long()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            theirs = teacher.lm_head(last_hidden(teacher, ids)).float()
            for c, (hidden, head) in enumerate(_candidates(stack, ids, count)):
                row_kl, *row_sums = compare(theirs, F.linear(hidden, head).float(), ids)
                kl[c] += row_kl
                sums[c] += torch.tensor(row_sums, dtype=torch.float64)
    nats, agree = (sums / len(tokens.heldout)).unbind(1)
    right = _recall(stack, tokens.tokenizer, examples, count) if examples else [None] * count
    return [dict(zip(("kl", "kl_stderr", "perplexity", "top1_agreement", "recall_exact", "recall_stderr"),
                     (*mean_stderr(kl[c]), nats[c].exp().item(), agree[c].item(),
                      *((None, None) if right[c] is None else exact_match(right[c]))))) for c in range(count)]


def _recall(stack, tokenizer, examples, count, batch_rows=128):
    """For each candidate, which answers are right, as `recall.score_recall` judges them; the logits of 128 rows."""
    device, right = next(stack.parameters()).device, [[] for _ in range(count)]
    for part in _parts(examples, max(1, batch_rows // count)):
        ids, mask, shift = pad_left([ids for ids, _ in part], tokenizer, device)
        predicted = recall_logits(stack, ids.repeat(count, 1), mask.repeat(count, 1)).argmax(-1).cpu()
        ids = ids.cpu()  # at once: a number at a time would wait for the GPU as often
        for c, predicted in enumerate(predicted.unflatten(0, (count, -1))):
            right[c] += [exact for exact, _, _ in judge(predicted, ids, shift, part)]
    return right


def _candidates(stack, ids, count):
    """For each candidate, its last hidden states on `ids` (rows, time), (rows, time, width), and its output head."""
    hidden = last_hidden(stack, ids.repeat(count, 1)).unflatten(0, (count, -1))
    return list(zip(hidden.unbind(0), stack.lm_head.weight.unbind(0), strict=True))


def _parts(items, size):
    return (items[i:i + size] for i in range(0, len(items), size))


def _clip(weights, count, clip):
    """Scale every candidate's gradient to a norm of at most `clip`; returns the norms before, (candidates,)."""
    first = weights[0][1]
    squares = torch.zeros(count, device=first.device, dtype=torch.promote_types(first.dtype, torch.float32))
    for _, p, members in weights:
        squares = squares.index_add(0, members, p.grad.flatten(1).to(squares.dtype).square().sum(1))
    norms = squares.sqrt()
    factors = (clip / (norms + 1e-6)).clamp(max=1)
    for _, p, members in weights:
        p.grad.mul_(factors[members].view(-1, *[1] * (p.dim() - 1)))
    return norms


def _silence(weights, errors):
    """Put 0 in the place of the gradients of the candidates that went wrong."""
    for _, p, members in weights if errors else ():
        p.grad[[i for i, c in enumerate(members.tolist()) if c in errors]] = 0


def _own(weights, c):
    """(name, weight) of candidate `c`, each with its gradient."""
    named = []
    for name, p, members in weights:
        for i in (members == c).nonzero().flatten().tolist():
            own = p.detach()[i]
            own.grad = p.grad[i]
            named.append((name, own))
    return named
