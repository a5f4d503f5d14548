"""The loggers of `adadim-train`, by the files that they write."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from adadim_lightning.callbacks.panels import METRICS
from adadim_lightning.cli.app import config_dir
from adadim_lightning.cli.loggers import finish_loggers, make_loggers
from adadim_lightning.extras import MissingExtraError
from adadim_lightning.trust import check_targets
from tests.callbacks.wandb_files import Found, wandb_runs
from tests.cli.test_train import ONE_STEP, options, run, summary

KEY = "0123456789" * 4  # of the right length, of nobody
SWEEP = Path(__file__).parents[2] / "sweeps" / "wandb.yaml"


@pytest.fixture(autouse=True)
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without an account, and without what other tests left."""
    for name in ("API_KEY", "MODE", "RUN_ID", "RUN_GROUP", "JOB_TYPE", "NAME", "PROJECT", "ENTITY"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.chdir(tmp_path)
    yield
    finish_loggers(exit_code=0)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two jobs with three loggers; the second ends in a NaN."""
    folder = tmp_path_factory.mktemp("loggers")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        monkeypatch.setenv("NETRC", str(folder / "netrc"))
        for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI"):
            monkeypatch.delenv(name, raising=False)
        jobs = ["-m", "optimizer.lr=1e-3,1e30", "logger=[wandb,tensorboard,mlflow]", "objective.gamma=0.3"]
        steps = ["trainer.max_epochs=2", "trainer.limit_train_batches=3", "trainer.limit_val_batches=1"]
        assert run(monkeypatch, folder / "study", *jobs, *steps) == 1
    return folder


def jobs(sweep: Path) -> list[Found]:
    return [found for i in range(2) for found in wandb_runs(sweep / "study" / str(i))]


# A sweep of two jobs.


def test_each_job_is_a_run_of_its_own_and_a_failed_one_is_shown_as_failed(sweep: Path) -> None:
    good, bad = jobs(sweep)
    assert [found.run.run_id for found in (good, bad)] == [
        summary(sweep / "study" / str(i))["run_id"] for i in range(2)
    ]
    assert (good.exit_code, bad.exit_code) == (0, 1)
    assert (good.run.project, good.run.run_group, good.run.job_type) == ("adadim", "study", "sweep")
    assert "optimizer.lr=0.001" in good.run.display_name
    assert bad.run.run_group == "study"


def test_the_configuration_is_searchable_by_dotted_keys(sweep: Path) -> None:
    config = jobs(sweep)[0].config
    assert config["objective.gamma"] == 0.3
    assert config["optimizer.lr"] == 1e-3
    assert config["callbacks.adadim.balance.alpha.normalizer"] == "min"
    assert config["data.mean"] == [0.3053]
    assert "objective.gamma=0.3" in config["overrides"]
    assert not any(isinstance(value, dict) and value for key, value in config.items() if "_wandb" not in key)


def test_wandb_is_told_the_last_value_of_every_log_name(sweep: Path) -> None:
    logged = {key: value for key, value in summary(sweep / "study" / "0").items() if "/" in key}
    told = jobs(sweep)[0]
    assert {"loss/total", "evaluation/trained_linear_top1"} <= logged.keys()
    for key, value in logged.items():
        assert told.values(key)[-1] == pytest.approx(value, rel=1e-6), key
        assert told.metrics[key].step_metric == "epoch", key
    assert told.epochs("evaluation/trained_linear_top1") == [1]


def test_tensorboard_files_are_in_the_folder_of_the_run(sweep: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(sweep / "study" / "0" / "tensorboard"))
    events.Reload()
    for key in ("loss/total", "dynamics/H_R", "evaluation/trained_linear_top1"):
        assert events.Scalars(key)[-1].value == pytest.approx(summary(sweep / "study" / "0")[key]), key
    parameters = yaml.safe_load((sweep / "study" / "0" / "tensorboard" / "hparams.yaml").read_text())
    assert parameters["objective.gamma"] == 0.3


def test_mlflow_runs_share_an_experiment_and_end_as_they_did(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient(f"file:{sweep / 'mlruns'}")
    [experiment] = [x for x in client.search_experiments() if x.name == "adadim"]
    found = {x.data.params["optimizer.lr"]: x for x in client.search_runs([experiment.experiment_id])}
    assert {lr: x.info.status for lr, x in found.items()} == {"0.001": "FINISHED", "1e+30": "FAILED"}
    good = found["0.001"]
    assert good.data.params["objective.gamma"] == "0.3"
    assert good.data.metrics["loss/total"] == pytest.approx(summary(sweep / "study" / "0")["loss/total"])
    assert "evaluation/trained_linear_top1" in good.data.metrics
    assert (good.data.tags["group"], good.data.tags["job_type"]) == ("study", "sweep")


# One run.


def prepared(folder: Path, *overrides: str) -> Any:
    """The configuration of the loggers, and the files of a run that stand before they are made."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = compose("train", [*overrides, "run_dir=."])
    for logger in config.logger.values():
        if "save_dir" in logger:  # else Hydra's folder
            logger.save_dir = str(folder)
        if "tracking_uri" in logger:
            logger.tracking_uri = f"file:{folder.parent / 'mlruns'}"
    folder.mkdir(exist_ok=True)
    settings = OmegaConf.to_container(config, resolve=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / ".hydra").mkdir(exist_ok=True)
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(list(overrides)))
    return config.logger


def begin_and_end(folder: Path, *overrides: str, exit_code: int = 0, **labels: str) -> None:
    make_loggers(prepared(folder, *overrides), folder=folder, **{"run_id": "abcd1234", **labels})  # type: ignore[arg-type]
    finish_loggers(exit_code=exit_code)


def test_a_run_says_where_it_is_in_80_columns_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "outputs" / "2026-01-31" / "12-00-00"
    assert run(monkeypatch, folder, "logger=wandb", *ONE_STEP) == 0
    output, errors = capfd.readouterr()
    lines = output.splitlines()
    first = lines.index("wandb      offline (not logged in); to upload it:")
    assert lines[first + 1] == "           wandb sync outputs/2026-01-31/12-00-00/wandb/offline-run-*"
    assert len(list(folder.glob("wandb/offline-run-*/*.wandb"))) == 1
    assert max(map(len, lines)) <= 80
    assert "wandb" not in errors
    assert "wandb:" not in output


def test_a_run_that_goes_on_keeps_its_id(tmp_path: Path) -> None:
    for exit_code in (1, 0):
        begin_and_end(tmp_path / "run", "logger=wandb", exit_code=exit_code)
    first, second = wandb_runs(tmp_path / "run")
    assert first.run.run_id == second.run.run_id == "abcd1234"
    assert (first.exit_code, second.exit_code) == (1, 0)


def test_mlflow_goes_on_with_the_run_and_ends_it_anew(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    begin_and_end(tmp_path / "run", "logger=mlflow", exit_code=1)
    client = MlflowClient(f"file:{tmp_path / 'mlruns'}")
    [experiment] = [x for x in client.search_experiments() if x.name == "adadim"]
    [first] = client.search_runs([experiment.experiment_id])
    assert first.info.status == "FAILED"
    begin_and_end(tmp_path / "run", "logger=mlflow", "trainer.max_epochs=99")
    [second] = client.search_runs([experiment.experiment_id])
    assert (second.info.run_id, second.info.status) == (first.info.run_id, "FINISHED")
    begin_and_end(tmp_path / "other", "logger=mlflow", run_id="other")
    assert len(client.search_runs([experiment.experiment_id])) == 2


def test_what_wandb_agent_sets_goes_before_our_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = {"group": "study", "job_type": "gamma", "name": "n" * 200}
    begin_and_end(tmp_path / "ours", "logger=wandb", **ours)
    [found] = wandb_runs(tmp_path / "ours")
    told = (found.run.run_id, found.run.run_group, found.run.job_type, found.run.display_name)
    assert told == ("abcd1234", "study", "gamma", "n" * 128)
    for name in ("RUN_ID", "RUN_GROUP", "NAME", "PROJECT"):
        monkeypatch.setenv(f"WANDB_{name}", f"its-{name.lower()}")
    begin_and_end(tmp_path / "its", "logger=wandb", **ours)
    [found] = wandb_runs(tmp_path / "its")
    told = (found.run.run_id, found.run.run_group, found.run.display_name, found.run.project)
    assert told == ("its-run_id", "its-run_group", "its-name", "its-project")
    begin_and_end(tmp_path / "asked", "logger=wandb", "logger.wandb.project=asked", "+logger.wandb.tags=[a]")
    [found] = wandb_runs(tmp_path / "asked")
    assert (found.run.project, list(found.run.tags)) == ("asked", ["a"])


def test_code_and_configuration_become_artifacts_where_they_are_wanted(tmp_path: Path) -> None:
    begin_and_end(tmp_path / "a", "logger=wandb")
    assert wandb_runs(tmp_path / "a")[0].artifacts == []
    switches = ("logger.wandb.log_code=true", "logger.wandb.log_config=true", "trust=[yaml]")
    begin_and_end(tmp_path / "b", "logger=wandb", *switches)
    config, code = sorted(wandb_runs(tmp_path / "b")[0].artifacts, key=lambda artifact: artifact.type != "config")
    assert [entry.path for entry in config.manifest.contents] == [".hydra/overrides.yaml", "config.yaml"]
    paths = {entry.path for entry in code.manifest.contents}
    assert {"adadim_lightning/objective.py", "adadim_lightning/cli/run.py", "yaml/loader.py"} <= paths
    assert all(path.endswith(".py") for path in paths)


@pytest.mark.parametrize(
    ("environment", "mode", "shown"),
    [
        ({}, "auto", "offline (not logged in)"),
        ({"WANDB_API_KEY": KEY}, "offline", "offline (logger.wandb.mode)"),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "auto", "offline (WANDB_MODE)"),
    ],
)
def test_the_mode_is_what_is_asked_for(
    environment: dict[str, str],
    mode: str,
    shown: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    begin_and_end(tmp_path / "run", "logger=wandb", f"logger.wandb.mode={mode}")
    assert f"wandb      {shown}" in capsys.readouterr().out
    assert len(wandb_runs(tmp_path / "run")) == 1


def test_a_key_is_found_where_wandb_looks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
import sys
from pathlib import Path
from adadim_lightning.cli.credentials import logged_in
netrc, key = Path(sys.argv[1]), sys.argv[2]
print(logged_in())
for host in ("elsewhere.org", "api.wandb.ai"):
    netrc.write_text(f"machine {host}\\n  login user\\n  password {key}\\n")
    print(logged_in())
"""
    command = [sys.executable, "-c", code, str(tmp_path / "netrc"), KEY]
    for expected in (["False", "False", "True"], ["True", "True", "True"]):
        answers = subprocess.run(command, check=True, capture_output=True, text=True, input="").stdout
        assert answers.split() == expected
        (tmp_path / "netrc").unlink()
        monkeypatch.setenv("WANDB_API_KEY", KEY)


def test_a_mode_that_does_not_exist_is_an_error_of_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path / "run", "logger=wandb", "logger.wandb.mode=onlin", *ONE_STEP) == 1
    error = "adadim-train: error: logger.wandb.mode must be one of auto, online, offline, got 'onlin'\n"
    assert capsys.readouterr().err == error


@pytest.mark.parametrize(("option", "package"), [("tensorboard", "tensorboard"), ("mlflow", "mlflow")])
def test_a_missing_package_is_named_with_the_line_that_installs_it(
    option: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        MissingExtraError, match=rf"{package} is not installed; pip install 'adadim.*\[{option}\]'"
    ):
        begin_and_end(tmp_path / "run", f"logger={option}")


@pytest.mark.parametrize("override", [*options("logger"), "logger=[wandb,tensorboard]"])
def test_every_logger_is_trusted(override: str, tmp_path: Path) -> None:
    config = prepared(tmp_path / "run", override)
    check_targets(OmegaConf.to_container(config, resolve=True))
    names = override.partition("=")[2].strip("[]").split(",")
    assert list(config) == [name for name in names if name != "csv"]


# Sweeps of Weights & Biases.


def test_the_sweep_file_makes_command_lines_that_compose() -> None:
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    sweep = yaml.safe_load(SWEEP.read_text())
    lows = {
        key: {"value": x["values"][0] if "values" in x else x["min"]} for key, x in sweep["parameters"].items()
    }
    words = create_sweep_command(sweep["command"])
    arguments = create_sweep_command_args({"args": lows})
    line = [
        part for word in words for part in (arguments.get(word[2:-1], []) if word.startswith("${") else [word])
    ]
    with initialize_config_dir(str(config_dir()), version_base="1.3"), pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("WANDB_RUN_ID", "abcd1234")
        config = compose("train", line)
        for option in sweep["parameters"]["balance"]["values"]:
            compose("train", [f"balance={option}"])
        assert config.run_dir == "outputs/wandb/abcd1234"
    assert (config.objective.gamma, config.optimizer.lr, config.seed) == (0.0, 3e-4, 0)
    assert config.balance.alpha._target_ == "adadim_lightning.EffectiveRankSchedule"
    assert config.logger.wandb.mode == "auto"
    assert sweep["metric"]["name"] in METRICS
    assert sweep["program"] == "adadim-train"
    assert words[:2] == ["${env}", "${program}"]


@pytest.mark.parametrize("log_model", ["true", "all"])
def test_checkpoints_are_uploaded_where_that_is_asked_for(
    log_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    steps = ["trainer.max_epochs=2", "trainer.limit_train_batches=2", "trainer.limit_val_batches=1", ONE_STEP[-1]]
    wanted = [f"logger.{name}.log_model={log_model}" for name in ("wandb", "mlflow")]
    assert run(monkeypatch, folder, "logger=[wandb,mlflow]", *wanted, *steps, "evaluation=null") == 0
    kept = sorted(path.name for path in folder.glob("checkpoints/epoch=*.ckpt"))
    assert len(kept) == 2
    uploaded = kept if log_model == "all" else kept[-1:]
    [found] = wandb_runs(folder)
    models = [json.loads(x.metadata) for x in found.artifacts if x.type == "model"]
    assert [model["original_filename"] for model in models] == uploaded
    stored = {path.name: path for path in (tmp_path / "mlruns").rglob("*.ckpt")}
    assert sorted(stored) == uploaded
    for name, path in stored.items():
        assert path.read_bytes() == (folder / "checkpoints" / name).read_bytes()
