"""The estimator study: its references are right, and its figures say what the results page says of them."""

import copy
import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import estimator_study as study
import numpy as np
import pytest
import torch
from sklearn.feature_selection import mutual_info_regression

from adadim_lightning.functional import effective_rank

ROOT = Path(__file__).parents[2]


Record = dict[str, Any]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return json.loads((ROOT / study.RESULT).read_text())


@pytest.fixture(scope="module")
def rank(found: dict[str, Any]) -> dict[str, Any]:
    return found["effective_rank"]


@pytest.fixture(scope="module")
def information(found: dict[str, Any]) -> dict[str, Any]:
    return found["information"]


# The references.


@pytest.mark.parametrize("spectrum", study.SPECTRA)
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("name", study.POPULATIONS)
def test_reference_rank_is_what_very_many_rows_read(name: str, center: bool, spectrum: Any) -> None:
    population = study.POPULATIONS[name]
    dim = 24  # above the 16 of the signal
    x = population.draw(60_000, dim, torch.Generator().manual_seed(0))
    many = float(effective_rank(x, spectrum=spectrum, center=center))
    assert many == pytest.approx(population.effective_rank(dim, spectrum, center), rel=0.01)


def test_reference_rank_of_hand_made_spectra() -> None:
    assert study.Population().effective_rank(7, "eigen", False) == pytest.approx(7)
    assert study.Population(signal=3, noise=0.0).effective_rank(9, "singular", True) == pytest.approx(3)
    # Eigenvalues 1 and 1/4: shares 2/3 and 1/3 of the singular values.
    two = math.exp(2 / 3 * math.log(3 / 2) + 1 / 3 * math.log(3))
    assert study.Population(decay=2).effective_rank(2, "singular", False) == pytest.approx(two)


def test_mean_adds_one_direction_of_its_own_power() -> None:
    # The moment I + 5 J of two dimensions, J all ones: eigenvalues 11 and 1.
    population = study.Population(mean_power=5.0)
    shares = np.array([11, 1]) / 12
    assert population.effective_rank(2, "eigen", False) == pytest.approx(np.exp(-np.sum(shares * np.log(shares))))
    assert population.effective_rank(2, "eigen", True) == pytest.approx(2)


@pytest.mark.parametrize("spectrum", study.SPECTRA)
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_rank_of_a_spectrum_is_that_of_the_library(shape: tuple[int, int], spectrum: Any) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    found = study.rank_of(study.eigenvalue_spectrum(x), spectrum)
    assert found == pytest.approx(float(effective_rank(x, spectrum=spectrum)), rel=1e-9)


def test_marchenko_pastur_rank_is_that_of_page() -> None:
    # Page (1993): the mean entropy of a random state lacks d / 2n of ln d, for n >= d.
    for ratio in (1, 2, 10):
        page = 100 * math.exp(-1 / (2 * ratio))
        assert study.isotropic_rank(100 * ratio, 100, "eigen") == pytest.approx(page, rel=1e-4)
    assert study.isotropic_rank(50, 200, "singular") == pytest.approx(study.isotropic_rank(200, 50, "singular"))
    assert study.isotropic_rows("eigen") == pytest.approx(-1 / (2 * math.log(0.95)), rel=1e-3)


@pytest.mark.parametrize(("dim", "correlation"), [(1, 0.0), (1, 0.6), (1, 0.9), (2, 0.6)])
def test_nearest_neighbors_find_the_information_of_gaussians_in_low_dimension(
    dim: int, correlation: float
) -> None:
    generator = torch.Generator().manual_seed(1)
    pairs = (study.draw_pair(600, dim, correlation, generator, decay=1, mean_power=2) for _ in range(8))
    values = [study.neighbor_information(r, z) for r, z in pairs]
    spread = np.std(values, ddof=1) / math.sqrt(len(values))
    assert np.mean(values) == pytest.approx(study.gaussian_information(dim, correlation), abs=3 * spread + 0.02)


def test_nearest_neighbors_of_scalars_agree_with_scikit_learn() -> None:
    r, z = study.draw_pair(400, 1, 0.8, torch.Generator().manual_seed(2))
    r, z = (x / x.std(correction=0) for x in (r, z))  # as scikit-learn scales them
    theirs = mutual_info_regression(r.numpy(), z.numpy().ravel(), n_neighbors=3, random_state=0)[0]
    assert study.neighbor_information(r, z, neighbors=3) == pytest.approx(theirs, abs=2e-3)


def test_drawn_pairs_have_the_canonical_correlations_that_they_are_told() -> None:
    r, z = study.draw_pair(100_000, 3, 0.7, torch.Generator().manual_seed(3), decay=2, mean_power=4)
    together = np.corrcoef(r.numpy().T, z.numpy().T)
    expected = np.block([[np.eye(3), 0.7 * np.eye(3)], [0.7 * np.eye(3), np.eye(3)]])
    assert np.abs(together - expected).max() < 0.02
    assert study.gaussian_information(3, 0.7) == pytest.approx(-0.5 * np.linalg.slogdet(expected)[1])


def test_rows_needed_lie_where_the_bias_crosses_the_tolerance() -> None:
    def needed(*biases: float) -> float | None:
        return study.rows_needed([{"rows": 64 * 2**i, "bias": b} for i, b in enumerate(biases)], 0.05)

    assert needed(-0.4, -0.2, -0.1, -0.025) == pytest.approx(256 * math.sqrt(2))
    assert needed(-0.04, -0.02, 0.01) == 64
    assert needed(-0.4, -0.2, -0.1) is None
    assert needed(-0.4, 0.01, 0.2, 0.02) > 256  # within it once is not enough


# The committed figures.


def _lists(found: dict[str, Any]) -> dict[str, list[Record]]:
    return {
        f"{part}/{name}": records
        for part in ("effective_rank", "information")
        for name, records in found[part].items()
        if isinstance(records, list) and records and "mean" in records[0]
    }


def test_figures_are_means_of_many_draws_in_the_files_own_form(found: dict[str, Any]) -> None:
    assert study.to_text(found) == (ROOT / study.RESULT).read_text()
    assert not found["quick"]
    records = [record for records in _lists(found).values() for record in records]
    assert len(records) > 500
    assert all(record["draws"] == found["draws"] >= 20 for record in records)
    assert all(record["min"] <= record["mean"] <= record["max"] and record["sd"] >= 0 for record in records)


KEYS = (
    *("population", "dim", "rows", "spectrum", "center", "reading", "correlation", "dtype", "estimator", "head"),
    *("decay", "order", "mean_power", "target", "dim_r", "dim_z"),
)


def test_quick_draws_of_another_seed_agree_within_the_spread(found: dict[str, Any]) -> None:
    start = time.process_time()
    quick = study.measure(quick=True)
    assert time.process_time() - start < 20
    assert quick["seed"] != found["seed"]
    shared = 0
    for name, records in _lists(quick).items():
        committed = {tuple((key, r.get(key)) for key in KEYS): r for r in _lists(found)[name]}
        for record in records:
            full = committed.get(tuple((key, record.get(key)) for key in KEYS))
            assert full is not None, (name, record)
            error = full["sd"] * math.sqrt(1 / record["draws"] + 1 / full["draws"])
            assert abs(record["mean"] - full["mean"]) <= 5 * error + 1e-5 * abs(full["mean"]), (name, record, full)
            shared += 1
    assert shared > 100
    assert quick["information"]["negative"] == found["information"]["negative"]
    json.dumps(quick, allow_nan=False)


def test_rank_never_exceeds_the_rows_or_the_dimensions(rank: dict[str, Any]) -> None:
    for record in rank["rows"] + rank["width"]:
        assert record["max"] <= min(record["rows"] - record["center"], record["dim"]) * (1 + 1e-5)
    for record in study.pick(rank["stream"], reading="one batch"):
        assert record["max"] <= study.STREAM_BATCH
    for record in rank["paper"]:
        rows = study.WINDOW if record["reading"] == "window" else study.PAPER_BATCH
        assert record["max"] <= rows


def test_bias_of_the_rank_falls_with_the_rows(rank: dict[str, Any]) -> None:
    curves = 0
    for _, group in itertools.groupby(
        rank["rows"] + rank["width"], key=lambda r: (r["population"], r["dim"], r["center"])
    ):
        records = list(group)
        for spectrum in study.SPECTRA:
            curve = study.pick(records, spectrum=spectrum)
            assert [record["rows"] for record in curve] == sorted(record["rows"] for record in curve)
            for fewer, more in itertools.pairwise(curve):
                # Below the error of its mean a bias has no order.
                error = 3 * more["sd"] / math.sqrt(more["draws"]) / more["truth"]
                assert abs(more["bias"]) <= max(abs(fewer["bias"]), error)
            assert curve[0]["bias"] < 0
            assert abs(curve[-1]["bias"]) < 0.07
            curves += 1
    assert curves == 4 * len(study.POPULATIONS) + 2 * len(study.WIDE_POPULATIONS)


def test_rank_of_isotropic_rows_follows_the_law_of_marchenko_and_pastur(rank: dict[str, Any]) -> None:
    records = study.pick(rank["rows"] + rank["width"], population="isotropic", center=False)
    assert len(records) == 2 * (len(study.ROWS) + len(study.ROWS) - 1)
    for record in records:
        law = study.isotropic_rank(record["rows"], record["dim"], record["spectrum"])
        assert record["mean"] == pytest.approx(law, rel=5e-3), record
    for spectrum in study.SPECTRA:
        per_dim = rank["isotropic_rows_per_dim"][spectrum]
        for record in study.pick(rank["needed"], population="isotropic", spectrum=spectrum, center=False):
            if record["rows"] is None:  # more than were drawn
                assert per_dim * record["dim"] > max(r["rows"] for r in study.pick(records, dim=record["dim"]))
            else:
                assert record["rows"] / record["dim"] == pytest.approx(per_dim, rel=0.05)


def test_rows_needed_follow_from_the_curves(rank: dict[str, Any]) -> None:
    for record in rank["needed"]:
        key = {name: record[name] for name in ("population", "dim", "spectrum", "center")}
        needed = study.rows_needed(study.pick(rank["rows"] + rank["width"], **key), rank["tolerance"])
        assert record["rows"] == (needed and pytest.approx(needed, rel=1e-3))


def test_singular_values_need_more_even_numbers_of_rows_than_eigenvalues(rank: dict[str, Any]) -> None:
    def needed(spectrum: str) -> list[float]:
        records = study.pick(rank["needed"], spectrum=spectrum, dim=study.DIM, center=False)
        return [r["rows"] for r in records if not study.POPULATIONS[r["population"]].tails]

    singular, eigen = needed("singular"), needed("eigen")
    assert max(singular) < 2 * min(singular)
    assert max(eigen) > 10 * min(eigen)
    assert max(singular) / study.DIM < 3.5


def test_averaging_batches_keeps_the_bias_that_stacking_them_removes(rank: dict[str, Any]) -> None:
    assert rank["streaming_error"] < 1e-9
    batch, averaged, window = study.pick(rank["paper"], population="power law")
    assert averaged["mean"] == pytest.approx(batch["mean"], rel=0.01)
    assert averaged["sd"] < batch["sd"] < 0.01 * batch["mean"]
    assert batch["bias"] < -0.8 < -0.1 < window["bias"] < -0.05


def test_window_follows_a_change_that_all_rows_hide(rank: dict[str, Any]) -> None:
    last = {record["reading"]: record for record in rank["stream"] if record["rows"] == 128 * 128}
    assert abs(last["window"]["bias"]) < 0.02
    assert last["all rows"]["bias"] > 1
    assert last["one batch"]["bias"] < -0.3


def test_two_views_are_worth_fewer_rows(rank: dict[str, Any]) -> None:
    biases = [record["bias"] for record in rank["views"] if record["rows"] == study.VIEW_ROWS]
    assert biases == sorted(biases, reverse=True)
    half = study.only(rank["views"], rows=study.VIEW_ROWS // 2)
    assert biases[-1] == pytest.approx(half["bias"], abs=1e-3)  # equal views are one row
    # With correlation c the sample covariance scatters like that of n / (1 + c^2) independent rows.
    law = study.isotropic_rank(study.VIEW_ROWS / (1 + 0.9**2), study.DIM, "singular") / study.DIM - 1
    assert study.only(rank["views"], correlation=0.9)["bias"] == pytest.approx(law, abs=5e-3)


def test_half_precision_matters_only_to_rows_without_noise(rank: dict[str, Any]) -> None:
    for record in rank["dtype"]:
        exact = record["population"] == "low rank"
        most = {"float32": 1e-5, "float16": 0.02, "bfloat16": 0.1}[record["dtype"]] if exact else 2e-3
        assert abs(record["mean"] - 1) < most, record
    spread = study.only(rank["dtype"], population="low rank", dtype="bfloat16", spectrum="singular", center=False)
    assert spread["mean"] > 1.02


def test_information_never_exceeds_the_logarithm_of_the_rows(information: dict[str, Any]) -> None:
    records = [
        r for name in ("sweep", "growth", "spectra") for r in information[name] if r["estimator"][:2] == "I_"
    ]
    for record in records + information["head"] + information["orders"] + information["centering"]:
        assert record["max"] <= math.log(record["rows"])
    # Independent and wide, it comes close.
    wide = study.only(information["head"], head="independent")
    assert wide["mean"] > 0.8 * math.log(wide["rows"])


def test_independent_pairs_read_what_the_squares_of_cosines_give(information: dict[str, Any]) -> None:
    records = study.pick(information["growth"], estimator="I_2", correlation=0.0)
    records += study.pick(information["head"], head="independent")
    assert len(records) == 2 * len(study.INFORMATION_ROWS) + 1
    for record in records:
        dims = (record.get("dim_r", record.get("dim")), record.get("dim_z", record.get("dim")))
        assert record["mean"] == pytest.approx(study.independent_information(record["rows"], *dims), abs=0.015)


def test_order_two_can_be_negative_and_order_one_is_not(information: dict[str, Any]) -> None:
    values = {(record["order"], record["size"]): record["value"] for record in information["negative"]}
    assert values[2.0, 10] == pytest.approx(-0.55, abs=0.01)
    assert values[2.0, 50] == pytest.approx(-1.90, abs=0.01)
    assert all(value >= 0 for (order, _), value in values.items() if order == 1.0)
    assert all(record["min"] > -1e-5 for record in study.pick(information["orders"], order=1.0))


def test_order_two_follows_the_spectrum_and_its_excess_the_information(information: dict[str, Any]) -> None:
    ranks = {(r["estimator"], r["target"]): r["mean"] for r in information["spectra_ranks"]}
    for order in ("I_2", "I_1"):
        assert ranks[order, "ER(R)"] > 0.85
        assert ranks[order, "mutual information"] < 0.5
        assert ranks[f"{order} excess", "mutual information"] > 0.85
        assert abs(ranks[f"{order} excess", "ER(R)"]) < 0.5
    assert ranks["KSG", "mutual information"] == max(
        value for (_, target), value in ranks.items() if target == "mutual information"
    )
    fixed = [r["mean"] for r in information["sweep_ranks"] if r["dim"] < 128]
    assert min(fixed) > 0.95


def test_a_linear_head_reads_no_more_than_its_torn_pairs_and_less_than_noise(information: dict[str, Any]) -> None:
    head = {record["head"]: record["mean"] for record in information["head"]}
    assert head["linear map"] == pytest.approx(head["linear map, shuffled"], abs=0.02)
    assert head["linear map"] < head["independent"] - 0.5


def test_mean_hides_the_dependence_unless_centered(information: dict[str, Any]) -> None:
    plain, *shifted = (r["mean"] for r in study.pick(information["centering"], order=2.0, center=False))
    centered = [r["mean"] for r in study.pick(information["centering"], order=2.0, center=True)]
    assert max(shifted) < 0.1 * plain
    assert centered == pytest.approx([plain] * 3, rel=0.02)


# The page.


def test_section_holds_tables_picture_and_where_its_numbers_come_from(found: dict[str, Any]) -> None:
    text = study.markdown(found)
    assert text.startswith("## The estimators\n")
    assert "](images/estimators.png)" in text
    assert study.COMMAND in text
    assert f"(../{study.RESULT})" in text
    assert 3 <= sum(line.startswith("- ") for line in text.splitlines()) <= 6
    for table in (part for part in text.split("\n\n") if part.startswith("|")):
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert not any(word in text for word in ("nan", "inf ", "None", "-0.00"))


def test_numbers_of_the_section_change_with_the_figures(found: dict[str, Any]) -> None:
    other = copy.deepcopy(found)
    for records in [*_lists(other).values(), other["information"]["negative"], other["effective_rank"]["needed"]]:
        for record in records:
            for name in {"mean", "sd", "bias", "truth", "value"} & record.keys():
                record[name] *= 1.7
            if "mean" not in record and record.get("rows"):
                record["rows"] *= 1.7
    before, after = study.markdown(found).splitlines(), study.markdown(other).splitlines()
    bullets = [(a, b) for a, b in zip(before, after, strict=True) if a.startswith("- ")]
    assert all(a != b for a, b in bullets)
    rows = [(a, b) for a, b in zip(before, after, strict=True) if a.startswith("|") and "±" in a]
    assert rows
    assert all(a != b for a, b in rows)
    assert "reads 374, the mean of 16 batches 374" in "\n".join(after)  # 1.7 times 220


def test_picture_has_four_panels_with_something_in_each(found: dict[str, Any], tmp_path: Path) -> None:
    (figure,) = study.pictures(found).values()
    assert list(study.pictures(found)) == ["estimators"]
    assert len(figure.axes) == 4
    for axes in figure.axes:
        assert axes.get_title(loc="left")
        assert axes.get_xlabel()
        assert axes.get_ylabel()
        assert len(axes.lines) >= 4
    figure.savefig(tmp_path / "estimators.png", dpi=86)
