"""Configuration: the schema, loading from YAML and overrides, and the objects that a config names.

Imports ``models``, ``head``, ``losses`` and ``options``, to check their parameters, and ``files``. ``runtime``,
``data``, ``tracking`` and the rooms above may import it.
"""

from partialfc.config.keys import describe_keys
from partialfc.config.load import load_config, parse_config, require_num_classes, to_yaml, value_of
from partialfc.config.objects import build_loss, build_sample_rate, loss_keys, spelled_out
from partialfc.config.reading import read_yaml
from partialfc.config.schema import Config, EngineConfig, OptimConfig, TrackingConfig, WandbConfig

__all__ = [
    "Config",
    "EngineConfig",
    "OptimConfig",
    "TrackingConfig",
    "WandbConfig",
    "build_loss",
    "build_sample_rate",
    "describe_keys",
    "load_config",
    "loss_keys",
    "parse_config",
    "read_yaml",
    "require_num_classes",
    "spelled_out",
    "to_yaml",
    "value_of",
]
