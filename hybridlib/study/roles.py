"""What each layer of a study's teacher does, as a record: attention, recall without it, and KL along two gates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from hybridlib.models.hybrid import check_layers
from hybridlib.records.ledger import Record
from hybridlib.selection.scorers.roles import attention_roles, gate_curves, recall_without_each
from hybridlib.study.selector import full_parameters
from hybridlib.study.study import Study

__all__ = ["role_parameters", "roles_record"]

TEXT_ROWS = 32  # held-out rows that attention and KL along gates are measured on, at most
GATES = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)


def role_parameters(study: Study, pair: Sequence[int] = (), seed: int = 0) -> dict:
    """The parameters of the record of `roles_record`."""
    s = study.settings
    own = {"recall": asdict(study.recall_task), "recall_prompts": s.recall_prompts, "pair": list(pair),
           "text_rows": TEXT_ROWS, "gates": list(GATES)}
    return full_parameters(own, s, study.aligned_parameters(s.mixer, seed))


def roles_record(study: Study, pair: Sequence[int] = (), seed: int = 0) -> Record:
    """Measure what each layer does. Record kind ``"roles"``: the figures of `attention_roles` and
    `recall_without_each`, ``pair``, and ``gates``, the points of `gate_curves`.

    `pair` are the two layers whose gates open; none for those whose replacement by a mixer costs the most recall.
    """
    s = study.settings
    check_layers(pair, study.num_layers)

    def compute():
        teacher, student = study.teacher, study.aligned(s.mixer, seed)
        tokens = study.tokens(seed, s.score_tokens, "score")
        figures = (attention_roles(teacher.model, tokens.heldout[:TEXT_ROWS],
                                   repeated=min(128, s.context // 2, teacher.model.config.max_position_embeddings // 2))
                   | recall_without_each(student, teacher.model, teacher.tokenizer, study.recall_task,
                                         num_examples=s.recall_prompts))
        chosen = sorted(pair or sorted(range(study.num_layers), key=figures["replaced"].__getitem__)[:2])
        return figures | {"pair": chosen, "gates": gate_curves(
            student, teacher.model, tokens, chosen, GATES,
            heldout_tokens=min(TEXT_ROWS, len(tokens.heldout)) * s.context)}

    return study.record("roles", role_parameters(study, pair, seed), compute)
