"""What adadim-train uses unless told otherwise is what the classes use in Python."""

import inspect
from typing import Any

from hydra import compose, initialize_config_dir

from adadim_lightning import AdaDimLoss, Balance, EffectiveRankSchedule
from adadim_lightning.cli.app import config_dir


def defaults(cls: type, *without: str) -> dict[str, Any]:
    parameters = inspect.signature(cls).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in without}


def test_the_shipped_configuration_has_the_defaults_of_the_classes() -> None:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = compose("train")
    objective, balance = config.objective, config.balance
    assert objective._target_ == "adadim_lightning.AdaDimLoss"
    assert {k: v for k, v in objective.items() if k != "_target_"} == defaults(AdaDimLoss)
    assert balance.alpha._target_ == "adadim_lightning.EffectiveRankSchedule"
    assert {k: v for k, v in balance.alpha.items() if k != "_target_"} == defaults(EffectiveRankSchedule)
    assert {k: v for k, v in balance.items() if k not in ("_target_", "alpha")} == defaults(Balance, "alpha")
