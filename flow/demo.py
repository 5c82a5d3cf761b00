"""The demo data set: real video files whose classes need both streams. `python -m flow.demo --out DIR`.

A class is a pair (appearance, motion): {Red, Green} x {Up, Down, Sideways}.

    appearance   tint of the sprites, equal in luma: optical flow, computed on luma, cannot see it
    motion       velocity of the sprites relative to the background: a single frame cannot show it

Sprites and background are random textures; the camera moves at a constant random velocity that carries everything
along, so it is the motion left after mean subtraction that counts (sec. 3.1). Sprites leave the frame and come in on
the other side, from random places, so that position says nothing. Sideways goes left or right, so that training may
mirror.

Every scene (textures, silhouettes, places, camera, speed) is filmed once in each of the six classes. So no scene can
hint at a class, and of a test scene's six clips the spatial stream alone can get two (33 %), the temporal stream alone
three (50 %).

The files are laid out like UCF-101: DIR/RedUp/v_RedUp_g01_c01.avi (g: scene), and DIR/splits with its lists.
"""

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from flow.command import Parser, describe_error
from flow.video import import_cv2, write_video

Image = npt.NDArray[np.float32]

# RGB offsets of zero luma (0.299 R + 0.587 G + 0.114 B), in grey levels.
RED_GREEN = np.array([0.587, -0.299, 0.0], np.float32) * 90
YELLOW_BLUE = np.array([0.0, -0.114, 0.587], np.float32) * 40

APPEARANCES = {"Red": RED_GREEN, "Green": -RED_GREEN}
#: direction (x, y) of the sprites against the background; y points down. Sideways is multiplied by the scene's +-1.
MOTIONS = {"Up": (0, -1), "Down": (0, 1), "Sideways": (1, 0)}

SPRITE_PX = 40
SPRITE_GRID = (3, 2)
LUMA_RANGE = (70.0, 185.0)  # leaves room for the tints


@dataclass(frozen=True)
class Scene:
    """All that is random in a clip. Velocities in px/frame, images are luma (H, W) or opacity 0..1."""

    background: Image
    sprites: list[Image]
    silhouettes: list[Image]
    places: npt.NDArray[np.float64]  # (sprites, 2): x, y in px at frame 0
    camera: npt.NDArray[np.float64]  # (2,)
    speed: float
    side: int
    tint: npt.NDArray[np.float32]  # of the background, RGB


def draw_scene(seed: int, number: int, width: int, height: int) -> Scene:
    """Scene `number` of a data set: a pure function of its arguments."""
    rng = np.random.default_rng([seed, number])
    columns, rows = SPRITE_GRID
    # One sprite in each cell of a grid on the torus, moved by a common random phase: spread out, anywhere.
    period = _period(width, height)
    cells = np.array(list(product(range(columns), range(rows))), float) / SPRITE_GRID
    slack = period / SPRITE_GRID - SPRITE_PX
    places = cells * period + rng.uniform(0, np.maximum(slack, 1), cells.shape) + rng.uniform(0, period)
    return Scene(
        background=draw_texture(rng, 256, 256),
        sprites=[draw_texture(rng, SPRITE_PX, SPRITE_PX) for _ in cells],
        silhouettes=[_draw_silhouette(rng) for _ in cells],
        places=places,
        camera=rng.uniform(-2.5, 2.5, 2),
        speed=rng.uniform(3.0, 4.5),
        side=int(rng.choice([-1, 1])),
        tint=YELLOW_BLUE * np.float32(rng.uniform(-1, 1)),
    )


def draw_texture(rng: np.random.Generator, width: int, height: int) -> Image:
    """Periodic random texture (height, width), luma in LUMA_RANGE, with detail of 3 to 24 px for flow to hold on to."""
    cv2 = import_cv2()
    texture = np.zeros((height, width), np.float32)
    for sigma_px in (1.5, 3.0, 6.0, 12.0):
        # Padded by the reach of the blur, so that it goes across the border.
        margin = int(4 * sigma_px) + 1
        noise = np.pad(rng.standard_normal((height, width)).astype(np.float32), margin, mode="wrap")
        octave = cv2.GaussianBlur(noise, (0, 0), sigma_px)[margin:-margin, margin:-margin]
        texture += octave / octave.std()
    low, high = LUMA_RANGE
    return np.clip((low + high) / 2 + texture / texture.std() * (high - low) / 4, low, high).astype(np.float32)


def _draw_silhouette(rng: np.random.Generator) -> Image:
    """Opacity (SPRITE_PX, SPRITE_PX) of a disc, square, triangle or cross, turned at random."""
    polygons = {
        "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        "triangle": [(0, -1.3), (1.2, 0.9), (-1.2, 0.9)],
        "cross": [(-.4, -1.2), (.4, -1.2), (.4, -.4), (1.2, -.4), (1.2, .4), (.4, .4),
                  (.4, 1.2), (-.4, 1.2), (-.4, .4), (-1.2, .4), (-1.2, -.4), (-.4, -.4)],
        "disc": [(1.15 * np.cos(a), 1.15 * np.sin(a)) for a in np.linspace(0, 2 * np.pi, 40)],
    }  # fmt: skip
    corners = np.array(polygons[str(rng.choice(list(polygons)))])
    angle = rng.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    # Drawn eight times as large and averaged down, for smooth edges.
    large = np.zeros((8 * SPRITE_PX, 8 * SPRITE_PX), np.float32)
    points = (corners @ turn.T * 0.34 + 0.5) * 8 * SPRITE_PX
    cv2 = import_cv2()
    cv2.fillPoly(large, [points.round().astype(np.int32)], 1.0)
    return np.asarray(cv2.resize(large, (SPRITE_PX, SPRITE_PX), interpolation=cv2.INTER_AREA), np.float32)


def _period(width: int, height: int) -> npt.NDArray[np.float64]:
    """Size of the torus on which sprites move: the frame and room to hide a sprite."""
    return np.array([width + SPRITE_PX, height + SPRITE_PX], float)


def shift(image: Image, dx: float, dy: float, width: int, height: int, wrap: bool = False) -> Image:
    """Window (height, width) on an image moved by (dx, dy) px, bilinear; outside it repeats (wrap) or is 0."""
    cv2 = import_cv2()
    border = cv2.BORDER_WRAP if wrap else cv2.BORDER_CONSTANT
    matrix = np.array([[1, 0, dx], [0, 1, dy]], float)
    return np.asarray(cv2.warpAffine(image, matrix, (width, height), borderMode=border), np.float32)


def render(
    scene: Scene, appearance: str, motion: str, num_frames: int, width: int, height: int
) -> Iterator[npt.NDArray[np.uint8]]:
    """Film a scene in one class: RGB frames (H, W, 3) uint8."""
    direction = np.array(MOTIONS[motion], float)
    velocity = scene.camera + scene.speed * direction * (scene.side if motion == "Sideways" else 1)
    period = _period(width, height)
    for t in range(num_frames):
        camera_x, camera_y = t * scene.camera
        luma = shift(scene.background, camera_x, camera_y, width, height, wrap=True)
        opacity = np.zeros_like(luma)
        for sprite, silhouette, place in zip(scene.sprites, scene.silhouettes, scene.places, strict=True):
            x, y = (place + t * velocity) % period - SPRITE_PX
            mask = shift(silhouette, x, y, width, height)
            luma += mask * (shift(sprite, x, y, width, height) - luma)
            opacity = np.maximum(opacity, mask)
        tint = opacity[..., None] * APPEARANCES[appearance] + (1 - opacity[..., None]) * scene.tint
        yield np.rint(luma[..., None] + tint).astype(np.uint8)


def generate(
    out: Path,
    seed: int = 0,
    num_train: int = 20,
    num_test: int = 10,
    num_frames: int = 24,
    width: int = 128,
    height: int = 96,
) -> bool:
    """Write the data set: num_train + num_test scenes, each filmed in the six classes. False if it is there already.

    Raises ValueError if `out` holds anything else.
    """
    options = {key: value for key, value in locals().items() if key != "out"}
    if min(num_train, num_test) < 1 or num_frames < 2 or min(width, height) < SPRITE_PX:
        raise ValueError(f"{options}: expected at least one scene on each side, 2 frames and {SPRITE_PX} px.")
    if out.exists():
        stored = out / "demo.json"
        if stored.exists() and json.loads(stored.read_text("utf-8")) == options:
            return False
        raise ValueError(f"{out} exists and is not this demo data set. Remove it, or choose another --out.")
    unfinished = out.with_name(out.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    classes = list(product(APPEARANCES, MOTIONS))
    for appearance, motion in classes:
        (unfinished / (appearance + motion)).mkdir(parents=True)
    for number in tqdm(range(1, num_train + num_test + 1), desc="filming", unit="scene", disable=None):
        scene = draw_scene(seed, number, width, height)
        for appearance, motion in classes:
            frames = render(scene, appearance, motion, num_frames, width, height)
            write_video(unfinished / _file_name(appearance + motion, number), frames)
    _write_lists(unfinished / "splits", num_train, num_test)
    (unfinished / "demo.json").write_text(json.dumps(options), "utf-8")
    unfinished.rename(out)
    return True


def _file_name(class_name: str, scene: int) -> str:
    return f"{class_name}/v_{class_name}_g{scene:02d}_c01.avi"


def _write_lists(folder: Path, num_train: int, num_test: int) -> None:
    """Official list files in UCF-101's format."""
    folder.mkdir()
    names = sorted(appearance + motion for appearance, motion in product(APPEARANCES, MOTIONS))
    train = range(1, num_train + 1)
    test = range(num_train + 1, num_train + num_test + 1)
    lines = {
        "classInd": [f"{label} {name}" for label, name in enumerate(names, 1)],
        "trainlist01": [f"{_file_name(name, n)} {label}" for label, name in enumerate(names, 1) for n in train],
        "testlist01": [_file_name(name, n) for name in names for n in test],
    }
    for name, content in lines.items():
        (folder / f"{name}.txt").write_text("".join(f"{line}\n" for line in content), "utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m flow.demo",
        description="Generate the demo data set: small videos of six classes, which need both streams.",
        epilog="example:\n"
        "  python -m flow.demo --out demo/videos\n"
        "  python -m flow.pack --videos demo/videos --splits demo/videos/splits --size 64 --out demo/packed\n\n"
        "exit code: 0 it is there; 2 it cannot be made, the message says why",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="new folder for class folders and splits/"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the scenes (default %(default)s)")
    parser.add_argument(
        "--train", type=int, default=20, metavar="N", help="training clips of each class (default %(default)s)"
    )
    parser.add_argument(
        "--test", type=int, default=10, metavar="N", help="test clips of each class (default %(default)s)"
    )
    parser.add_argument("--frames", type=int, default=24, metavar="N", help="of each clip (default %(default)s)")
    options = parser.parse_args(argv)
    try:
        made = generate(options.out, options.seed, options.train, options.test, options.frames)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {describe_error(error)}", file=sys.stderr)
        return 2
    num_clips = len(APPEARANCES) * len(MOTIONS) * (options.train + options.test)
    print(f"{options.out}: {num_clips} clips in 6 classes{'' if made else ', there already'}; lists in splits/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
