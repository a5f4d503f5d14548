"""Arms, the accuracy that compares them, and the best run."""

from pathlib import Path
from typing import Any

import pytest

from adadim_lightning.report.runs import RunRecord
from adadim_lightning.report.study import Study


def record(name: str, *overrides: str, **settings: Any) -> RunRecord:
    """A finished run with a configuration that its overrides led to."""
    seed = settings.setdefault("seed", 0)
    config = dict(text.split("=", 1) for text in overrides)
    settings.setdefault("config", {**config, "seed": seed, "run_dir": "runs/x"})
    return RunRecord(name, Path("runs/x") / name, overrides=[*overrides, f"seed={seed}"], **settings)


def labels(*runs: RunRecord) -> list[str]:
    return [arm.label for arm in Study(list(runs)).arms]


def test_runs_that_differ_in_their_seed_alone_are_one_arm() -> None:
    runs = [record(str(i), f"objective={arm}", seed=seed) for i, (arm, seed) in enumerate(
        (arm, seed) for arm in ("simclr", "vicreg") for seed in (0, 1, 2)
    )]  # fmt: skip
    study = Study(runs)
    assert [arm.label for arm in study.arms] == ["objective=simclr", "objective=vicreg"]
    assert [[run.seed for run in arm.runs] for arm in study.arms] == [[0, 1, 2], [0, 1, 2]]


def test_label_shows_only_what_differs() -> None:
    assert labels(record("0", "a=1", "b=1", "c=1"), record("1", "a=1", "b=2"), record("2", "a=1", "c=1")) == [
        "b=1 c=1", "b=2", "c=1",
    ]  # fmt: skip


def test_a_lone_arm_shows_all_its_overrides_and_none_is_the_default() -> None:
    assert labels(record("0", "a=1", "b=2")) == ["a=1 b=2"]
    assert labels(record("0")) == ["default"]
    assert labels(record("0"), record("1", "a=1")) == ["default", "a=1"]


def test_two_command_lines_that_give_one_configuration_are_one_arm() -> None:
    config = {"objective": {"gamma": 0.1}}
    spelled = record("0", "objective.gamma=0.1", config=config)
    plain = record("1", config=config, seed=1)
    assert labels(spelled, plain) == ["default"]


def test_one_command_line_that_gives_two_configurations_is_two_arms_told_apart_by_them() -> None:
    before, after = (record(str(i), "x=1", config={"head": {"dim": 64 * (i + 1)}}) for i in range(2))
    assert labels(before, after) == ["head.dim=64", "head.dim=128"]


def test_folders_and_seeds_inside_a_configuration_make_no_other_arm() -> None:
    runs = [
        record(str(i), config={
            "run_dir": "runs/x", "seed": i, "data": {"seed": i}, "logger": {"wandb": {"name": i}},
            "callbacks": {"save_dir": f"/home/me/runs/x/{i}"}, "resume": bool(i),
        }, seed=i)
        for i in range(3)
    ]  # fmt: skip
    assert len(Study(runs).arms) == 1


def test_a_run_that_failed_before_its_configuration_was_resolved_joins_its_arm() -> None:
    runs = [
        record("0", "a=1", seed=1, status="failed", config={"run_dir": "outputs/${now:%H}", "lr": "${x}"}),
        record("1", "a=1"),
        record("2", "a=2"),
        record("3", "a=3", status="failed", config={"lr": "${x}"}),
    ]
    study = Study(runs)
    assert [(arm.label, len(arm.runs), len(arm.finished)) for arm in study.arms] == [
        ("a=1", 2, 1), ("a=2", 1, 1), ("a=3", 1, 0),
    ]  # fmt: skip


def test_runs_of_unknown_command_lines_are_told_apart_by_configuration_else_by_name() -> None:
    def unknown(name: str, **config: object) -> RunRecord:
        return RunRecord(name, Path(name), config=config)

    assert labels(unknown("a", gamma=0.1), unknown("b", gamma=0.2)) == ["gamma=0.1", "gamma=0.2"]
    assert labels(unknown("a"), unknown("b")) == ["a", "b"]
    assert labels(unknown("a", gamma=0.1)) == ["a"]


def foreign(name: str, title: str | None = None, *, seed: int | None = None, **config: object) -> RunRecord:
    """A run of another program, of which only its logger's file is left."""
    return RunRecord(name, Path(name), config={**config, "seed": seed}, seed=seed, title=title)


def test_arms_of_foreign_runs_are_called_what_their_user_called_the_runs() -> None:
    assert labels(foreign("x", "simclr", lr=0.1), foreign("y", "byol", lr=0.2)) == ["simclr", "byol"]
    # One configuration: repeats of each name, since no seed tells of any other.
    runs = [foreign("x", "simclr"), foreign("y", "byol"), foreign("z", "simclr"), foreign("w")]
    assert [[run.name for run in arm.runs] for arm in Study(runs).arms] == [["x", "z"], ["y"], ["w"]]
    assert labels(*runs) == ["simclr", "byol", "w"]
    for run in runs:
        run.config = {}
    assert labels(*runs) == ["simclr", "byol", "w"]


def test_foreign_runs_that_differ_in_their_seed_are_one_arm_whatever_they_are_called() -> None:
    runs = [
        foreign(f"{lr}/{seed}", f"lr{lr}-s{seed}", seed=seed, lr=lr, model={"seed": seed})
        for lr in (1, 2)
        for seed in (0, 1, 2)
    ]
    assert labels(*runs) == ["lr=1", "lr=2"]
    assert labels(*runs[:3]) == ["1/0 and 2 more"]


def test_foreign_arms_of_one_name_are_told_apart_by_what_differs() -> None:
    assert labels(foreign("x", "simclr", lr=1), foreign("y", "simclr", lr=2)) == ["simclr lr=1", "simclr lr=2"]


def test_labels_hide_what_tools_note_for_themselves() -> None:
    def of(name: str, kind: str, **private: object) -> RunRecord:
        optimizer = {"_target_": f"torch.optim.{kind}", "_partial_": kind == "SGD"}
        private |= {"_wandb": {"t": name}, "hparams": {"_class_path": name}, "net": f"<Net object at 0x7f{name}>"}
        return foreign(name, optimizer=optimizer, **private)

    assert labels(of("1", "SGD"), of("2", "AdamW")) == ["optimizer=torch.optim.SGD", "optimizer=torch.optim.AdamW"]
    assert labels(of("1", "SGD"), of("2", "SGD")) == ["1 and 1 more"]


def test_long_values_are_cut_in_labels() -> None:
    first, second = labels(foreign("x", layers="a" * 300), foreign("y", layers="b" * 300))
    assert first == f"layers={'a' * 39}\N{HORIZONTAL ELLIPSIS}"
    alike = labels(foreign("x", layers="a" * 300), foreign("y", layers="a" * 299 + "b"))
    assert [label.rpartition(" ")[2] for label in alike] == ["(x)", "(y)"]
    assert second.startswith("layers=b")


def test_unreadable_runs_belong_to_no_arm() -> None:
    assert labels(record("0", "a=1"), record("1", "a=1", status="unreadable")) == ["a=1"]


@pytest.mark.parametrize(
    ("logged", "metric"),
    [
        ({"probe/linear_top1": 1, "evaluation/trained_knn_top1": 1}, "probe/linear_top1"),
        ({"probe/knn_top1": 1, "evaluation/trained_linear_top1": 1}, "evaluation/trained_linear_top1"),
        ({"probe/knn_top1": 1}, "probe/knn_top1"),
        ({"dynamics/ER_R": 1}, None),
    ],
)
def test_the_metric_is_the_first_accuracy_that_was_logged(logged: dict[str, float], metric: str | None) -> None:
    study = Study([record("0", values=logged)])
    assert study.metric == metric
    assert study.color == (metric or "dynamics/ER_R")


def accurate(name: str, accuracy: float, h: float, i: float, **settings: Any) -> RunRecord:
    values = {"probe/linear_top1": accuracy, "dynamics/H_R": h, "dynamics/I_RZ": i, "loss/total": h}
    return record(name, f"arm={name}", values=values, **settings)


def test_the_best_run_is_finished_and_its_place_in_the_plane_is_counted() -> None:
    study = Study([
        accurate("0", 0.9, 3.0, 0.5), accurate("1", 0.8, 4.0, 0.2), accurate("2", 0.9, 1.0, 0.1),
        accurate("3", 0.99, 9.0, 0.0, status="failed"),
    ])  # fmt: skip
    assert study.best is study.runs[0]
    assert study.ties == 1
    assert study.place("dynamics/H_R", highest=True) == (2, 3)
    assert study.place("dynamics/I_RZ", highest=False) == (3, 3)


def test_of_a_loss_the_lowest_is_best() -> None:
    study = Study([accurate("0", 0.9, 3.0, 0.5), accurate("1", 0.8, 2.0, 0.5)], "loss/total")
    assert study.best is study.runs[1]


def test_unfinished_runs_enter_no_mean_and_no_difference() -> None:
    runs = [record(str(i), f"a={arm}", seed=seed, status=status, values={"probe/linear_top1": value})
            for i, (arm, seed, status, value) in enumerate([
                (1, 0, "ok", 0.5), (1, 1, "ok", 0.7), (1, 2, "running", 0.1),
                (2, 0, "ok", 0.6), (2, 1, "ok", 0.8), (2, 2, "ok", 0.9),
            ])]  # fmt: skip
    study = Study(runs)
    first, second = study.arms
    mean = study.spread(first, study.value)
    assert mean is not None
    assert (mean.mean, mean.n) == (pytest.approx(0.6), 2)
    difference = study.difference(second, first)
    assert difference is not None
    assert (difference.mean, difference.n) == (pytest.approx(0.1), 2)
    assert study.difference(first, first) is None


def test_correlations_are_of_label_free_values_with_the_metric() -> None:
    study = Study([accurate(str(i), 0.1 * i, float(i), -float(i)) for i in range(5)])
    found = {c.name: (round(c.spearman, 6), c.n) for c in study.correlations}
    assert found == {"dynamics/H_R": (1, 5), "dynamics/I_RZ": (-1, 5), "loss/total": (1, 5)}


def test_an_arm_is_found_by_its_label_or_by_overrides_that_no_label_shows() -> None:
    study = Study([record("0", "a=1", "b=1", "c=1"), record("1", "a=1", "b=2", "c=1"), record("2", "a=2", "c=1")])
    assert study.find_arm("a=1 b=1") is study.arms[0]
    assert study.find_arm("b=2") is study.arms[1]
    assert study.find_arm("c=1 a=2") is study.arms[2]
    assert study.find_arm("a=3") is None
    assert study.find_arm("") is None
    with pytest.raises(ValueError, match=r"fits 2 arms: a=1 b=1; a=1 b=2"):
        study.find_arm("a=1")


def test_different_numbers_of_rows_are_noticed() -> None:
    runs = [record(str(i), values={"dynamics/log_n": value}) for i, value in enumerate((5.5452, 5.54518, 6.2))]
    assert Study(runs).log_ns == [5.545, 6.2]
