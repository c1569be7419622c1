"""Pictures: their names stay in their folder, a fault is called by its name before long work
begins, and they look as they look to a person.
"""
import io
import os
import struct

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from small_files import INDEX, TALK, changed, photo, write_files

from support import images
from support.common import InputError
from support.hadpo import read_image_index
from support.images import below, check_images, open_image
from training import conversations
from training.conversations import image_paths, read_llava

# ---- Names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("a.jpg", "sub/a.jpg", "..a.jpg", "a..jpg", "sub.../a", " a.jpg"))
def test_names_below_the_folder(name):
    assert below("images", name, "talk.json, row 3") == os.path.join("images", name)


@pytest.mark.parametrize("name", ("/etc/secret.jpg", "../a.jpg", "sub/../../a.jpg", "..", "",
                                  "sub/..", "C:/a.jpg", "..\\a.jpg"))
def test_names_that_lead_out(tmp_path, name):
    for folder in (str(tmp_path), "", None):
        with pytest.raises(InputError) as error:
            below(folder, name, "talk.json, row 3")
        message = str(error.value)
        assert message.startswith(f"talk.json, row 3: image {name!r} does not lie below ")
        assert "\n" not in message and "write names that begin there" in message


def test_whole_paths_are_taken_below_the_folder_that_is_named(tmp_path):
    """Files that name whole paths: --image_folder / takes them all."""
    path = str(tmp_path / "a.jpg")
    assert below("/", path, "") == below(str(tmp_path), path, "") == path
    with pytest.raises(InputError, match="does not lie below"):
        below(str(tmp_path / "a"), str(tmp_path / "ab.jpg"), "")


def test_readers_keep_to_their_folder(tmp_path, monkeypatch):
    """Visual Genome's index and LLaVA's rows, also those that are not read at the start."""
    rows = TALK + TALK + changed(TALK, 0, "image", value="../1.jpg")
    index = changed(INDEX, 1, "url", value="http://x.org/../2.jpg")
    paths = write_files(tmp_path, index=index, talk=rows)
    with pytest.raises(InputError, match=r"image_data.json, row 1: image '../2.jpg' does not lie"):
        read_image_index(paths["vg"])
    with pytest.raises(InputError, match=r"talk.json, row 4: image '../1.jpg' does not lie below"):
        read_llava(paths["talk"], str(tmp_path))
    monkeypatch.setattr(conversations, "ROWS_READ_FIRST", 2)
    examples = read_llava(paths["talk"], str(tmp_path))
    with pytest.raises(InputError, match=r"talk.json, row 4: image '../1.jpg' does not lie below"):
        image_paths(examples)


def test_a_symlink_in_the_folder_is_the_users_own(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "images").mkdir()
    photo(4, 4).save(tmp_path / "elsewhere" / "a.png")
    os.symlink(tmp_path / "elsewhere", tmp_path / "images" / "VG_100K")
    check_images([below(str(tmp_path / "images"), "VG_100K/a.png", "")])


# ---- Files ---------------------------------------------------------------------------------------


def test_images_are_checked_before_training(tmp_path):
    good, foreign = str(tmp_path / "good.png"), str(tmp_path / "text.jpg")
    Image.new("RGB", (4, 4)).save(good)
    with open(foreign, "w") as file:
        file.write("this is no image")
    check_images([good, good])
    absent = [str(tmp_path / f"absent{n:02}.jpg") for n in range(12)]
    with pytest.raises(InputError) as error:
        check_images([good, foreign, *absent, *absent])
    message = str(error.value)
    assert message.startswith("13 images ")                                   # each of them once
    assert foreign in message
    assert all(path in message for path in absent[:9]) and absent[9] not in message
    assert message.count("no such file") == 1 and "and 3 more" in message


def test_images_cut_short_are_found(tmp_path):
    """A download that broke off behind its header, an empty file, a folder of that name: all are
    named, before any training.
    """
    for suffix in ("jpg", "png", "gif", "webp"):
        photo(90, 70).save(tmp_path / f"whole.{suffix}")
        content = (tmp_path / f"whole.{suffix}").read_bytes()
        (tmp_path / f"cut.{suffix}").write_bytes(content[:len(content) // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    os.mkdir(tmp_path / "folder.jpg")
    check_images([str(path) for path in tmp_path.glob("whole.*")])
    bad = [str(path) for path in tmp_path.iterdir() if not path.name.startswith("whole")]
    with pytest.raises(InputError, match="^6 images") as error:
        check_images([*bad, str(tmp_path / "whole.jpg")])
    message = str(error.value)
    assert all(path in message for path in bad) and "whole" not in message


def test_images_of_very_many_are_looked_up_in_their_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "IMAGES_OPENED", 3)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    there = [str(tmp_path / "a" / f"{n}.jpg") for n in range(5)] + ["here.jpg"]
    for path in there:
        open(path, "w").close()
    check_images(there)                                          # empty, but there
    with pytest.raises(InputError, match=r"2 images.*a/9\.jpg.*b/0\.jpg"):
        check_images([*there, str(tmp_path / "a" / "9.jpg"), str(tmp_path / "b" / "0.jpg")])
    refused(there[0], "is empty")                                # it is said when it is opened


def refused(path, *said):
    """Both ways to meet a file say all of this about it, in one line that names the file."""
    for meet in (open_image, lambda path: check_images([path])):
        with pytest.raises(InputError) as error:
            meet(str(path))
        message = str(error.value)
        print(message)
        assert str(path) in message and "\n" not in message
        assert all(words in message for words in said)


def as_png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 7\n"
DAMAGED = {  # what the file holds: (content, what is said of it)
    "nothing": (b"", ("is empty", "download it again")),
    "another thing": (b"<html>404</html>", ("no picture that PIL knows", "JPEG or PNG")),
    "an LFS pointer": (POINTER, ("git lfs pull",)),
    "half a picture": (as_png(photo(40, 30))[:900], ("not readable as an image", "download")),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_the_reason_is_the_true_one(tmp_path, what):
    content, said = DAMAGED[what]
    (tmp_path / "a.jpg").write_bytes(content)
    refused(tmp_path / "a.jpg", *said)


def test_folders_and_absent_files_are_called_so(tmp_path):
    refused(tmp_path, "is a folder")
    refused(tmp_path / "b.jpg", "no such file; check the path")


def test_names_that_look_the_same(tmp_path):
    """An accent on its own, as macOS writes it; the JSON file says é in one."""
    photo(4, 4).save(tmp_path / "cafe\u0301.png")
    if (tmp_path / "caf\u00e9.png").exists():
        pytest.skip("both are the same file here")
    refused(tmp_path / "caf\u00e9.png", "looks the same", r"'cafe\u0301.png' for 'caf\xe9.png'")
    refused(tmp_path / "caf\u00e8.png", "no such file")


def test_whatever_pil_raises_is_one_line(tmp_path, monkeypatch):
    photo(4, 4).save(tmp_path / "a.png")
    for error in (RuntimeError("codec"), AttributeError("offset"), EOFError(), IndexError("0")):
        def fail(*args, error=error):
            raise error
        monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
        refused(tmp_path / "a.png", "not readable as an image", str(error) or "EOFError")


LARGE = os.path.join(os.path.dirname(__file__), "..", "..", "..", "shared", "cases",
                     "20_large_image", "huge.png")


@pytest.mark.skipif(not os.path.isfile(LARGE), reason=f"no {LARGE}")
def test_a_real_picture_with_too_many_pixels():
    refused(LARGE, "too large", "182250000 pixels", "limit of 178956970", "save it smaller")


@pytest.mark.filterwarnings("ignore")               # pytest takes away our own filter
def test_too_many_pixels(tmp_path, monkeypatch):
    photo(30, 20).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 250)
    refused(tmp_path / "a.png", "too large", "600 pixels", "limit of 500", "save it smaller")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)             # PIL only warns
    check_images([str(tmp_path / "a.png")])


def test_much_text_beside_a_picture(tmp_path, monkeypatch):
    """PIL stops at 1 MiB; some programs keep their whole workflow there."""
    info, path = PngImagePlugin.PngInfo(), tmp_path / "a.png"
    info.add_text("workflow", "x" * 2 ** 21, zip=True)
    photo(6, 5).save(path, pnginfo=info)
    check_images([str(path)])
    assert np.array_equal(open_image(str(path)), photo(6, 5))
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 2 ** 20)
    refused(path, "holds too much beside the picture", "MAX_TEXT_CHUNK", "without metadata")


# ---- How it looks --------------------------------------------------------------------------------


def same(image, expected):
    image, expected = np.asarray(image).astype(int), np.asarray(expected).astype(int)
    assert image.shape == expected.shape and abs(image - expected).max() == 0


GREY = photo(12, 7).convert("L")


def sixteen(big_endian=False):
    return np.asarray(GREY).astype(">u2" if big_endian else "<u2") * 257


def tiff(values, bits, photometric):
    """A grey TIFF by hand: 12 or 16 bits a pixel; photometric 0: zero is white."""
    height, width = values.shape
    data = values.astype("<u2").tobytes()
    if bits == 12:
        pairs = values.reshape(-1, 2).tolist()
        data = b"".join(bytes((a >> 4, (a & 15) << 4 | b >> 8, b & 255)) for a, b in pairs)
    tags = ((256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8),
            (277, 1), (278, height), (279, len(data)))
    head = struct.pack("<2sHI", b"II", 42, 8 + len(data))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return head + data + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("form", ("PNG", "TIFF", "JPEG2000", "PPM"))
def test_grey_of_sixteen_bits(tmp_path, form):
    """It is the same picture as with 8 bits; PIL's convert("RGB") makes it white."""
    path = str(tmp_path / "a")
    Image.fromarray(sixteen()).save(path, form)
    same(open_image(path), GREY.convert("RGB"))


def test_grey_of_more_bits_in_memory_and_in_tiffs(tmp_path):
    same(open_image(Image.fromarray(sixteen(big_endian=True))), GREY.convert("RGB"))
    wide = GREY.resize((12, 7))
    twelve = np.asarray(wide).astype(int) * 16
    path = tmp_path / "a.tif"
    for content, expected in (
            (tiff(twelve, 12, 1), np.asarray(wide)),
            (tiff(np.asarray(wide).astype(int) * 257, 16, 1), np.asarray(wide)),
            (tiff(np.asarray(wide).astype(int) * 257, 16, 0), 255 - np.asarray(wide))):
        path.write_bytes(content)
        same(open_image(str(path)), Image.fromarray(expected).convert("RGB"))


def test_numbers_without_a_white_are_refused(tmp_path):
    for n, array in enumerate((np.ones((4, 4), np.int32), np.ones((4, 4), np.float32))):
        Image.fromarray(array).save(tmp_path / f"{n}.tif")
        refused(tmp_path / f"{n}.tif", f"mode {'IF'[n]}", "what is white", "8 or 16 bits")
        with pytest.raises(InputError, match="picture: is a picture of 32-bit numbers"):
            open_image(Image.fromarray(array))


@pytest.mark.parametrize("mode", ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK",
                                  "YCbCr", "HSV"))
def test_ordinary_modes_are_pils(mode):
    """As LLaVA opens them: convert("RGB")."""
    first = {"PA": "P", "RGBa": "RGBA"}.get(mode)
    image = photo(12, 7).convert(first).convert(mode) if first else photo(12, 7).convert(mode)
    same(open_image(image), image.convert("RGB"))


def test_modes_that_pil_does_not_convert():
    grey = GREY.convert("LA")
    same(open_image(grey.convert("La")), GREY.convert("RGB"))


@pytest.mark.parametrize("form", ("GIF", "WEBP", "PNG", "TIFF"))
def test_the_first_picture_of_several(tmp_path, form):
    """Also under another name than it deserves."""
    frames = [Image.new("RGB", (20, 10), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    path = str(tmp_path / "a.jpg")
    frames[0].save(path, form, save_all=True, append_images=frames[1:])
    check_images([path])
    red, green, _ = np.asarray(open_image(path)).reshape(-1, 3).mean(0)
    assert red > 240 and green < 10


def test_one_pixel():
    assert open_image(Image.fromarray(np.uint8([[7]]))).getpixel((0, 0)) == (7, 7, 7)
    content = io.BytesIO(as_png(Image.new("RGB", (1, 1), (1, 2, 3))))
    assert open_image(Image.open(content)).getpixel((0, 0)) == (1, 2, 3)
