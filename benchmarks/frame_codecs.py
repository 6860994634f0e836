"""What the frames of three seconds take in each picture codec: those of a store, and of a photograph that moves.

    python benchmarks/frame_codecs.py STORE

The photograph is the sample picture of Matplotlib; it is moved along by a pixel every fourth frame, with noise of two
of 255 levels, as a camera has it. The table stands in docs/memory.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from matplotlib import get_data_path
from PIL import Image

from avsep.data.codecs import PictureCodec, encode_frames
from avsep.data.store import Store
from avsep.types import VisualSource

_SECONDS = 3.0
_CODECS: tuple[PictureCodec, ...] = ("raw", "deflate", "jpeg")


def of_store(store: Store, clips: int = 48) -> dict[str, float]:
    """The mean over so many clips, evenly chosen."""
    sources = [VisualSource("object", "frames"), VisualSource("motion", "frames")]
    chosen = [store.clips[i] for i in np.linspace(0, len(store.clips) - 1, clips).astype(int)]
    sizes: dict[PictureCodec, list[int]] = {codec: [] for codec in _CODECS}
    for clip in chosen:
        frames = [
            store.read_visual(clip, s, centre_s=clip.samples / store.sample_rate_hz / 2, duration_s=_SECONDS)
            for s in sources
        ]
        for codec, found in sizes.items():
            found.append(sum(len(encode_frames(array, codec)) for array in frames))
    return {codec: float(np.mean(found)) for codec, found in sizes.items()}


def of_photograph(store: Store) -> dict[str, float]:
    """Frames as the store has them, one of the object and those of the motion, of a photograph."""
    height, width = store.manifest["object_shape"][1:]
    small = store.manifest["motion_shape"][1]
    photo = Image.open(Path(get_data_path(), "sample_data", "grace_hopper.jpg")).convert("RGB")
    side = min(photo.size)
    square = photo.crop((0, 0, side, side))
    still = np.asarray(square.resize((width, height), Image.Resampling.LANCZOS)).transpose(2, 0, 1)[None]
    count = round(_SECONDS * store.motion_rate_hz)
    grey = np.asarray(square.convert("L").resize((small + count // 4 + 1,) * 2, Image.Resampling.LANCZOS), np.float64)
    noise = np.random.default_rng(0).normal(0, 2, (count, 1, small, small))
    moved = np.stack([grey[n // 4 : n // 4 + small, n // 4 : n // 4 + small][None] for n in range(count)])
    moving = np.rint(np.clip(moved + noise, 0, 255)).astype(np.uint8)
    return {codec: float(sum(len(encode_frames(x, codec)) for x in (still, moving))) for codec in _CODECS}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("store", type=Path, help="folder of a store with frames")
    store = Store.open(parser.parse_args().store)
    print(f"| | {' | '.join(_CODECS)} |\n|---|{'---:|' * len(_CODECS)}")
    for name, sizes in (("store", of_store(store)), ("a photograph", of_photograph(store))):
        print(f"| {name} | {' | '.join(f'{size / 1000:.0f} kB' for size in sizes.values())} |")


if __name__ == "__main__":
    main()
