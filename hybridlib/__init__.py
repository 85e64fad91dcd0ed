"""Distil a softmax Transformer into a hybrid of softmax and linear layers, and choose which layers stay softmax."""

from hybridlib.distill.corpus import Tokens, load_tokens
from hybridlib.distill.evaluate import Evaluation, evaluate, heldout_kl
from hybridlib.distill.objectives import alignment_loss, divergence, divergence_from_hidden, kl_divergence
from hybridlib.distill.recall import RecallExample, RecallScore, RecallTask, generate_recall, load_recall, score_recall
from hybridlib.distill.settings import AlignSettings, DistillationDiverged, History, MatchSettings
from hybridlib.distill.stages import align, match
from hybridlib.models.branches import gated_model, set_gates
from hybridlib.models.hybrid import cache_memory, linear_layers, linearize, load_hybrid, restore, softmax_layers
from hybridlib.models.mixers import GatedDeltaNet, GatedLinearAttention
from hybridlib.models.passes import TeacherStates
from hybridlib.models.teachers import Teacher, load_teacher
from hybridlib.records.folders import results_folder
from hybridlib.records.ledger import Ledger, Record
from hybridlib.selection.agreement import (bootstrap_interval, chance_jaccard, contiguity, interval, jaccard, kendall,
                                           paired_difference, spearman, top_k_jaccard)
from hybridlib.selection.cost import Cost, Meter, forward_flops, one_run_a_layer_flops, training_flops
from hybridlib.selection.engine.inputs import ScoringInputs
from hybridlib.selection.engine.measure import distilled_kl
from hybridlib.selection.engine.rounds import EarlyStop, ScoringFailed
from hybridlib.selection.engine.sets import match_sets
from hybridlib.selection.rules import budget_layers, select
from hybridlib.selection.scorers.ablation import ablate, score_associative_recall, score_halo, score_perplexity
from hybridlib.selection.scorers.gates import (GateSettings, LearnedGates, gate_gradient, gate_gradient_flops,
                                               learned_gates)
from hybridlib.selection.scorers.importance import score_layers
from hybridlib.selection.scorers.postnas import PostNAS, search_once_for_all, train_once_for_all
from hybridlib.selection.scorers.speculative import SkipSearch, score_acceptance, search_skips
from hybridlib.selection.scores import LayerScores
from hybridlib.selection.search import (SearchResult, beam, exhaustive, greedy_backward, greedy_forward, interactions,
                                        rank_of, regret)
from hybridlib.study.catalogue import SELECTORS, Selector, find_selector
from hybridlib.study.settings import StudySettings, notebook_settings
from hybridlib.study.steps import Selection
from hybridlib.study.study import Study

__all__ = [
    "AlignSettings", "Cost", "DistillationDiverged", "EarlyStop", "Evaluation", "GateSettings", "GatedDeltaNet",
    "GatedLinearAttention", "History", "LayerScores", "LearnedGates", "Ledger", "MatchSettings", "Meter", "PostNAS",
    "RecallExample", "RecallScore", "RecallTask", "Record", "SELECTORS", "ScoringFailed", "ScoringInputs",
    "SearchResult", "Selection", "Selector", "SkipSearch", "Study", "StudySettings", "Teacher", "TeacherStates",
    "Tokens", "ablate", "align", "alignment_loss", "beam", "bootstrap_interval", "budget_layers", "cache_memory",
    "chance_jaccard", "contiguity", "distilled_kl", "divergence", "divergence_from_hidden", "evaluate", "exhaustive",
    "find_selector", "forward_flops", "gate_gradient", "gate_gradient_flops", "gated_model", "generate_recall",
    "greedy_backward", "greedy_forward", "heldout_kl", "interactions", "interval", "jaccard", "kendall",
    "kl_divergence", "learned_gates", "linear_layers", "linearize", "load_hybrid", "load_recall", "load_teacher",
    "load_tokens", "match", "match_sets", "notebook_settings", "one_run_a_layer_flops", "paired_difference", "rank_of",
    "regret", "restore", "results_folder", "score_acceptance", "score_associative_recall", "score_halo", "score_layers",
    "score_perplexity", "score_recall", "search_once_for_all", "search_skips", "select", "set_gates", "softmax_layers",
    "spearman", "top_k_jaccard", "train_once_for_all", "training_flops",
]
