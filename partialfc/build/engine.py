"""The engine that updates a run's backbone."""

from __future__ import annotations

from torch import nn

from partialfc.build.optimizers import build_backbone_optimizer
from partialfc.config import Config
from partialfc.engines.base import Engine
from partialfc.engines.ddp import DdpEngine
from partialfc.errors import ConfigError
from partialfc.runtime.process import ProcessContext


def build_engine(module: nn.Module, config: Config, process: ProcessContext) -> Engine:
    """The engine that ``engine.name`` names, around a backbone that has its first weights. A collective.

    Raises:
        ConfigError: nothing of the backbone can be trained, or the engine does not take its settings.
    """
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ConfigError(f"model.name: {config.model.name} has no parameter to train: all are frozen")
    optimizer = build_backbone_optimizer(config, module, process.device)
    if config.engine.name == "deepspeed":
        from partialfc.engines.deepspeed import DeepSpeedEngine  # takes long to import

        return DeepSpeedEngine(module, optimizer, config, process)
    return DdpEngine(module, optimizer, config, process)
