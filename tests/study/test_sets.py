"""Sets of layers, distilled alike: settings, records, and that they are hybrids as any other."""

from __future__ import annotations

import pytest

from hybridlib.selection.engine import candidates
from hybridlib.study.selector import Selection
from hybridlib.study.sets import SetSettings, distilled_choices, distilled_sets

SMALL = dict(random_sets=3, set_points=[0.0, 0.5], set_heldout_tokens=32)


def test_settings_refuse_what_cannot_be():
    settings = SetSettings(match_tokens=1000, set_points=[0, 0.5], random_sets=7)
    assert settings.measure_at == [0, 500] and len(settings.sets(8, 4)) == 7 and len(settings.sets(4, 2)) == 6
    races = settings.races(10).items()
    assert [(label, options["num_tokens"]) for label, (_, options) in races] == [
        ("race, 0.1 of the tokens", settings.score_tokens), ("race, 1 of the tokens", 10 * settings.score_tokens)]
    for name, value in (("random_sets", 2), ("race_sets", 1), ("set_points", []), ("set_points", [2]),
                        ("race_shares", [0]), ("set_heldout_tokens", 10**6)):
        with pytest.raises(ValueError, match=f"^{name}="):
            SetSettings(**{name: value})


def test_sets_end_as_hybrids_do_and_are_measured_once(studies, monkeypatch):
    study = studies(SetSettings, **SMALL | {"set_heldout_tokens": 64})
    drawn = study.settings.sets(3, 2)
    records = distilled_sets(study, drawn, measure_at=study.settings.measure_at)
    assert [tuple(r.parameters["layers"]) for r in records] == list(drawn) and {r.kind for r in records} == {"set"}
    assert [[p["tokens"] for p in r.metrics["curve"]] for r in records] == [[0, 64]] * 3
    whole = study.hybrid(drawn[0]).metrics
    assert records[0].metrics["kl"] == pytest.approx(whole["kl"], rel=1e-5) and records[0].tokens == whole["tokens"]
    assert records[0].metrics["curve"][0]["kl"] != records[0].metrics["kl"]

    monkeypatch.setattr(candidates, "restore", lambda *a: pytest.fail("measured again"))
    assert distilled_sets(studies(SetSettings, **SMALL | {"set_heldout_tokens": 64}), drawn,
                          measure_at=study.settings.measure_at) == records


def test_choices_are_distilled_by_seed(studies):
    study = studies(SetSettings, **SMALL)
    frame = distilled_choices(study, {"a": {0: Selection((0,), None), 1: Selection((1,), None)}})
    assert frame["seed"].tolist() == [0, 1] and frame["layers"].tolist() == [(0,), (1,)]
    assert frame["kl"].tolist() == [distilled_sets(study, [(s,)], s)[0].metrics["kl"] for s in (0, 1)]
