"""Every selector, declared above the function that does its work; for the fields see `hybridlib.study.selector`."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from functools import cache, partial

from hybridlib.checks import check_choice, check_int, check_number
from hybridlib.distill.choice import ChoiceTask
from hybridlib.distill.corpus import Tokens, recall_tokens
from hybridlib.distill.recall import ADDENDS, TRAINING_FAMILIES, RecallTask
from hybridlib.selection.cost import Cost, heldout_size, one_run_a_layer_flops
from hybridlib.selection.engine.candidates import Job, measure_set
from hybridlib.selection.engine.inputs import LoadedInputs
from hybridlib.selection.rules import SCORES_NEEDED, budget_layers, select
from hybridlib.selection.scorers.ablation import score_associative_recall, score_halo, score_perplexity
from hybridlib.selection.scorers.gates import GateSettings, gate_gradient, gate_gradient_flops, learned_gates
from hybridlib.selection.scorers.importance import score_layers
from hybridlib.selection.scorers.postnas import search_once_for_all
from hybridlib.selection.scorers.speculative import search_skips
from hybridlib.selection.search import beam, exhaustive
from hybridlib.study.race import race_record, run_race
from hybridlib.study.selector import SELECTORS, Selection, find_selector, run_selector, scorer, selector

__all__ = ["MOST_SETS", "SELECTORS", "find_selector", "run_selector", "score_parameters"]

MOST_SETS = 20_000  # that "exhaustive" agrees to measure
PROMPTS = 1_000_000  # tokens of recall prompts that differ; longer training reads them again
PAPER, ALONE = "the paper (arXiv 2512.20569)", "layers add up: each is judged alone"
SILENCED = "what the teacher misses with a layer's attention silenced is what a mixer cannot give; " + ALONE
SHORT = "sets rank after a short stage 2 as they do after a long one"
SLOW = "training at a lower rate than the hybrid's ranks layers as that would"
NEEDLES, SUMS = (("needle", 1, 3),), (("lookup_sum", 1, 1),)
SLOPES = "passes of the gated model, forward and backward, over held-out rows"


def _rows(study, seed):
    """Training rows for a candidate, and the held-out rows that layers are scored on."""
    return study.tokens(seed, study.settings.score_tokens, "score")


def _data(data, num_tokens):
    """What a record says of the option `data`: of text nothing, of recall prompts their families and number."""
    check_choice("data", data, ("recall", "text"))
    return {} if data == "text" else {"families": list(TRAINING_FAMILIES), "recall_tokens": num_tokens}


def _prompts(study, seed, own):
    return recall_tokens(study.teacher.tokenizer, study.settings.context, own["recall_tokens"], seed)


def _stage_2_numbers(settings, rate, **changes):
    """Settings of stage 2 for a record, with mixers at `rate` times the rate that hybrids' have."""
    check_number("rate", rate, 0, open_low=True)
    rate *= settings.attention_learning_rate
    return replace(settings.match_settings, attention_learning_rate=rate, **changes).numbers()


def _stage_2(study, own):
    """The study's settings of stage 2 with the batch and rate in a record's parameters; None where these have none."""
    numbers = own.get("settings", {})
    changed = {name: numbers[name] for name in ("batch_tokens", "attention_learning_rate") if numbers}
    return replace(study.match_settings, **changed) if numbers else None


def _rule(name, source, assumes, **fields):
    def choose(study, mixer, seed, **options):
        return Selection(select(name, study.settings.budget, num_layers=study.num_layers, seed=seed, **options), Cost())
    selector(name, name, source, "nothing", assumes, "nothing", **fields)(choose)


_rule("uniform", "common practice; `offset` \"start\" or \"end\" gives the paper's own lists",
      "all depths matter alike", options={"offset": "centre"})
_rule("random", "control; the seed draws", "nothing", control=True)
_rule("first", "control", "early layers matter", control=True)
_rule("last", "control", "late layers matter", control=True)


@scorer("ppl", "PPL", "baseline of " + PAPER, "teacher", SILENCED, "L + 1 passes of the teacher over held-out rows",
        record={"selector": "ppl"})
def perplexity(study, mixer, seed, own):
    return score_perplexity(study.teacher.model, _rows(study, 0))


def _recall_records(families, settings, num_layers, seed, pairs, num_examples, selector="ar"):
    """A record a task: with `pairs` pairs each of `families`, (name, hops, digits), then with half as many, down to 2
    (in sums, 3)."""
    least, records = ADDENDS if families == SUMS else 2, []
    pairs = max(least, settings.recall_pairs) if pairs is None else pairs
    while pairs >= least or not records:
        records += [{"selector": selector, "task": asdict(RecallTask(name, pairs=pairs, hops=hops, digits=digits)),
                     "num_examples": num_examples} for name, hops, digits in families]
        pairs //= 2
    return records


@scorer("ar-mh", "AR-MH", "baseline of " + PAPER + "; by variables that are set to one another where chains of names "
        "are beyond the teacher, and by fewer of them where both are", "teacher",
        "the teacher recalls over two hops; " + SILENCED, "as AR, for the task that it settles on",
        options={"pairs": 8, "num_examples": 200}, note="scores of the task {task[name]}, {task[pairs]} pairs",
        record=partial(_recall_records, (("multi_hop", 2, 3), ("variable_tracking", 2, 3))))
@scorer("ar-sum", "AR, sums", "as " + PAPER + " asks it: the sum of three looked-up numbers, here of a digit each",
        "teacher", "the teacher recalls and adds; " + SILENCED, "as AR", options={"pairs": None, "num_examples": 200},
        note="scores of the task {task[name]}, {task[pairs]} pairs",
        record=partial(_recall_records, SUMS, selector="ar-sum"))
@scorer("ar", "AR", "baseline of " + PAPER, "teacher", "the teacher recalls; " + SILENCED,
        "L + 1 passes of the teacher over 200 prompts", options={"pairs": None, "num_examples": 200},
        note="scores of the task {task[name]}, {task[pairs]} pairs",
        record=partial(_recall_records, NEEDLES))
def recall(study, mixer, seed, own):
    """By the first task that is not beyond the teacher; tasks that were refused are not in the cost."""
    return score_associative_recall(study.teacher.model, study.teacher.tokenizer, RecallTask(**own["task"]),
                                    num_examples=own["num_examples"])


@scorer("rad", "RAD", "arXiv 2505.22135", "teacher", "a linear mixer does for a layer at least what nothing does",
        "2 + L passes of the teacher over held-out rows, and one for each of 64 sets",
        options={"evaluations": 64, "gamma": 4}, record=lambda settings, num_layers, seed, **options: {
            "selector": "rad", "budget": budget_layers(settings.budget, num_layers), "seed": seed, **options},
        note="its scores are those of layers skipped alone, its set that of a search over sets")
def skips(study, mixer, seed, own):
    result = search_skips(study.teacher.model, _rows(study, 0), own["budget"], gamma=own["gamma"],
                          evaluations=own["evaluations"], seed=seed)
    return {"layers": list(result.layers), "acceptance": result.acceptance, "throughput": result.throughput,
            "evaluations": result.evaluations, "values": list(result.scores.values), "cost": result.cost.to_dict()}


def score_parameters(settings, direction: str, metric: str, normalize: bool = True) -> dict:
    """The own parameters of a record of `Study.scores`."""
    numbers = {"num_tokens": settings.score_tokens, "settings": settings.match_settings.numbers()}
    return {"direction": direction, "metric": metric, **({"normalize": normalize} if metric == "mse" else numbers)}


def _by_scores(name, title, source, *texts, **fields):
    kinds = SCORES_NEEDED[name]

    def choose(study, mixer, seed, normalize=True, **options):
        scores = [study.scores(mixer, seed, *kind, normalize=normalize) for kind in kinds]
        values = scores[0].values if record else None
        if name == "avg":
            values = tuple(-sum(s.ranking.index(l) + 1 for s in scores) / 2 for l in range(study.num_layers))
        layers = select(name, study.settings.budget, scores=scores, **options)
        return Selection(layers, _total([s.cost for s in scores]), values)

    record = None if name in ("avg", "ga-s2-spaced") else (  # these order what others measured
        lambda settings, num_layers, seed, **options: score_parameters(settings, *kinds[0], **options))
    selector(name, title, source, *texts, record=record, **fields)(choose)


def _total(costs):
    return None if None in costs else Cost.total(costs)


_by_scores("ga-s1", "GA-S1", PAPER, "student", "the alignment error at a layer is what it costs the prediction",
           "one pass of the teacher and of all mixers over held-out rows", options={"normalize": True})


def _halo_records(settings, num_layers, seed, items, choices, length, **options):
    sense = {"sense": asdict(ChoiceTask(items, choices, length))}
    return [own | sense for own in _recall_records(NEEDLES, settings, num_layers, seed, selector="halo", **options)]


@scorer("halo", "HALO", "arXiv 2601.22156; common sense by a multiple choice among continuations of held-out text",
        "student", "a layer serves recall or common sense; " + ALONE,
        "L + 1 passes over 200 prompts and L over 200 questions of 4 choices", record=_halo_records,
        options={"pairs": None, "num_examples": 200, "items": 200, "choices": 4, "length": 8},
        note="scores of the task {task[name]}, {task[pairs]} pairs")
def recall_over_sense(study, mixer, seed, own):
    return score_halo(study.aligned(mixer, seed), study.teacher.model, _rows(study, seed), RecallTask(**own["task"]),
                      num_examples=own["num_examples"], sense=ChoiceTask(**own["sense"]))


def _gate_record(settings, num_layers, seed, at=0.0, order=1, steps=1, share=None, train=0, rate=1.0, data="text"):
    """Parameters for `gate_slopes`, whose cost is at most `share` of GA-S2's FLOPs; `train` scales its stage 2, and
    `data` is what the slope is measured on."""
    check_number("train", train, 0, 1)
    own = {"selector": "gate-gradient", "at": float(at), "order": order, "steps": steps}
    own |= _data(data, settings.heldout_tokens)
    if share is not None:
        check_number("share", share, 0, 1, open_low=True)
        own |= {"share": share, "score_tokens": settings.score_tokens}
    if train:
        tokens, batch = (max(settings.context, int(train * n)) for n in (settings.score_tokens, settings.batch_tokens))
        own |= {"train_tokens": tokens, "settings": _stage_2_numbers(settings, rate, batch_tokens=batch)}
    return own


def gate_slopes(study, mixer, seed, own):
    student, teacher, tokens = study.aligned(mixer, seed), study.teacher.model, _rows(study, seed)
    if "families" in own:
        tokens = Tokens(tokens.train, _prompts(study, seed, own).train, tokens.tokenizer, tokens.source, seed)
    num_tokens = heldout = heldout_size(tokens, None)
    train_tokens, how = own.get("train_tokens", 0), {"order": own["order"], "steps": own["steps"]}
    if "share" in own:
        flops = own["share"] * one_run_a_layer_flops(student, teacher, own["score_tokens"], heldout, tokens.context)
        flops -= train_tokens * gate_gradient_flops(student, teacher, tokens.context, frozen=False)
        rows = int(flops / gate_gradient_flops(student, teacher, tokens.context, **how) / tokens.context)
        num_tokens = min(heldout, max(2, rows) * tokens.context)
    return gate_gradient(student, teacher, tokens, at=own["at"], **how, num_tokens=num_tokens,
                         train_tokens=train_tokens, settings=_stage_2(study, own))


def _gates(*texts, **options):
    options = {"at": 0.0, "order": 1, "steps": 1, "share": None, "train": 0, "data": "text", **options}
    scorer(*texts, options=options, record=_gate_record)(gate_slopes)


_SLOPE = "the KL's slope where the gates are stands for the whole way to the hybrid; layers add up"
_IN_TURN = "one stage 2 of T / 4 tokens for all layers, then as gate gradient; at most 1/10 of GA-S2's FLOPs"
_gates("gate-gradient", "gate gradient", "ours", "student", _SLOPE, "one pass of the gated model, forward and "
       "backward, over as many held-out rows as 1/20 of GA-S2's FLOPs allows", share=0.05)
_gates("gate-gradient-2", "gate gradient, 2nd order", "ours", "student", _SLOPE, "1 + 2 L " + SLOPES, order=2)
_gates("gate-gradient-path", "gate gradient, path", "ours, on integrated gradients (arXiv 1703.01365)", "student",
       "opening all gates together shows what each brings", "8 " + SLOPES, steps=8)
_gates("gate-gradient-turns", "gate gradient, in turn", "ours", "stage 2", "weights trained with each gate open in "
       "turn rank layers as weights trained for each would; layers add up", _IN_TURN, share=0.1, train=0.25, rate=1.0)
_gates("gate-gradient-turns-slow", "gate gradient, in turn, slow", "ours, at the rate of GA-S2, slow", "stage 2",
       "as gate gradient, in turn; " + SLOW, _IN_TURN, share=0.1, train=0.25, rate=0.1)


def _long_record(name, settings, num_layers, seed, num_tokens, stage_2, **options):
    """Of a training of `num_tokens`, None for as many as GA-S2 takes for all layers."""
    num_tokens = max(settings.context, num_layers * settings.score_tokens) if num_tokens is None else num_tokens
    return {"selector": name, "budget": budget_layers(settings.budget, num_layers), "num_tokens": num_tokens,
            "settings": stage_2(settings), **options}


def _learned_record(settings, num_layers, seed, data, **options):
    own = _long_record("learned-gates", settings, num_layers, seed, stage_2=lambda settings: asdict(
        GateSettings(batch_tokens=settings.batch_tokens)), **options)
    return own | _data(data, max(settings.context, min(own["num_tokens"], PROMPTS)))


@scorer("learned-gates", "learned gates", "FlashMorph (arXiv 2606.30562); `data` is \"recall\" as there, or \"text\"",
        "student", "gates between 0 and 1 order layers as whole ones would",
        "training of L gates alone: L x T tokens forward and backward through both branches",
        options={"num_tokens": None, "data": "recall"}, record=_learned_record)
def trained_gates(study, mixer, seed, own):
    tokens = _prompts(study, seed, own) if "families" in own else study.tokens(seed, own["num_tokens"], "score")
    return learned_gates(study.aligned(mixer, seed), study.teacher.model, tokens, own["budget"],
                         num_tokens=own["num_tokens"], settings=GateSettings(**own["settings"])).scores


@scorer("postnas", "PostNAS", "Jet-Nemotron (arXiv 2508.15884)", "stage 2",
        "weights shared by all sets rank them as weights trained for each would",
        "one stage 2 of L x T tokens, and a pass over held-out rows for each set of a beam of 4",
        options={"num_tokens": None, "width": 4},
        record=partial(_long_record, "postnas", stage_2=lambda settings: settings.match_settings.numbers()))
def shared_weights(study, mixer, seed, own):
    tokens = study.tokens(seed, own["num_tokens"], "score")
    result = search_once_for_all(study.aligned(mixer, seed), study.teacher.model, tokens, own["budget"],
                                 own["num_tokens"], width=own["width"], settings=_stage_2(study, own), seed=seed)
    return {**_search_metrics(result.search, result.cost), "loss": list(result.losses),
            "loss_tokens": list(result.history_tokens)}


def _search_metrics(result, cost):
    return {"layers": list(result.layers), "path": [[list(layers), value] for layers, value in result.path],
            "evaluations": result.evaluations, "tokens": cost and cost.training_tokens, "cost": cost and cost.to_dict()}


def _added_record(name, settings, num_layers, seed, num_tokens=None, rate=1.0):
    """`num_tokens` of stage 2, None for the study's; `rate` of the mixers, times the rate that hybrids' have."""
    if num_tokens == 0:
        return {"selector": name, "num_tokens": 0}
    num_tokens = settings.score_tokens if num_tokens is None else num_tokens
    check_int("num_tokens", num_tokens, settings.context)
    return {"selector": name, "num_tokens": num_tokens, "settings": _stage_2_numbers(settings, rate)}


@scorer("smart", "SMART", "Zebra-Llama (arXiv 2505.17272)", "student",
        "ends matter, and kept layers lie apart; a layer's worth shows before training",
        "a pass of each of L candidates, untrained, over held-out rows", options={"num_tokens": 0},
        record=partial(_added_record, "smart"), rule="smart")
def adding(study, mixer, seed, own, tokens=None):
    tokens = tokens or study.tokens(seed, max(own["num_tokens"], study.settings.score_tokens), "score")
    return score_layers(study.aligned(mixer, seed), study.teacher.model, tokens, num_tokens=own["num_tokens"],
                        settings=_stage_2(study, own))


_by_scores("ga-s2", "GA-S2", PAPER, "stage 2", f"{ALONE}; {SHORT}",
           "a candidate for each layer: L x T tokens forward and backward, L passes over held-out rows")


@scorer("ga-s2-again", "GA-S2, other text", "ours: does GA-S2 repeat itself", "stage 2", f"{ALONE}; {SHORT}",
        "as GA-S2", record=partial(_added_record, "ga-s2-again"), control=True)
def adding_on_other_text(study, mixer, seed, own):
    s = study.settings
    rows = max(1, s.score_tokens // s.context)
    whole = study.tokens(seed, 2 * rows * s.context, "score")
    if len(whole.train) < 2 * rows:
        raise ValueError(f"corpus={s.corpus!r} has {whole.train.numel()} tokens to train on; 'ga-s2-again' needs twice "
                         f"score_tokens={s.score_tokens}; lower that")
    tokens = Tokens(whole.train[rows:], whole.heldout, whole.tokenizer, whole.source, whole.seed)
    return adding(study, mixer, seed, own, tokens)


scorer("ga-s2-slow", "GA-S2, slow", "ours: does a lower rate make GA-S2 repeat itself", "stage 2", f"{ALONE}; {SLOW}",
       "as GA-S2", options={"rate": 0.1}, record=partial(_added_record, "ga-s2-slow"))(adding)


_by_scores("ga-s2-spaced", "GA-S2, spaced", "asked for by the paper's reviewers", "stage 2",
           "neighbours stand in for one another", "as GA-S2", options={"penalty": 0.25, "distance": 1})
_by_scores("gr-s2", "GR-S2", PAPER, "stage 2", ALONE + ", among nearly all the others", "as GA-S2")
_by_scores("avg", "AVG", PAPER, "stage 2", "the ranks of GA-S2 and GR-S2 err apart", "GA-S2 and GR-S2")


def _distilled_kl(study, mixer, seed, costs):
    """A measure for searches: held-out KL of a set after the stage 2 of a candidate of GA-S2; costs go into `costs`."""
    s, num_layers = study.settings, study.num_layers
    inputs = cache(lambda: LoadedInputs(study.aligned(mixer, seed), study.teacher.model, _rows(study, seed)))

    def distil(layers):
        figures = measure_set(Job(inputs(), s.score_tokens, s.match_settings), layers)
        return {name: figures[name] for name in ("kl", "kl_stderr", "tokens", "cost")}

    def measure(layers):
        if len(layers) in (1, num_layers - 1):
            direction = "add" if len(layers) == 1 else "remove"
            scores = study.scores(mixer, seed, direction)
            costs[direction] = scores.cost
            l, = layers if direction == "add" else set(range(num_layers)) - set(layers)
            return scores.measured[l]
        own = {"layers": list(layers), "num_tokens": s.score_tokens, "settings": s.match_settings.numbers()}
        metrics = study.remember(own, partial(distil, layers), mixer, seed, kind="candidate").metrics
        costs[layers] = Cost.from_dict(metrics["cost"])
        return metrics["kl"]

    return measure


def _search_record(search, settings, num_layers, seed, **options):
    return {"selector": search, "budget": budget_layers(settings.budget, num_layers), "options": options,
            "num_tokens": settings.score_tokens, "settings": settings.match_settings.numbers()}


@scorer("greedy-forward", "greedy forward", "classical", "stage 2", "no pair helps only together; " + SHORT,
        "K (2 L - K + 1) / 2 candidates, sets of 1 to K layers",
        record=partial(_search_record, "beam", width=1, direction="add"))
def searching(study, mixer, seed, own):
    search, sets = {"beam": beam, "exhaustive": exhaustive}[own["selector"]], math.comb(study.num_layers, own["budget"])
    if search is exhaustive and sets > MOST_SETS:
        raise ValueError(f"selector='exhaustive' would distil {sets:,} sets of {own['budget']} of {study.num_layers} "
                         f"layers; it takes at most {MOST_SETS:,}, so use a smaller budget or another selector")
    costs = {}
    result = search(_distilled_kl(study, mixer, seed, costs), study.num_layers, own["budget"], **own["options"])
    return _search_metrics(result, _total([*costs.values()]))


scorer("greedy-backward", "greedy backward", "classical", "stage 2",
       "what is missed least among many is missed least among few; " + SHORT,
       "(L - K) (L + K + 1) / 2 candidates, sets of L - 1 to K layers",
       record=partial(_search_record, "beam", width=1, direction="remove"))(searching)
scorer("beam", "beam", "classical", "stage 2", SHORT,
       "at most as many times greedy forward's candidates as it is wide, 2", options={"width": 2, "direction": "add"},
       record=partial(_search_record, "beam"))(searching)
scorer("exhaustive", "exhaustive", "the truth to compare with, for few layers", "stage 2", SHORT,
       "a candidate for each of the L! / (K! (L - K)!) sets", record=partial(_search_record, "exhaustive"))(searching)
scorer("race", "race", "ours, by successive halving (arXiv 1502.07943)", "stage 2",
       "the best set is near what cheap scores choose; sets rank after a little of stage 2 as after a long one",
       "its proposers, and stage 2 of up to 16 sets, halved in each round: L x T / 10 tokens forward and backward in "
       "all, at least a step for each of two sets; in every round a pass of each set over as many held-out tokens as "
       "it was trained on", options={"sets": 16, "num_tokens": None, "proposers": ("gate-gradient", "learned-gates")},
       record=race_record)(run_race)
