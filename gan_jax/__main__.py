"""The command line: `python -m gan_jax COMMAND`, or `gan-jax COMMAND`."""

import importlib
import signal
import sys

import gan_jax

COMMANDS = {
  "train": "a classifier from few labels and many images, with its controls",
  "predict": "classes of new images, or the images whose label would teach most",
  "sample": "generated images",
  "export": "the networks of a run for use elsewhere",
  "report": "several runs side by side on one page",
  "check": "what a folder or file of images holds, before any training",
}


def main() -> None:
  """Runs the named command."""
  if sys.argv[1:] == ["--version"]:
    print(f"gan_jax {gan_jax.__version__}")
    sys.exit(0)
  name, flags = (sys.argv[1] if sys.argv[1:] else ""), sys.argv[2:]
  if name not in COMMANDS:
    known = "".join(f"\n  {command:8} {what}" for command, what in COMMANDS.items())
    asked = name in ("", "-h", "--help")
    complaint = "" if asked else f"error: unknown command {name}\n"
    usage = f"{complaint}usage: gan-jax COMMAND [--help]\n       gan-jax --version\n{known}"
    print(usage, file=sys.stdout if asked else sys.stderr)
    sys.exit(0 if asked else 2)
  handler = signal.getsignal(signal.SIGINT)
  if handler is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback from a half-finished import
  program = importlib.import_module("gan_jax.program")
  module = importlib.import_module(f"gan_jax.{'classify' if name == 'train' else 'commands'}")
  signal.signal(signal.SIGINT, handler)
  shown = {"flags": flags, "name": f"gan-jax {name}"}
  if name == "train":
    program.run(module.main, module.Config, **shown)
  command, config_cls = module.CONFIGS[name]
  program.run(command, config_cls, **shown, description=command.__doc__)


if __name__ == "__main__":
  main()
