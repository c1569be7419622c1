"""evals/objects.py: which objects a text names, by hand; COCO's files, whole and damaged."""
import json

import pytest
from small_files import assert_names_the_fault

from evals.objects import OUR_LIST, list_of_words, read_annotations, read_words
from support.common import InputError
from tiny.pictures import NAMES
from tiny.world import hallucinated

COCO = """person bicycle car motorcycle airplane bus train truck boat traffic_light fire_hydrant
stop_sign parking_meter bench bird cat dog horse sheep cow elephant bear zebra giraffe backpack
umbrella handbag tie suitcase frisbee skis snowboard sports_ball kite baseball_bat baseball_glove
skateboard surfboard tennis_racket bottle wine_glass cup fork knife spoon bowl banana apple sandwich
orange broccoli carrot hot_dog pizza donut cake chair couch potted_plant bed dining_table toilet tv
laptop mouse remote keyboard cell_phone microwave oven toaster sink refrigerator book clock vase
scissors teddy_bear hair_drier toothbrush""".split()


@pytest.fixture(scope="module")
def ours():
    return read_words()


def test_our_list_has_cocos_classes(ours):
    assert ours.classes == [name.replace("_", " ") for name in COCO] and len(COCO) == 80
    for name in ours.classes:
        assert [m.name for m in ours.mentions(f"There is a {name}.")] == [name]


def test_no_entry_of_our_list_stands_twice():
    with open(OUR_LIST, encoding="utf-8") as file:
        entries = [e.strip() for line in file for e in line.removeprefix("-").split(",")]
    assert len(entries) == len(set(entries))


@pytest.mark.parametrize("text, named", [
    ("Two hot dogs lie on a plate.", ["hot dog"]),
    ("A dog eats a hot dog, hot-dogs and a hotdog.", ["dog"] + 3 * ["hot dog"]),
    ("A boy swings a baseball bat; a BAT.", ["person", "baseball bat", "baseball bat"]),
    ("A toy car and a car, toy cars and cars.", ["car", "car"]),
    ("Women, men, children, knives, buses, mice and ponies.",
     ["person"] * 3 + ["knife", "bus", "mouse", "horse"]),
    ("A dining table, a table and some tables, but a tablecloth.", ["dining table"] * 3),
    ("A table cloth on the coffee table.", ["dining table"]),
    ("An orange cat looks at an orange on the floor.", ["cat", "orange"]),
    ("An orange and white cat, an orange and a cup, oranges.", ["cat", "orange", "cup", "orange"]),
    ("The teddy bear sits beside a bear; a baby elephant.", ["teddy bear", "bear", "elephant"]),
    ("The train station has a train, the bus stop none.", ["train"]),
    ("A wine glass, a glass of wine and a glass door.", ["wine glass", "wine glass"]),
    ("The man's catcher's mitt and the catcher’s mitt.", ["person"] + 2 * ["baseball glove"]),
    ("Skis, a ski and a ski slope; a jet ski.", ["skis", "skis"]),
    ("Nothing can be joined: hot. Dogs and baseball, bat.", ["dog", "baseball bat"]),
    ("A fire truck is parked at a fire hydrant.", ["truck", "fire hydrant"]),
    ("Carpets, cattery, doggedly and 5dogs7.", ["dog"]),
    ("", []), ("Straße, 漢字 und İstanbul mit dog.", ["dog"])])
def test_what_a_text_names(ours, text, named):
    assert [m.name for m in ours.mentions(text)] == named


def test_places_are_those_of_the_text(ours):
    text = "İ Two Hot-Dogs near a\nbaseball  bat."
    assert [text[m.start:m.end] for m in ours.mentions(text)] == ["Hot-Dogs", "baseball  bat"]


def test_a_public_list(tmp_path):
    path = tmp_path / "synonyms.txt"
    path.write_text("\ufeffdog, puppy, hot rod \n\ncat,kitten,puppy\n", encoding="utf-8")
    words = read_words(str(path))
    assert words.classes == ["dog", "cat"]
    names = [m.name for m in words.mentions("puppies, kittens, hot rods, an orange cat")]
    assert names == ["dog", "cat", "dog", "cat"]
    path.write_text("- toy car\n")
    with pytest.raises(InputError, match="names no class"):
        read_words(str(path))


def test_the_tiny_world_names_the_same():
    """Another rule of the same words: tiny/world.py's, which knows no plural and no repeats."""
    words = list_of_words(NAMES)
    for text in ("The image shows a park with a kite, a ball and a dog.", "", "a cup a bowl carpet",
                 "The image shows a street with a person."):
        assert [m.name for m in words.mentions(text)] == hallucinated(text, [])


# ---- Annotations ---------------------------------------------------------------------------------

INSTANCES = {"images": [{"id": 7, "file_name": "COCO_val2014_000000000007.jpg"},
                        {"id": 8, "file_name": "val2014/COCO_val2014_000000000008.jpg"}],
             "categories": [{"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}],
             "annotations": [{"image_id": 7, "category_id": 90}, {"image_id": 7, "category_id": 1},
                             {"image_id": 7, "category_id": 1}]}
CAPTIONS = {"images": [], "annotations": [{"image_id": 8, "caption": "Two dogs eat a hot dog."},
                                          {"image_id": 7, "caption": "A man."},
                                          {"image_id": 9, "caption": "A cat."}]}


def written(folder, **values):
    for name, value in values.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return [str(folder / f"{name}.json") for name in values]


def test_annotations(tmp_path, ours):
    paths = written(tmp_path, instances=INSTANCES, captions=CAPTIONS)
    seven, eight = "COCO_val2014_000000000007.jpg", "COCO_val2014_000000000008.jpg"
    marked = {seven: {"person", "toothbrush"}, eight: set()}
    assert read_annotations(paths[:1], ours) == marked
    both = marked | {eight: {"dog", "hot dog"}}             # image 9 is known by captions only
    assert read_annotations(paths, ours) == read_annotations(paths[::-1], ours) == both


@pytest.mark.parametrize("change, fault", [
    ({"categories": [{"id": 1, "name": "unicorn"}]}, "unicorn.*--synonyms"),
    ({"annotations": [{"image_id": 7, "category_id": 5}]}, "row 0: image 7 or category 5"),
    ({"annotations": [{"image_id": 6, "category_id": 1}]}, "row 0: image 6 or category 1"),
    ({"annotations": [{"image_id": "7", "category_id": 1}]}, "row 0: 'image_id'"),
    ({"images": None}, "'images' should be list")])
def test_damaged_annotations(tmp_path, ours, change, fault):
    paths = written(tmp_path, instances=INSTANCES | change)
    assert_names_the_fault(lambda: read_annotations(paths, ours), "instances.json", fault)


def test_captions_alone_are_refused(tmp_path, ours):
    paths = written(tmp_path, captions=CAPTIONS)
    assert_names_the_fault(lambda: read_annotations(paths, ours), "captions.json", "instances_")
