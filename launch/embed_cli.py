"""The command ``lce embed``: a model and images in, a file of vectors out, as every other command reads them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lce_dist.errors import ConfigError, LceError, SetupError

if TYPE_CHECKING:  # heavy imports wait until the command runs
    import torch


def add_embed_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``embed`` to the commands of ``lce``."""
    embed = commands.add_parser(
        "embed",
        help="images to a file of vectors, with a run's model or a model file (safetensors, .pt, TorchScript, ONNX)",
        description="Write one unit vector an image, with its key, identity and the model's space. A stopped command goes on when it\n"
        "is given again. Only you can read the file. No program in a model file is executed.",
        epilog="examples:\n"
        "  lce embed runs/quickstart/new photos --out new.parquet\n"
        "  lce embed old.onnx photos --out old.parquet --mean 127.5 127.5 127.5 --std 127.5 127.5 127.5\n"
        "  lce embed backbone.pth s3://bucket/packed --net iresnet50 --embedding-dim 512 --out new.npz --flip-average\n"
        "  lce embed runs/mine/old gallery --out upgraded.parquet --bridge runs/mine/bridge",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    embed.add_argument(
        "model", type=Path, metavar="MODEL", help="RUN/new, RUN/old, RUN/independent, or a model file as old.weights"
    )
    embed.add_argument(
        "images",
        metavar="IMAGES",
        help="a folder or .zip with a sub-folder an identity, or flat; a packed data set (folder or URL)",
    )
    embed.add_argument("--out", type=Path, required=True, metavar="FILE", help="a new .parquet, .npz or .npy file")
    embed.add_argument("--net", help="of a model file that holds tensors only, as iresnet50")
    embed.add_argument("--embedding-dim", type=int, metavar="D", help="of such a file")
    embed.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="a side, to which images are brought (default: the run's, or 112)",
    )
    embed.add_argument("--input-size", type=int, metavar="PIXELS", help="what a model file takes, if it is another")
    embed.add_argument("--channels", choices=("rgb", "bgr"), default="rgb", help="of a model file (default: rgb)")
    for flag in ("--mean", "--std"):
        embed.add_argument(
            flag,
            type=float,
            nargs=3,
            default=(127.5,) * 3,
            metavar="X",
            help="of pixel values 0 to 255 (default: 127.5)",
        )
    embed.add_argument("--flip-average", action="store_true", help="the mean of the vectors of image and mirror")
    embed.add_argument("--bridge", type=Path, metavar="DIR", help="a map that the vectors go through")
    embed.add_argument("--names", type=Path, metavar="FILE", help="names of a packed data set's images, one a line")
    embed.add_argument(
        "--device", choices=("auto", "cpu", "gpu"), default="auto", help="(default: a GPU if there is one)"
    )
    embed.set_defaults(run=_embed)


def _embed(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from launch.embed import check_bridge, embed_images, work_folder, working, write_embedded
    from launch.embedder import GivenModel, open_embedder
    from launch.image_set import open_images
    from launch.progress import RunProgress
    from lce_dist.blocks import refuse_existing
    from lce_dist.models.preprocess import InputSpec
    from lce_dist.vector_files import SUFFIXES

    out: Path = arguments.out
    if out.suffix not in SUFFIXES:
        raise ConfigError(f"--out {out} ends in {out.suffix!r}; must be {', '.join(SUFFIXES)}")
    refuse_existing(out)
    for flag, value, least in (
        ("--embedding-dim", arguments.embedding_dim, 1),
        ("--image-size", arguments.image_size, 16),
        ("--input-size", arguments.input_size, 16),
        ("--std", min(arguments.std), 1e-6),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{flag} is {value}; must be at least {least}")
    device = _device(arguments.device)
    spec = InputSpec(
        arguments.input_size,
        arguments.channels,
        tuple(arguments.mean),
        tuple(arguments.std),
        arguments.flip_average,
    )
    given = GivenModel(arguments.model, arguments.net, arguments.embedding_dim, arguments.image_size, spec)
    embedder = open_embedder(given, device)
    if arguments.bridge is not None:
        check_bridge(arguments.bridge, embedder)
    with RunProgress(Console(stderr=True)) as progress:
        try:
            with working(out) as work:
                images = open_images(arguments.images, arguments.names, work, progress.count)
                rows = embed_images(embedder, images, device, work, progress)
                dim = write_embedded(out, rows, images, embedder, arguments.bridge, progress)
                del rows
        except (KeyboardInterrupt, LceError):
            if work_folder(out).exists():
                progress.note(f"what is done is kept in {work_folder(out)}; the same command goes on")
            raise
    who = "nobody is named" if images.identities is None else f"{len(set(images.identities)):,} identities"
    print(f"{out}: {len(images.keys):,} unit vectors of {dim} values, {who}, by {device.type}")


def _device(word: str) -> torch.device:
    import torch

    if word == "gpu" and not torch.cuda.is_available():
        raise SetupError("--device is gpu, and torch sees none; lce doctor says why. Use --device cpu")
    return torch.device("cuda" if word != "cpu" and torch.cuda.is_available() else "cpu")
