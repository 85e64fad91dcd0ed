"""Distil a softmax Transformer into a hybrid of softmax and linear layers, and choose which layers stay softmax."""

from hybridlib.distill.corpus import Tokens, load_tokens
from hybridlib.distill.evaluate import Evaluation, evaluate
from hybridlib.distill.settings import AlignSettings, History, MatchSettings
from hybridlib.distill.stages import align, match
from hybridlib.models.hybrid import cache_memory, linearize, load_hybrid, restore
from hybridlib.models.teachers import Teacher, load_teacher
from hybridlib.records.folders import results_folder
from hybridlib.records.ledger import Ledger
from hybridlib.selection.engine.rounds import EarlyStop
from hybridlib.selection.rules import budget_layers, select
from hybridlib.selection.scorers.importance import score_layers
from hybridlib.selection.scores import LayerScores
from hybridlib.study.catalogue import SELECTORS
from hybridlib.study.settings import StudySettings, notebook_settings
from hybridlib.study.study import Study

__all__ = ["AlignSettings", "EarlyStop", "Evaluation", "History", "LayerScores", "Ledger", "MatchSettings", "SELECTORS",
           "Study", "StudySettings", "Teacher", "Tokens", "align", "budget_layers", "cache_memory", "evaluate",
           "linearize", "load_hybrid", "load_teacher", "load_tokens", "match", "notebook_settings", "restore",
           "results_folder", "score_layers", "select"]
