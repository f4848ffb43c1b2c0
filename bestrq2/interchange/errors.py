"""What is said about files that cannot be used."""

from pathlib import Path

from bestrq2.config import ConfigError

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")


class UnknownLayoutError(ConfigError):
    """A file whose tensors are not those of a layout we know; the message lists their names."""


def unknown_layout(origin: str | Path, why: str, names: list[str], shown: int = 24) -> UnknownLayoutError:
    listed = ", ".join(sorted(names)[:shown])
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return UnknownLayoutError(f"{origin}: {why}. Its keys: {listed}{more}")


def refuse_pickle(path: Path) -> None:
    """
    Raises:
        ConfigError: if ``path`` is a pickle by its name. Unpickling runs code of whoever made the file.
    """
    if path.suffix.lower() in PICKLES:
        raise ConfigError(
            f"{path}: pickled checkpoints are never opened here, because that runs code from the file. Where you trust "
            "it, convert it once: weights = torch.load(PATH, weights_only=True, map_location='cpu'); "
            "weights = weights.get('state_dict', weights); safetensors.torch.save_file({k: v.contiguous() for k, v in "
            "weights.items()}, 'model.safetensors'), and open the .safetensors file"
        )
