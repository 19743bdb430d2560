"""``python -m gptoss_convert`` is ``gptoss-convert``."""

from gptoss_convert.cli import run

run()
