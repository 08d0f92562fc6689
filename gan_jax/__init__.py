"""GANs for image classification with few labels.

Import modules, not names: `from gan_jax import data, datasets, evaluate, recipes, train`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from gan_jax import (
    augment,
    checkpoint,
    data,
    datasets,
    diagnostics,
    evaluate,
    export,
    losses,
    metrics,
    model,
    networks,
    objectives,
    parallel,
    penalties,
    probe,
    recipes,
    report,
    steps,
    terms,
    train,
    types,
  )
  from gan_jax.estimator import SemiSupervisedGAN
  from gan_jax.model import Model, load

__version__ = "0.1.0"
__all__ = [
  "Model",
  "SemiSupervisedGAN",
  "augment",
  "checkpoint",
  "data",
  "datasets",
  "diagnostics",
  "evaluate",
  "export",
  "load",
  "losses",
  "metrics",
  "model",
  "networks",
  "objectives",
  "parallel",
  "penalties",
  "probe",
  "recipes",
  "report",
  "steps",
  "terms",
  "train",
  "types",
]


_NAMES = {"Model": "model", "SemiSupervisedGAN": "estimator", "load": "model"}
"""What is here by its own name, and its module."""


def __getattr__(name: str) -> Any:
  """Modules are imported when they are asked for: --help does not wait for JAX."""
  if name not in __all__:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  module = importlib.import_module(f"gan_jax.{_NAMES.get(name, name)}")
  return getattr(module, name) if name in _NAMES else module


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
