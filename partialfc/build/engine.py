"""The engine of a run."""

from __future__ import annotations

from torch import nn

from partialfc.build.optimizers import build_backbone_optimizer
from partialfc.config import Config
from partialfc.engines.base import Engine
from partialfc.engines.ddp import DdpEngine
from partialfc.errors import ConfigError
from partialfc.runtime.process import ProcessContext


def build_engine(module: nn.Module, config: Config, process: ProcessContext) -> Engine:
    """Build the config's engine, with its optimizer, around an initialised backbone. A collective.

    Raises:
        ConfigError: all parameters of the backbone are frozen, or the engine refuses its settings.
    """
    require_trainable(module, config)
    optimizer = build_backbone_optimizer(config, module, process.device)
    if config.engine.name == "deepspeed":
        from partialfc.engines.deepspeed import DeepSpeedEngine  # takes ten seconds to import

        return DeepSpeedEngine(module, optimizer, config, process)
    return DdpEngine(module, optimizer, config, process)


def require_trainable(module: nn.Module, config: Config) -> None:
    """Raise a ConfigError if all parameters of the backbone are frozen."""
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ConfigError(f"model.name: {config.model.name} has no trainable parameter: all are frozen")
