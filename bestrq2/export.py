"""Write a trained encoder in the forms that other tools read.

    bestrq2 export runs/best_rq2_base-001 --hf FOLDER                      # transformers: AutoModel
    bestrq2 export runs/best_rq2_base-001 --xares encoders/best_rq2.py     # X-ARES; --xares-llm for XARES-LLM
    bestrq2 export runs/best_rq2_base-001 --published best_rq2.safetensors
    bestrq2 export runs/best_rq2_base-001 --onnx best_rq2.onnx             # and --torch-export best_rq2.pt2
    bestrq2 export runs/best_rq2_base-001 --s3prl upstream/best_rq2        # expert.py and hubconf.py

ENCODER is anything that ``bestrq2.load`` opens: a run folder, a step-* folder, an exported file or folder, a published
checkpoint.
"""

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bestrq2.command import command, leave

# isort: split
from bestrq2.config import ConfigError
from bestrq2.durability import has_utf8_name
from bestrq2.errors import printable
from bestrq2.interchange import hugging_face_folder, s3prl_folder
from bestrq2.interchange.graphs import check_writers, trace, write_onnx, write_torch_export
from bestrq2.interchange.opening import OpenedModel, open_source
from bestrq2.interchange.published import to_published
from bestrq2.interchange.staging import Check, staged
from bestrq2.interchange.tensors import assemble_encoder, write_tensors
from bestrq2.interchange.xares import Interface, check_encoder_module, check_module_name, write_encoder_module
from bestrq2.models.build import check_finite
from bestrq2.outputs import add_overwrite, check_new
from bestrq2.runs.checkpoint import STATE, list_checkpoints


def export_published(source: OpenedModel, out: Path, look_again: Check | None = None) -> list[str]:
    check_finite(source.weights, source.origin)
    tensors, metadata, notes = to_published(source.config, source.weights)
    with staged(out.parent, [out.name], look_again) as stage:
        write_tensors(stage / out.name, tensors, metadata)
    return [f"{out}: {len(tensors)} tensors in published names", *notes]


def export_folder(source: OpenedModel, out: Path, look_again: Check | None = None) -> list[str]:
    paths = hugging_face_folder.write_folder(out, source.config, source.weights, source.origin, look_again)
    names = ", ".join(path.name for path in paths)
    return [
        f"{out}: {names}",
        f"AutoModel.from_pretrained({str(out)!r}, trust_remote_code=True) needs bestrq2 installed",
    ]


def export_module(
    source: OpenedModel, out: Path, look_again: Check | None = None, *, interface: Interface = "xares"
) -> list[str]:
    weights = out.with_suffix(".safetensors")
    with staged(out.parent, [weights.name, out.name], look_again) as stage:
        write_encoder_module(stage / out.name, source.config, source.weights, interface)
        problems = check_encoder_module(stage / out.name)
        if problems:
            raise ConfigError(f"{out}: not written, it fails its check: {'; '.join(problems)}")
    return [f"{out}, {weights}: checked for {interface}; give its path relative to the folder you run in"]


def export_s3prl(source: OpenedModel, out: Path, look_again: Check | None = None) -> list[str]:
    paths = s3prl_folder.write_s3prl(out, source.config, source.weights, source.origin, look_again)
    names = ", ".join(path.name for path in paths)
    return [f"{out}: {names}", f"{out / 'hubconf.py'} says how s3prl finds it; it needs bestrq2 installed"]


def export_graphs(
    source: OpenedModel, onnx: Path | None, torch_export: Path | None, look_again: Callable[[str], None]
) -> list[str]:
    encoder = assemble_encoder(source.config, source.weights, source.origin)
    progress("tracing the encoder as one graph, which takes a minute or so")
    program = trace(encoder)
    lines = []
    for option, write, out in (
        ("--torch-export", write_torch_export, torch_export),
        ("--onnx", write_onnx, onnx),
    ):
        if out is not None:
            progress(f"writing {printable(str(out))} and checking it against PyTorch")
            lines.append(write(out, program, encoder, source.config, partial(look_again, option)))
    return lines


def check_names(options: argparse.Namespace) -> None:
    """Refuse every name that a writer would refuse, before the first of them has written anything.

    Raises:
        ConfigError: for such a name, or a package that is missing.
    """
    if options.published is not None and options.published.suffix != ".safetensors":
        name = printable(str(options.published))
        raise ConfigError(f"--published: expected a file name ending in .safetensors, got {name}")
    if options.xares is not None:
        check_module_name(options.xares, "xares")
    if options.xares_llm is not None:
        check_module_name(options.xares_llm, "xares-llm")
    if options.s3prl is not None:
        s3prl_folder.upstream_name(options.s3prl)
    if options.hf is not None and ((options.hf / STATE).exists() or _has_checkpoints(options.hf)):
        raise ConfigError(
            f"--hf: {printable(str(options.hf))} is a run or a part of one, in whose place the exported encoder would "
            "be read from then on; choose another folder"
        )
    check_writers(options.onnx, options.torch_export)


def _has_checkpoints(folder: Path) -> bool:
    return bool(list_checkpoints(folder) or list_checkpoints(folder / "checkpoints"))


def progress(text: str) -> None:
    """Tell on the error output what goes on, so that results alone are on the standard output."""
    print(f"{text} ...", file=sys.stderr, flush=True)


def results_of(options: argparse.Namespace) -> dict[str, list[Path]]:
    """The files that each option given writes."""
    found: dict[str, list[Path]] = {}
    if options.hf is not None:
        found["--hf"] = [options.hf / name for name in hugging_face_folder.FILES]
    if options.s3prl is not None:
        found["--s3prl"] = [options.s3prl / name for name in s3prl_folder.FILES]
    for option, out in (("--xares", options.xares), ("--xares-llm", options.xares_llm)):
        if out is not None:
            found[option] = [out, out.with_suffix(".safetensors")]
    single = {"--published": options.published, "--onnx": options.onnx, "--torch-export": options.torch_export}
    return found | {option: [out] for option, out in single.items() if out is not None}


@command
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bestrq2 export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("encoder", metavar="ENCODER", help="what to export")
    parser.add_argument("--hf", type=Path, metavar="FOLDER", help="transformers folder, read by AutoModel and by us")
    parser.add_argument("--xares", type=Path, metavar="OUT.py", help="X-ARES encoder file, weights beside it")
    parser.add_argument("--xares-llm", type=Path, metavar="OUT.py", help="XARES-LLM encoder file, weights beside it")
    parser.add_argument("--published", type=Path, metavar="OUT.safetensors", help="names of the published checkpoints")
    parser.add_argument("--onnx", type=Path, metavar="OUT.onnx", help="waveform to features, any batch and length")
    parser.add_argument("--torch-export", type=Path, metavar="OUT.pt2", help="the same for torch.export.load")
    parser.add_argument("--s3prl", type=Path, metavar="FOLDER", help="upstream folder of s3prl, all layers")
    parser.add_argument("--heads", type=int, help="attention heads, if a published ENCODER does not state them")
    parser.add_argument(
        "--hop-length", type=int, help="samples between frames, if a published ENCODER does not state them"
    )
    add_overwrite(parser)
    options = parser.parse_args(arguments)
    forms: dict[str, tuple[Callable[[OpenedModel, Path, Check], list[str]], Path | None]] = {
        "--hf": (export_folder, options.hf),
        "--xares": (partial(export_module, interface="xares"), options.xares),
        "--xares-llm": (partial(export_module, interface="xares-llm"), options.xares_llm),
        "--published": (export_published, options.published),
        "--s3prl": (export_s3prl, options.s3prl),
    }
    wanted = [(option, write, out) for option, (write, out) in forms.items() if out is not None]
    graphs = options.onnx is not None or options.torch_export is not None
    if not wanted and not graphs:
        raise ConfigError(f"nothing to write: give at least one of {', '.join(forms)}, --onnx, --torch-export")
    results = results_of(options)
    taken: dict[str, str] = {}
    for option, files in results.items():
        for path in map(os.path.abspath, files):
            if (other := taken.setdefault(path, option)) != option:
                raise ConfigError(f"{option} and {other} would both write {printable(path)}: give them other names")
        if not has_utf8_name(files[0]):
            raise ConfigError(f"{printable(str(files[0]))}: expected a name in UTF-8")

    def look(option: str) -> None:
        check_new(option, results[option], options.overwrite)

    check_names(options)
    for option in results:
        look(option)
    source = open_source(options.encoder, heads=options.heads, hop_length=options.hop_length)
    for option, write, out in wanted:
        for line in write(source, out, partial(look, option)):  # another process may have written it meanwhile
            print(printable(line))
    if graphs:
        for line in export_graphs(source, options.onnx, options.torch_export, look):
            print(printable(line))
    return 0


if __name__ == "__main__":
    leave(main())
