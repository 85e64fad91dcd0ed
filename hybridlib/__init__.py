"""Distil a softmax Transformer into a hybrid of softmax and linear layers, and choose which layers stay softmax."""

from .ablation import ablate, score_associative_recall, score_halo, score_perplexity
from .agreement import (bootstrap_interval, chance_jaccard, contiguity, interval, jaccard, kendall,
                        paired_difference, spearman, top_k_jaccard)
from .batched import match_sets
from .candidates import ScoringInputs
from .corpus import Tokens, load_tokens
from .cost import Cost, Meter, forward_flops, one_run_a_layer_flops, training_flops
from .distill import AlignSettings, DistillationDiverged, History, MatchSettings, align, match
from .evaluate import Evaluation, evaluate, heldout_kl
from .gates import (GateSettings, LearnedGates, gate_gradient, gate_gradient_flops, gated_model, learned_gates,
                    set_gates)
from .hybrid import cache_memory, linear_layers, linearize, load_hybrid, restore, softmax_layers
from .importance import LayerScores, score_layers
from .ledger import Ledger, Record
from .mixers import GatedDeltaNet, GatedLinearAttention
from .objectives import alignment_loss, divergence, divergence_from_hidden, kl_divergence
from .passes import TeacherStates
from .postnas import PostNAS, search_once_for_all, train_once_for_all
from .recall import RecallExample, RecallScore, RecallTask, generate_recall, load_recall, score_recall
from .search import (SearchResult, beam, distilled_kl, exhaustive, greedy_backward, greedy_forward, interactions,
                     rank_of, regret)
from .scoring import EarlyStop, ScoringFailed
from .selecting import Selection
from .selection import budget_layers, select
from .selectors import SELECTORS, Selector, find_selector
from .speculative import SkipSearch, score_acceptance, search_skips
from .study import Study, StudySettings, notebook_settings, results_folder
from .teachers import Teacher, load_teacher

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
