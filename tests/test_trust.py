"""What a configuration may name, and that nothing else is even imported."""

import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from adadim_lightning.trust import UntrustedTargetError, check_targets

Writer = Callable[..., Path]


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Writer]:
    """Writes a module that leaves a mark when it is imported; returns the path of the mark."""
    names: list[str] = []

    def write(name: str = "evil_module", code: str = "") -> Path:
        names.append(name)
        mark = tmp_path / f"{name}.mark"
        body = f"open({str(mark)!r}, 'w').close()\n\nclass Net:\n    @classmethod\n    def make(cls): ...\n"
        (tmp_path / f"{name}.py").write_text(body + code)
        return mark

    monkeypatch.syspath_prepend(tmp_path)
    yield write
    for name in names:
        sys.modules.pop(name, None)


def refusal(name: Any, trust: Any = ()) -> str:
    with pytest.raises(UntrustedTargetError) as error:
        check_targets({"_target_": name}, trust)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "name",
    [
        "adadim_lightning.AdaDim",
        "adadim_lightning.data.digits",
        "kornia.augmentation.RandomResizedCrop",
        "lightning.pytorch.Trainer",
        "lightning.pytorch.callbacks.ModelCheckpoint",
        "lightning.pytorch.loggers.WandbLogger",
        "timm.create_model",
        "timm.models.resnet18",
        "timm.optim.Lars",
        "torch.nn.Linear",
        "torch.nn.functional.relu",
        "torch.optim.AdamW",
        "torch.optim.lr_scheduler.CosineAnnealingLR",
        "torchvision.models.get_model",
        "torchvision.models.resnet18",
        "torchvision.transforms.v2.RandomCrop",
    ],
)
def test_what_the_trusted_packages_offer_passes_wherever_they_define_it(name: str) -> None:
    check_targets({"_target_": name})


def test_every_target_of_the_shipped_configuration_passes() -> None:
    conf = Path(__file__).parents[1] / "conf"
    names = {
        name
        for path in conf.rglob("*.yaml")
        for name in re.findall(r"_target_: ([\w.]+)", path.read_text())
        if "hydra" not in path.relative_to(conf).parts
    }
    assert {"adadim_lightning.AdaDimLoss", "adadim_lightning.optim.lars"} <= names
    check_targets([{"_target_": name} for name in sorted(names)])


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("os.system", "os"),
        ("builtins.eval", "builtins"),
        ("subprocess.Popen", "subprocess"),
        ("torch.hub.load", "torch.hub"),
        ("torch.load", "torch"),
        ("torch.nnx.Linear", "torch.nnx"),
        ("timmy.create_model", "timmy"),
        ("adadim_lightning_plugin.Net", "adadim_lightning_plugin"),
        ("hydra.utils.get_method", "hydra"),
        # Modules that a trusted module has imported.
        ("torchvision.datasets.utils.os.system", "torchvision.datasets.utils.os"),
        ("torch.optim.optimizer.functools.partial", "functools"),
        ("lightning.pytorch.trainer.trainer.os.system", "os"),
        ("torchvision.transforms.transforms.torch.hub.load", "torch"),
        ("torch.nn.modules.module.functools.partial", "functools"),
        # Objects that a trusted module has imported.
        ("lightning.pytorch.callbacks.model_checkpoint.Path", "pathlib"),
        ("torchvision.models.inception.partial", "functools"),
        # Trusted packages, but they import, unpickle or upload what they are told to.
        ("lightning.pytorch.cli.instantiate_class", "lightning.pytorch.cli"),
        ("lightning.pytorch.cli.LightningCLI", "lightning.pytorch.cli"),
        ("timm.models.load_checkpoint", "timm.models._helpers"),
        ("timm.models.push_to_hf_hub", "timm.models._hub"),
        ("timm.models._helpers.load_state_dict", "timm.models._helpers"),
        ("timm.data.create_dataset", "timm.data"),
        ("adadim_lightning.extras.require", "adadim_lightning.extras"),
        ("adadim_lightning.optim.require", "adadim_lightning.extras"),
        ("adadim_lightning.cli.train.main", "adadim_lightning.cli.train"),
        ("torch.nn.utils._deprecation_utils._getattr", "torch.nn.utils._deprecation_utils"),
        # Methods: some of them unpickle.
        ("lightning.pytorch.LightningModule.load_from_checkpoint", "lightning.pytorch.LightningModule"),
        ("adadim_lightning.AdaDimModule.load_from_checkpoint", "adadim_lightning.AdaDimModule"),
        ("torch.nn.Linear.__init__.__globals__.get", "torch.nn.Linear.__init__.__globals__"),
    ],
)
def test_what_may_run_anything_is_refused_with_its_fix(name: str, fix: str) -> None:
    assert refusal(name) == f"{name} is not trusted; allow it by trust=[{fix}]"


@pytest.mark.parametrize(
    "name", ["torch.nn", "torch.nn.functional", "lightning.pytorch.trainer.trainer.log", "torch"]
)
def test_what_is_neither_class_nor_function_is_refused(name: str) -> None:
    message = refusal(name, trust=["torch"] if name == "torch" else ())
    assert message == f"{name} is neither a class nor a function"


@pytest.mark.parametrize(
    "name", [None, 3, "", "torch..nn", ".nn", "torch.nn.Linear()", "os;system", ["torch.nn.ReLU"]]
)
def test_a_target_that_is_no_dotted_name_is_refused(name: Any) -> None:
    assert refusal(name) == f"_target_ must be a dotted name, got {name!r}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torch.optim.AdamX", "torch.optim.AdamX: torch.optim has no 'AdamX'; did you mean 'Adam"),
        ("torch.nn.Linaer", "torch.nn.Linaer: torch.nn has no 'Linaer'; did you mean 'Linear'?"),
        ("torchvision.modles.resnet18", "torchvision.modles.resnet18 is not trusted"),
        ("adadim_lightning.no_such.Net", "adadim_lightning.no_such.Net: adadim_lightning has no 'no_such'"),
        ("torch.nn.functional.relu.nothing", "torch.nn.functional.relu.nothing: torch.nn.functional.relu has no"),
    ],
)
def test_a_name_that_leads_nowhere_is_one_line_with_the_near_match(name: str, message: str) -> None:
    assert refusal(name).startswith(message)


def test_a_trusted_package_that_is_missing_is_one_line() -> None:
    assert refusal("no_such_pkg.Net", ["no_such_pkg"]) == "no_such_pkg.Net: no_such_pkg is not installed"


def test_an_untrusted_module_is_not_imported_and_a_trusted_one_passes(evil: Writer) -> None:
    mark = evil()
    config = {"a": [{"b": {"_target_": "torch.nn.ReLU"}}, {"_target_": "evil_module.Net", "_partial_": True}]}
    with pytest.raises(
        UntrustedTargetError, match=r"^evil_module\.Net is not trusted; allow it by trust=\[evil_m"
    ):
        check_targets(config)
    assert not mark.exists()
    for trust in (["evil_module"], ["evil_module."], "evil_module", ["evil_module.Net"]):
        if trust == ["evil_module.Net"]:  # an object alone is trusted only where it is defined there
            assert refusal("evil_module.Net", trust).endswith("trust=[evil_module]")
        else:
            check_targets(config, trust)
    assert mark.exists()


@pytest.mark.parametrize("name", ["evil", "evil_modul", "evil_module.Net.other", "evil_module_2"])
def test_trust_is_in_whole_names(name: str, evil: Writer) -> None:
    mark = evil()
    assert "is not trusted" in refusal("evil_module.Net", [name])
    assert not mark.exists()


def test_no_object_is_looked_up_while_another_name_is_untrusted(evil: Writer) -> None:
    mark = evil("good_module")
    with pytest.raises(UntrustedTargetError, match=r"^os\.system is not trusted"):
        check_targets([{"_target_": "good_module.Net"}, {"_target_": "os.system"}], ["good_module"])
    assert not mark.exists()


def test_a_trusted_package_passes_on_only_what_is_trusted(evil: Writer) -> None:
    evil("good_module", "from os import system, path\nfrom torch.nn import Linear\nimport os\n")
    check_targets([{"_target_": "good_module.Linear"}, {"_target_": "good_module.Net.make"}], ["good_module"])
    assert refusal("good_module.os.getcwd", ["good_module"]).endswith("allow it by trust=[os]")
    assert refusal("good_module.system", ["good_module"]).endswith(f"trust=[{os.system.__module__}]")
    check_targets({"_target_": "good_module.system"}, ["good_module", os.system.__module__])


def test_a_trusted_module_that_lacks_a_package_says_so(evil: Writer) -> None:
    evil("good_module", "import a_package_it_needs\n")
    with pytest.raises(ModuleNotFoundError, match="a_package_it_needs"):
        check_targets({"_target_": "good_module.Net"}, ["good_module"])


def test_a_target_is_found_at_any_depth_and_values_alone_are_not_targets() -> None:
    check_targets({"note": "os.system", "list": ["os.system", b"os.system", 1, None], "nested": ({"x": {}},)})
    for config in (
        [[[{"_target_": "os.system"}]]],
        {"_target_": "torch.nn.ReLU", "x": ({"_target_": "os.system"},)},
    ):
        with pytest.raises(UntrustedTargetError, match=r"^os\.system is not trusted"):
            check_targets(config)
