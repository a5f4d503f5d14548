"""What importing costs, in fresh interpreters."""

import subprocess
import sys

import pytest


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("train", "objective: adadim, adadim_paper, barlow_twins, simclr, vicreg"),
        ("evaluate", "adadim-evaluate ckpt="),
        ("embed", "adadim-embed ckpt="),
        ("export", "torch_export"),
        ("report", "--baseline ARM"),
        ("dashboard", "ENTITY/PROJECT"),
    ],
)
def test_help_answers_without_torch(command: str, shown: str) -> None:
    code = f"""
import sys
from adadim_lightning.cli.{command} import main
sys.argv = ["adadim-{command}", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code
print("torch" in sys.modules, "lightning" in sys.modules)
"""
    *lines, last = run_python(code).splitlines()
    assert last == "False False"
    assert any(shown in line for line in lines)
    if command == "export":
        assert max(map(len, lines)) <= 80


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
