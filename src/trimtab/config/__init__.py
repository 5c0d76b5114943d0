"""One frozen configuration per verb; the command line and its help are generated from these."""

from trimtab.config.base import MIN_WINDOW_TOKENS, CarrierName, Config, Dtype, TuneMethod
from trimtab.config.hosted import HostedOptions, ProbeConfig, is_hosted
from trimtab.config.making import AppendConfig, FitConfig, RecordConfig, TuneConfig
from trimtab.config.measuring import CompareConfig, CostConfig, EvaluateConfig, MethodName, RowName
from trimtab.config.plugin import LightCarrier, PluginConfig
from trimtab.config.using import (
    DRAFT_TOKENS,
    ExportConfig,
    ExportKind,
    GenerateConfig,
    MountConfig,
    ServeConfig,
)

__all__ = [
    "DRAFT_TOKENS",
    "MIN_WINDOW_TOKENS",
    "AppendConfig",
    "CarrierName",
    "CompareConfig",
    "Config",
    "CostConfig",
    "Dtype",
    "EvaluateConfig",
    "ExportConfig",
    "ExportKind",
    "FitConfig",
    "GenerateConfig",
    "HostedOptions",
    "LightCarrier",
    "MethodName",
    "MountConfig",
    "PluginConfig",
    "ProbeConfig",
    "RecordConfig",
    "RowName",
    "ServeConfig",
    "TuneConfig",
    "TuneMethod",
    "is_hosted",
]
