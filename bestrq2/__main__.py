"""Pretrain audio encoders, and use them.

bestrq2 train --data FOLDER --config best_rq2_small
bestrq2 embed ENCODER FOLDER --out features
bestrq2 COMMAND --help
"""

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from functools import partial
from importlib import import_module

from bestrq2.signals import importing
from bestrq2.version import __version__

with importing():
    from bestrq2.command import check_alone, command, leave

COMMANDS = {
    "train": ("bestrq2.train", "pretrain an encoder, or continue a run"),
    "embed": ("bestrq2.embed", "features of audio files"),
    "probe": ("bestrq2.probe", "measure a frozen encoder on labelled clips"),
    "export": ("bestrq2.export", "write an encoder for transformers, ONNX, X-ARES, s3prl, ..."),
    "report": ("bestrq2.report", "report on one run or several"),
    "stream": ("bestrq2.stream", "live features from a streaming encoder"),
    "stats": ("bestrq2.stats", "mean and deviation of the log-mel values of your audio"),
    "manifest": ("bestrq2.manifest", "list and check the audio of a source in a CSV file"),
    "shards": ("bestrq2.shards", "pack audio into tar shards"),
    "cache": ("bestrq2.cache", "decode audio once, for training that reads it without decoding"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:{width}}  {about}" for name, (_, about) in COMMANDS.items())
    about = f"\n\n{__doc__.strip()}" if __doc__ else ""  # python -OO has none
    return f"usage: bestrq2 COMMAND ...{about}\n\ncommands:\n{lines}"


@partial(command, ranks=True)
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names; only its modules are imported."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if given else 2
    if given[0] in ("-V", "--version"):
        print(f"bestrq2 {__version__}")
        return 0
    name, *rest = given
    if name not in COMMANDS:
        close = get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"the commands are {', '.join(COMMANDS)}"
        print(f"error: unknown command {name!r}; {hint}", file=sys.stderr)
        return 2
    if arguments is None and name != "train":
        check_alone()
    with importing():
        module = import_module(COMMANDS[name][0])
    return module.main(rest)


if __name__ == "__main__":
    leave(main())
