"""Folders of images, in the layouts that people have on disk."""

import os
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from adadim_lightning.data import ImageData, image_folder
from tests.data.pictures import pixels, views, write

SYNSETS = ["n01440764", "n01443537", "n02119789"]


def load(root: Path, **options) -> ImageData:
    return image_folder(root, **{"views": views(), "image_size": 12, "batch_size": 2, **options})


def fill(folder: Path, classes: list[str] | dict[str, int], each: int = 4, ending: str = ".png") -> None:
    """Class folders of a few images, all different."""
    counts = classes if isinstance(classes, dict) else dict.fromkeys(classes, each)
    for name, count in counts.items():
        for i in range(count):
            write(folder / name / f"{name}_{i}{ending}", hash_of(f"{folder.name}{name}{i}"))


def hash_of(text: str) -> int:
    return sum((i + 1) * ord(x) for i, x in enumerate(text))


def contents(images) -> dict[str, str | None]:
    """Class of each image, by the pixels, which are read by their seed."""
    classes = [None if label < 0 else images.classes[label] for label in images.labels.tolist()]
    return {Path(name).name: label for name, label in zip(images.names, classes, strict=True)}


def by_names(images) -> bool:
    """Whether the class of each image is that of its name."""
    return all(name.rpartition("_")[0] == label for name, label in contents(images).items())


def test_class_folders_at_the_root_are_split_by_class(tmp_path) -> None:
    fill(tmp_path, {"dog": 20, "cat": 10, "empty": 0})
    (tmp_path / "empty").mkdir()
    with pytest.warns(UserWarning, match=r"folders without an image are left out: .*empty$"):
        data = load(tmp_path, held_out=0.2)
    (tmp_path / "empty").rmdir()
    assert data.test is not None
    assert data.train.classes == data.test.classes == ["cat", "dog"]
    assert (data.train.labels.bincount().tolist(), data.test.labels.bincount().tolist()) == ([8, 16], [2, 4])
    assert by_names(data.train)
    assert by_names(data.test)
    assert set(contents(data.train)).isdisjoint(contents(data.test))
    again = load(tmp_path, held_out=0.2)
    assert again.test is not None
    assert again.test.names == data.test.names


def test_pixels_stay_with_their_classes(tmp_path) -> None:
    fill(tmp_path / "train", ["b", "a"])
    fill(tmp_path / "val", ["b"])
    for in_memory in (True, False):
        with pytest.warns(UserWarning, match=r"1 of 2 classes \(a\) have no held-out image, so they are not sc"):
            data = load(tmp_path, in_memory=in_memory)
        assert data.test is not None
        for folder, images in (("train", data.train), ("val", data.test)):
            for i, name in enumerate(images.names):
                expected = pixels(hash_of(folder + Path(name).stem.replace("_", "")))
                assert np.array_equal(images[i][0].permute(1, 2, 0).numpy(), expected)
                assert data.train.classes[images[i][1]] == Path(name).parent.name
    assert data.test.classes == ["a", "b"]  # numbered as in training, though it has no "a"


@pytest.mark.parametrize(
    ("train", "test"),
    [("train", "val"), ("train", "valid"), ("training", "validation"), ("Train", "Test"), ("TRAIN", "VAL")],
)
def test_the_usual_names_of_the_splits_are_known(train: str, test: str, tmp_path) -> None:
    fill(tmp_path / train, ["a", "b"], 5)
    fill(tmp_path / test, ["a", "b"], 3)
    data = load(tmp_path)
    assert data.test is not None
    assert (len(data.train), len(data.test)) == (10, 6)
    assert {Path(x).parents[1].name for x in data.test.names} == {test}


def test_a_training_folder_alone_is_split(tmp_path) -> None:
    fill(tmp_path / "train", ["a", "b"], 10)
    data = load(tmp_path)
    assert data.test is not None
    assert (len(data.train), len(data.test)) == (18, 2)


def test_cinic_10_has_three_splits_and_the_test_images_are_held_out(tmp_path) -> None:
    for split, each in (("train", 4), ("valid", 3), ("test", 2)):
        fill(tmp_path / split, ["airplane", "bird"], each)
    data = load(tmp_path, test_folder="test")
    assert data.test is not None
    assert (len(data.train), len(data.test)) == (8, 4)
    default = load(tmp_path).test
    assert default is not None
    assert len(default) == 6


@pytest.mark.parametrize("nested", [False, True])
def test_images_without_classes_are_trained_on_without_a_held_out_part(nested: bool, tmp_path) -> None:
    for i in range(6):
        write(tmp_path / ("images" if nested else ".") / f"{i}.png", i)
    data = load(tmp_path)
    assert len(data.train) == 6
    assert data.test is None
    assert not data.is_labeled
    assert data.num_classes is None
    assert data.val_dataloader() == []


def test_labeled_says_whether_folders_are_classes(tmp_path) -> None:
    fill(tmp_path / "many", ["a", "b"])
    assert load(tmp_path / "many", labeled=False).num_classes is None
    fill(tmp_path / "one", ["a"])
    assert load(tmp_path / "one").num_classes is None
    assert load(tmp_path / "one", labeled=True).num_classes == 1
    write(tmp_path / "many" / "loose.png")
    with pytest.warns(UserWarning, match=r"no classes: images lie beside the folders, such as .*loose\.png; move"):
        assert load(tmp_path / "many").num_classes is None
    with pytest.raises(ValueError, match=r"labeled=true.*loose\.png does not"):
        load(tmp_path / "many", labeled=True)


def test_a_test_folder_without_classes_does_not_take_the_place_of_the_held_out_part(tmp_path) -> None:
    fill(tmp_path / "train", ["cat", "dog"], 10)
    write(tmp_path / "test" / "1.png")
    with pytest.warns(UserWarning, match=r"test is left out: nothing tells the classes of its images"):
        data = load(tmp_path)
    assert data.test is not None
    assert data.is_labeled
    assert len(data.test) == 2
    with (
        pytest.warns(UserWarning, match=r"test is left out"),
        pytest.raises(ValueError, match=r"nothing tells the classes of the images in .*test"),
    ):
        load(tmp_path, test_folder="test")


def test_what_is_left_out_is_said(tmp_path) -> None:
    fill(tmp_path / "train", ["cat", "dog"], 5)
    fill(tmp_path / "val", ["cat", "dog"], 2)
    for name in ("train/cat/1.npy", "train/cat/2.npy", "train/dog/x.HEIC", "train/dog/notes.txt", "val/dog/y.dcm"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "train" / "again").symlink_to(tmp_path / "train" / "cat")
    write(tmp_path / "unlabeled" / "deep" / "1.png")
    (tmp_path / "notes").mkdir()
    with pytest.warns(UserWarning, match="left out") as caught:
        data = load(tmp_path)
    said = [str(x.message) for x in caught]
    assert len(data.train) == 10
    assert data.train.classes == ["cat", "dog"]
    assert len(said) == 4
    assert "left out are images outside the folders for training and held-out ones" in said[0]
    assert said[0].endswith("unlabeled")
    assert "train: files that are not read: 1 .heic, 2 .npy; images end in .avif" in said[1]
    assert said[2].startswith("folders that lead where another has led are left out: ")
    assert "val: files that are not read: 1 .dcm; " in said[3]
    flat = tmp_path / "flat"
    for name in ("train/1.png", "train/2.png", "val/3.png"):
        write(flat / name)
    with pytest.warns(UserWarning, match=r"val is left out: without classes in .*train nothing is scored"):
        assert load(flat).test is None
    fill(tmp_path / "single", ["a", "b"], 1)
    with pytest.warns(UserWarning, match=r"each class has one image, so none is held out and nothing can be"):
        assert load(tmp_path / "single").test is None


def test_a_line_break_in_a_name_leaves_a_message_in_one_line(tmp_path) -> None:
    fill(tmp_path, ["a", "b\nc\x1b[2J"], 10)
    (tmp_path / "a" / "bad\nname.png").write_bytes(b"oops")
    (tmp_path / "a" / "odd.x\ny").write_bytes(b"oops")
    (tmp_path / "no\nthing").mkdir()
    with pytest.warns(UserWarning, match="left out") as caught:
        data = load(tmp_path)
    said = [str(x.message) for x in caught]
    assert len(said) == 3
    assert all(x.isprintable() for x in said)
    assert any(r"bad\nname.png; left out" in x for x in said)
    assert data.train.classes == ["a", "b\nc\x1b[2J"]
    with pytest.warns(UserWarning, match="left out"), pytest.raises(ValueError, match=r"bad\\nname\.png") as error:
        load(tmp_path, max_unreadable=0)
    assert str(error.value).isprintable()


def tiny_imagenet(root: Path) -> None:
    """As it is unpacked."""
    for synset in SYNSETS:
        for i in range(4):
            write(root / "train" / synset / "images" / f"{synset}_{i}.JPEG", hash_of(f"{synset}{i}"))
        (root / "train" / synset / f"{synset}_boxes.txt").write_text(f"{synset}_0.JPEG\t0\t0\t62\t62\n")
    rows = []
    for i in range(6):
        write(root / "val" / "images" / f"val_{i}.JPEG", i)
        rows.append(f"val_{i}.JPEG\t{SYNSETS[-i % 3]}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(rows))
    for i in range(3):
        write(root / "test" / "images" / f"test_{i}.JPEG", i)
    (root / "wnids.txt").write_text("\n".join(reversed(SYNSETS)))
    (root / "words.txt").write_text("n01440764\ttench\n")


def test_tiny_imagenet_as_it_is_unpacked(tmp_path) -> None:
    tiny_imagenet(tmp_path)
    data = load(tmp_path)
    assert data.test is not None
    assert data.train.classes == SYNSETS
    assert (len(data.train), len(data.test)) == (12, 6)
    assert by_names(data.train)
    assert contents(data.test) == {f"val_{i}.JPEG": SYNSETS[-i % 3] for i in range(6)}


def test_tiny_imagenet_with_its_validation_images_sorted(tmp_path) -> None:
    tiny_imagenet(tmp_path)
    for i in range(6):
        target = tmp_path / "val" / SYNSETS[-i % 3] / "images" / f"val_{i}.JPEG"
        target.parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "val" / "images" / f"val_{i}.JPEG").rename(target)
    (tmp_path / "val" / "images").rmdir()
    data = load(tmp_path)
    assert data.test is not None
    assert contents(data.test) == {f"val_{i}.JPEG": SYNSETS[-i % 3] for i in range(6)}


def test_an_image_that_the_annotations_lack_is_named(tmp_path) -> None:
    tiny_imagenet(tmp_path)
    write(tmp_path / "val" / "images" / "val_9.JPEG", 9)
    with pytest.raises(ValueError, match=r"val_9.JPEG is not in the list of classes, .*val_annotations.txt"):
        load(tmp_path)


VALIDATION = {f"ILSVRC2012_val_{i:08d}": SYNSETS[i * 2 % 3] for i in range(1, 7)}


def imagenet_train(folder: Path) -> None:
    fill(folder, SYNSETS, 4, ".JPEG")


def test_imagenet_sorted_into_folders(tmp_path) -> None:
    imagenet_train(tmp_path / "train")
    for name, synset in VALIDATION.items():
        write(tmp_path / "val" / synset / f"{name}.JPEG")
    data = load(tmp_path)
    assert data.test is not None
    assert contents(data.test) == {f"{name}.JPEG": synset for name, synset in VALIDATION.items()}


@pytest.mark.parametrize("below", ["", "ILSVRC", "ILSVRC/Data/CLS-LOC"])
def test_imagenet_as_it_is_on_kaggle(below: str, tmp_path) -> None:
    base = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    imagenet_train(base / "train")
    for name in VALIDATION:
        write(base / "val" / f"{name}.JPEG")
        write(base / "test" / f"{name.replace('val', 'test')}.JPEG")
    rows = [f"{name},{synset} 111 108 441 193 {synset} 1 2 3 4" for name, synset in VALIDATION.items()]
    (tmp_path / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "\n".join(rows) + "\n")
    data = load(tmp_path / below)
    assert data.test is not None
    assert len(data.train) == 12
    assert contents(data.test) == {f"{name}.JPEG": synset for name, synset in VALIDATION.items()}


@pytest.mark.parametrize("kit", ["ILSVRC2012_devkit_t12/data", "data"])
def test_imagenet_with_the_development_kit(kit: str, tmp_path) -> None:
    imagenet_train(tmp_path / "train")
    for name in VALIDATION:
        write(tmp_path / "val" / f"{name}.JPEG")
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    numbers = {SYNSETS[0]: 3, SYNSETS[1]: 1, SYNSETS[2]: 2, "n00001740": 1001}
    rows = np.array([(number, name, "a word", 0) for name, number in numbers.items()], dtype=fields)
    (tmp_path / kit).mkdir(parents=True)
    savemat(tmp_path / kit / "meta.mat", {"synsets": rows[:, None]})
    truth = "\n".join(str(numbers[synset]) for synset in VALIDATION.values())
    (tmp_path / kit / "ILSVRC2012_validation_ground_truth.txt").write_text(truth + "\n")
    data = load(tmp_path)
    assert data.test is not None
    assert contents(data.test) == {f"{name}.JPEG": synset for name, synset in VALIDATION.items()}


def test_imagenet_100_as_it_is_on_kaggle(tmp_path) -> None:
    for part, synset in zip(("X1", "X2", "X4"), SYNSETS, strict=True):
        fill(tmp_path / f"train.{part}", [synset], 4, ".JPEG")
    fill(tmp_path / "val.X", SYNSETS, 2, ".JPEG")
    (tmp_path / "Labels.json").write_text("{}")
    data = load(tmp_path)
    assert data.test is not None
    assert data.train.classes == SYNSETS
    assert (len(data.train), len(data.test)) == (12, 6)
    assert by_names(data.train)
    assert by_names(data.test)


@pytest.mark.parametrize("line", ["{}", "{} tench, Tinca tinca", "{},tench", "{}: tench"])
def test_a_list_of_classes_takes_a_part_of_imagenet(line: str, tmp_path) -> None:
    imagenet_train(tmp_path / "train")
    fill(tmp_path / "val", SYNSETS, 2, ".JPEG")
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(line.format(x) for x in (SYNSETS[2], SYNSETS[0])) + "\n\n")
    data = load(tmp_path, classes=str(listed))
    assert data.test is not None
    assert data.train.classes == [SYNSETS[0], SYNSETS[2]]
    assert (len(data.train), len(data.test)) == (8, 4)
    assert by_names(data.train)
    assert by_names(data.test)


def test_a_list_of_classes_works_with_annotated_images(tmp_path) -> None:
    tiny_imagenet(tmp_path)
    data = load(tmp_path, classes=SYNSETS[:2])
    assert data.test is not None
    assert set(contents(data.test).values()) == set(SYNSETS[:2])
    assert len(data.test) == 4


def test_names_of_classes_may_have_spaces_and_be_numbers(tmp_path) -> None:
    fill(tmp_path, ["golden retriever", "golden", "1"], 6)
    listed = tmp_path / "list.txt"
    listed.write_text("golden retriever\n1\n")
    assert load(tmp_path, classes=listed).train.classes == ["1", "golden retriever"]
    assert load(tmp_path, classes=[1, "golden"]).train.classes == ["1", "golden"]


def test_classes_that_are_not_there_are_named(tmp_path) -> None:
    fill(tmp_path, ["a", "b"])
    with pytest.raises(ValueError, match=r"no image of 1 of the classes: c$"):
        load(tmp_path, classes=["a", "c"])
    with pytest.raises(ValueError, match=r"list of classes cannot be read: .*nowhere"):
        load(tmp_path, classes="nowhere.txt")
    write(tmp_path / "flat" / "1.png")
    with pytest.raises(ValueError, match=r"data.classes is given, but .*flat has no class folders"):
        load(tmp_path / "flat", classes=["a"])


def test_a_class_that_training_lacks_is_named(tmp_path) -> None:
    fill(tmp_path / "train", ["a", "b"])
    fill(tmp_path / "val", ["a", "new"])
    with pytest.raises(ValueError, match=r"val has images of the class 'new', of which .*train has none"):
        load(tmp_path)


def test_what_is_no_image_and_what_is_hidden_does_not_count(tmp_path) -> None:
    fill(tmp_path, ["a", "b"])
    for name in ("a/._a_0.png", "a/.DS_Store", "b/Thumbs.db", "b/notes.txt", ".git/x.png", "__MACOSX/a/._a_0.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"junk")
    data = load(tmp_path, held_out=0.0)
    assert data.train.classes == ["a", "b"]
    assert len(data.train) == 8
    assert data.test is None


def test_endings_in_capitals_and_names_of_any_script_are_read(tmp_path) -> None:
    for name in ("größe/ein bild.PNG", "größe/二.Jpg", "猫/a b (1).JPEG", "猫/x.tiff"):
        write(tmp_path / name, hash_of(name))
    data = load(tmp_path, held_out=0.0)
    assert data.train.classes == ["größe", "猫"]
    found = {Path(x).name for x in data.train.names}
    assert found == {"ein bild.PNG", "二.Jpg", "a b (1).JPEG", "x.tiff"}


def test_links_are_followed_and_one_that_leads_back_ends(tmp_path) -> None:
    fill(tmp_path / "store", ["a", "b"])
    root = tmp_path / "root"
    root.mkdir()
    for name in ("a", "b"):
        (root / name).symlink_to(tmp_path / "store" / name)
    (tmp_path / "store" / "a" / "up").symlink_to(root)
    (tmp_path / "store" / "b" / "up").symlink_to(root)
    (root / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.warns(UserWarning, match=r"1 of 9 images cannot be read: .*gone.png"):
        data = load(root, held_out=0.0)
    assert sorted(Path(x).name for x in data.train.names) == sorted(f"{x}_{i}.png" for x in "ab" for i in range(4))
    assert int(data.train.labels.bincount()[0]) == 4


def test_a_damaged_image_is_left_out_with_a_warning(tmp_path) -> None:
    fill(tmp_path, ["a", "b"], 10)
    (tmp_path / "a" / "a_3.png").write_bytes(b"oops")
    with pytest.warns(UserWarning, match=r"1 of 18 images cannot be read: .*a_3.png; left out"):
        data = load(tmp_path)
    assert len(data.train) == 17


def test_mistakes_are_one_line_that_names_the_fix(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere; set data.root"):
        load(tmp_path / "nowhere")
    (tmp_path / "readme.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"no image is in .*names of images end in"):
        load(tmp_path)
    fill(tmp_path, ["a", "b"])
    with pytest.raises(ValueError, match=r"there is no folder .*missing"):
        load(tmp_path, train_folder="missing")
    with pytest.raises(ValueError, match=r"there is no folder .*missing"):
        load(tmp_path, test_folder="missing")
    with pytest.raises(ValueError, match=r"channels must be 1"):
        load(tmp_path, channels=4)
    with pytest.raises(ValueError, match=r"held_out must lie in"):
        load(tmp_path, held_out=1.5)
    with pytest.raises(ValueError, match=r"held_out=8 cannot leave an image of each of 2 classes"):
        load(tmp_path, held_out=8)


def test_a_folder_train_that_may_be_a_class_is_asked_about(tmp_path) -> None:
    fill(tmp_path, ["train", "plane"])
    with pytest.raises(
        ValueError, match=r"may hold the training images, or a class beside plane: set data.train_f"
    ):
        load(tmp_path)
    assert load(tmp_path, train_folder=".").train.classes == ["plane", "train"]
    assert len(load(tmp_path, train_folder="train").train) == 4


def test_other_names_of_folders_are_given(tmp_path) -> None:
    fill(tmp_path / "seg_train", ["a", "b"])
    fill(tmp_path / "seg_test", ["a", "b"], 2)
    data = load(tmp_path, train_folder="seg_train", test_folder="seg_test")
    assert data.test is not None
    assert (len(data.train), len(data.test)) == (8, 4)


def test_the_title_is_the_name_of_the_folder(tmp_path, monkeypatch) -> None:
    fill(tmp_path / "cats", ["a", "b"])
    monkeypatch.chdir(tmp_path / "cats")
    assert str(load(Path("."))).startswith("cats: ")
    assert os.fspath(tmp_path) not in str(load(Path(".")))
