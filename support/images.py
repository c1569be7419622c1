"""Pictures: which files they are, whether they can be read, and how they look.

    path = below("images", "VG_100K/1.jpg", "talk.json, row 7")    # never outside of "images"
    check_images(paths)                     # before long work: are they all there, and whole?
    image = open_image(path)                # as a person sees it, in RGB; also an ImageInFile
    image = fit_thin(image, 336)            # a very thin one, scaled without filling the memory

The model shall see what a person sees, so PIL's conversion to RGB, which LLaVA uses, is corrected
in one thing: it cuts grey of 16 bits off at 255, which makes nearly all of it white. Whatever
cannot be read is an InputError with the true reason.

`fit_thin` follows `Resample.c` of python-pillow/Pillow, to the same pixels.
"""
import io
import os
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from unicodedata import normalize

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from support.common import InputError, check_file, progress

# check_images opens at most so many files, which takes seconds. Of more it checks only the names.
IMAGES_OPENED = 20_000
# PIL refuses pictures above twice its limit of pixels, which is reported; below that, it warns.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# One text beside a PNG's picture may take what PIL allows to all of them together (64 MiB); some
# programs write their whole workflow there.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


# ---- Names ---------------------------------------------------------------------------------------


def below(folder, name, place):
    """The path of an image that a file names. InputError unless it lies below `folder`.

    `place`: file and row, for the message. `folder` None: not known yet, so the name is relative.
    A report embeds what these paths show, so a file from elsewhere must not choose from the whole
    disk. Only the name counts: a symlink in the folder is the user's own, and data sets are often
    put together from symlinks.
    """
    parts = name.replace("\\", "/").split("/")
    outside = not name or ".." in parts
    if not outside and (not parts[0] or re.match(r"[A-Za-z]:", name)):                  # absolute
        outside = folder is None or not name.startswith(os.path.join(os.path.abspath(folder), ""))
    if outside:
        where = "the image folder" if folder is None else os.path.abspath(folder)
        raise InputError(f"{place}: image {name!r} does not lie below {where}; write names that "
                         "begin there, without .., or name the folder that holds all images")
    return os.path.join(folder or "", name)


# ---- Files ---------------------------------------------------------------------------------------


class ImageInFile(str):
    """A picture that stands in a row of another file: the row's place. `read()` gives its bytes."""
    read = None


@contextmanager
def opened(path):
    """A picture file, opened by PIL. InputError with the reason, also for what is done with it."""
    source = path
    if isinstance(path, ImageInFile):
        source = io.BytesIO(path.read())
    else:
        refuse_other_spelling(path)
        check_file(path)
        if not os.path.getsize(path):
            raise InputError(f"{path}: is empty; download it again")
    try:
        with Image.open(source) as file:
            grey_bits(file, path)
            yield file
    except InputError:
        raise
    except Image.DecompressionBombError as e:
        raise InputError(f"{path}: is too large ({str(e).split(',')[0]}); save it smaller") from e
    except UnidentifiedImageError as e:
        raise InputError(f"{path}: is no picture that PIL knows; download it again, or save it as "
                         "JPEG or PNG") from e
    except Exception as e:                          # damaged files raise nearly everything in PIL
        if "MAX_TEXT" in str(e):
            raise InputError(f"{path}: holds too much beside the picture ({e}); save it without "
                             "metadata") from e
        raise InputError(f"{path}: not readable as an image ({str(e) or type(e).__name__}); "
                         "download it again") from e


def refuse_other_spelling(path):
    """InputError if the file is there and only its accents are written otherwise, as macOS does."""
    folder, name = os.path.split(path)
    if name.isascii() or os.path.exists(path) or not os.path.isdir(folder or "."):
        return
    for there in os.listdir(folder or "."):
        if normalize("NFC", there) == normalize("NFC", name):
            raise InputError(f"{path}: is there under a name that looks the same and is written "
                             f"otherwise, {ascii(there)} for {ascii(name)}; rename it")


def open_image(image):
    """A path or a PIL image → RGB."""
    if isinstance(image, Image.Image):
        return as_seen(image, "picture")
    with opened(image) as file:
        return as_seen(file, image)


def image_size(path):
    """(width, height) of a picture; nothing but its header is read."""
    with opened(path) as file:
        return file.size


def check_images(paths):
    """InputError with the count and the first ten of the images that cannot be read, and why."""
    paths = list(dict.fromkeys(paths))
    if len(paths) <= IMAGES_OPENED:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            faults = list(checking(pool.map(fault_of, paths), paths))
    else:
        faults = list(checking(are_absent(paths), paths))
    bad = {path: fault for path, fault in zip(paths, faults, strict=True) if fault}
    if bad:
        alike = {}                                  # what is wrong: with which files
        for path, fault in list(bad.items())[:10]:
            alike.setdefault(fault, []).append(path)
        listed = [f"{', '.join(names)}: {fault}" for fault, names in alike.items()]
        listed += [f"and {len(bad) - 10} more"] if len(bad) > 10 else []
        if len(paths) == 1:
            raise InputError(listed[0])
        plural = "s" if len(bad) > 1 else ""
        raise InputError(f"{len(bad)} image{plural} missing or unreadable: {' | '.join(listed)}")


def checking(results, paths):
    return progress(results, "checking images", len(paths), unit="image")


def fault_of(path):
    """Why a whole image cannot be decoded; None if it can."""
    try:
        with opened(path) as file:
            file.draft("RGB", (1, 1))       # JPEG: decode at an eighth of the size
            file.load()
    except InputError as e:
        return str(e).removeprefix(f"{path}: ")
    return None


def are_absent(paths):
    """For each path what is wrong if there is no such file. Each folder is listed once, which is
    much faster.
    """
    listings = {}
    for path in paths:
        if isinstance(path, ImageInFile):
            yield None                      # the row was read, so it is there
            continue
        folder, name = os.path.split(path)
        if folder not in listings:
            there = folder or "."
            listings[folder] = set(os.listdir(there)) if os.path.isdir(there) else set()
        yield None if name in listings[folder] else "no such file; check the path"


# ---- How it looks --------------------------------------------------------------------------------


def grey_bits(image, name):
    """How many bits a grey picture has, if more than 8; None for all other pictures.

    InputError for numbers that name no white: there is no telling how a person would see them.
    """
    if image.mode.startswith("I;16"):
        return getattr(image, "tag_v2", {}).get(258, (16,))[0]          # TIFF has 12 bits, too
    if image.mode == "I" and image.format in ("PNG", "PPM"):            # PPM, and PNG in PIL 10
        return 16
    if image.mode in ("I", "F"):
        raise InputError(f"{name}: is a picture of 32-bit numbers (PIL's mode {image.mode}), which "
                         "do not say what is white; save it with 8 or 16 bits")
    return None


def as_seen(image, name):
    """A PIL image as RGB: PIL's conversion, and of grey with more than 8 bits the upper 8.

    As in LLaVA, colours behind transparency stay, and EXIF's rotation is ignored.
    """
    bits = grey_bits(image, name)
    if bits:
        grey = (np.asarray(image) >> bits - 8).clip(0, 255).astype(np.uint8)
        zero_is_white = getattr(image, "tag_v2", {}).get(262) == 0      # PIL turns 8 bits only
        image = Image.fromarray(255 - grey if zero_is_white else grey)
    if image.mode == "La":                          # PIL has no direct way
        image = image.convert("LA")
    return image.convert("RGB")


# ---- Thin pictures -------------------------------------------------------------------------------

LARGEST = 2 ** 28           # pixels of the plain way, a gigabyte in memory
BITS = 22                   # PIL's weights are whole numbers of 1 / 2^22


def fit_thin(image, size, colour=None):
    """An RGB image that is too thin for the plain way → size x size, all others as they are.

    The plain way pads to a square in `colour`, or cuts out the middle, and scales by PIL's bicubic.
    Padded, a picture of 65,000 x 2 has 65,000 x 65,000 pixels; scaled until its short side is 336,
    its long side is 10,920,000. Here the same pixels are computed, and only those that are kept.
    """
    long, short = max(image.size), min(image.size)
    if (long * long if colour else long * size // short * size) <= LARGEST:
        return image
    frame = 2 * [max(image.size)] if colour else image.size
    across, down = (taps(length, whole, int(size * whole / min(frame)), size)
                    for length, whole in zip(image.size, frame, strict=True))
    # Squares, and what grows, PIL scales across first; it rounds in between. Rows that the second
    # step does not read are left out.
    top, bottom = down[0].begin, down[-1].end
    columns = [tap.apply(np.asarray(image.crop((tap.begin, top, tap.end, bottom))), colour)
               for tap in across]
    columns = np.stack(columns)                                                     # (x, h, 3)
    first = across[0].place
    out = np.empty((size, size, 3), np.uint8)
    out[:] = colour or 0
    for tap in down:
        rows = columns[:, tap.begin - top:tap.end - top]
        out[tap.place, first:first + len(columns)] = tap.apply(rows, colour)
    return Image.fromarray(out)


@dataclass
class Tap:
    """Which pixels of a line make one pixel of the scaled line, and with what weights."""
    place: int                  # of the pixel that they make, counted from the first one kept
    begin: int
    end: int
    weights: np.ndarray         # of the picture's pixels from begin to end: whole, as float64
    padding: float              # the weight of all padding together

    def apply(self, pixels, colour):
        """(n, end - begin, 3) → (n, 3)"""
        total = np.stack([pixels[..., c].astype(float) @ self.weights for c in range(3)], -1)
        total += self.padding * np.array(colour or (0, 0, 0)) + (1 << BITS - 1)
        return (total.astype(int) >> BITS).clip(0, 255).astype(np.uint8)


def taps(length, frame, target, size):
    """A line of `length` in the middle of `frame`, scaled to `target` → the taps of the middle
    `size` pixels, without those that are padding alone.
    """
    scale, before, cut = frame / target, (frame - length) // 2, (target - size) // 2
    spread = max(scale, 1.0)                        # where it shrinks, PIL's filter is wider
    found = []
    for place in range(size):
        centre = (cut + place + 0.5) * scale
        first = max(0, int(centre - 2 * spread + 0.5))
        end = min(frame, int(centre + 2 * spread + 0.5))
        x = abs((np.arange(first, end) - centre + 0.5) * (1 / spread))
        near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
        weights = np.where(x < 1, near, np.where(x < 2, far, 0))
        weights /= np.cumsum(weights)[-1]           # summed one by one, as PIL does
        weights = np.trunc(weights * (1 << BITS) + np.copysign(0.5, weights))
        # Of these, the picture has its part; the rest is padding.
        begin, end = (min(max(at - before, 0), length) for at in (first, end))
        inside = weights[begin + before - first:][:end - begin]
        if begin < end:
            found.append(Tap(place, begin, end, inside, weights.sum() - inside.sum()))
    return found
