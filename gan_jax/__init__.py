"""GANs that turn many images and few labels into a good classifier.

Import modules, not names: `from gan_jax import losses, networks, objectives, steps`.
"""

import time

PROCESS_START = time.time()  # before the imports below: the time to the first update counts them

from gan_jax import (
  augment,
  checkpoint,
  data,
  losses,
  metrics,
  networks,
  objectives,
  parallel,
  probe,
  report,
  steps,
  types,
  watch,
)

__version__ = "0.1.0"
__all__ = [
  "augment",
  "checkpoint",
  "data",
  "losses",
  "metrics",
  "networks",
  "objectives",
  "parallel",
  "probe",
  "report",
  "steps",
  "types",
  "watch",
]
