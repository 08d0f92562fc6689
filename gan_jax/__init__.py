"""GANs that turn many images and few labels into a good classifier.

Import modules, not names: `from gan_jax import data, datasets, evaluate, recipes, train`.
"""

from typing import TYPE_CHECKING, Any

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
from gan_jax.model import Model, load

if TYPE_CHECKING:
  from gan_jax.estimator import SemiSupervisedGAN

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


def __getattr__(name: str) -> Any:
  if name == "SemiSupervisedGAN":  # late: scikit-learn takes half a second
    from gan_jax.estimator import SemiSupervisedGAN

    return SemiSupervisedGAN
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
