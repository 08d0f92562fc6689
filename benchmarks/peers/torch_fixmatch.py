"""FixMatch in PyTorch, as one would train it without a GAN; needs only PyTorch and NumPy.

The published hyper-parameters (Sohn et al., 2020, https://arxiv.org/abs/2001.07685, section 4): SGD with
Nesterov momentum 0.9, weight decay 5e-4, learning rate `0.03 cos(7 pi t / 16 T)`, 7 unlabelled images per
labelled one, threshold 0.95, weight 1, averages with decay 0.999. The network is that of PyTorch's MNIST
example. Batched augmentation: weak, shifts of up to an eighth; strong, an affine map, contrast, brightness
and cutout.

As a program, it reads the arrays of an .npz file and prints one line of JSON per evaluation; see
`benchmarks.time_to_accuracy`.
"""

import copy
import json
import math
import platform
import sys
import time

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]


class Net(nn.Module):
  """Two 3x3 convolutions, 2x2 max-pooling, two dense layers; for images `[B, C, H, W]` in [0, 1]."""

  def __init__(self, shape, num_classes):
    super().__init__()
    channels, height, width = shape
    self.conv1, self.conv2 = nn.Conv2d(channels, 32, 3), nn.Conv2d(32, 64, 3)
    self.fc1 = nn.Linear(64 * ((height - 4) // 2) * ((width - 4) // 2), 128)
    self.fc2 = nn.Linear(128, num_classes)

  def forward(self, x):
    h = F.relu(self.conv2(F.relu(self.conv1(2 * x - 1))))
    h = F.dropout2d(F.max_pool2d(h, 2), 0.25, self.training).flatten(1)
    return self.fc2(F.dropout(F.relu(self.fc1(h)), 0.5, self.training))


def warp(x, angle, scale, shear, shift):
  """Applies one affine map per image: radians, log scale, tangent, and fraction of the side."""
  cos, sin, scale = angle.cos(), angle.sin(), scale.exp()
  rows = [
    torch.stack([scale * cos, scale * (shear * cos - sin), 2 * shift[:, 0]], 1),
    torch.stack([scale * sin, scale * (shear * sin + cos), 2 * shift[:, 1]], 1),
  ]
  grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
  return F.grid_sample(x, grid, align_corners=False)


def uniform(num, width, *shape):
  return (2 * torch.rand(num, *shape) - 1) * width


def weak(x):
  zero = torch.zeros(len(x))
  return warp(x, zero, zero, zero, uniform(len(x), 0.125, 2))


def strong(x):
  num, _, height, width = x.shape
  x = warp(x, uniform(num, 0.5), uniform(num, 0.2), uniform(num, 0.3), uniform(num, 0.125, 2))
  each = lambda values: values[:, None, None, None]
  x = (x * each(1 + uniform(num, 0.5)) + each(uniform(num, 0.2))).clamp(0, 1)
  near = lambda side: (torch.arange(side) - torch.rand(num, 1) * side).abs() < side / 8
  return x * ~(near(height)[:, None, :, None] & near(width)[:, None, None, :])


def main() -> None:
  path, flags = sys.argv[1], json.loads(sys.argv[2])
  on_gpu = torch.cuda.is_available()
  torch.set_default_device("cuda" if on_gpu else "cpu")
  if on_gpu:
    torch.set_float32_matmul_precision("high")  # XLA's default on GPUs: TF32 products
  torch.manual_seed(flags["seed"])
  arrays = np.load(path)
  images = lambda name: torch.tensor(arrays[name]).permute(0, 3, 1, 2).contiguous()
  x_lab, x_unl, x_test = images("x_lab"), images("x_unl"), images("x_test").float() / 255
  y_lab, y_test = (torch.tensor(arrays[name]).long() for name in ("y_lab", "y_test"))
  net = Net(x_lab.shape[1:], int(y_lab.max()) + 1)
  ema = copy.deepcopy(net).eval()
  decayed = [p for p in net.parameters() if p.ndim > 1]
  others = [p for p in net.parameters() if p.ndim == 1]
  groups = [{"params": decayed, "weight_decay": 5e-4}, {"params": others}]
  optimizer = torch.optim.SGD(groups, lr=0.03, momentum=0.9, nesterov=True)
  num_lab, num_unl, num_steps = flags["num_labelled"], flags["num_unlabelled"], flags["num_steps"]

  def step(t: int) -> None:
    for group in optimizer.param_groups:
      group["lr"] = 0.03 * math.cos(7 * math.pi * t / (16 * num_steps))
    rows = torch.randint(len(x_lab), (num_lab,))
    x = x_unl[torch.randint(len(x_unl), (num_unl,))].float() / 255
    net.eval()  # the published network has no dropout, which would blur the targets
    with torch.no_grad():
      confidence, target = net(weak(x)).softmax(1).max(1)
    net.train()
    views = torch.cat([weak(x_lab[rows].float() / 255), strong(x)])
    logits_lab, logits_strong = net(views).split([num_lab, num_unl])
    loss = F.cross_entropy(logits_lab, y_lab[rows])
    loss = loss + ((confidence >= 0.95) * F.cross_entropy(logits_strong, target, reduction="none")).mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    with torch.no_grad():
      decay = min(0.999, (t + 1) / (t + 10))  # else the first evaluations would be of the initial network
      for average, now in zip(ema.parameters(), net.parameters(), strict=True):
        average.lerp_(now, 1 - decay)

  @torch.no_grad()
  def error() -> float:
    classes = torch.cat([ema(x).argmax(1) for x in x_test.split(500)])
    return 100 * float((classes != y_test).float().mean())

  seconds, done, now = 0.0, 0, 100.0
  while now > flags["target"] and done < num_steps and seconds < flags["limit"]:
    begin = time.perf_counter()
    for t in range(done, min(done + flags["every"], num_steps)):
      step(t)
    if on_gpu:
      torch.cuda.synchronize()
    seconds, done = seconds + time.perf_counter() - begin, min(done + flags["every"], num_steps)
    now = error()
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    line = {"step": done, "seconds": seconds, "error": now, "versions": versions}
    line["gpu"] = torch.cuda.get_device_name() if on_gpu else None
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
  main()
