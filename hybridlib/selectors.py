"""Every selector behind one interface: from a study to the layers that stay softmax, and what finding them cost.

`SELECTORS` names them, each with its source, what it needs and what it assumes; `Study.selection` and `Study.select`
run one. All choose under the study's budget, score on the same held-out rows, keep what they measured as records (asked
twice, computed once), and count their cost alike (`hybridlib.cost`). A search's cost is that of the sets that it
measured, also where another search had measured some of them before.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial

from .ablation import TaskTooHard, score_associative_recall, score_halo, score_perplexity
from .checks import check_choice, check_int, check_number
from .corpus import Tokens
from .cost import Cost, Meter, heldout_size, one_run_a_layer_flops
from .distill import match
from .evaluate import heldout_kl
from .gates import GateSettings, gate_gradient, gate_gradient_flops, learned_gates
from .hybrid import restore
from .importance import LayerScores, score_layers
from .postnas import search_once_for_all
from .recall import RecallTask
from .search import SearchResult, beam, exhaustive
from .selection import SCORES_NEEDED, budget_layers, select
from .speculative import search_skips

__all__ = ["MOST_SETS", "SELECTORS", "Selection", "Selector", "find_selector", "run_selector"]

MOST_SETS = 20_000  # that ``"exhaustive"`` agrees to measure


@dataclass(frozen=True)
class Selection:
    """What a selector chose: `layers`, ascending, and its `cost` (None if it reads scores recorded without one).

    `values` is one number a layer, higher for more worth keeping, where the selector makes such numbers; else None.
    `note` says in words what the selector settled on along the way, if anything.
    """

    selector: str
    layers: tuple[int, ...]
    cost: Cost | None
    values: tuple[float, ...] | None = None
    note: str = ""


@dataclass(frozen=True)
class Selector:
    """A selector.

    Parameters
    ----------
    title : its name in figures and tables.
    source : where it comes from.
    needs : ``"nothing"``, ``"teacher"``, ``"student"`` (all linear and aligned) or ``"stage 2"`` (the student, and
        training of candidates).
    assumes : what must hold for it to choose well.
    run : called as ``run(study, mixer, seed, **options)``; gives the `Selection`, its name still empty.
    options : keywords of `run` with their defaults.
    """

    title: str
    source: str
    needs: str
    assumes: str
    run: Callable[..., Selection]
    options: Mapping[str, object] = field(default_factory=dict)


def find_selector(name: str) -> Selector:
    """The selector of that name. Raises ValueError, with the name that was likely meant or all of them."""
    if not isinstance(name, str) or name not in SELECTORS:
        close = difflib.get_close_matches(str(name), SELECTORS, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose among {', '.join(SELECTORS)}"
        raise ValueError(f"selector={name!r} is unknown; {hint}")
    return SELECTORS[name]


def run_selector(name: str, study, mixer: str, seed: int, options: Mapping[str, object]) -> Selection:
    """Let the selector choose, its defaults replaced by `options`. Raises ValueError for an unknown name or option."""
    selector = find_selector(name)
    for option, value in options.items():
        if option not in selector.options:
            known = ", ".join(selector.options) or "none"
            raise ValueError(f"{option}={value!r} is no option of selector {name!r}; its options: {known}")
    found = selector.run(study, mixer, seed, **{**selector.options, **options})
    return replace(found, selector=name)


def _count(study) -> int:
    return budget_layers(study.settings.budget, study.num_layers)


def _rule(rule, study, mixer, seed, **options):
    """A rule of `selection.select` that needs no score."""
    layers = select(rule, study.settings.budget, num_layers=study.num_layers, seed=seed, **options)
    return Selection("", layers, Cost())


def _ranked(rule, study, mixer, seed, normalize=True, **options):
    """A rule of `selection.select` on the scores of `score_layers`."""
    scores = [study.scores(mixer, seed, *kind, normalize=normalize) for kind in SCORES_NEEDED[rule]]
    values, costs = scores[0].values, [s.cost for s in scores]
    if rule == "avg":
        ranks = [{l: r for r, l in enumerate(s.ranking, 1)} for s in scores]
        values = tuple(-sum(rank[l] for rank in ranks) / 2 for l in range(len(values)))
    layers = select(rule, study.settings.budget, scores=scores, **options)
    return Selection("", layers, None if None in costs else Cost.total(costs), values)


def _best(study, scores: LayerScores, note=""):
    return Selection("", tuple(sorted(scores.ranking[:_count(study)])), scores.cost, scores.values, note)


def _heldout(study, seed):
    return study.tokens(seed, study.settings.score_tokens, "score")


def _perplexity(study, mixer, seed):
    return _best(study, LayerScores.from_dict(study.remember(
        {"selector": "ppl"}, lambda: score_perplexity(study.teacher.model, _heldout(study, 0)).to_dict()).metrics))


def _recall(families, study, mixer, seed, pairs, num_examples):
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
                return _best(study, scores, f"by {name.replace('_', ' ')}, {pairs} pairs")
            except TaskTooHard:
                if pairs < 4 and name == families[-1][0]:
                    raise
        pairs //= 2


def _halo(study, mixer, seed, pairs, num_examples):
    task = RecallTask("key_value", pairs=study.settings.recall_pairs if pairs is None else pairs)
    return _best(study, LayerScores.from_dict(study.remember(
        {"selector": "halo", "task": asdict(task), "num_examples": num_examples},
        lambda: score_halo(study.aligned(mixer, seed), study.teacher.model, _heldout(study, seed), task,
                           num_examples=num_examples).to_dict(), mixer, seed).metrics))


def _rad(study, mixer, seed, evaluations, gamma):
    def compute():
        found = search_skips(study.teacher.model, _heldout(study, 0), _count(study), gamma=gamma,
                             evaluations=evaluations, seed=seed)
        return {"layers": list(found.layers), "acceptance": found.acceptance, "throughput": found.throughput,
                "evaluations": found.evaluations, "values": list(found.scores.values), "cost": found.cost.to_dict()}

    found = study.remember({"selector": "rad", "budget": _count(study), "evaluations": evaluations, "gamma": gamma,
                            "seed": seed}, compute).metrics
    return Selection("", tuple(found["layers"]), Cost.from_dict(found["cost"]), tuple(found["values"]))


def _gate_gradient(study, mixer, seed, at, order, steps, share, train, rate=1.0):
    """`share`: all costs at most this share of GA-S2's FLOPs, by fewer held-out rows, but at least two; None reads all.
    `train`: a candidate's tokens and batch times this, for the stage 2 that all layers share first; 0 is none. `rate`:
    mixers' rate in it, times the rate that hybrids' have."""
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


def _again(study, mixer, seed):
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


def _slow(study, mixer, seed, rate):
    """GA-S2 with candidates' mixers trained at `rate` times the rate that hybrids' are."""
    check_number("rate", rate, 0, open_low=True)
    settings = replace(study.match_settings, mixer_learning_rate=rate * study.settings.mixer_learning_rate)
    return _best(study, _scored_anew(study, mixer, seed, "ga-s2-slow", study.settings.score_tokens, settings,
                                     lambda: _heldout(study, seed)))


def _smart(study, mixer, seed, num_tokens):
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


def _learned_gates(study, mixer, seed, num_tokens):
    s = study.settings
    num_tokens = max(s.context, study.num_layers * s.score_tokens) if num_tokens is None else num_tokens
    settings = GateSettings(batch_tokens=s.batch_tokens)
    return _best(study, LayerScores.from_dict(study.remember(
        {"selector": "learned-gates", "budget": _count(study), "num_tokens": num_tokens, "settings": asdict(settings)},
        lambda: learned_gates(study.aligned(mixer, seed), study.teacher.model, study.tokens(seed, num_tokens, "score"),
                              _count(study), num_tokens=num_tokens, settings=settings).scores.to_dict(), mixer, seed
    ).metrics))


def _postnas(study, mixer, seed, num_tokens, width):
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
        self.study, self.mixer, self.seed, self.costs, self._student = study, mixer, seed, {}, None

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
        study, teacher = self.study, self.study.teacher.model
        if self._student is None:
            self._student = study.aligned(self.mixer, self.seed)
        tokens, count, meter = _heldout(study, self.seed), study.settings.score_tokens, Meter(teacher)
        hybrid = restore(self._student, teacher, layers)
        spent = match(hybrid, teacher, tokens, count, settings=study.match_settings).tokens[-1] if count else 0
        kl, error = heldout_kl(hybrid, teacher, tokens)
        meter.stage_2(hybrid, teacher, spent, heldout_size(tokens, None), tokens.context)
        return {"kl": kl, "kl_stderr": error, "tokens": spent, "cost": meter.cost().to_dict()}


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


def _beam(study, mixer, seed, width, direction):
    check_int("width", width, 1)
    check_choice("direction", direction, ("add", "remove"))
    return _search(beam, study, mixer, seed, width=width, direction=direction)


def _exhaustive(study, mixer, seed):
    sets = math.comb(study.num_layers, _count(study))
    if sets > MOST_SETS:
        raise ValueError(f"selector='exhaustive' would distil {sets:,} sets of {_count(study)} of {study.num_layers} "
                         f"layers; it takes at most {MOST_SETS:,}, so use a smaller budget or another selector")
    return _search(exhaustive, study, mixer, seed)


_PAPER, _ALONE = "the paper (arXiv 2512.20569)", "layers add up: each is judged alone"
_TEACHER = "what the teacher misses with a layer's attention silenced is what a mixer cannot give; " + _ALONE
_GATES = "the KL's slope where the gates are stands for the whole way to the hybrid; layers add up"
_SHORT = "sets rank after a short stage 2 as they do after a long one"

#: name -> `Selector`
SELECTORS: dict[str, Selector] = {
    "uniform": Selector("uniform", "common practice; `offset` \"start\" or \"end\" gives the paper's own lists",
                        "nothing", "all depths matter alike", partial(_rule, "uniform"), {"offset": "centre"}),
    "random": Selector("random", "control; the seed draws", "nothing", "nothing", partial(_rule, "random")),
    "first": Selector("first", "control", "nothing", "early layers matter", partial(_rule, "first")),
    "last": Selector("last", "control", "nothing", "late layers matter", partial(_rule, "last")),
    "ppl": Selector("PPL", "baseline of " + _PAPER, "teacher", _TEACHER, _perplexity),
    "ar": Selector("AR", "baseline of " + _PAPER, "teacher", "the teacher recalls; " + _TEACHER,
                   partial(_recall, (("key_value", 1),)), {"pairs": None, "num_examples": 200}),
    "ar-mh": Selector("AR-MH", "baseline of " + _PAPER + "; by variables that are set to one another where chains of "
                      "names are beyond the teacher, and by fewer of them where both are", "teacher",
                      "the teacher recalls over two hops; " + _TEACHER,
                      partial(_recall, (("multi_hop", 2), ("variable_tracking", 2))),
                      {"pairs": 8, "num_examples": 200}),
    "rad": Selector("RAD", "arXiv 2505.22135", "teacher", "a linear mixer does for a layer at least what nothing does",
                    _rad, {"evaluations": 64, "gamma": 4}),
    "ga-s1": Selector("GA-S1", _PAPER, "student", "the alignment error at a layer is what it costs the prediction",
                      partial(_ranked, "ga-s1"), {"normalize": True}),
    "halo": Selector("HALO", "arXiv 2601.22156", "student", "a layer serves recall or common sense; " + _ALONE, _halo,
                     {"pairs": None, "num_examples": 200}),
    "gate-gradient": Selector("gate gradient", "ours", "student", _GATES, _gate_gradient,
                              {"at": 0.0, "order": 1, "steps": 1, "share": 0.05, "train": 0}),
    "gate-gradient-2": Selector("gate gradient, 2nd order", "ours", "student", _GATES, _gate_gradient,
                                {"at": 0.0, "order": 2, "steps": 1, "share": None, "train": 0}),
    "gate-gradient-path": Selector("gate gradient, path", "ours, on integrated gradients (arXiv 1703.01365)", "student",
                                   "opening all gates together shows what each brings", _gate_gradient,
                                   {"at": 0.0, "order": 1, "steps": 8, "share": None, "train": 0}),
    "gate-gradient-turns": Selector("gate gradient, in turn", "ours", "stage 2",
                                    "weights trained with each gate open in turn rank layers as weights trained for "
                                    "each would; layers add up", _gate_gradient,
                                    {"at": 0.0, "order": 1, "steps": 1, "share": 0.1, "train": 0.25, "rate": 1.0}),
    "gate-gradient-turns-slow": Selector("gate gradient, in turn, slow", "ours, with the rate of ga-s2-slow", "stage 2",
                                         "weights trained with each gate open in turn, at a lower rate than the "
                                         "hybrid's, rank layers as weights trained for each would; layers add up",
                                         _gate_gradient, {"at": 0.0, "order": 1, "steps": 1, "share": 0.1,
                                                          "train": 0.25, "rate": 0.1}),
    "learned-gates": Selector("learned gates", "FlashMorph (arXiv 2606.30562)", "student",
                              "gates between 0 and 1 order layers as whole ones would", _learned_gates,
                              {"num_tokens": None}),
    "postnas": Selector("PostNAS", "Jet-Nemotron (arXiv 2508.15884)", "stage 2",
                        "weights shared by all sets rank them as weights trained for each would", _postnas,
                        {"num_tokens": None, "width": 4}),
    "smart": Selector("SMART", "Zebra-Llama (arXiv 2505.17272)", "student",
                      "ends matter, and kept layers lie apart; a layer's worth shows before training", _smart,
                      {"num_tokens": 0}),
    "ga-s2": Selector("GA-S2", _PAPER, "stage 2", _ALONE + "; " + _SHORT, partial(_ranked, "ga-s2")),
    "ga-s2-again": Selector("GA-S2, other text", "ours: does GA-S2 repeat itself", "stage 2", _ALONE + "; " + _SHORT,
                            _again),
    "ga-s2-slow": Selector("GA-S2, slow", "ours: does a lower rate make GA-S2 repeat itself", "stage 2",
                           _ALONE + "; training at a lower rate than the hybrid's ranks layers as that would", _slow,
                           {"rate": 0.1}),
    "ga-s2-spaced": Selector("GA-S2, spaced", "asked for by the paper's reviewers", "stage 2",
                             "neighbours stand in for one another", partial(_ranked, "ga-s2-spaced"),
                             {"penalty": 0.25, "distance": 1}),
    "gr-s2": Selector("GR-S2", _PAPER, "stage 2", _ALONE + ", among nearly all the others", partial(_ranked, "gr-s2")),
    "avg": Selector("AVG", _PAPER, "stage 2", "the ranks of GA-S2 and GR-S2 err apart", partial(_ranked, "avg")),
    "greedy-forward": Selector("greedy forward", "classical", "stage 2", "no pair helps only together; " + _SHORT,
                               partial(_beam, width=1, direction="add")),
    "greedy-backward": Selector("greedy backward", "classical", "stage 2",
                                "what is missed least among many is missed least among few; " + _SHORT,
                                partial(_beam, width=1, direction="remove")),
    "beam": Selector("beam", "classical", "stage 2", _SHORT, _beam, {"width": 2, "direction": "add"}),
    "exhaustive": Selector("exhaustive", "the truth to compare with, for few layers", "stage 2", _SHORT, _exhaustive),
}
