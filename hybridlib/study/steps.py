"""What each selector does in a study: scores or a search, under the study's budget, kept as records with their cost.

Each function is called as ``by_...(study, mixer, seed, **options)`` and gives a `Selection` whose name is still empty;
`hybridlib.study.catalogue` names and describes them. All score on the same held-out rows and count their cost alike
(`hybridlib.selection.cost`). A search's cost is that of the sets that it measured, also where another search had
measured some of them before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

from hybridlib.checks import check_choice, check_int, check_number
from hybridlib.distill.corpus import Tokens
from hybridlib.distill.recall import RecallTask
from hybridlib.selection.cost import Cost, heldout_size, one_run_a_layer_flops
from hybridlib.selection.rules import SCORES_NEEDED, budget_layers, select
from hybridlib.selection.scorers.ablation import TaskTooHard, score_associative_recall, score_halo, score_perplexity
from hybridlib.selection.scorers.gates import GateSettings, gate_gradient, gate_gradient_flops, learned_gates
from hybridlib.selection.scorers.importance import score_layers
from hybridlib.selection.scorers.postnas import search_once_for_all
from hybridlib.selection.scorers.speculative import search_skips
from hybridlib.selection.scores import LayerScores
from hybridlib.selection.engine.candidates import Job, measure_set
from hybridlib.selection.engine.inputs import LoadedInputs
from hybridlib.selection.search import SearchResult, beam, exhaustive

__all__ = ["MOST_SETS", "Selection", "by_all_sets", "by_beam", "by_gate_gradient", "by_halo", "by_learned_gates",
           "by_other_text", "by_perplexity", "by_recall", "by_rule", "by_scores", "by_shared_weights", "by_skips",
           "by_slow_mixers", "by_smart"]

MOST_SETS = 20_000  # that ``"exhaustive"`` agrees to measure


@dataclass(frozen=True)
class Selection:
    """What a selector chose: `layers`, ascending, and its `cost` (None if it reads scores recorded without one).

    `values` is one number a layer, higher for more worth keeping, where the selector makes such numbers of its own;
    else None. Its set need not be the best by them: SMART's also lies apart, RAD only begins its search from them.
    `note` says in words what the selector settled on along the way, if anything.
    """

    selector: str
    layers: tuple[int, ...]
    cost: Cost | None
    values: tuple[float, ...] | None = None
    note: str = ""


def _count(study) -> int:
    return budget_layers(study.settings.budget, study.num_layers)


def by_rule(rule, study, mixer, seed, **options):
    """A rule of `selection.select` that needs no score."""
    layers = select(rule, study.settings.budget, num_layers=study.num_layers, seed=seed, **options)
    return Selection("", layers, Cost())


def by_scores(rule, study, mixer, seed, normalize=True, **options):
    """A rule of `selection.select` on the scores of `score_layers`."""
    scores = [study.scores(mixer, seed, *kind, normalize=normalize) for kind in SCORES_NEEDED[rule]]
    values, costs = None if rule == "ga-s2-spaced" else scores[0].values, [s.cost for s in scores]
    if rule == "avg":
        ranks = [{l: r for r, l in enumerate(s.ranking, 1)} for s in scores]
        values = tuple(-sum(rank[l] for rank in ranks) / 2 for l in range(study.num_layers))
    layers = select(rule, study.settings.budget, scores=scores, **options)
    return Selection("", layers, None if None in costs else Cost.total(costs), values)


def _best(study, scores: LayerScores, note=""):
    return Selection("", tuple(sorted(scores.ranking[:_count(study)])), scores.cost, scores.values, note)


def _heldout(study, seed):
    return study.tokens(seed, study.settings.score_tokens, "score")


def by_perplexity(study, mixer, seed):
    """The K layers whose silence costs the teacher most perplexity."""
    return _best(study, LayerScores.from_dict(study.remember(
        {"selector": "ppl"}, lambda: score_perplexity(study.teacher.model, _heldout(study, 0)).to_dict()).metrics))


def by_recall(families, study, mixer, seed, pairs, num_examples):
    """By the first task that is not beyond the teacher: with `pairs` pairs each of `families`, (name, hops), in turn,
    then with half as many, down to 2. Tasks that were refused are not in the cost."""
    pairs = study.settings.recall_pairs if pairs is None else pairs
    while True:
        for name, hops in families:
            task = RecallTask(name, pairs=pairs, hops=hops)
            try:
                scores = LayerScores.from_dict(study.remember(
                    {"selector": "ar", "task": asdict(task), "num_examples": num_examples},
                    lambda task=task: score_associative_recall(study.teacher.model, study.teacher.tokenizer, task,
                                                               num_examples=num_examples).to_dict()).metrics)
                return _best(study, scores, f"scores of the task {name}, {pairs} pairs")
            except TaskTooHard:
                if pairs < 4 and name == families[-1][0]:
                    raise
        pairs //= 2


def by_halo(study, mixer, seed, pairs, num_examples):
    """The K best by HALO's ratio of recall lost to common sense lost."""
    task = RecallTask("key_value", pairs=study.settings.recall_pairs if pairs is None else pairs)
    return _best(study, LayerScores.from_dict(study.remember(
        {"selector": "halo", "task": asdict(task), "num_examples": num_examples},
        lambda: score_halo(study.aligned(mixer, seed), study.teacher.model, _heldout(study, seed), task,
                           num_examples=num_examples).to_dict(), mixer, seed).metrics))


def by_skips(study, mixer, seed, evaluations, gamma):
    """The K layers that the best draft found by RAD does not skip; `evaluations` drafts, `gamma` tokens a check. Its
    values are what skipping each layer alone costs in acceptance."""
    def compute():
        found = search_skips(study.teacher.model, _heldout(study, 0), _count(study), gamma=gamma,
                             evaluations=evaluations, seed=seed)
        return {"layers": list(found.layers), "acceptance": found.acceptance, "throughput": found.throughput,
                "evaluations": found.evaluations, "values": list(found.scores.values), "cost": found.cost.to_dict()}

    found = study.remember({"selector": "rad", "budget": _count(study), "evaluations": evaluations, "gamma": gamma,
                            "seed": seed}, compute).metrics
    return Selection("", tuple(found["layers"]), Cost.from_dict(found["cost"]), tuple(found["values"]),
                     "its scores are those of layers skipped alone, its set that of a search over sets")


def by_gate_gradient(study, mixer, seed, at, order, steps, share, train, rate=1.0):
    """The K steepest slopes of KL as the gates open.

    `share`: all costs at most this share of GA-S2's FLOPs, by fewer held-out rows, but at least two; None reads all.
    `train`: a candidate's tokens and batch times this, for the stage 2 that all layers share first; 0 is none. `rate`:
    mixers' rate in it, times the rate that hybrids' have.
    """
    s, settings = study.settings, None
    check_number("train", train, 0, 1)
    check_number("rate", rate, 0, open_low=True)
    if share is not None:
        check_number("share", share, 0, 1, open_low=True)
    train_tokens = max(s.context, int(train * s.score_tokens)) if train else 0
    if train:
        settings = replace(study.match_settings, batch_tokens=max(s.context, int(train * s.batch_tokens)),
                           mixer_learning_rate=rate * s.mixer_learning_rate)

    def compute():
        student, teacher, tokens = study.aligned(mixer, seed), study.teacher.model, _heldout(study, seed)
        held = num_tokens = heldout_size(tokens, None)
        if share is not None:
            whole = one_run_a_layer_flops(student, teacher, s.score_tokens, held, s.context)
            left = share * whole - train_tokens * gate_gradient_flops(student, teacher, s.context, frozen=False)
            rows = int(left / gate_gradient_flops(student, teacher, s.context, order, steps) / s.context)
            num_tokens = min(held, max(2, rows) * s.context)
        return gate_gradient(student, teacher, tokens, at=at, order=order, steps=steps, num_tokens=num_tokens,
                             train_tokens=train_tokens, settings=settings).to_dict()

    parameters = {"selector": "gate-gradient", "at": float(at), "order": order, "steps": steps}
    parameters |= {} if share is None else {"share": share, "score_tokens": s.score_tokens}
    parameters |= {"train_tokens": train_tokens, "settings": settings.numbers()} if train else {}
    return _best(study, LayerScores.from_dict(study.remember(parameters, compute, mixer, seed).metrics))


def by_other_text(study, mixer, seed):
    """GA-S2 once more: the same student, settings and held-out rows, trained on the corpus's next rows."""
    s = study.settings
    rows = max(1, s.score_tokens // s.context)

    def next_rows():
        whole = study.tokens(seed, 2 * rows * s.context, "score")
        if len(whole.train) < 2 * rows:
            raise ValueError(f"corpus={s.corpus!r} has {whole.train.numel()} tokens to train on; 'ga-s2-again' "
                             f"needs twice score_tokens={s.score_tokens}; lower that")
        return Tokens(whole.train[rows:], whole.heldout, whole.tokenizer, whole.source, whole.seed)

    return _best(study, _scored_anew(study, mixer, seed, "ga-s2-again", s.score_tokens, study.match_settings,
                                     next_rows))


def by_slow_mixers(study, mixer, seed, rate):
    """GA-S2 with candidates' mixers trained at `rate` times the rate that hybrids' are."""
    check_number("rate", rate, 0, open_low=True)
    settings = replace(study.match_settings, mixer_learning_rate=rate * study.settings.mixer_learning_rate)
    return _best(study, _scored_anew(study, mixer, seed, "ga-s2-slow", study.settings.score_tokens, settings,
                                     lambda: _heldout(study, seed)))


def by_smart(study, mixer, seed, num_tokens):
    """Zebra-Llama's placement on the fall of KL as each layer of the aligned student is restored, by default untrained.

    `num_tokens`: of stage 2 for each layer's candidate.
    """
    if num_tokens != 0:
        check_int("num_tokens", num_tokens, study.settings.context)

    def tokens():
        return study.tokens(seed, max(num_tokens, study.settings.score_tokens), "score")

    scores = _scored_anew(study, mixer, seed, "smart", num_tokens, study.match_settings if num_tokens else None, tokens)
    return Selection("", select("smart", study.settings.budget, scores=scores), scores.cost, scores.values)


def _scored_anew(study, mixer, seed, selector, num_tokens, settings, tokens):
    """Scores by addition after `num_tokens` of stage 2 under `settings`, None for no training, on what `tokens` gives;
    a record of `selector`'s own."""
    def compute():
        return score_layers(study.aligned(mixer, seed), study.teacher.model, tokens(), num_tokens=num_tokens,
                            settings=settings).to_dict()

    parameters = {"selector": selector, "num_tokens": num_tokens}
    parameters |= {} if settings is None else {"settings": settings.numbers()}
    return LayerScores.from_dict(study.remember(parameters, compute, mixer, seed).metrics)


def by_learned_gates(study, mixer, seed, num_tokens):
    """The K largest of gates trained together for `num_tokens`, None for as many as GA-S2 trains on."""
    s = study.settings
    num_tokens = max(s.context, study.num_layers * s.score_tokens) if num_tokens is None else num_tokens
    settings = GateSettings(batch_tokens=s.batch_tokens)
    return _best(study, LayerScores.from_dict(study.remember(
        {"selector": "learned-gates", "budget": _count(study), "num_tokens": num_tokens, "settings": asdict(settings)},
        lambda: learned_gates(study.aligned(mixer, seed), study.teacher.model, study.tokens(seed, num_tokens, "score"),
                              _count(study), num_tokens=num_tokens, settings=settings).scores.to_dict(), mixer, seed
    ).metrics))


def by_shared_weights(study, mixer, seed, num_tokens, width):
    """PostNAS: a beam of `width` over sets of one student, trained for `num_tokens` (None for as many as GA-S2)."""
    s, settings = study.settings, study.match_settings
    num_tokens = max(s.context, study.num_layers * s.score_tokens) if num_tokens is None else num_tokens

    def compute():
        found = search_once_for_all(study.aligned(mixer, seed), study.teacher.model,
                                    study.tokens(seed, num_tokens, "score"), _count(study), num_tokens, width=width,
                                    settings=settings, seed=seed)
        return {"layers": list(found.layers), "path": [[list(layers), value] for layers, value in found.search.path],
                "loss": list(found.losses), "loss_tokens": list(found.history_tokens),
                "evaluations": found.search.evaluations, "tokens": found.cost.training_tokens,
                "cost": found.cost.to_dict()}

    found = study.remember({"selector": "postnas", "budget": _count(study), "num_tokens": num_tokens, "width": width,
                            "settings": settings.numbers()}, compute, mixer, seed).metrics
    return Selection("", tuple(found["layers"]), Cost.from_dict(found["cost"]))


class _Distilled:
    """A measure for searches: held-out KL of a set after the stage 2 that GA-S2 gives a candidate; keeps the costs.

    Single layers are measured as GA-S2 does and all layers but one as GR-S2 does, so their scores serve here.
    """

    def __init__(self, study, mixer, seed):
        self.study, self.mixer, self.seed, self.costs, self._job = study, mixer, seed, {}, None

    def __call__(self, layers):
        study, num_layers = self.study, self.study.num_layers
        if len(layers) in (1, num_layers - 1):
            direction = "add" if len(layers) == 1 else "remove"
            scores = study.scores(self.mixer, self.seed, direction)
            self.costs[direction] = scores.cost
            l, = layers if direction == "add" else set(range(num_layers)) - set(layers)
            return scores.measured[l]
        parameters = {"layers": list(layers), "num_tokens": study.settings.score_tokens,
                      "settings": study.match_settings.numbers()}
        found = study.remember(parameters, partial(self._measure, layers), self.mixer, self.seed,
                               kind="candidate").metrics
        self.costs[layers] = Cost.from_dict(found["cost"])
        return found["kl"]

    def _measure(self, layers):
        study = self.study
        if self._job is None:
            inputs = LoadedInputs(study.aligned(self.mixer, self.seed), study.teacher.model, _heldout(study, self.seed))
            self._job = Job(inputs, study.settings.score_tokens, study.match_settings)
        figures = measure_set(self._job, layers)
        return {name: figures[name] for name in ("kl", "kl_stderr", "tokens", "cost")}


def _search(find: Callable[..., SearchResult], study, mixer, seed, **options):
    """Run a search over sets; `options` go to it and into the record's key."""
    def compute():
        measure = _Distilled(study, mixer, seed)
        found = find(measure, study.num_layers, _count(study), **options)
        costs = list(measure.costs.values())
        cost = None if None in costs else Cost.total(costs)
        return {"layers": list(found.layers), "path": [[list(layers), value] for layers, value in found.path],
                "evaluations": found.evaluations, "tokens": cost.training_tokens if cost else None,
                "cost": cost and cost.to_dict()}

    found = study.remember({"selector": find.__name__, "budget": _count(study), "options": options,
                            "num_tokens": study.settings.score_tokens, "settings": study.match_settings.numbers()},
                           compute, mixer, seed).metrics
    return Selection("", tuple(found["layers"]), found["cost"] and Cost.from_dict(found["cost"]))


def by_beam(study, mixer, seed, width, direction):
    """A beam of `width` over sets that are distilled as GA-S2's candidates are; ``"remove"`` starts from all layers."""
    check_int("width", width, 1)
    check_choice("direction", direction, ("add", "remove"))
    return _search(beam, study, mixer, seed, width=width, direction=direction)


def by_all_sets(study, mixer, seed):
    """The best of all sets, distilled as GA-S2's candidates are. Raises ValueError for more than `MOST_SETS`."""
    sets = math.comb(study.num_layers, _count(study))
    if sets > MOST_SETS:
        raise ValueError(f"selector='exhaustive' would distil {sets:,} sets of {_count(study)} of {study.num_layers} "
                         f"layers; it takes at most {MOST_SETS:,}, so use a smaller budget or another selector")
    return _search(exhaustive, study, mixer, seed)
