"""The notebooks: sources without outputs, parameters that are the study's, refusals, and a run of each."""

import ast
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import nbformat
import pytest
import yaml
from tests.conftest import (CONTESTS, NOTEBOOKS, ORACLE, OTHERS, PUBLISHED, RANDOM, ROOT, SPEED, STABILITY, WHY,
                            profile_path)

from hybridlib import Ledger, StudySettings, budget_layers
from hybridlib.bench.scoring import CostSettings
from hybridlib.bench.speed import SpeedSettings
from hybridlib.report.published import PublishedSettings
from hybridlib.study.contest import SelectorSettings
from hybridlib.study.oracle import OracleSettings
from hybridlib.study.sets import SetSettings
from hybridlib.study.stability import StabilitySettings

PROFILES = ("smoke", "cpu", "gpu", "paper")
ALL = (*NOTEBOOKS, *OTHERS)
SETTINGS = (dict.fromkeys(NOTEBOOKS, StudySettings) | dict.fromkeys(CONTESTS, SelectorSettings)
            | {"cost_of_selection": CostSettings, ORACLE: OracleSettings, PUBLISHED: PublishedSettings,
               SPEED: SpeedSettings, STABILITY: StabilitySettings, RANDOM: SetSettings,
               WHY: StudySettings})
PROFILED = (*CONTESTS, ORACLE, STABILITY, RANDOM, SPEED)  # those with profiles of their own
AT_SCALE = ("corpus_tokens", "test_tokens", "recall_prompts", "written", "reading", "reading_items")  # no notebook's
NAMES = {name: [field.name for field in fields(kind) if field.name not in AT_SCALE] for name, kind in SETTINGS.items()}
SOURCES = {name: nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4) for name in ALL}
RESULTS = (": lower", ": higher", "not told apart", "equal on every seed")


def code_cells(name):
    return [cell for cell in SOURCES[name].cells if cell.cell_type == "code"]


def parameters_cell(name):
    cells = [cell for cell in SOURCES[name].cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(cells) == 1
    return cells[0]


def profile(name, notebook=NOTEBOOKS[0]):
    return yaml.safe_load(profile_path(notebook, name).read_text(encoding="utf-8"))


def run_head(name, **parameters):
    """The notebook as far as its settings, with `parameters` injected as papermill does it; its variables."""
    namespace = {"__name__": "__main__"}
    exec(parameters_cell(name).source, namespace)
    namespace.update(parameters)
    setup = code_cells(name)[1].source
    exec(setup[:setup.index("study = ") if "study = " in setup else None], namespace)
    return namespace


@pytest.mark.parametrize("name", ALL)
def test_a_source_has_no_outputs_and_reads_in_ten_to_twenty_short_cells(name):
    notebook = SOURCES[name]
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3" and "papermill" not in notebook.metadata
    assert 10 <= len(notebook.cells) <= 20
    assert all(re.fullmatch(r"[a-z-]+", cell.id) for cell in notebook.cells)
    for cell in code_cells(name):
        assert not cell.outputs and cell.execution_count is None
        tree = ast.parse(cell.source)
        assert not [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.For))]
        assert cell is parameters_cell(name) or len(cell.source.splitlines()) <= 14


@pytest.mark.parametrize("name", ALL)
def test_parameters_are_those_of_a_study_each_typed_and_explained(name):
    cell = parameters_cell(name)
    lines = ast.parse(cell.source).body
    assert all(isinstance(line, ast.AnnAssign) for line in lines)
    assert sorted(line.target.id for line in lines) == sorted(NAMES[name])
    assert all("  # " in cell.source.splitlines()[line.lineno - 1] for line in lines)
    assert code_cells(name)[0] is cell
    settings = run_head(name)["settings"]
    if name in PROFILED:
        assert settings == SETTINGS[name](**profile("cpu", name) | {"device": "auto"})
    elif name != PUBLISHED:
        assert settings.seeds >= 2


@pytest.mark.parametrize("notebook", (NOTEBOOKS[0], *PROFILED))
@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_sets_every_parameter_to_an_allowed_value(name, notebook):
    values = profile(name, notebook)
    assert sorted(values) == sorted(NAMES[notebook])
    SETTINGS[notebook](**values | {"device": "cpu"})  # a GPU may not be here


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_of_selectors_are_the_shared_one_and_a_list_alike_in_both(name):
    values = profile(name, CONTESTS[0])
    assert values == {k: v for k, v in profile(name, CONTESTS[1]).items() if not k.startswith("engine_")}
    assert {k: v for k, v in values.items() if k != "selectors"} == profile(name)


@pytest.mark.parametrize("notebook", [ORACLE, STABILITY])
@pytest.mark.parametrize("name", ["smoke", "cpu"])
def test_some_notebooks_share_students_and_scores_with_the_others(name, notebook):
    common, own = profile(name), profile(name, notebook)
    assert {key: own[key] for key in common if key != "seeds"} == {key: common[key] for key in common if key != "seeds"}
    assert own["seeds"] <= common["seeds"]


@pytest.mark.parametrize("name", ["smoke", "cpu"])
def test_the_notebook_of_sets_shares_students_and_scores_with_the_others(name):
    common, own = profile(name), profile(name, RANDOM)
    assert {key for key in common if own[key] != common[key]} <= {"seeds", "budget", "match_tokens"}


def test_there_are_four_profiles_and_all_notebooks_are_tested():
    for folder in ("profiles", *(f"profiles/{name}" for name in PROFILED)):
        assert {path.stem for path in (ROOT / "notebooks" / folder).glob("*.yaml")} == set(PROFILES)
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == set(ALL)


@pytest.mark.parametrize("name, parameter, value, message", [
    *((name, *bad) for name in (*NOTEBOOKS, ORACLE, STABILITY) for bad in (
        ("bugdet", 0.5, r"bugdet=0.5 is no parameter of this notebook; did you mean 'budget'\?$"),
        ("budget", 0, "budget=0 is not a count"), ("budget", 1.5, "budget=1.5 is not a share"),
        ("mixer", "mamba", "mixer='mamba'"))),
    (STABILITY, "rates", [], r"rates=\[\] is not a list of different numbers, at least 1$"),
    (STABILITY, "shares", [2.0], "shares=2.0 is not a number of at least 0 and at most 1$"),
    (SPEED, "shape", 0.5, r"shape=0.5 is no parameter of this notebook; did you mean 'shapes'\?$"),
    (SPEED, "shapes", [[1, 2, 3]], r"shape=\[1, 2, 3\] is not \(batch, time, heads, dim\)"),
    (PUBLISHED, "shares", 0.5, r"shares=0.5 is no parameter of this notebook; did you mean 'share'\?$")])
def test_a_bad_parameter_is_refused_before_any_compute(name, parameter, value, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        run_head(name, **{parameter: value})


@pytest.mark.parametrize("name", [SPEED, PUBLISHED])
def test_a_notebook_passes_over_parameters_of_the_others(name):
    assert run_head(name, align_tokens=1)["settings"] == run_head(name)["settings"]


@pytest.mark.parametrize("name", ALL)
def test_commands_that_a_notebook_shows_name_what_exists(name):
    text = "\n".join(cell.source for cell in SOURCES[name].cells if cell.cell_type == "markdown")
    commands = re.findall(r"^papermill (\S+) out\.ipynb -f (\S+) -p (\w+) (\S+)$", text, re.MULTILINE)
    assert len(commands) >= 2
    for source, settings, parameter, _ in commands:
        assert (ROOT / source).is_file() and (ROOT / settings).is_file()
        assert parameter in NAMES[name]
    keys = re.findall(r"@\w+\{(\w+),", (ROOT / "book" / "references.bib").read_text(encoding="utf-8"))
    cited = [key for keys in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", text) for key in keys.split(",")]
    assert cited and set(cited) <= set(keys)


def outputs_of(path):
    """Of each cell of an executed notebook its outputs' data; none is an error."""
    cells = nbformat.read(path, as_version=4).cells
    assert not [o for cell in cells for o in cell.get("outputs", []) if o.output_type == "error"]
    return {cell.id: [o.data for o in cell.get("outputs", []) if "data" in o] for cell in cells}


def count_shown(cells, kind, *names):
    """How many outputs of the mime type `kind` the cells of these names have, or all cells."""
    return sum(kind in data for name in names or cells for data in cells[name])


def tables_of(cells, name):
    """The tables that a cell shows, as HTML."""
    return "\n".join("".join(data.get("text/html", "")) for data in cells[name])


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_run_shows_figures_tables_and_a_verdict_from_its_records(name, executed_notebooks):
    cells = outputs_of(executed_notebooks[name])
    assert count_shown(cells, "image/svg+xml") >= 4 and count_shown(cells, "text/html") >= 3
    verdict = tables_of(cells, "verdict")
    assert ("GDN probe against GLA probe" if name == "gdn_to_gla" else "GA-S2 against") in verdict
    assert any(result in verdict for result in RESULTS)


def test_runs_of_the_notebooks_of_selectors_show_sets_agreement_quality_and_cost(executed_notebooks, smoke_results):
    selectors, cost = (outputs_of(executed_notebooks[name]) for name in CONTESTS)
    for cells, figures in ((selectors, 5), (cost, 4)):
        assert count_shown(cells, "image/svg+xml", *(name for name in cells if name != "gpu")) == figures
        assert count_shown(cells, "text/html") >= 3
    assert "GA-S2 against uniform" in tables_of(selectors, "verdict")
    assert "against GA-S2" in tables_of(cost, "verdict") and "<td>1/" in tables_of(cost, "verdict")
    assert count_shown(cost, "text/html", "verdict") == 5  # fronts by two measures and two costs, and the reference
    assert count_shown(cost, "text/html", "engine") >= 1
    assert {r.parameters["loop"] for r in Ledger(smoke_results).find("scoring_speed")} == {"plain", "engine"}
    assert len(Ledger(smoke_results).find("contest")) == 1  # the second notebook read what the first had recorded


def test_a_run_of_the_notebook_of_speeds_measures_and_draws_each_part(executed_notebooks, smoke_results):
    cells = outputs_of(executed_notebooks[SPEED])
    for name, figures in (("operators", 1), ("step", 1), ("loss", 2), ("decoding", 2)):
        assert count_shown(cells, "image/svg+xml", name) == figures, name
    assert count_shown(cells, "text/html", "exactness", "objectives") >= 3
    assert all(count_shown(cells, "text/html", name) >= 1 for name in ("operators", "objectives", "loss", "decoding"))
    assert count_shown(cells, "text/html", "gpu") >= 9 and count_shown(cells, "image/svg+xml", "gpu") == 8
    assert {"copy_speed", "operator_speed", "operator_exactness", "objective_speed", "step_speed",
            "decoding_speed"} <= {r.kind for r in Ledger(smoke_results)}


def test_a_run_of_the_published_sets_draws_and_compares(executed_notebooks):
    cells = outputs_of(executed_notebooks[PUBLISHED])
    assert count_shown(cells, "image/svg+xml") >= 8
    assert count_shown(cells, "image/svg+xml", "halo", "perplexity") == 2 and "shuffled" in tables_of(cells, "halo")
    assert "GA-S2 (gla probe)" in tables_of(cells, "verdict") and "SMART" in tables_of(cells, "verdict")


def test_a_run_of_the_oracle_measures_draws_and_judges(executed_notebooks, smoke_results):
    cells, seeds = outputs_of(executed_notebooks[ORACLE]), profile("smoke", ORACLE)["seeds"]
    drawn = [count_shown(cells, "image/svg+xml", name) for name in ("judged", "interactions")]
    assert drawn == [2, 1] and count_shown(cells, "text/html", "settled") >= 1
    verdict = tables_of(cells, "verdict")
    assert all(said in verdict for said in ("1 of 4 layers", "2 of 4 layers", "of 6 sets", "a set drawn at random"))
    records = [r for r in Ledger(smoke_results) if r.kind == "oracle"]
    assert [r.seed for r in records] == list(range(seeds))
    assert {len(r.metrics["sets"]) for r in records} == {1 + 4 + 6}


def test_a_run_of_the_notebook_of_sets_predicts_races_and_says_what_is_missing(executed_notebooks, smoke_results):
    cells = outputs_of(executed_notebooks[RANDOM])
    drawn = [count_shown(cells, "image/svg+xml", name) for name in ("predict", "race", "arms")]
    assert drawn == [2, 2, 1] and "ridge on scores and pairs" in tables_of(cells, "predict")
    assert "race, 0.3 of the tokens against GA-S2" in tables_of(cells, "verdict")
    assert "random sets" in tables_of(cells, "gpu")
    kinds = [r.kind for r in Ledger(smoke_results)]
    values = profile("smoke", RANDOM)
    assert kinds.count("set") >= values["random_sets"] + 2


def test_a_run_of_the_notebook_of_stability_shows_its_own_records_and_those_of_gpus(executed_notebooks, smoke_results):
    cells = outputs_of(executed_notebooks[STABILITY])
    assert [count_shown(cells, "image/svg+xml", name) for name in ("repetition", "noise")] == [2, 1]
    assert "GR-S2" in tables_of(cells, "verdict") and "gate gradient" in tables_of(cells, "verdict")
    assert count_shown(cells, "text/html", "gpu") >= 6 and count_shown(cells, "image/svg+xml", "gpu") >= 3
    assert count_shown(cells, "image/svg+xml", "older") >= 2 and count_shown(cells, "text/html", "older") >= 8
    assert not [r for r in Ledger(smoke_results).find("candidate") if "curve" in r.metrics]  # none was trained again


def test_a_run_of_the_notebook_of_roles_draws_layers_and_gates(executed_notebooks, smoke_results):
    cells = outputs_of(executed_notebooks[WHY])
    assert [count_shown(cells, "image/svg+xml", name) for name in ("strip", "curves")] == [1, 1]
    record, = Ledger(smoke_results).find("roles")
    assert len(record.metrics["replaced"]) == 4 and len(record.metrics["gates"]) == 24
    assert "neither" in tables_of(cells, "pair")


def test_notebooks_share_their_records(executed_notebooks, smoke_results, smoke_profile):
    kinds = [(r.kind, r.parameters.get("mixer")) for r in Ledger(smoke_results)]
    seeds = smoke_profile["seeds"]
    assert kinds.count(("align", "gdn")) == kinds.count(("align", "gla")) == seeds
    # added, removed, two stage-1 errors, the gates' gradient; and a race with the learned gates that propose to it
    assert kinds.count(("score", "gdn")) == 5 * seeds + 2
    assert kinds.count(("score", "gla")) == seeds


def test_the_command_line_of_the_readme_runs_with_another_budget(executed_notebooks, smoke_results,
                                                                     smoke_teacher, tmp_path):
    before = {r.key for r in Ledger(smoke_results)}
    command = [Path(sys.executable).with_name("papermill"), "--no-progress-bar", "-k", "python3",
               "notebooks/importance_scoring.ipynb", tmp_path / "out.ipynb", "-f", "notebooks/profiles/smoke.yaml",
               "-p", "budget", "0.5", "-p", "results", smoke_results, "-p", "teacher", smoke_teacher]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    added = [r for r in Ledger(smoke_results) if r.key not in before]
    depth = len(next(r for r in Ledger(smoke_results) if r.kind == "align").metrics["heldout_error"])
    assert {r.kind for r in added} == {"hybrid"}
    assert {len(r.parameters["layers"]) for r in added} == {budget_layers(0.5, depth)}
