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
from bestrq2.interchange.tensors import assemble_encoder, write_tensors
from bestrq2.interchange.xares import Interface, check_encoder_module, write_encoder_module
from bestrq2.outputs import add_overwrite, check_new


def export_published(source: OpenedModel, out: Path) -> list[str]:
    tensors, metadata, notes = to_published(source.config, source.weights)
    if out.suffix != ".safetensors":
        raise ConfigError(f"--published: expected a file name ending in .safetensors, got {out}")
    write_tensors(out, tensors, metadata)
    return [f"{out}: {len(tensors)} tensors in published names", *notes]


def export_folder(source: OpenedModel, out: Path) -> list[str]:
    paths = hugging_face_folder.write_folder(out, source.config, source.weights, source.origin)
    names = ", ".join(path.name for path in paths)
    return [
        f"{out}: {names}",
        f"AutoModel.from_pretrained({str(out)!r}, trust_remote_code=True) needs bestrq2 installed",
    ]


def export_module(source: OpenedModel, out: Path, interface: Interface) -> list[str]:
    out.parent.mkdir(parents=True, exist_ok=True)
    weights = write_encoder_module(out, source.config, source.weights, interface)
    problems = check_encoder_module(out)
    if problems:
        raise ConfigError(f"{out}: written, but it fails its check: {'; '.join(problems)}")
    return [f"{out}, {weights}: checked for {interface}; give its path relative to the folder you run in"]


def export_s3prl(source: OpenedModel, out: Path) -> list[str]:
    paths = s3prl_folder.write_s3prl(out, source.config, source.weights, source.origin)
    names = ", ".join(path.name for path in paths)
    return [f"{out}: {names}", f"{out / 'hubconf.py'} says how s3prl finds it; it needs bestrq2 installed"]


def export_graphs(source: OpenedModel, onnx: Path | None, torch_export: Path | None) -> list[str]:
    encoder = assemble_encoder(source.config, source.weights, source.origin)
    check_writers(onnx, torch_export)
    progress("tracing the encoder as one graph, which takes a minute or so")
    program = trace(encoder)
    lines = []
    for write, out in ((write_torch_export, torch_export), (write_onnx, onnx)):
        if out is not None:
            progress(f"writing {out} and checking it against PyTorch")
            lines.append(write(out, program, encoder, source.config))
    return lines


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
    forms: dict[str, tuple[Callable[[OpenedModel, Path], list[str]], Path | None]] = {
        "--hf": (export_folder, options.hf),
        "--xares": (partial(export_module, interface="xares"), options.xares),
        "--xares-llm": (partial(export_module, interface="xares-llm"), options.xares_llm),
        "--published": (export_published, options.published),
        "--s3prl": (export_s3prl, options.s3prl),
    }
    wanted = [(write, out) for write, out in forms.values() if out is not None]
    graphs = options.onnx is not None or options.torch_export is not None
    if not wanted and not graphs:
        raise ConfigError(f"nothing to write: give at least one of {', '.join(forms)}, --onnx, --torch-export")
    taken: dict[str, str] = {}
    for option, files in results_of(options).items():
        for path in map(os.path.abspath, files):
            if (other := taken.setdefault(path, option)) != option:
                raise ConfigError(f"{option} and {other} would both write {printable(path)}: give them other names")
        if not has_utf8_name(files[0]):
            raise ConfigError(f"{printable(str(files[0]))}: expected a name in UTF-8")
        check_new(option, files, options.overwrite)
    source = open_source(options.encoder, heads=options.heads, hop_length=options.hop_length)
    for write, out in wanted:
        for line in write(source, out):
            print(line)
    if graphs:
        for line in export_graphs(source, options.onnx, options.torch_export):
            print(line)
    return 0


if __name__ == "__main__":
    leave(main())
