"""Probes and label-free values of frozen representations, against scikit-learn, torch.optim and the estimators."""

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from adadim_lightning import evaluation, functional
from adadim_lightning.evaluation import (
    embed,
    few_shot_accuracy,
    knn_accuracy,
    label_free_values,
    linear_accuracies,
    linear_accuracy,
    sgd_linear_accuracy,
)

Rows = tuple[Tensor, Tensor]

PROBES = {
    "logistic regression": linear_accuracy,
    "SGD": lambda train, test: sgd_linear_accuracy(train, test, epochs=5),
    "neighbors": knn_accuracy,
    "few labels": lambda train, test: few_shot_accuracy(train, test, 0.2)[0],
}
every_probe = pytest.mark.parametrize("probe", PROBES.values(), ids=PROBES.keys())


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    )


def digits_rows(backbone: nn.Module) -> Rows:
    """Representations and labels of scikit-learn's digits."""
    images, labels = (torch.from_numpy(x) for x in load_digits(return_X_y=True))
    batches = zip(images.reshape(-1, 1, 8, 8).split(500), labels.split(500), strict=True)
    return embed(backbone, batches, lambda x: x / 16)


def clusters(n: int, *, classes: int = 4, d: int = 8, spread: float = 0.7) -> Rows:
    labels = torch.randint(classes, (n,))
    return torch.eye(classes, d)[labels] + spread * torch.randn(n, d), labels


def views_of(r: Tensor, q: int = 3) -> Tensor:
    return r[:, None] + 0.1 * torch.randn(len(r), q, r.shape[1])


@pytest.mark.parametrize("make", [nn.Flatten, conv_net], ids=["raw", "untrained"])
def test_the_sgd_probe_agrees_with_logistic_regression_on_the_digits(make) -> None:
    r, labels = digits_rows(make())
    gaps = []
    for seed in range(5):  # 500 rows alone say no more than +-0.7 points
        split = train_test_split(r, labels, test_size=500, stratify=labels, random_state=seed)
        train, test = (split[0], split[2]), (split[1], split[3])
        expected = linear_accuracy(train, test)
        assert expected > 0.9
        gaps.append(sgd_linear_accuracy(train, test) - expected)
    assert abs(np.mean(gaps)) < 0.01
    assert max(map(abs, gaps)) < 0.02


@pytest.mark.parametrize(("batch_size", "lr"), [(32, 0.1), (256, 0.5), (1000, 0.1)])
def test_the_sgd_probe_equals_one_linear_layer_trained_by_torch(batch_size: int, lr: float) -> None:
    (x, y), (test_x, test_y) = clusters(300), clusters(2000)
    epochs, seed = 7, 3
    scaler = StandardScaler().fit(x.numpy())
    layer = nn.Linear(8, 4)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr * batch_size / 256, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * math.ceil(300 / batch_size))
    generator = torch.Generator().manual_seed(seed)
    scaled = torch.from_numpy(scaler.transform(x.numpy()))
    for _ in range(epochs):
        for rows in torch.randperm(300, generator=generator).split(batch_size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(layer(scaled[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    predicted = layer(torch.from_numpy(scaler.transform(test_x.numpy()))).argmax(dim=1)
    accuracy = sgd_linear_accuracy(
        (x, y), (test_x, test_y), epochs=epochs, batch_size=batch_size, lr=lr, seed=seed
    )
    assert 0.5 < accuracy < 0.95
    # Two of 2,000 rows may lie on a border.
    assert accuracy == pytest.approx((predicted == test_y).double().mean().item(), abs=0.0011)


def test_constant_dimensions_do_not_disturb_the_sgd_probe() -> None:
    (x, y), (test_x, test_y) = clusters(300), clusters(300)
    wider = [
        (torch.cat([rows, torch.full((300, 2), 0.1)], dim=1), labels)
        for rows, labels in [(x, y), (test_x, test_y)]
    ]
    assert sgd_linear_accuracy(*wider) == sgd_linear_accuracy((x, y), (test_x, test_y))


def test_random_probes_depend_on_their_seed_alone_and_leave_the_random_state() -> None:
    train, test = clusters(200, spread=1.5), clusters(500, spread=1.5)
    for probe in (
        lambda seed: sgd_linear_accuracy(train, test, epochs=2, batch_size=8, seed=seed),
        lambda seed: few_shot_accuracy(train, test, 0.1, seed=seed),
    ):
        state = torch.get_rng_state(), np.random.get_state()[1].copy()
        first = probe(0)
        assert torch.equal(torch.get_rng_state(), state[0])
        assert (np.random.get_state()[1] == state[1]).all()
        torch.manual_seed(17)
        assert probe(0) == first
        assert len({probe(seed) for seed in range(6)}) > 1


@every_probe
def test_rows_without_a_label_are_left_out_to_fit_and_to_score(probe) -> None:
    train, test = clusters(200), clusters(200)

    def with_unlabeled(rows: Rows, value: int) -> Rows:
        x = torch.stack([rows[0], 100 * torch.randn_like(rows[0])], dim=1).flatten(0, 1)
        return x, torch.stack([rows[1], torch.full_like(rows[1], value)], dim=1).flatten()

    assert probe(with_unlabeled(train, -1), with_unlabeled(test, -100)) == probe(train, test)


@every_probe
def test_rows_none_of_which_has_a_label_are_an_error(probe) -> None:
    rows = clusters(50)
    unlabeled = rows[0], torch.full_like(rows[1], -1)
    for train, test in [(unlabeled, rows), (rows, unlabeled)]:
        with pytest.raises(ValueError, match="none of the 50 rows has a label"):
            probe(train, test)


def test_linear_accuracy_is_that_of_logistic_regression_on_standardized_rows() -> None:
    (x, y), (test_x, test_y) = train, test = clusters(300), clusters(300)
    x, test_x = (((rows - x.mean(dim=0)) / x.std(dim=0, correction=0)).numpy() for rows in (x, test_x))
    assert linear_accuracy(train, test) == LogisticRegression().fit(x, y).score(test_x, test_y)


def test_balanced_accuracy_is_that_of_scikit_learn_and_unlabeled_rows_do_not_count() -> None:
    (x, y), (test_x, test_y) = train, test = clusters(300), clusters(300)
    kept = (test_y != 0) | (torch.arange(len(test_y)) % 10 == 0)  # few of the first class
    test = (test_x[kept], torch.where(torch.arange(int(kept.sum())) % 7 == 0, -1, test_y[kept]))
    found = linear_accuracies(train, test)
    scaled, shown = (((rows - x.mean(dim=0)) / x.std(dim=0, correction=0)).numpy() for rows in (x, test[0]))
    predicted, known = LogisticRegression().fit(scaled, y).predict(shown), test[1] >= 0
    assert found.balanced == pytest.approx(balanced_accuracy_score(test[1][known], predicted[known]))
    assert found.top1 == pytest.approx(accuracy_score(test[1][known], predicted[known]))
    assert found.balanced != found.top1


@pytest.mark.parametrize("k", [1, 5, 20])
def test_an_infinite_temperature_is_the_plain_vote_of_scikit_learn(k: int) -> None:
    train, test = clusters(300), clusters(300)
    peer = KNeighborsClassifier(k, metric="cosine", algorithm="brute")
    expected = peer.fit(*(x.numpy() for x in train)).score(*(x.numpy() for x in test))
    assert knn_accuracy(train, test, k=k, temperature=math.inf) == expected
    assert knn_accuracy(train, test, k=k, temperature=1e6) == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(
    ("fraction", "counts"), [(0.1, [3, 1, 1]), (0.101, [4, 2, 1]), (1e-6, [1, 1, 1]), (1.0, [30, 10, 3])]
)
def test_few_shot_draws_that_share_of_each_class_rounded_up(
    fraction: float, counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, labels = torch.randn(43, 2), torch.tensor([0] * 30 + [1] * 10 + [5] * 3)
    seen: list[Rows] = []

    def fit(train: Rows, _: Rows) -> float:
        seen.append(train)
        return float(len(seen))

    monkeypatch.setattr(evaluation, "linear_accuracy", fit)
    assert few_shot_accuracy((x, labels), (x, labels), fraction, draws=4) == (2.5, pytest.approx(math.sqrt(5 / 3)))
    for rows, drawn in seen:
        assert [int((drawn == c).sum()) for c in (0, 1, 5)] == counts
        assert len(rows.unique(dim=0)) == len(rows) == sum(counts)
        assert all((labels[(x == row).all(dim=1)] == label).all() for row, label in zip(rows, drawn, strict=True))
    if fraction == 0.1:
        assert not torch.equal(seen[0][0], seen[1][0])


def test_few_shot_with_all_labels_is_linear_accuracy_without_deviation() -> None:
    train, test = clusters(200), clusters(200)
    mean, deviation = few_shot_accuracy(train, test, 1.0, draws=2)
    assert mean == pytest.approx(linear_accuracy(train, test), abs=0.006)
    assert deviation == pytest.approx(0, abs=0.006)
    assert few_shot_accuracy(train, test, 0.05, draws=1)[1] == 0


@pytest.mark.parametrize(
    ("call", "cause"),
    [
        (lambda rows: few_shot_accuracy(rows, rows, 0.0), "fraction must be > 0"),
        (lambda rows: few_shot_accuracy(rows, rows, 1.5), r"fraction must lie in \[0, 1\]"),
        (lambda rows: few_shot_accuracy(rows, rows, 0.5, draws=0), "draws must be an integer >= 1"),
        (lambda rows: sgd_linear_accuracy(rows, rows, epochs=0), "epochs must be an integer >= 1"),
        (lambda rows: sgd_linear_accuracy(rows, rows, batch_size=0), "batch_size must be an integer >= 1"),
        (lambda rows: sgd_linear_accuracy(rows, rows, seed=-1), "seed must be an integer >= 0"),
        (lambda rows: sgd_linear_accuracy(rows, rows, lr=math.nan), "lr must be a finite number"),
        (lambda rows: knn_accuracy(rows, rows, temperature=0.0), "temperature must be > 0"),
    ],
)
def test_settings_out_of_range_are_errors(call, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        call(clusters(20))


def test_label_free_values_are_the_estimators_on_the_right_rows() -> None:
    r = torch.randn(300, 24) * torch.linspace(2, 0.1, 24) + 0.3
    z, r_views = r @ torch.randn(24, 10), views_of(r[:50])
    values = label_free_values(r, z, r_views)
    expected = {
        "H_R": functional.spectral_entropy(r),
        "ER_R": functional.effective_rank(r),
        "rankme": functional.rankme(r),
        "lidar": functional.lidar(r_views),
        "alpha_req": functional.alpha_req(r),
        "I_RZ": functional.matrix_mutual_information(r, z),
        "log_n": math.log(300),
        "ER_Z": functional.effective_rank(z),
        "uniformity": functional.uniformity(r),
        "alignment": functional.alignment(r_views[:, 0], r_views[:, 1]),
    }
    assert list(values) == list(expected)
    assert all(type(value) is float for value in values.values())
    assert values == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-6)
    assert values["H_R"] == pytest.approx(math.log(values["ER_R"]), rel=1e-5)
    assert values["rankme"] == pytest.approx(values["ER_R"], rel=1e-3)


def test_without_embeddings_only_their_values_are_missing() -> None:
    r = torch.randn(40, 6)
    with_z, without = (label_free_values(r, z, views_of(r)).keys() for z in (r, None))
    assert with_z - without == {"I_RZ", "log_n", "ER_Z"}


@pytest.mark.parametrize("n", [512, 700, 1024, 1600])
def test_information_is_the_mean_over_disjoint_groups_of_512_rows(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    r, z = torch.randn(n, 8), torch.randn(n, 4)
    seen: list[tuple[Tensor, Tensor]] = []

    def note(*pair: Tensor) -> Tensor:
        seen.append(pair)
        return functional.matrix_mutual_information(*pair)

    monkeypatch.setattr(evaluation, "matrix_mutual_information", note)
    values = label_free_values(r, z, views_of(r[:20]))
    assert [len(rows) for pair in seen for rows in pair] == [512] * (2 * (n // 512))
    joint = torch.cat([torch.cat(pair, dim=1) for pair in seen])
    assert len(joint.unique(dim=0)) == len(joint)
    every = torch.cat([r, z], dim=1)
    assert len(torch.cat([joint, every]).unique(dim=0)) == n
    mean = np.mean([float(functional.matrix_mutual_information(*pair)) for pair in seen])
    assert values["I_RZ"] == pytest.approx(mean, rel=1e-5)
    assert values["log_n"] == pytest.approx(math.log(512))


def test_values_of_rows_sorted_by_class_are_about_those_of_shuffled_rows() -> None:
    r, labels = clusters(6000, classes=8, d=16, spread=0.2)
    z = r + 0.1 * torch.randn_like(r)
    order = labels.argsort()
    by_class, shuffled = (label_free_values(x, y, views_of(r[:30])) for x, y in [(r[order], z[order]), (r, z)])
    for name in ("I_RZ", "uniformity"):
        assert by_class[name] == pytest.approx(shuffled[name], rel=0.02)


def test_uniformity_never_sees_more_than_4096_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(evaluation, "uniformity", lambda x: seen.append(len(x)) or torch.tensor(0.0))
    for n in (4096, 4097, 9000):
        label_free_values(torch.randn(n, 3), None, torch.randn(5, 2, 3))
    assert seen == [4096, 2049, 3000]


def test_values_of_collapsed_representations_are_never_nan() -> None:
    r = torch.full((40, 6), 0.1)
    values = label_free_values(r, r, r[:, None].expand(40, 2, 6))
    assert not any(math.isnan(value) for value in values.values())
    assert values["alpha_req"] == math.inf
    assert values["lidar"] == 1
    assert [values["ER_R"], values["rankme"], values["ER_Z"]] == pytest.approx([1, 1, 1], abs=1e-4)
    assert values["I_RZ"] == pytest.approx(0, abs=1e-5)
    assert values["alignment"] == 0


@pytest.mark.parametrize(
    ("r", "z", "r_views", "cause"),
    [
        (torch.ones(4), None, torch.ones(3, 2, 2), r"shape \(N, d\)"),
        (torch.eye(4), torch.eye(3), torch.ones(3, 2, 2), "same number of rows, got 4 and 3"),
        (torch.eye(4), None, torch.ones(3, 1, 2), r"shape \(N, q, d\)"),
        (torch.full((4, 4), math.nan), None, torch.ones(3, 2, 2), "NaN or an infinity"),
    ],
)
def test_label_free_values_reject_what_does_not_fit(
    r: Tensor, z: Tensor | None, r_views: Tensor, cause: str
) -> None:
    with pytest.raises(ValueError, match=cause):
        label_free_values(r, z, r_views)


def test_embed_stacks_batches_in_evaluation_mode_and_restores_training_mode() -> None:
    images, labels = torch.randint(256, (50, 1, 8, 8), dtype=torch.uint8), torch.arange(50)
    backbone = conv_net().train()
    r, targets = embed(backbone, zip(images.split(20), labels.split(20), strict=True), lambda x: x / 255)
    assert backbone.training
    with torch.no_grad():
        torch.testing.assert_close(r, backbone.eval()(images / 255))
    assert torch.equal(targets, labels)
