"""`adadim-report` from the command line to the files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from adadim_lightning.cli.report import main
from tests.cli.test_train import run as train
from tests.report.runs import write_run, write_sweep


def report(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """Run the command as a shell would; its exit code."""
    monkeypatch.setattr(sys, "argv", ["adadim-report", *map(str, arguments)])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.slow
def test_a_real_sweep_makes_a_page_its_pictures_and_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = tmp_path / "sweep"
    few = ["trainer.max_epochs=2", "trainer.limit_train_batches=2"]
    assert train(monkeypatch, sweep, "-m", "objective=simclr,adadim", "seed=0,1", *few) == 0
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    assert report(monkeypatch, "sweep", "--baseline", "objective=adadim") == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    summaries = [json.loads((sweep / str(i) / "summary.json").read_text()) for i in range(4)]
    name = "evaluation/trained_linear_top1"
    gain = sum(summaries[i][name] - summaries[i + 2][name] for i in (0, 1)) / 2
    assert f"{gain:+.4f}".replace("-", "\N{MINUS SIGN}") in printed
    assert "accuracy: evaluation/trained_linear_top1" in printed
    text = (sweep / "report.html").read_text()
    best = max(summaries, key=lambda summary: summary[name])
    assert f"adadim-train {best['overrides'][0]} seed={best['seed']} trainer.max_epochs=2" in text
    for picture in ("plane", "dynamics", "spectra"):
        assert f'href="report_{picture}.png"' in text
        assert (sweep / f"report_{picture}.png").stat().st_size > 10_000


def test_help_needs_neither_torch_nor_plotly_and_fits_80_columns() -> None:
    code = """
import sys
from adadim_lightning.cli.report import main
sys.argv = ["adadim-report", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code
print({"torch", "plotly", "hydra", "matplotlib", "wandb"} & set(sys.modules))
"""
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    *lines, last = output.splitlines()
    assert last == "set()"
    assert any("--baseline ARM" in line for line in lines)
    assert max(map(len, lines)) <= 80


def test_reading_runs_needs_no_torch(tmp_path: Path) -> None:
    write_run(tmp_path / "0")
    code = f"""
import sys
from adadim_lightning.cli.report import main
sys.argv = ["adadim-report", {str(tmp_path)!r}]
main()
assert not {{"torch", "lightning"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["empty"], "no run found in empty: a run folder holds a summary.json"),
        (["nowhere"], "there is no folder nowhere"),
        (["sweep", "--metric", "probe/linear_top"], "did you mean 'probe/linear_top1'?"),
        (["sweep", "--metric", "zzz"], "there are balance/alpha, "),
        (["sweep", "--baseline", "a=3"], "--baseline 'a=3' is no arm; did you mean 'a=2'?"),
        (["sweep", "--baseline", "zzzzzz"], "--baseline 'zzzzzz' is no arm; there are a=1; a=2"),
        (["sweep", "--baseline", "c=1"], "--baseline 'c=1' fits 2 arms: a=1; a=2"),
        (["sweep", "--out", "page.pdf"], "--out must be an HTML file, such as page.html"),
        (["sweep", "--out", "sweep/multirun.yaml/page.html"], "cannot write sweep/multirun.yaml: "),
        ([], "the following arguments are required: PATH"),
        (["sweep", "--metrics", "x"], "unrecognized arguments: --metrics x"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_1(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    for number, arm in enumerate(("a=1", "a=2")):
        write_run(Path("sweep") / str(number), arm, "c=1", epochs=1)
    Path("sweep/multirun.yaml").touch()
    assert report(monkeypatch, *arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("adadim-report: error: ")
    assert message in line
    assert not list(tmp_path.rglob("*.html"))


def test_a_missing_extra_is_one_line_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "0", epochs=1)
    monkeypatch.setitem(sys.modules, "plotly", None)
    assert report(monkeypatch, tmp_path) == 1
    assert "pip install 'adadim-lightning[report]'" in capsys.readouterr().err


def test_out_and_metric_and_several_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (write_run(tmp_path / name, f"a={name}", epochs=2) for name in ("x", "y"))
    out = tmp_path / "new folder" / "both.html"
    assert report(monkeypatch, first, second, "--out", out, "--metric", "loss/total") == 0
    printed = capsys.readouterr().out
    assert "total: loss/total" in printed
    names = {path.name for path in out.parent.iterdir()}
    assert names == {"both.html", "both_plane.png", "both_dynamics.png", "both_spectra.png"}
    assert not (first / "report.html").exists()


def test_damage_is_a_warning_and_the_terminal_table_stays_narrow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = [f"a.very.long.key.of.a.configuration={i} [red]" for i in range(23)]
    write_sweep(tmp_path, arms, [0, 1], epochs=1)
    (tmp_path / "0" / "summary.json").write_text("{")
    (tmp_path / "1" / "spectra.npz").write_text("{")
    monkeypatch.chdir(tmp_path)
    assert report(monkeypatch, ".") == 0
    captured = capsys.readouterr()
    assert max(map(len, captured.out.splitlines())) <= 80
    assert "and 3 arms more" in captured.out
    assert "1 of 46 runs are not finished" in captured.out
    assert [line.split(":")[:2] for line in captured.err.splitlines()] == [["warning", " 0"], ["warning", " 1"]]
