"""A semi-supervised GAN: a K-class discriminator from few labels and many images.

Salimans et al., 2016, https://arxiv.org/abs/1606.03498 (feature matching), with consistency (Sohn et al.,
2020, https://arxiv.org/abs/2001.07685) and class balance (Springenberg, 2016,
https://arxiv.org/abs/1511.06390).

  python -m experiments.mnist_ssgan                 MNIST if it can be obtained, else the bundled digits
  python -m experiments.mnist_ssgan --network mlp   the published networks and losses

100 labels of MNIST: 0.72 +- 0.08 % test error over splits 20-29 (supervised control 5.67), 485 to 580 s
on two CPU cores shared with other work. 50 labels of the digits: 1.47 +- 0.74 % over splits 0-4 (control
8.78), 12 to 14 s. This is the library's main task, `python -m gan_jax train`, under its benchmark name.
"""

from gan_jax import classify, program
from gan_jax.classify import Config
from gan_jax.types import Json


def main(config: Config) -> Json:
  """Trains the semi-supervised GAN and its control; returns the contents of `result.json`."""
  return classify.main(config, name="mnist_ssgan")


if __name__ == "__main__":
  program.run(main, Config)
