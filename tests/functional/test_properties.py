"""What holds for every function and any input: bounds, invariances, precision, gradients, refusals."""

import inspect
import itertools
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.spatial.distance import cdist, pdist
from torch import Tensor

from adadim_lightning.functional import (
    alignment,
    alpha_req,
    barlow_twins_loss,
    cosine_gram,
    covariance_loss,
    effective_rank,
    eigenvalue_spectrum,
    invariance_loss,
    knn_predict,
    lidar,
    matrix_entropy,
    matrix_mutual_information,
    nt_xent_loss,
    rankme,
    spectral_entropy,
    uniformity,
    variance_loss,
    vicreg_loss,
)

from .strategies import MOST, dtypes, matrices, no_matrices, not_finite, refused, seeds, views

Function = Callable[..., Tensor]
Bounds = Callable[[int, int], tuple[float, float]]
CONVENTIONS = [(spectrum, center) for spectrum in ("singular", "eigen") for center in (False, True)]
ORDERS = (0.5, 1, 1.05, 2, 3)

# Each function with its bounds for N rows of d dimensions.
RANKS: dict[str, tuple[Function, Bounds]] = {
    f"effective rank, {spectrum}, {'centered' if center else 'as is'}": (
        partial(effective_rank, spectrum=spectrum, center=center),
        (lambda n, d: (1, max(1, min(n - 1, d)))) if center else (lambda n, d: (1, min(n, d))),
    )
    for spectrum, center in CONVENTIONS
}
ENTROPIES: dict[str, tuple[Function, Bounds]] = {
    f"spectral entropy, {spectrum}, {'centered' if center else 'as is'}": (
        partial(spectral_entropy, spectrum=spectrum, center=center),
        lambda n, d: (0, math.log(min(n, d))),
    )
    for spectrum, center in CONVENTIONS
}
ESTIMATORS: dict[str, tuple[Function, Bounds]] = {
    **RANKS,
    **ENTROPIES,
    "rankme": (rankme, lambda n, d: (1 - 1e-6, min(n, d) * (1 + 1e-4))),
    "alpha-ReQ": (partial(alpha_req, first=2, last=20), lambda n, d: (0, math.inf)),
}
MATRIX_ENTROPIES: dict[str, tuple[Function, Bounds]] = {
    f"matrix entropy {q}": (partial(matrix_entropy, order=q), lambda n, d: (0, math.log(n))) for q in ORDERS
}
UNIFORMITIES: dict[str, tuple[Function, Bounds]] = {
    f"uniformity {t}": (partial(uniformity, t=t), lambda n, d, t=t: (-4 * t, 0)) for t in (0.5, 2.0, 10.0)
}
PARTS: dict[str, tuple[Function, Bounds]] = {
    "variance": (variance_loss, lambda n, d: (0, 1)),
    "covariance": (covariance_loss, lambda n, d: (0, math.inf)),
}
OF_ONE = {**ESTIMATORS, **MATRIX_ENTROPIES, **UNIFORMITIES, **PARTS}
CONTRASTIVE: dict[str, tuple[Function, Bounds]] = {
    f"NT-Xent {tau}": (
        partial(nt_xent_loss, temperature=tau),
        lambda n, d, tau=tau: (0, math.log(2 * n - 1) + 2 / tau),
    )
    for tau in (0.05, 0.2, 1.0)
}
ALIGNMENTS: dict[str, tuple[Function, Bounds]] = {
    f"alignment {alpha}": (partial(alignment, alpha=alpha), lambda n, d, alpha=alpha: (0, 2**alpha))
    for alpha in (1.0, 2.0, 3.0)
}
INFORMATION: dict[str, tuple[Function, Bounds]] = {
    f"information {q}": (
        partial(matrix_mutual_information, order=q),
        lambda n, d, q=q: (0 if q == 1 else -math.inf, math.log(n)),
    )
    for q in ORDERS
}
INVARIANCE: dict[str, tuple[Function, Bounds]] = {
    f"invariance, {reduction}": (partial(invariance_loss, reduction=reduction), lambda n, d: (0, math.inf))
    for reduction in ("mean", "sum")
}
VICREG: dict[str, tuple[Function, Bounds]] = {
    f"VICReg{', halved' if halve else ''}": (
        partial(vicreg_loss, halve_variance=halve),
        lambda n, d: (0, math.inf),
    )
    for halve in (False, True)
}
BARLOW_TWINS: dict[str, tuple[Function, Bounds]] = {
    "Barlow Twins": (barlow_twins_loss, lambda n, d: (0, math.inf))
}
OF_TWO = {**CONTRASTIVE, **ALIGNMENTS, **INFORMATION, **INVARIANCE, **VICREG, **BARLOW_TWINS}
ALL = {**OF_ONE, **OF_TWO}
COSINE = [*MATRIX_ENTROPIES, *UNIFORMITIES, *CONTRASTIVE, *ALIGNMENTS, *INFORMATION]
CENTERED = [name for name in ESTIMATORS if "centered" in name] + ["alpha-ReQ"]
# Losses: a look at the values would wait for the device.
UNCHECKED = [*PARTS, *CONTRASTIVE, *INVARIANCE, *VICREG, *BARLOW_TWINS]


def value(name: str, x: Tensor, y: Tensor) -> Tensor:
    """A function of one view, or of two."""
    return ALL[name][0](x) if name in OF_ONE else ALL[name][0](x, y)


def assert_close(name: str, result: Tensor, expected: Tensor, *, rtol: float, atol: float) -> None:
    torch.testing.assert_close(result, expected, rtol=rtol, atol=atol, msg=lambda message: f"{name}: {message}")


@given(views())
def test_every_result_is_a_scalar_within_its_bounds_and_leaves_its_input(pair) -> None:
    before = [x.clone() for x in pair]
    for name, (_, bounds) in ALL.items():
        result = value(name, *pair)
        low, high = bounds(*pair[0].shape)
        slack = 2e-5 * max(1, abs(low), abs(high)) if math.isfinite(high - low) else 2e-5
        assert low - slack <= result.item() <= high + slack, name
        assert result.isfinite() or name == "alpha-ReQ", name
        assert result.shape == (), name
        used = {x.dtype for x in pair[: 1 if name in OF_ONE else 2]}
        assert result.dtype == (torch.float64 if torch.float64 in used else torch.float32), name
        assert all(map(torch.equal, pair, before)), name


@given(views())
def test_any_dtype_and_layout_gives_what_float64_gives(pair) -> None:
    wide = [x.double().contiguous() for x in pair]
    for name in ALL:
        atol = 1e-3 if name in VICREG else 2e-5
        assert_close(name, value(name, *pair).double(), value(name, *wide), rtol=1e-3, atol=atol)


def permuted(x: Tensor) -> Tensor:
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(5))]


def rotated(x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(x.shape[1])
    square = torch.randn(x.shape[1], x.shape[1], dtype=torch.float64, generator=generator)
    return x @ torch.linalg.qr(square)[0]


def scaled_row_by_row(x: Tensor) -> Tensor:
    return x * torch.logspace(-9, 9, len(x), dtype=torch.float64)[:, None]


TRANSFORMS: dict[str, tuple[Callable[[Tensor], Tensor], list[str]]] = {
    "rows are permuted": (permuted, list(ALL)),
    "columns are reversed": (lambda x: x.flip(1), list(ALL)),
    "signs are turned": (lambda x: -x, list(ALL)),
    "space is rotated": (rotated, [*ESTIMATORS, *COSINE, *INVARIANCE]),
    "space is shrunk": (lambda x: x * 1e-20, [*ESTIMATORS, *COSINE]),
    "space is stretched": (lambda x: x * 1e20, [*ESTIMATORS, *COSINE]),
    "rows are scaled one by one": (scaled_row_by_row, COSINE),
    "space is shifted": (lambda x: x + 7, [*CENTERED, *PARTS, *INVARIANCE, *VICREG]),
    "a zero column is added": (lambda x: torch.nn.functional.pad(x, (0, 1)), [*ESTIMATORS, *COSINE]),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@given(views(dtype=st.just(torch.float64)))
def test_a_value_does_not_change_when(transform: str, pair) -> None:
    change, names = TRANSFORMS[transform]
    for name in names:
        assert_close(name, value(name, *map(change, pair)), value(name, *pair), rtol=1e-5, atol=1e-5)


@given(pair=views(dtype=st.just(torch.float32)), scale=st.sampled_from([1e-35, 1e-25, 1e25, 1e35]))
def test_directions_survive_where_squares_leave_the_range_of_float32(pair, scale: float) -> None:
    for name in COSINE:
        assert_close(name, value(name, *(x * scale for x in pair)), value(name, *pair), rtol=1e-3, atol=1e-3)


@given(views())
def test_both_views_have_the_same_say(pair) -> None:
    for name in OF_TWO:
        assert_close(name, value(name, *pair), value(name, *pair[::-1]), rtol=1e-4, atol=1e-5)


@given(views())
def test_gradients_are_finite_for_any_input(pair) -> None:
    for name in set(ALL) - set(ESTIMATORS):
        leaves = [x.clone().requires_grad_() for x in pair]
        value(name, *leaves).backward()
        for leaf in leaves[: 1 if name in OF_ONE else 2]:
            assert leaf.grad is not None, name
            assert leaf.grad.isfinite().all(), name


@given(good=matrices(rows=(3, 3), columns=(3, 3)), bad=no_matrices())
def test_what_is_no_matrix_is_refused(good: Tensor, bad) -> None:
    for call, _ in OF_ONE.values():
        refused(call, bad)
    for call, _ in OF_TWO.values():
        for pair in ((good, bad), (bad, good), (bad, bad)):
            refused(call, *pair)


@given(views(), st.integers(1, 5))
def test_views_of_different_numbers_of_rows_are_refused(pair, more: int) -> None:
    x, y = pair
    for call, _ in OF_TWO.values():
        refused(call, x, torch.cat([y, y[:1].repeat(more, 1)]))


@given(not_finite())
def test_a_nan_or_an_infinity_anywhere_is_refused(x: Tensor) -> None:
    y = torch.ones_like(x)
    for name in set(ALL) - set(UNCHECKED):
        assert "NaN or an infinity" in refused(value, name, x, y)
        if name in OF_TWO:
            assert "NaN or an infinity" in refused(value, name, y, x)


@given(matrices(rows=(2, MOST), columns=(2, MOST)))
def test_losses_pass_a_nan_on_instead_of_waiting_for_the_device_to_look_for_it(x: Tensor) -> None:
    x = x.clone()
    x[0, 0] = math.nan
    for name in UNCHECKED:
        assert value(name, x, x).isnan(), name


def positive(name: str, call: Callable[..., object]) -> tuple[str, Callable[..., object]]:
    return name, lambda bad: call(**{name: bad})


X = torch.eye(3)
NOT_POSITIVE = st.sampled_from([0, -1.0, math.nan, math.inf, -math.inf, "1", None, [1.0], True, torch.ones(())])


@pytest.mark.parametrize(
    ("name", "call"),
    [
        positive("temperature", partial(nt_xent_loss, X, X)),
        positive("t", partial(uniformity, X)),
        positive("alpha", partial(alignment, X, X)),
        positive("order", partial(matrix_entropy, X)),
        positive("order", partial(matrix_mutual_information, X, X)),
        positive("eps", partial(variance_loss, X)),
        positive("eps", partial(vicreg_loss, X, X)),
        positive("delta", partial(lidar, X[:, None].repeat(1, 2, 1))),
    ],
)
@given(bad=NOT_POSITIVE)
def test_a_setting_that_is_no_positive_number_is_refused(name: str, call, bad) -> None:
    assert f"{name} must " in refused(call, bad)


@given(bad=NOT_POSITIVE.filter(lambda bad: bad is not math.inf))  # which makes the vote plain
def test_a_temperature_of_neighbors_that_is_no_positive_number_is_refused(bad) -> None:
    assert "temperature must " in refused(lambda bad: knn_predict(X, X, torch.arange(3), temperature=bad), bad)


VICREG_DEFAULTS = {
    "invariance_weight": 25.0,
    "variance_weight": 25.0,
    "covariance_weight": 1.0,
    "eps": 1e-4,
    "halve_variance": False,
    "invariance_reduction": "mean",
}


@pytest.mark.parametrize(
    ("function", "defaults"),
    [
        (alignment, {"alpha": 2.0}),
        (alpha_req, {"first": 11, "last": 50}),
        (barlow_twins_loss, {"redundancy_weight": 0.005}),
        (effective_rank, {"spectrum": "singular", "center": False}),
        (eigenvalue_spectrum, {"center": False}),
        (invariance_loss, {"reduction": "mean"}),
        (knn_predict, {"k": 20, "temperature": 0.07, "chunk_size": 1024}),
        (lidar, {"delta": 1e-4}),
        (matrix_entropy, {"order": 2.0}),
        (matrix_mutual_information, {"order": 2.0}),
        (nt_xent_loss, {"temperature": 0.2}),
        (spectral_entropy, {"spectrum": "singular", "center": False}),
        (uniformity, {"t": 2.0}),
        (variance_loss, {"eps": 1e-4}),
        (vicreg_loss, VICREG_DEFAULTS),
    ],
)
def test_the_defaults_are_those_of_the_papers(function, defaults: dict) -> None:
    parameters = inspect.signature(function).parameters.values()
    assert {x.name: x.default for x in parameters if x.default is not inspect.Parameter.empty} == defaults


# What holds between functions, and against other libraries.


@pytest.mark.parametrize(("spectrum", "center"), CONVENTIONS)
@given(x=matrices())
def test_the_effective_rank_is_the_exponential_of_the_spectral_entropy_and_both_equal_numpy(
    spectrum, center: bool, x: Tensor
) -> None:
    rows = x.double().numpy()
    sigma = np.linalg.svd(rows - rows.mean(axis=0) if center else rows, compute_uv=False)
    sigma[sigma < 1e-7 * np.linalg.norm(rows)] = 0
    p = sigma if spectrum == "singular" else sigma**2
    p = p[p > 0] / max(p.sum(), 1e-300)
    entropy = spectral_entropy(x, spectrum=spectrum, center=center).item()
    assert entropy == pytest.approx(-(p * np.log(p)).sum(), abs=1e-5)
    rank = effective_rank(x, spectrum=spectrum, center=center).item()
    assert rank == pytest.approx(math.exp(entropy), rel=1e-5)


@given(x=matrices(), center=st.booleans())
def test_the_spectrum_sums_to_the_squared_norm_and_descends(x: Tensor, center: bool) -> None:
    rows = x.double()
    rows = rows - rows.mean(dim=0) if center else rows
    spectrum = eigenvalue_spectrum(x, center=center)
    assert spectrum.shape == (min(x.shape),)
    assert (spectrum.diff() <= 0).all()
    assert (spectrum >= 0).all()
    torch.testing.assert_close(spectrum.sum(), rows.square().sum(), rtol=1e-9, atol=1e-9)


@given(x=matrices(), y=matrices())
def test_matrix_entropy_falls_with_its_order_and_order_2_is_the_others_limit(x: Tensor, y: Tensor) -> None:
    entropies = [matrix_entropy(x.double(), order=q).item() for q in (0.3, 0.95, 1, 1.05, 2, 2 + 1e-9, 5)]
    assert all(a >= b - 1e-9 for a, b in itertools.pairwise(entropies))
    assert entropies[-3] == pytest.approx(entropies[-2], abs=1e-6)


@given(views())
def test_order_2_information_is_at_most_either_entropy(pair) -> None:
    least = min(matrix_entropy(x.double()).item() for x in pair)
    assert matrix_mutual_information(*(x.double() for x in pair)).item() <= least + 1e-9


@given(x=matrices())
def test_the_cosine_gram_is_symmetric_positive_with_a_unit_diagonal(x: Tensor) -> None:
    gram = cosine_gram(x).double()
    torch.testing.assert_close(gram, gram.T, rtol=0, atol=1e-6)
    torch.testing.assert_close(gram.diagonal(), torch.ones(len(x)).double(), rtol=0, atol=1e-5)
    assert torch.linalg.eigvalsh(gram).min() > -1e-5
    zero = x.double().square().sum(dim=1) == 0
    rows = x.double()[~zero].numpy()
    if len(rows):
        np.testing.assert_allclose(gram[~zero][:, ~zero], 1 - cdist(rows, rows, "cosine"), atol=1e-5)


@given(x=matrices(rows=(2, MOST)), t=st.floats(0.1, 10))
def test_uniformity_equals_scipy_where_no_row_is_zero(x: Tensor, t: float) -> None:
    rows = x.double().numpy()
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    assume(norms.min() > 0)
    expected = math.log(np.exp(-t * pdist(rows / norms) ** 2).mean())
    assert uniformity(x, t=t).item() == pytest.approx(expected, abs=1e-3)


@given(views(), st.lists(st.floats(0, 30), min_size=3, max_size=3))
def test_vicreg_is_the_weighted_sum_of_its_parts(pair, weights: list[float]) -> None:
    z1, z2 = (z.double() for z in pair)
    parts = [
        invariance_loss(z1, z2),
        variance_loss(z1) + variance_loss(z2),
        covariance_loss(z1) + covariance_loss(z2),
    ]
    names = ("invariance_weight", "variance_weight", "covariance_weight")
    loss = vicreg_loss(z1, z2, **dict(zip(names, weights, strict=True)))
    torch.testing.assert_close(loss, sum(w * p for w, p in zip(weights, parts, strict=True)))


# Views of images, shape (N, q, d).


@st.composite
def images(draw: st.DrawFn, *, dtype: st.SearchStrategy[torch.dtype] = dtypes) -> Tensor:
    """q views of each of N images, shape ``(N, q, d)``."""
    means = draw(matrices(rows=(2, 20), columns=(1, 12), dtype=st.just(torch.float32)))
    spread = draw(st.sampled_from([0.0, 0.1, 1.0]))
    noise = torch.randn(len(means), draw(st.integers(2, 5)), means.shape[1])
    return (means[:, None] + spread * noise).to(draw(dtype))


@given(images())
def test_lidar_is_at_least_1_and_at_most_the_number_of_images_less_one_and_of_dimensions(x: Tensor) -> None:
    rank = lidar(x)
    assert 1 <= rank <= min(len(x) - 1, x.shape[2])
    assert rank.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    assert rank.item() == pytest.approx(lidar(x.double()).item(), rel=1e-5)


@pytest.mark.parametrize(
    "transform",
    [
        permuted,
        lambda x: x.flip(1),
        lambda x: x.flip(2),
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: -x,
        lambda x: rotated(x.flatten(0, 1)).reshape(x.shape),
        lambda x: x + 3,
    ],
    ids=["images", "views", "columns", "layout", "sign", "rotation", "shift"],
)
@given(x=images(dtype=st.just(torch.float64)))
def test_lidar_does_not_change_with(transform, x: Tensor) -> None:
    assert lidar(transform(x)).item() == pytest.approx(lidar(x).item(), rel=1e-5)


@given(st.one_of(no_matrices(), st.sampled_from([torch.ones(1, 2, 3), torch.ones(2, 1, 3), torch.ones(2, 2, 0)])))
def test_lidar_refuses_what_is_no_stack_of_views(x) -> None:
    assume(not (isinstance(x, Tensor) and x.shape == (2, 3, 4)))
    refused(lidar, x)


# The vote of neighbors.


@st.composite
def votes(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, a bank with as many columns, and its labels."""
    bank = draw(matrices(rows=(1, MOST), columns=(2, 12)))
    torch.manual_seed(draw(seeds))
    x = torch.randn(draw(st.integers(1, MOST)), bank.shape[1]).to(draw(dtypes))
    return x, bank, torch.randint(draw(st.integers(1, 9)), (len(bank),))


@given(votes(), st.integers(1, 50), st.integers(1, 50))
def test_every_predicted_class_is_one_of_the_bank_and_chunks_do_not_matter(vote, k: int, chunk_size: int) -> None:
    x, bank, labels = vote
    predicted = knn_predict(x, bank, labels, k=k)
    assert predicted.shape == (len(x),)
    assert set(predicted.tolist()) <= set(labels.tolist())
    # Ties between copies of a row may fall differently, and products of other shapes round differently.
    wide = [x.double(), bank.double(), labels]
    if len(torch.unique(bank, dim=0)) == len(bank):
        assert torch.equal(knn_predict(*wide, k=k, chunk_size=chunk_size), knn_predict(*wide, k=k))


@given(votes(), st.integers(1, 50), st.floats(0.02, 1.0))
def test_the_vote_wins_over_every_other_class_by_its_definition(vote, k: int, temperature: float) -> None:
    x, bank, labels = (v.double().numpy() if v.is_floating_point() else v.numpy() for v in vote)
    norms = np.linalg.norm(bank, axis=1)
    assume(norms.min() > 0)
    predicted = knn_predict(*vote, k=k, temperature=temperature)
    for similarity, winner in zip(1 - cdist(x, bank, "cosine"), predicted.tolist(), strict=True):
        least = np.sort(similarity)[::-1][:k].min()
        weight = np.exp((similarity - similarity.max()) / temperature)
        # Rows at the border of the neighborhood are in or out, as rounding has it.
        inside, border = similarity > least + 1e-5, np.abs(similarity - least) <= 1e-5
        surely = np.bincount(labels[inside], weight[inside], minlength=10)
        perhaps = np.bincount(labels[border], weight[border], minlength=10)
        others = np.delete(surely, winner)
        assert surely[winner] + perhaps[winner] >= others.max() - 1e-3 * weight.sum()


@given(votes(), st.permutations(range(9)))
def test_other_names_for_the_classes_give_the_other_names(vote, names: list[int]) -> None:
    x, bank, labels = vote
    renamed = knn_predict(x, bank, torch.tensor(names)[labels], k=1)
    assert torch.equal(renamed, torch.tensor(names)[knn_predict(x, bank, labels, k=1)])


@given(votes(), no_matrices())
def test_a_vote_among_what_are_no_matrices_is_refused(vote, bad) -> None:
    x, bank, labels = vote
    refused(knn_predict, bad, bank, labels)
    refused(knn_predict, x, bad, labels)


@pytest.mark.parametrize(
    "change",
    [
        {"bank_labels": torch.tensor([0, -1, 1])},
        {"bank_labels": torch.tensor([0.0, 1.0, 2.0])},
        {"bank_labels": torch.tensor([0, 1])},
        {"bank_labels": torch.ones(3, dtype=torch.complex64)},
        {"bank_labels": [0, 1, 2]},
        {"k": 1.5},
        {"k": 0},
        {"k": "1"},
        {"chunk_size": 0},
        {"chunk_size": 2.0},
    ],
    ids=str,
)
def test_labels_and_numbers_that_make_no_vote_are_refused(change: dict) -> None:
    arguments = {"x": X, "bank": X, "bank_labels": torch.arange(3), **change}
    assert next(iter(change)) in refused(knn_predict, **arguments)
