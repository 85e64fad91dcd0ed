"""Every selector by name, behind one interface: from a study to the layers that stay softmax, and what that cost.

`SELECTORS` has them, each with its source, what it needs, assumes and costs; `Study.selection` and `Study.select` run
one. What they do is in `hybridlib.study.steps`. Asked twice, nothing is computed twice.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from hybridlib.study.steps import (Selection, by_all_sets, by_beam, by_gate_gradient, by_halo, by_learned_gates,
                                   by_other_text, by_perplexity, by_recall, by_rule, by_scores, by_shared_weights,
                                   by_skips, by_slow_mixers, by_smart)

__all__ = ["SELECTORS", "Selector", "find_selector", "run_selector"]


@dataclass(frozen=True)
class Selector:
    """A selector.

    Parameters
    ----------
    title : its name in figures and tables.
    source : where it comes from.
    needs : ``"nothing"``, ``"teacher"``, ``"student"`` (all linear and aligned; none of its weights is trained) or
        ``"stage 2"`` (the student, and training of candidates' weights).
    assumes : what must hold for it to choose well.
    cost : what it computes, in words, for L layers of which K are kept; "held-out" are the rows that layers are scored
        on, T the study's ``score_tokens``, and a candidate is trained on T tokens and then measured.
    run : called as ``run(study, mixer, seed, **options)``; gives the `Selection`, its name still empty.
    options : keywords of `run` with their defaults.
    control : it is there to compare with, not to be used: no advice names it.
    """

    title: str
    source: str
    needs: str
    assumes: str
    cost: str
    run: Callable[..., Selection]
    options: Mapping[str, object] = field(default_factory=dict)
    control: bool = False


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
    return replace(selector.run(study, mixer, seed, **{**selector.options, **options}), selector=name)


_PAPER, _ALONE = "the paper (arXiv 2512.20569)", "layers add up: each is judged alone"
_TEACHER = "what the teacher misses with a layer's attention silenced is what a mixer cannot give; " + _ALONE
_GATES = "the KL's slope where the gates are stands for the whole way to the hybrid; layers add up"
_SHORT = "sets rank after a short stage 2 as they do after a long one"
_CANDIDATES = "a candidate for each layer: L x T tokens forward and backward, L passes over held-out rows"
_SLOPES = "passes of the gated model, forward and backward, over held-out rows"
_GATE = {"at": 0.0, "order": 1, "steps": 1, "share": None, "train": 0}
_TURNS = {**_GATE, "share": 0.1, "train": 0.25}
_IN_TURN = "one stage 2 of T / 4 tokens for all layers, then as gate gradient; at most 1/10 of GA-S2's FLOPs"

#: name -> `Selector`
SELECTORS: dict[str, Selector] = {
    "uniform": Selector("uniform", "common practice; `offset` \"start\" or \"end\" gives the paper's own lists",
                        "nothing", "all depths matter alike", "nothing", partial(by_rule, "uniform"),
                        {"offset": "centre"}),
    "random": Selector("random", "control; the seed draws", "nothing", "nothing", "nothing",
                       partial(by_rule, "random"), control=True),
    "first": Selector("first", "control", "nothing", "early layers matter", "nothing", partial(by_rule, "first"),
                      control=True),
    "last": Selector("last", "control", "nothing", "late layers matter", "nothing", partial(by_rule, "last"),
                     control=True),
    "ppl": Selector("PPL", "baseline of " + _PAPER, "teacher", _TEACHER,
                    "L + 1 passes of the teacher over held-out rows", by_perplexity),
    "ar": Selector("AR", "baseline of " + _PAPER, "teacher", "the teacher recalls; " + _TEACHER,
                   "L + 1 passes of the teacher over 200 prompts", partial(by_recall, (("key_value", 1),)),
                   {"pairs": None, "num_examples": 200}),
    "ar-mh": Selector("AR-MH", "baseline of " + _PAPER + "; by variables that are set to one another where chains of "
                      "names are beyond the teacher, and by fewer of them where both are", "teacher",
                      "the teacher recalls over two hops; " + _TEACHER, "as AR, for the task that it settles on",
                      partial(by_recall, (("multi_hop", 2), ("variable_tracking", 2))),
                      {"pairs": 8, "num_examples": 200}),
    "rad": Selector("RAD", "arXiv 2505.22135", "teacher", "a linear mixer does for a layer at least what nothing does",
                    "2 + L passes of the teacher over held-out rows, and one for each of 64 sets", by_skips,
                    {"evaluations": 64, "gamma": 4}),
    "ga-s1": Selector("GA-S1", _PAPER, "student", "the alignment error at a layer is what it costs the prediction",
                      "one pass of the teacher and of all mixers over held-out rows", partial(by_scores, "ga-s1"),
                      {"normalize": True}),
    "halo": Selector("HALO", "arXiv 2601.22156", "student", "a layer serves recall or common sense; " + _ALONE,
                     "L + 1 passes over 200 prompts and L over held-out rows", by_halo,
                     {"pairs": None, "num_examples": 200}),
    "gate-gradient": Selector("gate gradient", "ours", "student", _GATES,
                              "one pass of the gated model, forward and backward, over as many held-out rows as 1/20 "
                              "of GA-S2's FLOPs allows", by_gate_gradient, {**_GATE, "share": 0.05}),
    "gate-gradient-2": Selector("gate gradient, 2nd order", "ours", "student", _GATES, "1 + 2 L " + _SLOPES,
                                by_gate_gradient, {**_GATE, "order": 2}),
    "gate-gradient-path": Selector("gate gradient, path", "ours, on integrated gradients (arXiv 1703.01365)", "student",
                                   "opening all gates together shows what each brings", "8 " + _SLOPES,
                                   by_gate_gradient, {**_GATE, "steps": 8}),
    "gate-gradient-turns": Selector("gate gradient, in turn", "ours", "stage 2",
                                    "weights trained with each gate open in turn rank layers as weights trained for "
                                    "each would; layers add up", _IN_TURN, by_gate_gradient, {**_TURNS, "rate": 1.0}),
    "gate-gradient-turns-slow": Selector("gate gradient, in turn, slow", "ours, at the rate of GA-S2, slow", "stage 2",
                                         "as gate gradient, in turn; training at a lower rate than the hybrid's ranks "
                                         "layers as that would", _IN_TURN, by_gate_gradient, {**_TURNS, "rate": 0.1}),
    "learned-gates": Selector("learned gates", "FlashMorph (arXiv 2606.30562)", "student",
                              "gates between 0 and 1 order layers as whole ones would",
                              "training of L gates alone: L x T tokens forward and backward through both branches",
                              by_learned_gates, {"num_tokens": None}),
    "postnas": Selector("PostNAS", "Jet-Nemotron (arXiv 2508.15884)", "stage 2",
                        "weights shared by all sets rank them as weights trained for each would",
                        "one stage 2 of L x T tokens, and a pass over held-out rows for each set of a beam of 4",
                        by_shared_weights, {"num_tokens": None, "width": 4}),
    "smart": Selector("SMART", "Zebra-Llama (arXiv 2505.17272)", "student",
                      "ends matter, and kept layers lie apart; a layer's worth shows before training",
                      "a pass of each of L candidates, untrained, over held-out rows", by_smart, {"num_tokens": 0}),
    "ga-s2": Selector("GA-S2", _PAPER, "stage 2", _ALONE + "; " + _SHORT, _CANDIDATES, partial(by_scores, "ga-s2")),
    "ga-s2-again": Selector("GA-S2, other text", "ours: does GA-S2 repeat itself", "stage 2", _ALONE + "; " + _SHORT,
                            "as GA-S2", by_other_text, control=True),
    "ga-s2-slow": Selector("GA-S2, slow", "ours: does a lower rate make GA-S2 repeat itself", "stage 2",
                           _ALONE + "; training at a lower rate than the hybrid's ranks layers as that would",
                           "as GA-S2", by_slow_mixers, {"rate": 0.1}),
    "ga-s2-spaced": Selector("GA-S2, spaced", "asked for by the paper's reviewers", "stage 2",
                             "neighbours stand in for one another", "as GA-S2", partial(by_scores, "ga-s2-spaced"),
                             {"penalty": 0.25, "distance": 1}),
    "gr-s2": Selector("GR-S2", _PAPER, "stage 2", _ALONE + ", among nearly all the others", "as GA-S2",
                      partial(by_scores, "gr-s2")),
    "avg": Selector("AVG", _PAPER, "stage 2", "the ranks of GA-S2 and GR-S2 err apart", "GA-S2 and GR-S2",
                    partial(by_scores, "avg")),
    "greedy-forward": Selector("greedy forward", "classical", "stage 2", "no pair helps only together; " + _SHORT,
                               "K (2 L - K + 1) / 2 candidates, sets of 1 to K layers",
                               partial(by_beam, width=1, direction="add")),
    "greedy-backward": Selector("greedy backward", "classical", "stage 2",
                                "what is missed least among many is missed least among few; " + _SHORT,
                                "(L - K) (L + K + 1) / 2 candidates, sets of L - 1 to K layers",
                                partial(by_beam, width=1, direction="remove")),
    "beam": Selector("beam", "classical", "stage 2", _SHORT,
                     "at most as many times greedy forward's candidates as it is wide, 2", by_beam,
                     {"width": 2, "direction": "add"}),
    "exhaustive": Selector("exhaustive", "the truth to compare with, for few layers", "stage 2", _SHORT,
                           "a candidate for each of the L! / (K! (L - K)!) sets", by_all_sets),
}
