"""What importing costs, in fresh interpreters."""

import subprocess
import sys


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_help_answers_without_torch() -> None:
    code = """
import sys
from adadim_lightning.cli.train import main
sys.argv = ["adadim-train", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code
print("torch" in sys.modules, "lightning" in sys.modules)
"""
    lines = run_python(code).splitlines()
    assert lines[-1] == "False False"
    assert any("objective: adadim, adadim_paper, simclr, vicreg" in line for line in lines)


def test_the_library_adds_nothing_heavy_to_lightning() -> None:
    code = """
import sys
import lightning
before = set(sys.modules)
import adadim_lightning
for name in adadim_lightning.__all__:
    getattr(adadim_lightning, name)
roots = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(roots))
"""
    assert run_python(code).split() == ["adadim_lightning"]


def test_importing_the_package_alone_loads_no_library() -> None:
    code = "import sys, adadim_lightning; print({'torch', 'lightning', 'hydra', 'wandb'} & set(sys.modules))"
    assert run_python(code).strip() == "set()"


def test_versions_are_printed_for_bug_reports() -> None:
    output = subprocess.run(
        [sys.executable, "-m", "adadim_lightning"], check=True, capture_output=True, text=True
    ).stdout
    found = dict(line.split(maxsplit=1) for line in output.splitlines())
    assert found["adadim-lightning"] == "0.1.0"
    assert {"python", "torch", "lightning", "hydra-core"} <= set(found)
