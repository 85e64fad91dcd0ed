"""Candidates at several rates: what is trained, what is shared, what is measured on the way."""

import pytest

from hybridlib.report import stability as report
from hybridlib.study import stability


def test_candidates_are_shared_and_measured_on_the_way_at_each_rate(studies):
    own = dict(seeds=1, score_tokens=256, rates=[1e-3, 1e-2], shares=[0.0, 0.25], early_heldout_tokens=32)
    study = studies(stability.StabilitySettings, **own)
    scores = study.scores("gdn", 0)  # as another notebook would
    points = report.candidate_points(stability.stability_records(study))
    ends = points[(points["selector"] == "GA-S2") & (points["rate"] == 1e-3) & points["end"] & (points["seed"] == 0)]
    assert tuple(ends["kl"]) == scores.measured
    tokens = points[points["selector"] != "gate gradient"].groupby("rate")["tokens"].unique()
    assert sorted(tokens[1e-3]) == [0, 64, 256] and sorted(tokens[1e-2]) == [64]
    assert len(points) == 2 * 3 * (3 + 1) + 3
    alone = studies(stability.StabilitySettings, **own | {"results": study.settings.results + "2"})
    stability.stability_records(alone)  # in one go
    both = [s.ledger.run("candidate", s.candidates().parameters | {"layer": 1}, dict).metrics for s in (study, alone)]
    assert both[0]["curve"] == both[1]["curve"] and both[0]["kl"] == both[1]["kl"]
    assert both[0]["cost"]["training_tokens"] > 256
    written = {r.key: r.started for r in study.ledger}
    stability.stability_records(study)
    assert {r.key: r.started for r in study.ledger} == written  # nothing is run again


@pytest.mark.parametrize("changes, message", [
    (dict(rates=0.1), "rates=0.1 is not a list of different numbers, at least 1"),
    (dict(rates=[1e-3, 1e-3]), "is not a list of different numbers"),
    (dict(rates=[-1.0]), "rates=-1.0 is not a number of at least 0"),
    (dict(shares=[1.5]), "shares=1.5 is not a number of at least 0 and at most 1"),
    (dict(early_heldout_tokens=9_000), "early_heldout_tokens=9000 is not a whole number from 256 to 8192"),
    (dict(rates=[1e-4], shares=[0.0]), r"shares=\[0.0\] has none above 0")])
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        stability.StabilitySettings(**changes)
