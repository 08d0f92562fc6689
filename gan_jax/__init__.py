"""GANs for image classification with few labels.

Import modules, not names: `from gan_jax import data, datasets, evaluate, recipes, train`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from gan_jax.estimator import SemiSupervisedGAN
  from gan_jax.model import Model, load

__version__ = "0.1.0"
__all__ = ["Model", "SemiSupervisedGAN", "load"]

_MODULES = {"Model": "model", "SemiSupervisedGAN": "estimator", "load": "model"}
"""The module of each name."""


def __getattr__(name: str) -> Any:
  """Imports modules on first access, so that `gan-jax --help` does not wait for JAX."""
  if name in _MODULES:
    return getattr(importlib.import_module(f"gan_jax.{_MODULES[name]}"), name)
  try:
    return importlib.import_module(f"gan_jax.{name}")
  except ModuleNotFoundError as error:
    if error.name != f"gan_jax.{name}":
      raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
