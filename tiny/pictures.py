"""Pictures of the tiny world: a kitchen, a street or a park, and two to five objects in it.

    scene, objects, pixels, owner = picture(seed=42, split="sft", index=1)

The objects are small, pale and noisy, and most of them belong to their scene.
"""
import numpy as np

SIDE = 48                                       # pixels of an image
CONTRAST = 0.3, 0.8                             # how far an object stands out from its background
NOISE = 8.0                                     # sigma of the pixels' noise, of 255
SCENES = {"kitchen": 0.40, "street": 0.35, "park": 0.25}                   # and how often each is
CLASSES = {                                     # name: (shape, colour, texture)
    # Two that live everywhere
    "person": ("post", "red", "plain"), "chair": ("arch", "brown", "plain"),
    # Six for each scene
    "cup": ("disc", "blue", "plain"), "bowl": ("disc", "brown", "rows"),
    "bottle": ("post", "green", "rows"), "knife": ("bar", "violet", "plain"),
    "sink": ("square", "blue", "check"), "toaster": ("square", "red", "columns"),

    "car": ("bar", "red", "columns"), "bus": ("square", "yellow", "rows"),
    "truck": ("square", "green", "plain"), "bicycle": ("ring", "blue", "columns"),
    "sign": ("diamond", "red", "plain"), "hydrant": ("cross", "yellow", "plain"),

    "dog": ("cross", "brown", "check"), "bird": ("wedge", "blue", "plain"),
    "bench": ("arch", "green", "check"), "kite": ("diamond", "violet", "check"),
    "tree": ("wedge", "green", "rows"), "ball": ("ring", "yellow", "plain")}
COLOURS = {"red": (215, 60, 55), "green": (50, 165, 75), "blue": (60, 95, 215),
           "yellow": (225, 205, 65), "violet": (160, 70, 190), "brown": (135, 90, 55)}
COLOURS = {name: np.array(rgb, np.float32) for name, rgb in COLOURS.items()}
NAMES = list(CLASSES)                           # from here on a class is an index into this list
HOME = {scene: [0, 1, *range(2 + 6 * i, 8 + 6 * i)] for i, scene in enumerate(SCENES)}
# Streams of random numbers. The order counts: a stream's seed is its place in this list.
STREAMS = ["sft", "preference", "validation", "evaluation", "tower", "tower_test", "words"]


def stencil(shape, texture, size):
    """The mask of an object (0 or 1) and the brightness of its texture, both (size, size, 1)."""
    x, y = np.meshgrid(*2 * [np.linspace(-1, 1, size)])
    ax, ay, r = abs(x), abs(y), np.hypot(x, y)
    mask = {"disc": r < 1, "ring": (r < 1) & (r > 0.5), "square": np.maximum(ax, ay) < 0.9,
            "diamond": ax + ay < 1.05, "wedge": ax < (y + 1) / 2,
            "cross": np.minimum(ax, ay) < 0.33, "bar": ay < 0.5, "post": ax < 0.5,
            "arch": (ax > 0.5) | (y < -0.4)}[shape]
    row, column = np.indices((size, size)) // 2 % 2                 # two light, two dark
    dark = {"plain": 0 * row, "rows": row, "columns": column, "check": row ^ column}[texture]
    return mask[..., None].astype(np.float32), (1 - 0.45 * dark[..., None]).astype(np.float32)


STENCILS = {(c, size): stencil(shape, texture, size) for size in range(10, 19)
            for c, (shape, _, texture) in enumerate(CLASSES.values())}
Y, X = np.indices((SIDE, SIDE, 1))[:2]
BACKDROPS = {       # tiles; a road below a wall; grass below the sky: (SIDE, SIDE, 3), rather grey
    "kitchen": np.where((Y % 12 == 0) | (X % 12 == 0), (130, 126, 117), (165, 160, 148)),
    "street": np.where(Y < SIDE // 2, (150, 145, 150), (110, 110, 112)),
    "park": np.where(Y < SIDE // 2, (150, 165, 185), (115, 145, 105))}
BACKDROPS = {scene: pixels.astype(np.float32) for scene, pixels in BACKDROPS.items()}


def begin(seed, split, index, fewest, biased=True):
    """What picture `index` of a split will show: its random numbers, scene, classes as they come.

    Each picture has its own random numbers and depends on no other.
    """
    rng = np.random.default_rng([seed, STREAMS.index(split), index])
    scene = str(rng.choice(list(SCENES), p=list(SCENES.values())))
    chance = np.full(len(NAMES), 0.12 / (len(NAMES) - 8))           # 12 % belong to another scene
    chance[HOME[scene]] = 0.88 / 8 * np.linspace(1.6, 0.6, 8) / 1.1
    if not biased:
        chance[:] = 1
    # The first arrivals of exponential clocks are a weighted draw without replacement.
    arrivals = rng.exponential(size=len(NAMES)) / chance
    return rng, scene, np.argsort(arrivals)[:rng.integers(fewest, 6)].tolist()


def facts(seed, split, index, fewest=2):
    """The scene of a picture and its classes in ascending order, without drawing it."""
    _, scene, objects = begin(seed, split, index, fewest)
    return scene, sorted(objects)


def picture(seed, split, index, fewest=2, biased=True):
    """Draw picture `index` of a split.

    `fewest`: objects in it, at least. `biased`: most objects belong to their scene.
    Returns the scene, the classes in ascending order, the pixels uint8 (SIDE, SIDE, 3), and whose
    each pixel is (SIDE, SIDE): 0 = nobody's, or class + 1.
    """
    rng, scene, objects = begin(seed, split, index, fewest, biased)
    canvas = BACKDROPS[scene] * rng.uniform(0.85, 1.15, 3).astype(np.float32)
    owner = np.zeros((SIDE, SIDE), np.uint8)
    centres = np.full((1, 2), -99.0)
    for c in objects:
        # Of eight places the farthest from all earlier objects: few objects hide another.
        size = int(rng.integers(10, 19))
        places = rng.integers(0, SIDE - size + 1, (8, 2)) + size / 2
        distances = np.abs(places[:, None] - centres).max(-1).min(-1)
        centre = places[distances.argmax()]
        centres = np.vstack([centres, centre])
        top, left = (centre - size / 2).astype(int)
        where = slice(top, top + size), slice(left, left + size)
        mask, shade = STENCILS[c, size]
        own_colour = rng.random() < 0.9
        colour = COLOURS[CLASSES[NAMES[c]][1] if own_colour else str(rng.choice(list(COLOURS)))]
        canvas[where] += rng.uniform(*CONTRAST) * mask * (colour * shade - canvas[where])
        owner[where][mask[..., 0] > 0] = c + 1
    canvas += NOISE * rng.standard_normal(canvas.shape, np.float32)
    return scene, sorted(objects), canvas.clip(0, 255).astype(np.uint8), owner
