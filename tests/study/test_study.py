"""A study remembers its steps, shares them, and refuses bad parameters with a sentence."""

from __future__ import annotations

import shutil
from functools import partial

import pandas as pd
import pytest
import torch
from tests.conftest import CONTEST_SETTINGS

import hybridlib as hl
from hybridlib.distill.reading import READING_MODES
from hybridlib.records.folders import sha256_of
from hybridlib.selection.engine import candidates
from hybridlib.study import settings as settings_module, study as study_module


@pytest.fixture
def small_study(studies, monkeypatch):
    """A study that keeps one layer; ``calls`` are the trainings of all."""
    small_study, calls = partial(studies, budget=0.34), []
    small_study.calls = calls
    monkeypatch.setattr(study_module, "align", lambda *a, **k: calls.append("align") or hl.align(*a, **k))
    monkeypatch.setattr(candidates, "match", lambda *a, **k: calls.append("match") or hl.match(*a, **k))
    return small_study


def test_steps_are_computed_once_and_found_by_another_study(small_study):
    first, again = small_study(), small_study()
    scores = first.scores("gdn", 0)
    record = first.hybrid(first.select("ga-s2"), seed=0)
    assert again.scores("gdn", 0) == scores and again.hybrid(again.select("ga-s2"), seed=0) == record
    assert small_study.calls == ["align", *["match"] * 4]  # three candidates and the hybrid
    assert record.parameters["layers"] == list(first.select("ga-s2")) and record.metrics["tokens"] == 128


def test_recompute_runs_each_step_once_more_with_the_same_numbers(small_study):
    before = small_study().hybrid([1])
    again = small_study(recompute=True)
    after = again.hybrid([1])
    again.hybrid([1])
    assert small_study.calls == ["align", "match", "align", "match"]
    assert after.metrics["loss"] == before.metrics["loss"] and after.metrics["kl"] == before.metrics["kl"]
    assert after.started > before.started


def killed_after(calls, function):
    """`function`, interrupted at the call after `calls` calls."""
    left = iter(range(calls))

    def call(*args, **kwargs):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("stage", ["align", "hybrid"])
def test_a_killed_step_goes_on_from_its_checkpoint(small_study, tmp_path, monkeypatch, stage):
    every = dict(checkpoint_every=64)
    monkeypatch.setattr(settings_module, "AlignSettings", lambda **k: hl.AlignSettings(**k, **every))
    monkeypatch.setattr(settings_module, "MatchSettings", lambda **k: hl.MatchSettings(**k, **every))
    whole = small_study(results=str(tmp_path / "whole")).hybrid([1])
    rows = hl.Tokens.rows
    monkeypatch.setattr(hl.Tokens, "rows", killed_after(3 if stage == "align" else 4 + 1, rows))  # align takes 4 steps
    with pytest.raises(KeyboardInterrupt):
        small_study().hybrid([1])
    models = small_study().ledger.folder / "models"
    assert [p.name[:len(stage)] for p in models.glob("*.checkpoint")] == [stage]
    monkeypatch.setattr(hl.Tokens, "rows", rows)
    again = small_study().hybrid([1])
    assert again.metrics["loss"] == whole.metrics["loss"] and again.metrics["kl"] == whole.metrics["kl"]
    assert not list(models.glob("*.checkpoint"))


def test_a_killed_scoring_goes_on_with_the_next_candidate(small_study, tmp_path, monkeypatch):
    whole = small_study(results=str(tmp_path / "whole")).scores("gdn", 0)
    train = candidates.match
    monkeypatch.setattr(candidates, "match", killed_after(2, train))
    with pytest.raises(KeyboardInterrupt):
        small_study().scores("gdn", 0)
    assert [r.parameters["layer"] for r in small_study().ledger.find("candidate")] == [0, 1]
    monkeypatch.setattr(candidates, "match", killed_after(1, train))  # as many as are left to do
    assert small_study().scores("gdn", 0).values == whole.values


def test_a_lost_model_is_made_again(small_study):
    study = small_study()
    study.aligned("gdn", 0)
    shutil.rmtree(study.ledger.folder / "models")
    small_study().aligned("gdn", 0)
    assert small_study.calls == ["align", "align"]


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors", "all"])
def test_a_model_that_cannot_be_read_is_made_again(small_study, damage):
    study = small_study()
    whole = study.aligned("gdn", 0).state_dict()
    folder, = (study.ledger.folder / "models").glob("align-*")
    for file in folder.iterdir():
        if damage in (file.name, "all"):
            file.unlink()
    again = small_study().aligned("gdn", 0).state_dict()
    assert small_study.calls == ["align", "align"] and all(torch.equal(whole[k], again[k]) for k in whole)


@pytest.mark.parametrize("place", ["hybridlib.models.hybrid.os.replace", "hybridlib.study.study.weights_sha256",
                                   "pathlib.Path.rename"])
def test_a_study_killed_while_it_saves_a_student_runs_again(small_study, monkeypatch, place):
    whole = small_study().aligned("gdn", 0).state_dict()

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(place, killed)
        with pytest.raises(KeyboardInterrupt):
            small_study(recompute=True).aligned("gdn", 0)
    again = small_study().aligned("gdn", 0).state_dict()
    assert all(torch.equal(whole[k], again[k]) for k in whole)
    assert not list((small_study().ledger.folder / "models").glob(".saving-*"))


def test_seeds_mixers_and_selectors_are_kept_apart(small_study):
    study = small_study()
    keys = {study.ledger.path("align", study.aligned_parameters(m, s)) for m in ("gdn", "gla") for s in (0, 1)}
    assert len(keys) == 4
    assert study.scores("gdn", 0).values != study.scores("gdn", 1).values
    raw = study.scores("gdn", 0, metric="mse", normalize=False)
    assert raw.values != study.scores("gdn", 0, metric="mse").values
    record, = study.ledger.find("score", mixer="gdn", seed=1)
    assert record.parameters["aligned"]["revision"] == "r1" and record.parameters["num_tokens"] == 64
    assert record.tokens == 3 * 64 and record.seconds > 0


def test_compare_gives_a_row_a_selection_and_seed(small_study):
    table = small_study().compare({"middle": {0: [1], 1: [1]}, "none": {0: []}})
    assert list(table["selector"]) == ["middle", "middle", "none"] and list(table["layers"]) == [(1,), (1,), ()]
    assert table["kl"].notna().all()
    assert small_study.calls.count("match") == 3


def test_hybrids_and_the_teacher_are_judged_by_what_they_write_and_read(tiny_files, tmp_path):
    rows = pd.DataFrame({"doc_id": list("abcde"), "text": [f"w{i} w{i + 5} w{i + 10}" for i in range(5)],
                         "value": [f"w{i + 15}" for i in range(5)]})
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        rows.to_parquet(tmp_path / folder / "pattern.parquet")
    plain = hl.Study(hl.StudySettings(**CONTEST_SETTINGS | tiny_files | {"results": str(tmp_path / "results")}))
    study = plain.under(written=True, reading=[str(tmp_path / "one")], reading_items=4)
    for kind in ("hybrid", "teacher"):
        without, record, again = (one.hybrid([1], measure_at=[64]) if kind == "hybrid" else one.teacher_record()
                                  for one in (plain, study, study.under(reading=(str(tmp_path / "two"),))))
        own = {"written": True, "reading_items": 4,
               "reading": {"pattern": sha256_of(tmp_path / "one" / "pattern.parquet")}}
        assert record.parameters == without.parameters | own and again == record
        assert set(record.metrics) - set(without.metrics) == {
            "reading", *(f"recall_written{end}" for end in ("", "_stderr", "_hits"))}
        assert all(len(record.metrics["reading"]["pattern"][f"{mode}_hits"]) == 4 for mode in READING_MODES)
        assert len(record.metrics["recall_written_hits"]) == 200
    assert all("reading" not in point and "recall_written" not in point for point in record.metrics.get("curve", []))
    assert hl.StudySettings.from_record(record.parameters).reading == ()
    with pytest.raises(ValueError, match="pattern takes 27 tokens .* context is 20"):
        study.teacher.model.config.max_position_embeddings = 20
        study.under(reading_items=5).hybrid([2])


@pytest.mark.parametrize(("changes", "message"), [
    (dict(written=1), "written=1"), (dict(reading="a.parquet"), "reading='a.parquet' is not a list"),
    (dict(reading_items=0), "reading_items=0"),
    (dict(budget=0), "budget=0"), (dict(mixer="mamba"), "mixer='mamba'"), (dict(seeds=0), "seeds=0"),
    (dict(context=1), "context=1"), (dict(align_tokens=8), "align_tokens=8"), (dict(batch_tokens=8), "batch_tokens=8"),
    (dict(device="tpu9"), "device='tpu9'"), (dict(recompute=1), "recompute=1"), (dict(teacher=3), "teacher=3"),
    (dict(context=80, align_tokens=512, match_tokens=512, score_tokens=512, heldout_tokens=512, batch_tokens=512),
     "context=80 is beyond teacher tiny's 64"), (dict(budget=4), "budget=4 is not a count from 1 to 3")])
def test_bad_parameters_are_refused(small_study, changes, message):
    with pytest.raises(ValueError, match=message):
        small_study(**changes)
    assert small_study.calls == []


def test_notebook_settings_take_parameters_only():
    namespace = {"__name__": "__main__", "_": 1, "In": [], "Out": {}, "hl": hl, "budget": 0.5, "seeds": 1}
    assert hl.notebook_settings(namespace) == hl.StudySettings(budget=0.5, seeds=1)
    with pytest.raises(ValueError, match="bugdet=0.5 is no parameter of this notebook; did you mean 'budget'?"):
        hl.notebook_settings({**namespace, "bugdet": 0.5})
    with pytest.raises(ValueError, match="zzz=1 is no parameter of this notebook; choose among align_learning_rate"):
        hl.notebook_settings({"zzz": 1})
