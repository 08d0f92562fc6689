"""GANs that turn many images and few labels into a good classifier.

Import modules, not names: `from gan_jax import data, datasets, evaluate, recipes, train`.
"""

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

__version__ = "0.1.0"
__all__ = [
  "Model",
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
